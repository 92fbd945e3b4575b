"""The state of an index on disk: what index.json says, the list of items, the stores filled from it.

A new state is written beside the old one, then index.json points to it, then what nobody reads any more is swept away.
"""

import contextlib
import errno
import json
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from twofold.data.atomic import write_atomically
from twofold.data.sources import Modality
from twofold.data.vectors import ByContent, Joined, Vectors
from twofold.errors import FingerprintMismatch, StoreError
from twofold.models.bundle import Bundle, kept_meta
from twofold.retrieve.engines import Engine, Kept, engine
from twofold.retrieve.spaces import Row, Space, text_rows
from twofold.retrieve.store import Claim, ExactStore, Scalar, Store

CHUNK = 8192  # items whose vectors are in memory at once
TOLD = 1024  # rows that a store takes between two words on how far it is
ENTRIES = {
    *("index.json", "model", "vectors", "items", "chroma", "exact", "thumbs", "map", "twofold.lock"),
    *("feedback.jsonl", "corrected.json", "fusion.json"),
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Head:
    """What index.json says."""

    fingerprint: str  # of what made the vectors: a tower, or several
    bundle: str  # the fingerprint of the bundle with all its towers
    modality: Modality  # "image"; of several, in their order, "image,text,video"
    dim: int
    snapshot: str
    source: str  # what the index was made from, for messages
    built: str  # when the snapshot was made
    format: int = 1
    texts: Space | None = None  # of the items' texts, where there is one
    store: Kept = field(default_factory=Kept)  # what answers searches
    id: str = ""  # by which its stores are told from others on a server
    towers: Mapping[Modality, str] = field(default_factory=dict, hash=False)  # the fingerprint of each of several
    frames: Mapping[Modality, int] = field(default_factory=dict, hash=False)  # of clips that the picture tower reads
    model: str = ""  # where the bundle was loaded from, for messages

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return tuple(self.modality.split(","))

    @property
    def prints(self) -> Mapping[Modality, str]:
        """The fingerprint of the tower of each modality."""
        return self.towers or {self.modality: self.fingerprint}

    @property
    def spaces(self) -> list[Space]:
        own = Space("items", self.fingerprint, self.dim)
        return [own] if self.texts is None else [own, self.texts]


class Item(NamedTuple):
    """What an index knows of an item, besides the vector that `key` names. `texts` are those of the space of texts."""

    key: str
    meta: dict[str, Scalar]
    texts: tuple[str, ...] = ()


@contextlib.contextmanager
def claimed(path: Path, *, shared: bool = False) -> Iterator[None]:
    """The folder, for one process that writes it, or for several (`shared`) that embed for it; refuses one that holds
    other things."""
    path.mkdir(parents=True, exist_ok=True)
    if strange := sorted(e.name for e in path.iterdir() if e.name not in ENTRIES and not e.name.startswith(".")):
        raise StoreError(f"{path} is no index: it holds {strange[0]}. Choose a new or empty folder.")
    claim = Claim(path / "twofold.lock", shared=shared)
    try:
        yield
    except (OSError, StoreError, sqlite3.Error, SafetensorError) as error:
        if not _is_full(path, error):
            raise
        raise StoreError(
            f"{path} cannot be written: its disk is full, a quota on it is used up, or it fails. What was in the index "
            f"is whole, and what was embedded is kept. Make room; the same command goes on from there. ({error})"
        ) from error
    finally:
        claim.release()


def _is_full(path: Path, error: Exception) -> bool:
    """Whether this failed for want of room; Chroma and safetensors say so in their own words, if at all."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    said = str(error).lower()
    return any(words in said for words in ("is full", "no space left", "too large", "disk i/o error")) or not _room(
        path
    )


def _room(path: Path) -> bool:
    return shutil.disk_usage(path).free > 1 << 20


def index_id(head: Head | None) -> str:
    return (head.id if head else "") or secrets.token_hex(6)


def next_snapshot(head: Head | None) -> str:
    return f"{int(head.snapshot) + 1 if head else 1:04d}"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def read_head(path: Path) -> Head:
    try:
        said = json.loads((path / "index.json").read_text())
        texts = Space(**said["texts"]) if said.get("texts") else None
        head = Head(**{**said, "texts": texts, "store": Kept(**said.get("store", {}))})
    except FileNotFoundError:
        raise StoreError(
            f"{path} is no index: it has no index.json. `twofold index SOURCE --model MODEL --out {path}` makes one."
        ) from None
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{path / 'index.json'} is damaged or of another version of twofold ({error}). Delete it and "
            f"index again: contents that have a vector are not embedded again."
        ) from error
    return head


def _items_file(path: Path, head: Head) -> Path:
    return path / "items" / f"{head.snapshot}.jsonl"


def read_items(path: Path, head: Head) -> dict[str, Item]:
    return dict(read_lines(path, head))


def read_lines(path: Path, head: Head) -> Iterator[tuple[str, Item]]:
    file = _items_file(path, head)
    try:
        with open(file, encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield row["id"], Item(row["key"], row["meta"], tuple(row.get("texts", ())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{file} is missing or damaged ({error}). `twofold index {head.source} --model {path / 'model'} "
            f"--out {path} --existing replace` makes it again; contents that have a vector are not embedded again."
        ) from error


def _write_items(path: Path, items: dict[str, Item]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for name, (key, meta, texts) in items.items():
            row = {"id": name, "key": key, "meta": meta} | ({"texts": texts} if texts else {})
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows_of(space: Space, items: dict[str, Item]) -> dict[str, Row]:
    """What the store of a space holds of these items."""
    if space.name == "items":
        return {name: Row(item.key, item.meta) for name, item in items.items()}
    return {id: row for name, item in items.items() for id, row in text_rows(name, item.texts, item.meta).items()}


def store_name(head: Head, space: Space) -> str:
    return head.snapshot if space.name == "items" else f"{head.snapshot}-{space.name}"


def engine_of(path: Path, head: Head) -> Engine:
    return engine(head.store, path, head.id)


def open_store(path: Path, head: Head, space: Space, *, write: bool = False) -> Store:
    name = store_name(head, space)
    return engine_of(path, head).open(name, fingerprint=space.fingerprint, dim=space.dim, write=write)


def item_vectors(path: Path, head: Head, *, aside: bool = True) -> Joined:
    """The vectors that items are found by."""
    parts = {name: Vectors(path / "vectors", mark, head.dim, aside=aside) for name, mark in head.prints.items()}
    return Joined(parts)


def vectors_of(path: Path, head: Head, space: Space, *, aside: bool = True) -> ByContent:
    """The vectors of a space."""
    if space.name == "items":
        return item_vectors(path, head, aside=aside)
    return Vectors(path / "vectors", space.fingerprint, space.dim, aside=aside)


def exact_store(path: Path, head: Head, space: Space, items: dict[str, Item]) -> ExactStore:
    rows = rows_of(space, items)
    store = ExactStore(fingerprint=space.fingerprint, dim=space.dim)
    vectors = vectors_of(path, head, space)
    store.upsert(list(rows), vectors.get([row.key for row in rows.values()]), [row.meta for row in rows.values()])
    return store


def healthy(path: Path, head: Head, items: dict[str, Item]) -> bool:
    try:
        for space in head.spaces:
            with contextlib.closing(open_store(path, head, space)) as store:
                if store.ids() != sorted(rows_of(space, items)):
                    return False
    except StoreError:
        return False
    return True


def write_snapshot(
    path: Path,
    head: Head,
    items: dict[str, Item],
    was: Head | None,
    old: dict[str, Item],
    progress: Progress | None = None,
) -> None:
    """Write the stores and the list of `items`: what changed in a copy of the old stores, or all in new ones.

    `progress(done, total)` counts the rows that a store takes, from 0 for each.
    """
    # Chroma only marks what is deleted or replaced; past a half, a new store is smaller and finds better.
    same = sum(old.get(name) == item for name, item in items.items())
    if was is None or 2 * same < len(old):
        old = {}
    for space in head.spaces:
        stores, name = engine_of(path, head), store_name(head, space)
        stores.drop(name)  # of a build that was killed
        vectors = vectors_of(path, head, space)
        rows, held = rows_of(space, items), {}
        if (
            old
            and was is not None
            and any(one.fingerprint == space.fingerprint and one.name == space.name for one in was.spaces)
        ):
            held = rows_of(space, old)
        try:
            if held and was is not None and not (was.store == head.store and stores.copy(store_name(was, space), name)):
                held = {}
                stores.drop(name)
            _fill(path, head, space, rows, vectors, held, progress)
        except (StoreError, OSError, sqlite3.Error):
            if not held:
                raise
            stores.drop(name)  # a copy of something damaged
            _fill(path, head, space, rows, vectors, {}, progress)
    write_atomically(_items_file(path, head), lambda file: _write_items(file, items))


def _fill(
    path: Path,
    head: Head,
    space: Space,
    rows: dict[str, Row],
    vectors: ByContent,
    old: dict[str, Row],
    progress: Progress | None,
) -> None:
    with contextlib.closing(open_store(path, head, space, write=True)) as store:
        if store.ids() != sorted(old):
            raise StoreError(f"The store {store_name(head, space)} does not hold the items that it should.")
        store.delete([name for name in old if name not in rows])
        todo = [name for name, row in rows.items() if old.get(name) != row]
        for start in range(0, len(todo), TOLD):
            if progress is not None:
                progress(start, len(todo))
            names = todo[start : start + TOLD]
            store.upsert(names, vectors.get([rows[n].key for n in names]), [rows[n].meta for n in names])
        if progress is not None and todo:
            progress(len(todo), len(todo))


def publish(path: Path, head: Head, bundle: Bundle | None, was: Head | None) -> None:
    """Point index.json at the new snapshot, then sweep away what nobody reads any more."""
    if bundle is not None and (was is None or was.bundle != head.bundle or kept_meta(path / "model") != bundle.meta):
        bundle.save(path / "model")
    if head != was:
        text = json.dumps(asdict(head), indent=2) + "\n"
        write_atomically(path / "index.json", lambda file: file.write_text(text))
    used = [store_name(head, space) for space in head.spaces]
    before = [store_name(was, space) for space in was.spaces] if was else []
    kept = engine_of(path, head).sweep(used, before)
    for other in {Kept("chroma"), Kept("exact"), was.store if was else head.store}:
        if other.engine != head.store.engine:
            kept += engine_of(path, replace(head, store=other)).sweep(())
    for file in (path / "items").glob("*.jsonl"):
        if file.stem not in (head.snapshot, *kept):
            file.unlink(missing_ok=True)
    prints = {*head.prints.values(), *([head.texts.fingerprint] if head.texts else [])}
    for folder in (path / "vectors").iterdir():
        if folder.name not in prints:
            shutil.rmtree(folder)


def mismatch(path: Path, head: Head, bundle: Bundle, prints: Mapping[Modality, str]) -> FingerprintMismatch:
    other = [name for name, mark in head.prints.items() if prints.get(name) != mark]
    told = "; ".join(f"{head.prints[name]} ({name}), this model's is {prints.get(name, 'missing')}" for name in other)
    return FingerprintMismatch(
        f"{path} was made by the encoder {told}. Search with the model that made it, or make it again: "
        f"`twofold index {head.source} --model {bundle.folder or 'MODEL'} --out {path} --existing replace`."
    )
