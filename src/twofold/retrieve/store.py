"""Stores: named vectors with a few scalars each, and the nearest ones to a query.

`Store` says what a store can do; `ExactStore` does it by comparing with every vector, `ChromaStore` with an embedded
Chroma on disk, `ChromaServerStore` with a server, `QdrantStore` (in `qdrant.py`) with another, which may be a cluster.
All answer alike: cosine scores, best first, equal scores by id, the same filters.

A filter (`where`) names columns and the values they may have (see `filters`):
`{"group": "food-drink", "year": {"$in": [2024, 2025]}}`.
"""

import contextlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float

from twofold.data.atomic import write_atomically
from twofold.errors import FingerprintMismatch, StoreError, UsageError
from twofold.retrieve.filters import All, Rule, Scalar, Some, Where, compiled, for_chroma, is_column

Via = Literal["both", "items", "texts"]
VIAS: tuple[Via, ...] = ("both", "items", "texts")
"""Which spaces of an index words are asked in."""


class Place(NamedTuple):
    """Where one space of an index has an item in its own answer: its rank, from 1, and its score there."""

    space: str  # "items" or "texts"; of an index of several modalities also the item's own, such as "image"
    rank: int
    score: float
    text: str | None = None  # the item's text that was nearest, in the space of texts


class Hit(NamedTuple):
    """One item found. `score` is its cosine with the query, −1..1, or what a remedy or fusion made of it: an order.

    `probability` is that of the item belonging to the query, where a `Retriever` has a calibration for it. `spaces`
    says which of an index's spaces found it, where several were asked.
    """

    id: str
    score: float
    meta: dict[str, Scalar]
    probability: float | None = None
    spaces: tuple[Place, ...] = ()


class Store(Protocol):
    """What search needs of a vector store; `fingerprint` names the encoder whose vectors it holds."""

    fingerprint: str
    dim: int

    def upsert(self, ids: Sequence[str], vectors: Float[np.ndarray, "n d"], meta: Sequence[Mapping]) -> None:
        """Add items, or replace (vector and metadata) those whose id is known. Lengths are made 1."""

    def delete(self, ids: Sequence[str]) -> None:
        """Forget these items; an id that is not there is no error."""

    def query(self, vector: Float[np.ndarray, "d"], k: int, where: Where | None = None) -> list[Hit]:
        """The k nearest items that match `where`, best first; fewer if fewer match."""

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """The unit vectors of these items; StoreError for an id that is not there."""

    def meta(self, ids: Sequence[str]) -> list[dict[str, Scalar]]:
        """The columns of these items; StoreError for an id that is not there."""

    def ids(self) -> list[str]:
        """Every id, sorted."""

    def __len__(self) -> int: ...

    @property
    def parameters(self) -> dict[str, Any]:
        """How it was told to search, for whoever wants to know."""

    def close(self) -> None:
        """Let go of files and locks."""


FEW = 8
"""An exact search copies the rows that a filter leaves if they are fewer than one in so many; else it compares all."""


