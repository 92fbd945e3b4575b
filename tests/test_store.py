"""Every store keeps what a dictionary would keep, and finds what comparing with everything would find."""

import atexit
import contextlib
import functools
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from twofold.errors import FingerprintMismatch, StoreError, UsageError
from twofold.retrieve.filters import parse_where
from twofold.retrieve.qdrant import QdrantStore
from twofold.retrieve.store import ChromaServerStore, ChromaStore, ExactStore, Hit, scalars

STORES = {
    "exact": lambda path, dim: ExactStore(fingerprint="f", dim=dim),
    "matrix": lambda path, dim: ExactStore(fingerprint="f", dim=dim, path=path, write=True),
    "chroma": lambda path, dim: ChromaStore(path, fingerprint="f", dim=dim, write=True),
    "chroma server": lambda path, dim: ChromaServerStore(
        server(), f"test-{secrets.token_hex(8)}", fingerprint="f", dim=dim, write=True
    ),
    "qdrant": lambda path, dim: QdrantStore(str(path), "test", fingerprint="f", dim=dim, write=True),
}


@functools.cache
def server() -> str:
    """The URL of a Chroma server on a free port, the same for all tests; it ends with them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp()
    command = [Path(sys.executable).with_name("chroma"), "run", "--path", folder, "--host", "127.0.0.1"]
    running = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end() -> None:
        running.kill()
        running.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    raise AssertionError("chroma run did not start")


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    store = STORES[request.param](tmp_path / "store", 4)
    yield store
    store.close()


def cloud(n: int, dim: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def names(hits) -> list[str]:
    return [hit.id for hit in hits]


def fill(store, rows: list[dict], vectors: np.ndarray | None = None) -> list[str]:
    ids = [f"item{n}" for n in range(len(rows))]
    store.upsert(ids, cloud(len(rows), store.dim) if vectors is None else vectors, rows)
    return ids


def test_scores_are_cosines_by_hand(store):
    store.upsert(
        ["same", "half", "across", "against"],
        np.array([[3, 0, 0, 0], [1, 1, 0, 0], [0, 0, 5, 0], [-2, 0, 0, 0]]),
        [{"n": n} for n in range(4)],
    )
    hits = store.query(np.array([10, 0, 0, 0]), 4)
    assert names(hits) == ["same", "half", "across", "against"]
    assert [hit.score for hit in hits] == pytest.approx([1, 0.707107, 0, -1], abs=2e-6)
    assert [hit.meta for hit in hits] == [{"n": n} for n in range(4)]


def test_equal_scores_come_in_the_order_of_their_ids(store):
    store.upsert(["c", "a", "d", "b"], np.tile([0.3, 0.1, 0.7, 0.2], (4, 1)), [{}] * 4)
    assert names(store.query(np.array([1, 2, 3, 4]), 10)) == ["a", "b", "c", "d"]


def test_upsert_replaces_vector_and_metadata_as_a_whole(store):
    store.upsert(["a", "b"], np.eye(4)[:2], [{"x": 1, "gone": "yes"}, {}])
    store.upsert(["b", "a"], np.eye(4)[2:], [{"y": 2}, {"x": 3}])
    hit = store.query(np.eye(4)[3], 1)[0]
    assert hit == Hit("a", 1.0, {"x": 3})
    store.upsert(["a"], np.eye(4)[:1], [{}])
    assert store.query(np.eye(4)[0], 1)[0] == Hit("a", 1.0, {})
    assert len(store) == 2


def test_deleted_items_are_not_found_and_unknown_ids_are_ignored(store):
    ids = fill(store, [{}] * 5)
    store.delete([ids[1], "never there", ids[3]])
    store.delete([])
    assert store.ids() == ["item0", "item2", "item4"]
    assert set(names(store.query(cloud(1)[0], 10))) == {"item0", "item2", "item4"}


def test_vectors_come_back_in_the_order_asked_for_and_of_length_one(store):
    x = cloud(6) * 7
    ids = fill(store, [{}] * 6, x)
    order = [4, 0, 5]
    expected = x[order] / np.linalg.norm(x[order], axis=1, keepdims=True)
    np.testing.assert_allclose(store.vectors([ids[i] for i in order]), expected, atol=1e-6)
    assert store.vectors([]).shape == (0, 4)
    with pytest.raises(StoreError, match="'nobody'"):
        store.vectors(["item0", "nobody"])


def test_an_item_asked_for_twice_comes_twice(store):
    ids = fill(store, [{"n": n} for n in range(3)], cloud(3))
    twice = [ids[1], ids[0], ids[1]]
    np.testing.assert_array_equal(store.vectors(twice), np.stack([store.vectors([name])[0] for name in twice]))
    assert store.meta(twice) == [{"n": 1}, {"n": 0}, {"n": 1}]


def test_an_empty_store_answers(store):
    assert (len(store), store.ids(), store.query(np.ones(4), 3)) == (0, [], [])
    store.upsert([], np.empty((0, 4)), [])


FILTERED = [
    {"group": "food", "year": 2024, "tall": True},
    {"group": "food", "year": 2025.0, "tall": False},
    {"group": "animals", "year": "2024"},
    {"group": "animals", "year": 1, "tall": 1},
    {},
]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (None, {0, 1, 2, 3, 4}),
        ({}, {0, 1, 2, 3, 4}),
        ({"group": "food"}, {0, 1}),
        ({"group": "food", "year": 2024}, {0}),
        ({"group": {"$in": ["food", "animals"]}, "year": {"$in": [2025, 1]}}, {1, 3}),
        ({"year": 2025}, {1}),  # numbers by value: 2025 is 2025.0 …
        ({"year": {"$in": [2024, "2024"]}}, {0, 2}),  # … but not the text
        ({"year": {"$in": [1.0, 2024, "2024", True]}}, {0, 2, 3}),
        ({"tall": True}, {0}),
        ({"tall": 1}, {3}),
        ({"tall": np.float32(1)}, {3}),
        ({"group": {"$in": []}}, set()),
        ({"nothing": "x"}, set()),
        (parse_where(["year=2024"]), {0, 2}),
        (parse_where(["tall=true", "group=food"]), {0}),
        (parse_where(["group=food", "group=animals"]), {0, 1, 2, 3}),
    ],
)
def test_filters_select_the_same_items_in_every_store(store, where, found):
    fill(store, FILTERED)
    assert set(names(store.query(np.ones(4), 10, where))) == {f"item{n}" for n in found}


@pytest.mark.parametrize("where", [{"a": {"$near": 1}}, {"a": None}, {"a": [1, 2]}, {"$and": []}, {"": 1}])
def test_filters_that_mean_nothing_are_refused(store, where):
    with pytest.raises(UsageError):
        store.query(np.ones(4), 1, where)


@pytest.mark.parametrize("term", ["group", "=food", ""])
def test_a_filter_word_without_column_is_refused(term):
    with pytest.raises(UsageError, match="column=value"):
        parse_where([term])


def test_infinity_is_a_word_in_a_filter():
    assert parse_where(["name=infinity"]) == {"name": {"$in": ["infinity"]}}


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a", "a"], np.eye(4)[:2], "'a' comes twice"),
        (["a"], np.eye(4)[:2], "1 ids, 2 vectors"),
        (["a"], np.ones((1, 3)), r"\[1, 4\], got \[1, 3\]"),
        (["a"], np.zeros((1, 4)), "vector of a has no direction"),
        (["a"], np.full((1, 4), np.nan), "vector of a has no direction"),
        ([""], np.ones((1, 4)), "not empty"),
        (["caf\udce9"], np.ones((1, 4)), "UTF-8"),
    ],
)
def test_bad_items_are_named_and_nothing_is_kept(store, ids, vectors, message):
    with pytest.raises(StoreError, match=message):
        store.upsert(ids, vectors, [{}] * len(ids))
    assert len(store) == 0


def test_bad_queries_are_refused(store):
    with pytest.raises(UsageError, match="k must be at least 1, got 0"):
        store.query(np.ones(4), 0)
    with pytest.raises(StoreError, match=r"\[4\], got \[5\]"):
        store.query(np.ones(5), 1)
    with pytest.raises(StoreError, match="the query has no direction"):
        store.query(np.zeros(4), 1)


def test_metadata_become_scalars():
    columns = {
        "text": "a", "none": None, "nan": float("nan"), "tags": ["x", "y"], "n": np.int64(3), "f": np.float32(0.5),
        "yes": np.bool_(True), "where": Path("a/b"), "huge": 2**63, "many": np.arange(3),
    }  # fmt: skip
    expected = {
        "text": "a", "tags": "x, y", "n": 3, "f": 0.5, "yes": True, "where": "a/b", "huge": str(2**63),
        "many": "0, 1, 2",
    }  # fmt: skip
    assert scalars(columns) == expected
    assert scalars({"chroma:document": 1, "": 2, "#": 3, "$in": 4}) == {
        "_chroma:document": 1, "_": 2, "_#": 3, "_$in": 4,
    }  # fmt: skip
    assert scalars({"file": "caf\udce9"}) == {"file": "caf\\udce9"}


def test_chroma_finds_what_the_exact_store_finds(tmp_path):
    x, queries = cloud(1500, 16), cloud(40, 16, seed=1)
    rows = [{"tenth": n % 10} for n in range(len(x))]
    exact = ExactStore(fingerprint="f", dim=16)
    ids = fill(exact, rows, x)
    chroma = ChromaStore(tmp_path, fingerprint="f", dim=16, write=True)
    for part in (slice(0, 700), slice(700, None)):
        chroma.upsert(ids[part], x[part], rows[part])
    for where in (None, {"tenth": 3}):
        found = [(exact.query(q, 10, where), chroma.query(q, 10, where)) for q in queries]
        assert np.mean([len({*names(a)} & {*names(b)}) / 10 for a, b in found]) > 0.98
        for a, b in found:
            shared = {hit.id: hit.score for hit in a}
            assert all(hit.score == pytest.approx(shared[hit.id], abs=2e-6) for hit in b if hit.id in shared)
    chroma.close()


def is_one(value) -> bool:
    return value == 1 and value is not True


def said_one(value) -> bool:
    return is_one(value) or value == "1"


FILTERS = [
    (None, lambda row: True),
    ({"x": "1"}, lambda row: row.get("x") == "1"),
    ({"x": 1}, lambda row: row.get("x") == 1 and row["x"] is not True),
    ({"y": {"$in": [2.5, False]}}, lambda row: row.get("y") in (2.5, False)),  # no 0 among the values
    ({"x": True, "y": "1"}, lambda row: row.get("x") is True and row.get("y") == "1"),
    ({"x": {"$gte": 2}}, lambda row: row.get("x") == 2.5),
    (
        {"$or": [{"x": {"$nin": [1, "1"]}}, {"y": {"$lt": 2}}]},
        lambda row: not said_one(row.get("x")) or is_one(row.get("y")),
    ),
]


class Dictionary(RuleBasedStateMachine):
    """A store next to a dictionary: id → (vector, metadata)."""

    make = None  # set by the test

    ids = st.sampled_from(["a", "b", "c", "é", "a b/c.jpg", "0"])
    rows = st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from([1, 2.5, "1", True, False]))
    vectors = st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any)

    def __init__(self):
        super().__init__()
        self.store, self.model = type(self).make(), {}

    @rule(items=st.dictionaries(ids, st.tuples(vectors, rows), min_size=1))
    def upsert(self, items):
        vectors, rows = zip(*items.values(), strict=True)
        self.store.upsert(list(items), np.array(vectors), rows)
        self.model.update(items)

    @rule(gone=st.sets(ids))
    def delete(self, gone):
        self.store.delete(sorted(gone))
        self.model = {name: item for name, item in self.model.items() if name not in gone}

    @rule(vector=vectors, k=st.integers(1, 7), rule=st.sampled_from(FILTERS))
    def query(self, vector, k, rule):
        where, fits = rule
        unit = np.array(vector) / np.linalg.norm(vector)
        expected = {
            name: unit @ other / np.linalg.norm(other) for name, (other, row) in self.model.items() if fits(row)
        }
        hits = self.store.query(np.array(vector), k, where)
        assert [hit.score for hit in hits] == pytest.approx(sorted(expected.values(), reverse=True)[:k], abs=2e-6)
        assert [hit.score for hit in hits] == pytest.approx([expected[hit.id] for hit in hits], abs=2e-6)
        assert [hit.meta for hit in hits] == [self.model[hit.id][1] for hit in hits]
        assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.id))

    @invariant()
    def the_same_items(self):
        assert len(self.store) == len(self.model)
        assert self.store.ids() == sorted(self.model)
        assert self.store.meta(list(self.model)) == [row for _, row in self.model.values()]

    def teardown(self):
        self.store.close()


@pytest.mark.parametrize("kind", STORES)
def test_a_store_behaves_like_a_dictionary(kind, tmp_path_factory):
    class Machine(Dictionary):
        make = staticmethod(lambda: STORES[kind](tmp_path_factory.mktemp("store"), 3))

    limits = settings(max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=limits)


# Chroma alone: the folder


def chroma(path: Path, **options) -> ChromaStore:
    return ChromaStore(path, **{"fingerprint": "f", "dim": 4, **options})


def filled(path: Path, n: int = 8) -> Path:
    store = chroma(path, write=True)
    fill(store, [{"n": n} for n in range(n)])
    store.close()
    return path


def test_a_store_opened_again_holds_what_it_held(tmp_path):
    filled(tmp_path)
    for store in [chroma(tmp_path), chroma(tmp_path)]:
        assert names(store.query(cloud(8)[3], 1)) == ["item3"]
        store.close()


def test_metric_telemetry_and_embedding_function_are_set_explicitly(tmp_path):
    store = chroma(tmp_path, write=True)
    assert store._items.configuration_json["hnsw"]["space"] == "cosine"
    assert store._items.configuration_json["embedding_function"] in (None, {"type": "legacy"})
    assert store._client.get_settings().anonymized_telemetry is False
    store.close()


def test_more_items_than_a_batch_holds(tmp_path):
    store = ChromaStore(tmp_path, fingerprint="f", dim=2, write=True)
    n = store._client.get_max_batch_size() + 10
    ids = fill(store, [{}] * n, cloud(n, 2))
    assert (len(store), store.ids(), len(store.vectors(ids))) == (n, sorted(ids), n)
    store.delete(ids[5:])
    assert store.ids() == ids[:5]
    store.close()


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"dim": 5}])
def test_another_encoder_is_refused(tmp_path, write, other):
    filled(tmp_path)
    with pytest.raises(FingerprintMismatch, match="embed the items"):
        chroma(tmp_path, write=write, **other)
    chroma(tmp_path, write=True).close()  # the refused one holds no lock


def test_a_reader_cannot_write(tmp_path):
    store = chroma(filled(tmp_path))
    for change in (lambda: store.upsert(["a"], np.ones((1, 4)), [{}]), lambda: store.delete(["item0"])):
        with pytest.raises(StoreError, match="write=True"):
            change()
    store.close()


def test_a_missing_folder_is_not_made_by_reading(tmp_path):
    with pytest.raises(StoreError, match="no Chroma store in"):
        chroma(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def only_folder(path: Path) -> Path:
    return next(entry for entry in path.iterdir() if entry.is_dir())


DAMAGE = {
    "not a database": lambda path: (path / "chroma.sqlite3").write_bytes(b"nonsense" * 999),
    "database cut short": lambda path: (path / "chroma.sqlite3").write_bytes(
        (path / "chroma.sqlite3").read_bytes()[:50_000]
    ),
    "database empty": lambda path: (path / "chroma.sqlite3").write_bytes(b""),
    "index cut short": lambda path: (only_folder(path) / "data_level0.bin").write_bytes(b"nonsense"),
    "index gone": lambda path: [file.unlink() for file in only_folder(path).iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_an_error_and_can_be_filled_again(tmp_path, damage):
    filled(tmp_path, 1200)  # past the 1000 from which on Chroma writes its index to disk
    DAMAGE[damage](tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"damaged.*[Dd]elete it"):
            chroma(tmp_path)
    for file in sorted(tmp_path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    store = chroma(filled(tmp_path))
    assert len(store) == 8
    store.close()


HOLD = """
    import sys, time
    import numpy as np
    from pathlib import Path
    from twofold.retrieve.store import ChromaStore
    store = ChromaStore(Path(sys.argv[1]), fingerprint="f", dim=4, write=True)
    n = 0
    while True:
        vectors = np.random.default_rng(n).normal(size=(50, 4))
        store.upsert([f"{n:04d}-{i:02d}" for i in range(50)], vectors, [{}] * 50)
        n += 1
        print(n, flush=True)
