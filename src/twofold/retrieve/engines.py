"""Engines: what serves the vectors of an index to searches. Which one, and how, an index remembers.

    chroma           embedded, a folder of the index; the default
    exact            every vector compared, a memory-mapped matrix in the index
    chroma:URL       a Chroma server (`chroma run`)
    qdrant:URL       a Qdrant server or cluster; qdrant:FOLDER is its client's local mode

An engine opens stores by name (a snapshot's, such as "0003" or "0003-texts"). The vectors that an index keeps are the
truth: whatever an engine holds can be made again from them.
"""

import contextlib
import re
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from twofold.errors import StoreError, UsageError, unknown
from twofold.retrieve.store import ChromaServerStore, ChromaStore, Claim, ExactStore, Store, chroma_client

GRAPH = {"max_neighbors": 16, "ef_construction": 100, "ef_search": 100}  # Chroma's own, good for 10⁵ items


@dataclass(frozen=True)
class Kept:
    """How an index is searched: an engine's name, and settings of its graph (HNSW) where they are not the default.

    `max_neighbors` edges an item, `ef_construction` candidates while it is built, `ef_search` while it is searched:
    more finds more and takes longer; the first two take memory and building time.
    """

    engine: str = "chroma"
    hnsw: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        kind, _, place = self.engine.partition(":")
        if kind not in ("chroma", "exact", "qdrant"):
            raise unknown("store", self.engine, ("chroma", "exact", "chroma:URL", "qdrant:URL"))
        if (kind == "qdrant" and not place) or (kind == "exact" and ":" in self.engine):
            raise UsageError("A store is chroma, exact, chroma:URL or qdrant:URL: qdrant:http://localhost:6333.")
        if kind == "chroma" and ":" in self.engine and not re.match(r"https?://[^/]", place):
            raise UsageError(
                f"chroma:URL needs a server's address, such as chroma:http://localhost:8000; got {place!r}."
            )
        for name, value in self.hnsw.items():
            if name not in GRAPH:
                raise unknown("setting of the graph", name, GRAPH)
            if not 2 <= value <= 10_000:
                raise UsageError(f"{name} must be 2 to 10,000, got {value}.")
        if self.hnsw and kind == "exact":
            raise UsageError("The exact store has no graph: --hnsw goes with the others.")

    @property
    def described(self) -> str:
        """What it is, in words."""
        kind, _, place = self.engine.partition(":")
        where = f" at {place}" if place else ""
        return {"exact": "every vector (exact)", "qdrant": f"Qdrant{where} (HNSW)"}.get(
            kind, f"Chroma{where or ', embedded'} (HNSW)"
        )


class Engine(Protocol):
    def open(self, name: str, *, fingerprint: str, dim: int, write: bool = False) -> Store:
        """The store of that name; a new, empty one with `write`, where there is none."""

    def copy(self, old: str, new: str) -> bool:
        """Let a new store begin as the old one is; False where it can only be filled anew."""

    def drop(self, name: str) -> None:
        """Forget a store that nobody uses; one that is not there is no error."""

    def sweep(self, used: Collection[str], before: Collection[str] = ()) -> list[str]:
        """Forget all stores but `used`; those that stay are returned, because somebody may still read them."""


def engine(kept: Kept, index: Path, id: str) -> Engine:
    """The engine of the index in a folder; `id` tells its stores from those of others on a server."""
    kind, _, place = kept.engine.partition(":")
    hnsw = {**GRAPH, **kept.hnsw}
    if kept.engine == "exact":
        return Folders(index / "exact")
    if kept.engine == "chroma":
        return Folders(index / "chroma", hnsw)
    if kind == "chroma":
        return ChromaServer(place, id, hnsw)
    return Qdrant(place, id, hnsw)


