"""Pairs that were exchanged are found, whatever their share; what is said of a pair is what a slow reference says."""

import csv

import numpy as np
import pytest

from twofold.cli import main
from twofold.data.samples import openmoji
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.measure.pair_audit import Pairs, alike, folds, held_out, judge, made, neighbourly, oddities, siblings, unit
from twofold.train.align import Recipe
from twofold.train.pairs import audit_pairs
from twofold.train.weights import read_weights


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def test_folds_keep_groups_together_and_are_about_equal(draw):
    group = draw.permutation(np.repeat(np.arange(40), 5))
    fold = folds(group, 4, draw)
    assert all(len(set(fold[group == one])) == 1 for one in range(40))
    assert np.bincount([fold[group == one][0] for one in np.unique(group)]).tolist() == [10] * 4
    with pytest.raises(DataError, match="do not make 4 folds"):
        folds(np.array([1, 1, 2, 2]), 4, draw)


def test_made_pairs_are_wrong_and_of_the_same_items(draw):
    owner = np.repeat(np.arange(6), 2)
    given = Pairs(owner, np.arange(12)).take(np.flatnonzero(owner >= 3))
    fake = made(given, owner, draw)
    assert (fake.item != owner[fake.row]).all() and set(fake.item) <= {3, 4, 5}
    assert (fake.row == given.row).all()
    with pytest.raises(DataError, match="two items"):
        made(given.take(np.arange(2)), owner, draw)


def test_held_out_evidence_against_a_slow_reference(draw):
    first, second = (
        unit(draw.normal(size=(7, 5))).astype(np.float64),
        unit(draw.normal(size=(11, 5))).astype(np.float64),
    )
    pairs = Pairs(draw.integers(0, 7, 20), draw.integers(0, 11, 20))
    found = held_out(first, second, pairs)
    table = first @ second.T
    for p, (i, j) in enumerate(zip(pairs.item, pairs.row, strict=True)):
        assert found.cosine[p] == pytest.approx(table[i, j])
        assert found.rarity_first[p] == pytest.approx((table[i, j] - table[i].mean()) / table[i].std())
        assert found.rarity_second[p] == pytest.approx((table[i, j] - table[:, j].mean()) / table[:, j].std())
        assert found.rank[p] == 1 + (table[i] > table[i, j]).sum()
        assert found.rank_back[p] == 1 + (table[:, j] > table[i, j]).sum()


def test_neighbours_agree_where_what_is_alike_has_texts_alike(draw):
    topic = np.repeat(np.arange(4), 25)
    near = unit(np.eye(4)[topic] + 0.1 * draw.normal(size=(100, 4)))
    owner = np.repeat(np.arange(100), 2)
    judged = unit(np.eye(4)[topic[owner]] + 0.3 * draw.normal(size=(200, 4)))
    right = neighbourly(near, judged, owner, Pairs(owner, np.arange(200)), draw)
    other = (owner + 25) % 100
    wrong = neighbourly(near, judged, owner, Pairs(other, np.arange(200)), draw)
    assert np.quantile(right, 0.05) > np.quantile(wrong, 0.95)


def test_an_items_own_rows_have_no_say_in_what_its_neighbours_say(draw):
    near, owner = unit(draw.normal(size=(30, 4))), np.arange(30)
    judged = unit(draw.normal(size=(30, 3)))
    pair = Pairs(np.array([4]), np.array([9]))
    before = neighbourly(near, judged, owner, pair, np.random.default_rng(1))
    judged[4] = judged[9]  # a perfect match, at the pair's own item
    assert neighbourly(near, judged, owner, pair, np.random.default_rng(1)) == pytest.approx(before, abs=0.2)
    group = np.zeros(30, int)
    assert neighbourly(near, judged, owner, pair, draw, group=group).shape == (1,)  # nobody may speak


def test_siblings_by_hand():
    judged = unit(np.array([[1, 0], [1, 0], [0, 1], [1, 1], [1, 0]]))
    owner = np.array([0, 0, 0, 1, 2])
    found = siblings(judged, owner, Pairs(np.array([0, 0, 1]), np.array([0, 2, 3])))
    assert found[:2] == pytest.approx([0.5, 0.0]) and np.isnan(found[2])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5])
def test_the_share_of_wrong_pairs_is_recovered(draw, share):
    n = 4000
    wrong = draw.random(n) < share
    given = {"a": np.where(wrong, draw.normal(size=n), draw.normal(3, 1, n)), "b": np.full(n, np.nan)}
    fake = {"a": draw.normal(size=n), "b": np.full(n, np.nan)}
    judged = judge(given, fake)
    assert judged.noise.value == pytest.approx(share, abs=0.03)
    assert list(judged.weights) == ["a"] and judged.weights["a"] > 0
    assert judged.wrong.mean() == pytest.approx(share, abs=0.05)  # the probabilities add up
    if share:
        assert judged.wrong[wrong].mean() > 5 * judged.wrong[~wrong].mean()