"""


def test_a_second_process_is_refused_until_the_first_dies_and_nothing_is_lost(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            for _ in range(25):  # past Chroma's first index on disk
                done = int(writer.stdout.readline())
            for write in (True, False):
                with pytest.raises(StoreError, match=f"written by process {writer.pid}"):
                    chroma(tmp_path, write=write)
        finally:
            writer.kill()
    store = chroma(tmp_path, write=True)
    for n in range(done):
        vectors = np.random.default_rng(n).normal(size=(50, 4))
        assert names(store.query(vectors[7], 1)) == [f"{n:04d}-07"]
    store.close()


def test_readers_share_and_a_writer_waits_for_them(tmp_path):
    first, second = chroma(filled(tmp_path)), chroma(tmp_path)
    first.close()
    with pytest.raises(StoreError, match="being read"):
        chroma(tmp_path, write=True)
    second.close()
    chroma(tmp_path, write=True).close()


# The others


def reopened(kind: str, path: Path, **options):
    options = {"fingerprint": "f", "dim": 4, **options}
    if kind == "matrix":
        return ExactStore(path=path / "m", **options)
    if kind == "qdrant":
        return QdrantStore(str(path / "q"), "items", **options)
    return ChromaServerStore(server(), f"items-{path.name}", **options)


@pytest.mark.parametrize("kind", ["matrix", "qdrant", "chroma server"])
def test_a_store_elsewhere_is_found_again_and_refuses_another_encoder_and_writing_readers(kind, tmp_path):
    with pytest.raises(StoreError):
        reopened(kind, tmp_path)
    store = reopened(kind, tmp_path, write=True)
    fill(store, [{"n": n} for n in range(8)])
    store.delete(["item0"])
    store.close()
    store = reopened(kind, tmp_path)
    assert names(store.query(cloud(8)[3], 1)) == ["item3"] and len(store) == 7
    for change in (lambda: store.upsert(["a"], np.ones((1, 4)), [{}]), lambda: store.delete(["item1"])):
        with pytest.raises(StoreError, match="write=True"):
            change()
    store.close()
    for write in (False, True):
        for other in ({"fingerprint": "g"}, {"dim": 5}):
            with pytest.raises(FingerprintMismatch, match="embed the items"):
                reopened(kind, tmp_path, write=write, **other)
    reopened(kind, tmp_path, write=True).close()


def test_a_matrix_whose_writer_died_is_no_store(tmp_path):
    store = reopened("matrix", tmp_path, write=True)
    fill(store, [{}] * 8)
    with pytest.raises(StoreError, match=r"no rows\.json"):
        reopened("matrix", tmp_path)
    store.close()
    (tmp_path / "m" / "vectors.f32").write_bytes(b"1234")
    with pytest.raises(StoreError, match="damaged"):
        reopened("matrix", tmp_path)


def test_a_server_that_is_not_there_is_said_so():
    with pytest.raises(StoreError, match="Is the server running there"):
        ChromaServerStore("http://127.0.0.1:9", "items", fingerprint="f", dim=4)