@dataclass(frozen=True)
class Folders:
    """Stores in folders of the index, held by locks: Chroma's with a graph, matrices without."""

    root: Path
    hnsw: Mapping[str, int] | None = None

    def open(self, name: str, *, fingerprint: str, dim: int, write: bool = False) -> Store:
        if self.hnsw is None:
            return ExactStore(fingerprint=fingerprint, dim=dim, path=self.root / name, write=write)
        return ChromaStore(self.root / name, fingerprint=fingerprint, dim=dim, write=write, hnsw=self.hnsw)

    def copy(self, old: str, new: str) -> bool:
        """Whole even if a reader opens the old one at this moment, which makes Chroma write a little."""
        try:
            shutil.copytree(self.root / old, self.root / new, ignore=shutil.ignore_patterns("chroma.sqlite3*"))
            if self.hnsw is not None:
                with (
                    contextlib.closing(sqlite3.connect(self.root / old / "chroma.sqlite3")) as database,
                    contextlib.closing(sqlite3.connect(self.root / new / "chroma.sqlite3")) as copied,
                ):
                    database.backup(copied)
        except FileNotFoundError:
            return False
        return True

    def drop(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def sweep(self, used: Collection[str], before: Collection[str] = ()) -> list[str]:
        kept = []
        for folder in self.root.iterdir() if self.root.exists() else ():
            if folder.name in used:
                continue
            try:
                claim = Claim(folder / "twofold.lock")
            except StoreError:  # somebody searches it: next time
                kept.append(folder.name)
                continue
            shutil.rmtree(folder)
            claim.release()
        return kept


class _Server(ABC):
    """Collections of a server, named after the index that they belong to."""

    def __init__(self, place: str, id: str, hnsw: Mapping[str, int]):
        self.place, self.hnsw = place, hnsw
        self.prefix = f"twofold-{id}-"

    def copy(self, old: str, new: str) -> bool:
        return False  # servers copy no collections; the vectors are here

    def sweep(self, used: Collection[str], before: Collection[str] = ()) -> list[str]:
        """`before` stay: readers elsewhere hold no lock, and have until the next build to go over to the new ones."""
        kept = []
        for name in self.names():
            if name in before and name not in used:
                kept.append(name)
            elif name not in used:
                self.drop(name)
        return kept

    @abstractmethod
    def names(self) -> list[str]:
        """Of the index's collections, without the prefix."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Forget a collection; one that is not there is no error."""


class ChromaServer(_Server):
    def open(self, name: str, *, fingerprint: str, dim: int, write: bool = False) -> Store:
        return ChromaServerStore(
            self.place, self.prefix + name, fingerprint=fingerprint, dim=dim, write=write, hnsw=self.hnsw
        )

    def names(self) -> list[str]:
        with self._connected() as client:
            named = [collection.name for collection in client.list_collections()]
        return [name.removeprefix(self.prefix) for name in named if name.startswith(self.prefix)]

    def drop(self, name: str) -> None:
        if name in self.names():
            with self._connected() as client:
                client.delete_collection(self.prefix + name)

    @contextlib.contextmanager
    def _connected(self) -> Any:
        try:
            with chroma_client(self.place) as client:
                yield client
        except Exception as error:
            raise StoreError(
                f"The Chroma server at {self.place} does not answer: {error}. {ChromaServerStore.remedy}"
            ) from error


class Qdrant(_Server):
    def open(self, name: str, *, fingerprint: str, dim: int, write: bool = False) -> Store:
        from twofold.retrieve.qdrant import QdrantStore

        return QdrantStore(
            self.place, self.prefix + name, fingerprint=fingerprint, dim=dim, write=write, hnsw=self.hnsw
        )

    def names(self) -> list[str]:
        with self._connected() as client:
            named = [one.name for one in client.get_collections().collections]
        return [name.removeprefix(self.prefix) for name in named if name.startswith(self.prefix)]

    def drop(self, name: str) -> None:
        with self._connected() as client:
            if client.collection_exists(self.prefix + name):
                client.delete_collection(self.prefix + name)

    @contextlib.contextmanager
    def _connected(self) -> Any:
        from twofold.retrieve.qdrant import qdrant_client

        try:
            with contextlib.closing(qdrant_client(self.place)) as client:
                yield client
        except UsageError:
            raise
        except Exception as error:
            raise StoreError(f"Qdrant at {self.place} does not answer: {type(error).__name__}: {error}.") from error