def test_oddities_are_named():
    texts = [f"a picture of thing number {n}" for n in range(100)]
    strange = ["", "  ", "12345 67890 !!!", "картина собаки на пляже", "x", "word " * 2000]
    found = oddities(texts + strange)
    assert found[:100] == [""] * 100
    assert found[100:102] == ["blank", "blank"] and found[102] == "hardly any letters"
    assert found[103] == "in Cyrillic script, unlike the others"
    assert found[104].startswith("1 characters") and found[105].startswith("9,999 characters")
    assert oddities([]) == []


def test_rows_that_are_alike_are_listed_once(draw):
    rows = unit(draw.normal(size=(50, 16)))
    rows[7] = rows[31]
    assert alike(rows) == [(7, 31, pytest.approx(1, abs=1e-3))]


def exchanged(seed: int = 0) -> tuple[Source, set[str]]:
    """Six hundred emoji as vectors that say what their name says, a fifth of them with the name of another."""
    emoji = openmoji().take(range(0, 4400, 7))
    names = {text[0] for text in emoji.texts}
    emoji = emoji.take(
        [item for item, text in enumerate(emoji.texts) if text[0] in names and not names.discard(text[0])]
    )
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(emoji))[: len(emoji) // 5]
    texts = [list(own[:1]) for own in emoji.texts]
    for one, other in zip(chosen, np.roll(chosen, 1), strict=True):
        texts[one] = [emoji.texts[other][0]]
    words = [
        [f"{group}, {subgroup}: {text[0]}"]
        for group, subgroup, text in zip(emoji.meta["group"], emoji.meta["subgroup"], emoji.texts, strict=True)
    ]
    return (
        Source("exchanged", emoji.ids, texts=texts, columns={"about": type(emoji.column("text"))("text", words)}),
        {emoji.ids[one] for one in chosen},
    )


def test_exchanged_names_are_found_between_two_kinds_of_text(tmp_path):
    source, wrong = exchanged()
    audit = audit_pairs(
        source,
        out=tmp_path,
        towers={"about": "minilm", "text": "minilm"},
        recipe=Recipe(epochs=3, hidden=0),
        folds=2,
        quiet=True,
    )
    right = np.array([pair.id in wrong for pair in audit.pairs])
    precision = (np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean()
    assert precision > 0.9
    assert audit.noise.value == pytest.approx(0.2, abs=0.06)
    assert all(pair.reasons for pair in audit.pairs[:50])
    again = audit_pairs(
        source,
        out=tmp_path,
        towers={"about": "minilm", "text": "minilm"},
        recipe=Recipe(epochs=3, hidden=0),
        folds=2,
        quiet=True,
    )
    assert again.pairs == audit.pairs


def test_it_refuses_what_it_cannot_judge(tmp_path):
    source, _ = exchanged()
    with pytest.raises(UsageError, match="at least 2"):
        audit_pairs(source, out=tmp_path, folds=1)
    with pytest.raises(DataError, match="has no image"):
        audit_pairs(source, out=tmp_path)


def test_the_command_writes_a_table_that_align_reads_and_a_page(tmp_path, capsys):
    rows = ["image,text"]
    emoji = openmoji().take(range(0, 4400, 60))
    for id, image, text in zip(emoji.ids, emoji.images, emoji.texts, strict=True):
        (tmp_path / f"{id}.png").write_bytes(image)
        rows.append(f'{id}.png,"{text[0]}"')
    rows.append(f"{emoji.ids[0]}.png,12345 67890")
    data = tmp_path / "emoji.csv"
    data.write_text("\n".join(rows) + "\n")
    assert main(["pairs", str(data), "--out", str(tmp_path / "audit"), "--folds", "2", "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "do not belong together" in said and "--weights" in said
    with (tmp_path / "audit" / "pairs.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(emoji) + 1
    assert [float(row["wrong"]) for row in table] == sorted((float(row["wrong"]) for row in table), reverse=True)
    assert "hardly any letters" in next(row["reasons"] for row in table if row["text"] == "12345 67890")
    weights = read_weights(tmp_path / "audit" / "pairs.csv")
    assert len(weights.texts) == len(table)
    page = (tmp_path / "audit" / "pairs.html").read_text()
    assert "data:image/webp" in page and "http" not in page