class ExactStore:
    """Every vector compared with every query: the reference, and fast up to some 10⁵ items, faster with a filter.

    In memory; or with `path` in a folder, whose matrix is mapped, so that opening it reads little and several
    processes share it. Of a folder many may read or one may write (`write=True`); what it wrote counts once closed.
    """

    def __init__(self, *, fingerprint: str, dim: int, path: Path | None = None, write: bool = False):
        self.fingerprint, self.dim = fingerprint, dim
        self._names: list[str] = []  # of the rows of the matrix
        self._row: dict[str, int] = {}  # and back
        self._matrix = np.empty((0, dim), np.float32)  # its first rows are in use, the rest is room to grow
        self._meta: list[dict[str, Scalar]] = []
        self._columns: dict[str, tuple[np.ndarray, list]] = {}  # of filters: which value each row has, and the values
        self._folder = None if path is None else MatrixFolder(path, fingerprint=fingerprint, dim=dim, write=write)
        if self._folder is not None:
            self._names, self._meta, self._matrix = self._folder.read()
            self._row = {name: row for row, name in enumerate(self._names)}

    @property
    def parameters(self) -> dict[str, Any]:
        return {"numbers": "float32", "kept": "in memory" if self._folder is None else "memory-mapped"}

    def upsert(self, ids: Sequence[str], vectors: Float[np.ndarray, "n d"], meta: Sequence[Mapping]) -> None:
        self._check_writable()
        vectors, meta = _checked(ids, vectors, meta, self.dim)
        self._columns = {}
        new = [i for i, name in enumerate(ids) if name not in self._row]
        rows = len(self._meta) + len(new)
        if rows > len(self._matrix):
            grown = max(rows, 3 * len(self._matrix) // 2)
            self._matrix = _grown(self._matrix, grown) if self._folder is None else self._folder.grown(grown)
        self._row.update((ids[i], len(self._meta) + n) for n, i in enumerate(new))
        self._names += [ids[i] for i in new]
        self._meta += [meta[i] for i in new]
        for i, name in enumerate(ids):
            self._matrix[self._row[name]], self._meta[self._row[name]] = vectors[i], meta[i]

    def delete(self, ids: Sequence[str]) -> None:
        self._check_writable()
        self._columns = {}
        gone = set(ids)
        rows = [row for row, name in enumerate(self._names) if name not in gone]
        if len(rows) < len(self._names):
            self._matrix[: len(rows)] = self._matrix[rows]
            self._meta = [self._meta[row] for row in rows]
            self._names = [self._names[row] for row in rows]
            self._row = {name: row for row, name in enumerate(self._names)}

    def query(self, vector: Float[np.ndarray, "d"], k: int, where: Where | None = None) -> list[Hit]:
        unit, wanted = _checked_query(vector, k, where, self.dim)
        matrix = self._matrix[: len(self._meta)]
        if wanted == All():  # without indexing, which would copy the matrix
            rows, scores = np.arange(len(matrix)), matrix @ unit
        else:
            rows = np.flatnonzero(self._mask(wanted))
            scores = matrix[rows] @ unit if FEW * len(rows) < len(matrix) else (matrix @ unit)[rows]
        if k < len(rows):
            # With all that may tie with the k-th once rounded, for ids to decide.
            best = scores >= np.partition(scores, -k)[-k] - 2e-6
            rows, scores = rows[best], scores[best]
        hits = (_hit(self._names[row], score, self._meta[row]) for row, score in zip(rows, scores, strict=True))
        return sorted(hits, key=_rank)[:k]

    def _mask(self, rule: Rule) -> np.ndarray:
        """Which rows a filter accepts; it is asked once for each different value of a column, not for each row."""
        if isinstance(rule, All | Some):
            join = np.logical_and if isinstance(rule, All) else np.logical_or
            masks = [self._mask(one) for one in rule.rules]
            return join.reduce(masks) if masks else np.full(len(self._meta), isinstance(rule, All))
        if rule.column not in self._columns:
            known: dict[tuple[type, object], int] = {}
            values = [meta.get(rule.column) for meta in self._meta]
            codes = [known.setdefault((type(value), value), len(known)) for value in values]
            self._columns[rule.column] = np.array(codes, np.intp), [value for _, value in known]
        at, distinct = self._columns[rule.column]
        return np.array([rule.accepts(value) for value in distinct], bool)[at]

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n d"]:
        _all_known(ids, self._row)
        return np.array(self._matrix[[self._row[name] for name in ids]])

    def meta(self, ids: Sequence[str]) -> list[dict[str, Scalar]]:
        _all_known(ids, self._row)
        return [dict(sorted(self._meta[self._row[name]].items())) for name in ids]

    def ids(self) -> list[str]:
        return sorted(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close(self._names, self._meta)

    def _check_writable(self) -> None:
        if self._folder is not None:
            _check_writable(self._folder.path, self._folder.write)


def _grown(matrix: Float[np.ndarray, "n d"], rows: int) -> Float[np.ndarray, "m d"]:
    grown = np.empty((rows, matrix.shape[1]), np.float32)
    grown[: len(matrix)] = matrix
    return grown


class _Chroma:
    """What is alike for a Chroma in a folder and one behind a URL: a collection that is filled and asked."""

    remedy = "If the folder is damaged, delete it and fill it again."

    def __init__(self, place: str, fingerprint: str, dim: int, *, write: bool):
        self.place, self.fingerprint, self.dim, self._write = place, fingerprint, dim, write
        self._client: Any = None
        self._items: Any = None
        self._close: Callable[[], object]

    def _collection(self, client: Any, name: str, hnsw: Mapping[str, int] | None) -> Any:
        if not self._write:
            return client.get_collection(name, embedding_function=None)
        return client.get_or_create_collection(
            name,
            embedding_function=None,  # else Chroma fetches a model of its own
            configuration={"hnsw": {"space": "cosine", **(hnsw or {})}},  # its default is squared distance
            metadata={"fingerprint": self.fingerprint, "dim": self.dim},  # an existing one keeps its own
        )

    def _check_encoder(self) -> None:
        """Chroma itself would take the vectors of any checkpoint."""
        held, wanted = self._items.metadata or {}, {"fingerprint": self.fingerprint, "dim": self.dim}
        if any(held.get(name) != value for name, value in wanted.items()):
            raise _other_encoder(self.place, held, wanted)

    def upsert(self, ids: Sequence[str], vectors: Float[np.ndarray, "n d"], meta: Sequence[Mapping]) -> None:
        _check_writable(self.place, self._write)
        vectors, rows = _checked(ids, vectors, meta, self.dim)
        with self._doing("write vectors"):
            for part in self._batches(len(ids)):
                names = list(ids[part])
                # Chroma merges metadata into what an item has: a column that it lost must be set to None.
                held = self._items.get(names, include=["metadatas"])
                lost = {
                    name: dict.fromkeys(columns or ())
                    for name, columns in zip(held["ids"], held["metadatas"], strict=True)
                }
                new = [{**lost.get(name, {}), **row} or None for name, row in zip(names, rows[part], strict=True)]
                self._items.upsert(names, vectors[part], new)

    def delete(self, ids: Sequence[str]) -> None:
        _check_writable(self.place, self._write)
        with self._doing("delete items"):
            for part in self._batches(len(ids)):
                self._items.delete(list(ids[part]))

    def query(self, vector: Float[np.ndarray, "d"], k: int, where: Where | None = None) -> list[Hit]:
        unit, wanted = _checked_query(vector, k, where, self.dim)
        rule = for_chroma(wanted)
        if rule is False:  # no value would do; Chroma rejects an empty list
            return []
        with self._doing("search"):
            found = self._items.query(
                query_embeddings=unit[None],
                n_results=k,
                where=None if rule is True else rule,
                include=["distances", "metadatas"],
            )
        rows = zip(found["ids"][0], found["distances"][0], found["metadatas"][0], strict=True)
        return sorted((_hit(name, 1 - distance, meta or {}) for name, distance, meta in rows), key=_rank)

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n d"]:
        found: dict[str, np.ndarray] = {}
        unique = list(dict.fromkeys(ids))  # Chroma refuses an id asked for twice
        with self._doing("read vectors"):
            for part in self._batches(len(unique)):
                got = self._items.get(unique[part], include=["embeddings"])
                found.update(zip(got["ids"], got["embeddings"], strict=True))
        _all_known(ids, found)
        return np.array([found[name] for name in ids], np.float32).reshape(len(ids), self.dim)

    def meta(self, ids: Sequence[str]) -> list[dict[str, Scalar]]:
        found: dict[str, Mapping] = {}
        unique = list(dict.fromkeys(ids))
        with self._doing("read metadata"):
            for part in self._batches(len(unique)):
                got = self._items.get(unique[part], include=["metadatas"])
                found.update(zip(got["ids"], ({**(row or {})} for row in got["metadatas"]), strict=True))
        _all_known(ids, found)
        return [dict(sorted(found[name].items())) for name in ids]

    def ids(self) -> list[str]:
        with self._doing("list its ids"):
            return sorted(self._items.get(include=[])["ids"])

    def __len__(self) -> int:
        with self._doing("count its items"):
            return self._items.count()

    @property
    def parameters(self) -> dict[str, Any]:
        """How Chroma was told to build and search its graph."""
        return dict(self._items.configuration_json["hnsw"])

    def close(self) -> None:
        self._close()

    def _batches(self, n: int) -> list[slice]:
        step = self._client.get_max_batch_size()
        return [slice(start, start + step) for start in range(0, n, step)]

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise StoreError(f"Chroma could not {what} in {self.place}: {_named(error)}. {self.remedy}") from error


class ChromaStore(_Chroma):
    """A folder with an embedded Chroma: approximate (HNSW), on disk, opened without a server.

    Many may read it or one may write it (`write=True`), and a lock file refuses the rest: Chroma loses vectors
    without an error where two processes write, and where one searches what another has changed meanwhile.
    """

    def __init__(
        self, path: Path, *, fingerprint: str, dim: int, write: bool = False, hnsw: Mapping[str, int] | None = None
    ):
        self.path = Path(path).resolve()
        super().__init__(str(self.path), fingerprint, dim, write=write)
        exists = (self.path / "chroma.sqlite3").is_file()
        if not (write or exists):  # Chroma would make an empty one
            raise StoreError(f"There is no Chroma store in {self.path}: it holds no chroma.sqlite3.")
        with contextlib.ExitStack() as undo:
            self.path.mkdir(parents=True, exist_ok=True)
            undo.callback(Claim(self.path / "twofold.lock", shared=not write).release)
            self._check_files()
            self._client, self._items = self._connect(hnsw)
            if write:
                self._sizes.unlink(missing_ok=True)
                undo.callback(lambda: self._sizes.write_text(json.dumps(self._file_sizes())))
            undo.callback(self._client.close)
            self._check_encoder()
            self._close = undo.pop_all().close

    @property
    def _sizes(self) -> Path:
        """Written when a writer is done: how large the files of Chroma's search index are."""
        return self.path / "sizes.json"

    def _file_sizes(self) -> dict[str, int]:
        # Up to 1,000 items Chroma has no index on disk; it makes one from its log, and idle files, at each opening.
        folders = [pickle.parent for pickle in self.path.glob("*/index_metadata.pickle")]
        return {str(file.relative_to(self.path)): file.stat().st_size for one in folders for file in one.iterdir()}

    def _check_files(self) -> None:
        """A search index cut short (full disk, broken copy) would take the whole process down when searched."""
        if self._sizes.exists() and json.loads(self._sizes.read_text()) != self._file_sizes():
            raise StoreError(
                f"{self.path} is damaged: the files of its search index are not as they were written. "
                "Delete it and fill it again."
            )

    def _connect(self, hnsw: Mapping[str, int] | None) -> tuple[Any, Any]:
        import chromadb
        from chromadb.api.shared_system_client import SharedSystemClient
        from chromadb.config import Settings

        try:
            with self._doing("open"):
                settings = Settings(anonymized_telemetry=False)
                client: Any = chromadb.PersistentClient(self.path, settings=settings)
        except StoreError:
            # Chroma keeps what failed to open and hands it out again, even for a folder mended since.
            SharedSystemClient._identifier_to_system.pop(str(self.path), None)
            raise
        with self._doing("open"), contextlib.ExitStack() as undo:
            undo.callback(client.close)
            items = self._collection(client, "items", hnsw)
            # With its HNSW files gone or damaged, Chroma still opens and counts, and may search what is left.
            items.get(limit=1, include=["embeddings"])
            undo.pop_all()
        return client, items


class ChromaServerStore(_Chroma):
    """A collection of a Chroma server (`chroma run`) at a URL: several machines may search it while one writes.

    The server keeps order between its clients, so there is no lock here; an index has one of its own for writing.
    """

    remedy = "Is the server running there (`chroma run --host HOST --port PORT`)?"

    def __init__(
        self,
        url: str,
        name: str,
        *,
        fingerprint: str,
        dim: int,
        write: bool = False,
        hnsw: Mapping[str, int] | None = None,
    ):
        super().__init__(f"{url}, collection {name}", fingerprint, dim, write=write)
        with contextlib.ExitStack() as undo:
            with self._doing("connect"):
                self._client = undo.enter_context(chroma_client(url))
                self._items = self._collection(self._client, name, hnsw)
            self._check_encoder()
            self._close = undo.pop_all().close


@contextlib.contextmanager
def chroma_client(url: str) -> Iterator[Any]:
    """A connection to a Chroma server, closed at the end."""
    import chromadb
    from chromadb.config import Settings

    address = urlsplit(url)
    secure = address.scheme == "https"
    client: Any = chromadb.HttpClient(
        address.hostname or "",
        address.port or (443 if secure else 80),
        ssl=secure,
        settings=Settings(anonymized_telemetry=False),
    )
    try:
        yield client
    finally:
        # `close` leaves the connections of the client, and of the one that it made for itself, to the garbage collector
        for one in (client, client._admin_client):
            one._server._session.close()
        client.close()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")


class MatrixFolder:
    """Where an `ExactStore` lies on disk: `vectors.f32`, and `rows.json`, which is there once the two are whole."""

    def __init__(self, path: Path, *, fingerprint: str, dim: int, write: bool):
        self.path, self.write = Path(path).resolve(), write
        self._mark: dict[str, Scalar] = {"fingerprint": fingerprint, "dim": dim}
        self._vectors, self._rows = self.path / "vectors.f32", self.path / "rows.json"
        if not (write or self._rows.is_file()):
            raise StoreError(f"There is no whole store in {self.path}: it holds no rows.json.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(self.path / "twofold.lock", shared=not write)

    def read(self) -> tuple[list[str], list[dict[str, Scalar]], Float[np.ndarray, "n d"]]:
        """Ids, columns and the mapped matrix; while it is written to, `rows.json` is away."""
        dim = int(self._mark["dim"])
        if not self._rows.exists():
            return [], [], np.empty((0, dim), np.float32)
        try:
            held = json.loads(self._rows.read_text())
            names, meta, mark = held["ids"], held["meta"], {name: held[name] for name in self._mark}
            size = self._vectors.stat().st_size
            if (mark == self._mark and size != 4 * dim * len(names)) or len(names) != len(meta):
                raise ValueError(f"{self._vectors.name} has {size} bytes for {len(names)} items")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._claim.release()
            raise StoreError(f"{self.path} is damaged ({error}). Delete it and fill it again.") from error
        if mark != self._mark:
            self._claim.release()
            raise _other_encoder(str(self.path), mark, self._mark)
        if self.write:
            self._rows.unlink()
        return names, meta, self._mapped(len(names))

    def grown(self, rows: int) -> Float[np.ndarray, "m d"]:
        """The matrix with room for so many rows."""
        with open(self._vectors, "ab") as file:
            file.truncate(4 * int(self._mark["dim"]) * rows)
        return self._mapped(rows)

    def _mapped(self, rows: int) -> Float[np.ndarray, "n d"]:
        dim = int(self._mark["dim"])
        if not rows:  # an empty file cannot be mapped
            return np.empty((0, dim), np.float32)
        return np.memmap(self._vectors, np.float32, "r+" if self.write else "r", shape=(rows, dim))

    def close(self, names: list[str], meta: list[dict[str, Scalar]]) -> None:
        """Write down what the rows are, where this was the writer, and let go of the folder."""
        if self.write:
            with open(self._vectors, "ab") as file:
                file.truncate(4 * int(self._mark["dim"]) * len(names))
                os.fsync(file.fileno())
            text = json.dumps({**self._mark, "ids": names, "meta": meta}, ensure_ascii=False)
            write_atomically(self._rows, lambda path: path.write_text(text))
            self.write = False
        self._claim.release()


def _other_encoder(place: str, held: Mapping, wanted: Mapping) -> FingerprintMismatch:
    return FingerprintMismatch(
        f"{place} holds vectors [{held.get('dim')}] of encoder {held.get('fingerprint')}, not [{wanted['dim']}] of "
        f"{wanted['fingerprint']}; a score between the two would mean nothing. Open it with the model that filled it, "
        "or embed the items with this model into a new folder."
    )


class Claim:
    """A lock file (flock) that one process holds, or several share; it ends with the process, however that dies."""

    def __init__(self, path: Path, *, shared: bool = False):
        import fcntl

        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                use = "read by another process or by this one"
            except BlockingIOError:
                use = f"written by process {os.read(handle, 32).decode() or '(unknown)'}"
            self.release()
            raise StoreError(
                f"{path.parent} is being {use}. One may write, or several read: wait until it is done, or stop it."
            ) from None
        if not shared:
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())

    def release(self) -> None:
        self._close()


def scalars(columns: Mapping[str, object]) -> dict[str, Scalar]:
    """These columns as a store keeps them: text, numbers and booleans; empty ones (None, NaN) dropped.

    Lists become "a, b, c", anything else its text. A name that stores keep for themselves gets a _ in front.
    """
    kept: dict[str, Scalar] = {}
    for column, value in columns.items():
        name = column if is_column(column) else f"_{column}"
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        match value:
            case None:
                continue
            case bool():
                kept[name] = value
            case int() if -(2**63) <= value < 2**63:
                kept[name] = value
            case float():
                if np.isfinite(value):
                    kept[name] = value
            case _:
                kept[name] = str(value).encode("utf-8", "backslashreplace").decode()
    return kept


def _checked(ids, vectors, meta, dim: int) -> tuple[Float[np.ndarray, "n d"], list[dict[str, Scalar]]]:
    if not len(ids) == len(vectors) == len(meta):
        raise StoreError(f"Got {len(ids)} ids, {len(vectors)} vectors and {len(meta)} rows of metadata.")
    if len(set(ids)) < len(ids):
        twice = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise StoreError(f"The id {twice!r} comes twice in one call; an id names one item.")
    for name in ids:
        _check_id(name)
    vectors = np.asarray(vectors, np.float32)
    if len(ids) and vectors.shape != (len(ids), dim):
        raise StoreError(f"Expected vectors [{len(ids)}, {dim}], got {list(vectors.shape)}.")
    return _unit(vectors.reshape(len(ids), dim), ids), [scalars(row) for row in meta]


def _check_writable(place: str | Path, write: bool) -> None:
    if not write:
        raise StoreError(f"{place} was opened for reading; open it with write=True to change it.")


def _check_id(name: str) -> None:
    try:
        if name and name.encode():
            return
    except UnicodeEncodeError:  # a file name whose bytes are not UTF-8
        pass
    raise StoreError(f"An id must be text that is not empty and can be written as UTF-8; got {name!r}.")


def _checked_query(vector, k: int, where: Where | None, dim: int) -> tuple[Float[np.ndarray, "d"], Rule]:
    vector = np.asarray(vector, np.float32)
    if vector.shape != (dim,):
        raise StoreError(f"Expected a query vector [{dim}], got {list(vector.shape)}.")
    if k < 1:
        raise UsageError(f"k must be at least 1, got {k}.")
    return _unit(vector[None], ["the query"])[0], compiled(where)


def _unit(vectors: Float[np.ndarray, "n d"], names: Sequence[str]) -> Float[np.ndarray, "n d"]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise StoreError(f"The vector of {names[bad[0]]} has no direction: it is zero or not finite.")
    return (vectors / lengths).astype(np.float32)


def _hit(name: str, score: float, meta: Mapping[str, Scalar]) -> Hit:
    # Rounded to what float32 carries, so that equal vectors tie wherever they lie in memory.
    return Hit(name, round(min(1.0, max(-1.0, float(score))), 6), dict(sorted(meta.items())))


def _rank(hit: Hit) -> tuple[float, str]:
    return -hit.score, hit.id


def _all_known(ids: Sequence[str], known: Mapping[str, object]) -> None:
    for name in ids:
        if name not in known:
            raise StoreError(f"There is no item {name!r} in the store.")
