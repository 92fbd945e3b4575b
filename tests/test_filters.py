"""A filter means the same in words, as a mapping and to every store, and one that means nothing says what is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.errors import UsageError
from twofold.retrieve.filters import columns_of, compiled, matches, parse_where
from twofold.retrieve.store import ChromaStore

ROWS = [
    {"group": "food", "year": 2024, "tall": True},
    {"group": "Food and drink", "year": 2025.5, "tall": False},
    {"group": "animals", "year": "2024"},
    {"group": "cat (domestic)", "year": 1},
    {"name": 'a "b", c', "year": -3},
    {},
]
WORDS = {
    "year=2024": {0, 2},
    'year="2024"': {2},
    "year!=2024": {1, 3, 4, 5},
    "year>=1": {0, 1, 3},
    "year > 1 and year <= 2024": {0},
    "not year>1": {3, 4},
    "group=food or year<0": {0, 4},
    "group = Food": set(),
    'group="Food and drink"': {1},
    "group='Food and drink' or group=animals": {1, 2},
    "group=cat (domestic)": {3},
    "group in (food, animals)": {0, 2},
    'group not in (food, "Food and drink")': {2, 3, 4, 5},
    "not (group=food or group=animals)": {1, 3, 4, 5},
    "not (group!=food and tall!=false)": {0, 1},
    "(group=food or group=animals) and not tall=true": {2},
    r'name="a \"b\", c"': {4},
    "tall=true": {0},
    "group in (food) AND year IN (1, 2024)": {0},
}


@pytest.fixture(scope="module")
def chroma(tmp_path_factory):
    store = ChromaStore(tmp_path_factory.mktemp("store"), fingerprint="f", dim=4, write=True)
    store.upsert([str(n) for n in range(len(ROWS))], np.random.default_rng(0).normal(size=(len(ROWS), 4)), ROWS)
    yield store
    store.close()


@pytest.mark.parametrize("words", WORDS)
def test_words_select_what_they_say(words, chroma):
    where = parse_where([words])
    assert {n for n, row in enumerate(ROWS) if matches(compiled(where), row)} == WORDS[words]
    assert {int(hit.id) for hit in chroma.query(np.ones(4), 10, where)} == WORDS[words]


def test_terms_hold_together_and_values_of_one_column_are_a_choice():
    assert parse_where(["group=a", "group=b"]) == {"group": {"$in": ["a", "b"]}}
    rule = compiled(parse_where(["group=food", "group=animals", "year>2000"]))
    assert [n for n, row in enumerate(ROWS) if matches(rule, row)] == [0]
    assert columns_of(rule) == {"group", "year"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("group", "'nothing' stands"),
        ("=food", "'=food' stands"),
        ("", "'nothing' stands"),
        ("group=", "a value is missing"),
        ("group=Food and drink", "'drink'|'nothing' stands"),
        ("taken>=2024-05-01", ">= compares numbers, and '2024-05-01' is none"),
        ("(group=a", "not closed"),
        ("group in (a, b", "not closed"),
        ("group in a", "in parentheses"),
        ("year>nan", "compares numbers"),
    ],
)
def test_words_that_mean_nothing_say_where(words, said):
    with pytest.raises(UsageError, match=r"column=value.*in .*" + said + ".* quotes"):
        parse_where([words])


@pytest.mark.parametrize(
    "where",
    [{"$and": []}, {"$or": {}}, {"a": {}}, {"a": {"$regex": "x"}}, {"a": {"$gt": "x"}}, {"a": {"$in": "x"}}, []],
)
def test_mappings_that_mean_nothing_are_refused(where):
    with pytest.raises(UsageError):
        compiled(where or [1])


CONDITIONS = st.one_of(
    st.tuples(
        st.sampled_from("xy"), st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), st.sampled_from([0, 1, 1.5, -0.5])
    ),
    st.tuples(st.sampled_from("xy"), st.sampled_from(["$in", "$nin"]), st.lists(st.sampled_from([0, 1, "1", True]))),
).map(lambda one: {one[0]: {one[1]: one[2]}})
TREES = st.recursive(
    CONDITIONS,
    lambda below: st.one_of(
        st.lists(below, min_size=1, max_size=3).map(lambda parts: {"$and": parts}),
        st.lists(below, min_size=1, max_size=3).map(lambda parts: {"$or": parts}),
        below.map(lambda part: {"$not": part}),
    ),
    max_leaves=6,
)
SMALL = [{}, {"x": 0}, {"x": 1.0}, {"x": "1", "y": True}, {"y": 2}, {"x": 1, "y": 0}]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    store = ChromaStore(tmp_path_factory.mktemp("small"), fingerprint="f", dim=2, write=True)
    store.upsert([str(n) for n in range(len(SMALL))], np.random.default_rng(0).normal(size=(len(SMALL), 2)), SMALL)
    yield store
    store.close()


def test_chroma_selects_what_the_rule_selects(small):
    @settings(max_examples=60, deadline=None)
    @given(TREES)
    def same(where):
        expected = {n for n, row in enumerate(SMALL) if matches(compiled(where), row)}
        assert {int(hit.id) for hit in small.query(np.ones(2), 10, where)} == expected
        both = matches(compiled({"$not": {"$not": where}}), SMALL[1])
        assert both == matches(compiled(where), SMALL[1])

    same()
