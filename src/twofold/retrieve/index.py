"""An index: a folder that answers searches, made from a source and a bundle.

    index.json        which encoder, modality and snapshot; replaced as a whole, so a reader sees one state or the next
    model/            the bundle, so that the folder works on another machine
    vectors/          every vector made so far, by content: the truth, and why nothing is embedded twice
    items/0002.jsonl  what a snapshot holds: id, content key, metadata and texts of each item
    chroma/0002/      the same as a Chroma store; made from the two above, and made again where it is damaged
    chroma/0002-texts/  the items' texts as another one, where a text embedder has a space of its own (see `spaces`)
    fusion.json       how the answers of the two become one, where that was fitted
    feedback.jsonl    what people said of hits; corrected.json how these questions were answered before the last model
    thumbs/           small pictures: of items whose source holds their pictures (a table, arrays) from the build on, of
                      files when they are first asked for

A build writes a new snapshot beside the old one and then points index.json at it. Whoever searches meanwhile keeps the
old one, and a build that is killed leaves no trace but the vectors that it had finished.
"""

import contextlib
import errno
import hashlib
import json
import secrets
import shutil
import sqlite3
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError

from twofold.data.atomic import write_atomically
from twofold.data.decode import OnError, Raw, Skipped, ahead, skip_report, thumbnail
from twofold.data.sources import Modality, Source, content_key, open_source
from twofold.data.vectors import Vectors
from twofold.errors import BundleError, DataError, FingerprintMismatch, StoreError, UsageError, unknown
from twofold.measure.embed import embed
from twofold.measure.layout import layout
from twofold.models.bundle import Bundle, kept_meta
from twofold.models.encoders import TextEncoder, fingerprint
from twofold.retrieve.corrected import keep_answers
from twofold.retrieve.engines import Engine, Kept, engine
from twofold.retrieve.fusion import FUSION, Fusion
from twofold.retrieve.retriever import Picture, Retriever
from twofold.retrieve.spaces import Row, Space, TextSpace, text_rows, texts_of
from twofold.retrieve.store import Claim, ExactStore, Hit, Scalar, Store, Where, scalars
from twofold.retrieve.text_embedders import LocalEmbedder, TextEmbedder, text_embedder

THUMBNAIL = 320  # pixels of the longer side
CHUNK = 8192  # items whose vectors are in memory at once
ENTRIES = {
    *("index.json", "model", "vectors", "items", "chroma", "exact", "thumbs", "map", "twofold.lock"),
    *("feedback.jsonl", "corrected.json", "fusion.json"),
}

Existing = Literal["keep", "prune", "replace"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Head:
    """What index.json says."""

    fingerprint: str  # of the tower that made the vectors
    bundle: str  # the fingerprint of the bundle with all its towers
    modality: Modality
    dim: int
    snapshot: str
    source: str  # what the index was made from, for messages
    built: str  # when the snapshot was made
    format: int = 1
    texts: Space | None = None  # of the items' texts, where there is one
    store: Kept = field(default_factory=Kept)  # what answers searches
    id: str = ""  # by which its stores are told from others on a server

    @property
    def spaces(self) -> list[Space]:
        own = Space("items", self.fingerprint, self.dim)
        return [own] if self.texts is None else [own, self.texts]


class Item(NamedTuple):
    """What an index knows of an item, besides the vector that `key` names. `texts` are those of the space of texts."""

    key: str
    meta: dict[str, Scalar]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """What a build did, in items; `embedded` counts contents, of which several items may share one."""

    items: int  # in the index now
    embedded: int
    added: int
    changed: int
    removed: int
    absent: int  # in the index, and not in the source
    skipped: list[Skipped]
    texts: int = 0  # in the space of texts now
    texts_embedded: int = 0


class Index:
    """An index opened for searching, to be used in a `with`; `Index.build` makes one or brings it up to date."""

    def __init__(self, path: Path, head: Head, bundle: Bundle, store: Store, texts: TextSpace | None = None):
        self.path, self.head, self.bundle, self.store = path, head, bundle, store
        self.retriever = Retriever(bundle, store, texts=texts, fusion=_kept_fusion(path, head), columns=self.columns)
        self.search = self.retriever.search
        self._annotated = _annotated(path)

    @classmethod
    def open(cls, path: str | Path, model: str | Path | Bundle | None = None, *, exact: bool = False) -> "Index":
        """Open an index with its own model, or with `model`, which must have made its vectors.

        `exact` compares with every vector in memory instead of asking Chroma.
        """
        path = Path(path)
        head = read_head(path)
        bundle = model if isinstance(model, Bundle) else Bundle.load(Path(model or path / "model"))
        while True:
            if bundle.tower_fingerprint(head.modality) != head.fingerprint:
                raise _mismatch(path, head, bundle, "MODEL" if isinstance(model, Bundle | None) else str(model))
            try:
                return _opened(path, head, bundle, exact=exact)
            except StoreError as error:
                if (now := read_head(path)) == head:
                    raise StoreError(
                        f"{error} What it is made from is kept apart: Index.rebuild({str(path)!r}) makes it again, "
                        "as does the next `twofold index`."
                    ) from error
                head = now  # a build has ended since we read index.json, and swept away what that named

    def items(self) -> Iterator[tuple[str, dict[str, Scalar]]]:
        """Every item's id and columns, read from the disk one after the other."""
        for name, item in _lines(self.path, self.head):
            yield name, item.meta

    def columns(self) -> list[str]:
        """The names of the items' columns, in the order in which they are met."""
        return list(dict.fromkeys(column for _, meta in self.items() for column in meta))

    def map(self) -> tuple[list[str], Float[np.ndarray, "n 2"]]:
        """Ids and where they lie on a plane of 0..1 (see `layout`); made once for each state of the index."""
        file = self.path / "map" / f"{self.head.snapshot}.npz"
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(file) as kept:
            return kept["ids"].tolist(), kept["places"]
        ids = self.store.ids()
        places = layout(self.store.vectors(ids)).astype(np.float32)
        with contextlib.suppress(OSError):  # a full or read-only disk: laid out again the next time
            shutil.rmtree(file.parent, ignore_errors=True)
            write_atomically(file, lambda path: _save_map(path, ids, places))
        return ids, places

    @property
    def stale(self) -> bool:
        """Whether a build has ended or `calibrate` was run since this was opened; open the index again to see it."""
        return read_head(self.path) != self.head or _annotated(self.path) != self._annotated

    def hints(self) -> list[str]:
        """What whoever keeps this index may want to do, with the command for it."""
        if self.retriever.texts is None or self.retriever.fusion.calibration or self.retriever.calibration is None:
            return []
        return [
            "Words have no probabilities here: the model's calibration is for pictures alone, and this index asks its "
            f"texts, too. `twofold calibrate {self.path} --data PAIRS` gives it its own."
        ]

    def audit(self, limit: int = 1000) -> list[str]:
        """Ids that the store lost or does not find by their own vector, of `limit` tried; [] where all is well."""
        items = read_items(self.path, self.head)
        lost = set(items) ^ set(self.store.ids())
        tried = [name for name in items if name not in lost][:: max(1, len(items) // limit)]
        vectors = Vectors(self.path / "vectors", self.head.fingerprint, self.head.dim)
        for name, vector in zip(tried, vectors.get([items[name].key for name in tried]), strict=True):
            hits = self.store.query(vector, 1)
            if not hits or hits[0].score < 1 - 1e-4:
                lost.add(name)
        return sorted(lost)

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the stores, so that a later build may sweep its snapshot away."""
        self.store.close()
        if self.retriever.texts is not None:
            self.retriever.texts.close()

    @staticmethod
    def build(
        source: Source,
        bundle: Bundle,
        out: str | Path,
        *,
        modality: Modality | None = None,
        on_error: OnError = "skip",
        existing: Existing = "keep",
        texts: str | TextEmbedder | None = None,
        store: Kept | None = None,
        progress: Progress | None = None,
    ) -> Built:
        """Make the index `out` of a source, or bring it up to date; only new contents are embedded.

        `existing` says what becomes of items that the index has and the source has not: they stay ("keep") or go
        ("prune"). "replace" begins anew, which is the only way to another model. Items are found by their picture, or
        by their texts where the source has no pictures or `modality` says so. After a kill, run it again: it goes on.
        `progress(done, total)` counts the contents to embed, and then the texts.

        `texts` embeds the items' texts into a space of their own, which answers words, too: a text embedder or its
        name, or "none". Without it, an index goes on as it is, and a new one takes "minilm" if its source has texts.
        `store` is what answers searches (see `engines`); an index remembers it, and a new one takes embedded Chroma.
        """
        out = Path(out)
        if existing not in ("keep", "prune", "replace"):
            raise unknown("choice of existing", existing, ("keep", "prune", "replace"))
        with claimed(out):
            was, head = begun(source, bundle, out, modality, existing, store)
            modality = head.modality
            kept = was if existing != "replace" else None
            embedder = _embedder(out, texts, kept, source)
            old = read_items(out, kept) if kept else {}
            vectors = Vectors(out / "vectors", head.fingerprint, head.dim)
            before = len(vectors)
            found, skipped = embed_items(source, bundle, modality, vectors, on_error, progress)
            gone = [] if existing == "prune" else sorted(old.keys() - set(source.ids))
            absent = {name: old[name] for name in gone if old[name].key in vectors}
            lost = [name for name in gone if name not in absent]
            skipped += [Skipped(name, "its vector is damaged, and the source no longer has it") for name in lost]
            new = absent | found
            if not new:
                raise DataError(f"{source.name} gives nothing to search in. {skip_report(skipped, len(source))}")
            if was and was.bundle != head.bundle:
                _keep_answers(out)
            made = 0
            if embedder is None:
                new = {name: item._replace(texts=()) for name, item in new.items()}
            else:
                texts_of_source = {source.ids[i]: texts_of(source, i) for i in range(len(source))}
                new = {name: item._replace(texts=texts_of_source.get(name, item.texts)) for name, item in new.items()}
                made = _embed_texts(out, embedder, new, progress)
                head = replace(head, texts=_text_space(embedder, new))
            if was and new == old and (head.texts, head.store) == (was.texts, was.store) and _healthy(out, was, old):
                head = replace(head, snapshot=was.snapshot, built=was.built)
            else:
                _write_snapshot(out, head, new, was, old)
            _keep_thumbnails(out, source, found, old)
            _publish(out, head, bundle, was)
        return Built(
            items=len(new),
            embedded=len(vectors) - before,
            added=len(new.keys() - old.keys()),
            changed=sum(new[name] != old[name] for name in new.keys() & old.keys()),
            removed=len(old.keys() - new.keys()),
            absent=len(absent),
            skipped=skipped,
            texts=head.texts.rows if head.texts else 0,
            texts_embedded=made,
        )

    @staticmethod
    def rebuild(
        path: str | Path,
        *,
        source: Source | None = None,
        without: Collection[str] = (),
        store: Kept | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Make the store of an index again from its vectors, `without` some items; the ids that it lost.

        With `store` in another engine, or with other settings.

        A content whose vector is lost is embedded again where `source` has its item, and is dropped where `source` has
        it no more. Without `source` a lost vector is an error.
        """
        path = Path(path)
        with claimed(path):
            head = read_head(path)
            held = read_items(path, head)
            items = {name: item for name, item in held.items() if name not in without}
            vectors = Vectors(path / "vectors", head.fingerprint, head.dim)
            vectors.drop(vectors.broken([item.key for item in items.values()]))
            lost = [name for name, item in items.items() if item.key not in vectors]
            if lost and source is None:
                raise StoreError(
                    f"{path} has lost the vectors of {len({items[name].key for name in lost})} contents; embed them "
                    f"again with `twofold index {head.source} --model {path / 'model'} --out {path}`."
                )
            if lost and source is not None:
                at = {name: i for i, name in enumerate(source.ids)}
                again = source.take(at[name] for name in lost if name in at)
                bundle = Bundle.load(path / "model")
                items |= embed_items(again, bundle, head.modality, vectors, "skip", progress)[0]
                items = {name: item for name, item in items.items() if item.key in vectors}
            if not items:
                raise StoreError(f"Nothing of {path} would be left. Delete it, or bring back {head.source}.")
            new = replace(head, snapshot=_next_snapshot(head), built=_now(), store=store or head.store, id=_id(head))
            if head.texts is not None:
                kept_texts = Vectors(path / "vectors", head.texts.fingerprint, head.texts.dim)
                kept_texts.drop(kept_texts.broken([content_key(text) for text in _all_texts(items)]))
                if kept_texts.missing([content_key(text) for text in _all_texts(items)]):
                    _embed_texts(path, _embedder(path, None, head, None), items, progress)
                new = replace(new, texts=replace(head.texts, rows=sum(len(item.texts) for item in items.values())))
            _write_snapshot(path, new, items, None, {})
            _publish(path, new, None, head)
        return sorted(held.keys() - items.keys())


def index(
    source: str | Path | Source,
    *,
    model: str | Path | Bundle,
    out: str | Path,
    on_error: OnError = "skip",
    existing: Existing = "keep",
    texts: str | TextEmbedder | None = None,
    modality: Modality | None = None,
    store: Kept | None = None,
    progress: Progress | None = None,
) -> Built:
    """Make a folder searchable, or bring its index up to date: `Index.build` by the names of things."""
    opened = source if isinstance(source, Source) else open_source(source)
    bundle = model if isinstance(model, Bundle) else Bundle.load(Path(model))
    return Index.build(
        opened,
        bundle,
        out,
        modality=modality,
        on_error=on_error,
        existing=existing,
        texts=texts,
        store=store,
        progress=progress,
    )


def search(
    index: str | Path,
    text: str | None = None,
    *,
    image: Picture | None = None,
    like: str | Sequence[str] = (),
    minus: str | None = None,
    k: int = 10,
    where: Where | None = None,
) -> list[Hit]:
    """Open an index and search it once (see `Retriever.search`); for several searches keep an `Index` open."""
    with Index.open(index) as opened:
        return opened.search(text, image=image, like=like, minus=minus, k=k, where=where)


# -- Items ------------------------------------------------------------------------------------------------------------


def embed_items(
    source: Source,
    bundle: Bundle,
    modality: Modality,
    vectors: Vectors,
    on_error: OnError,
    progress: Progress | None,
) -> tuple[dict[str, Item], list[Skipped]]:
    """The source's items, after their contents have vectors; and those that cannot have one."""
    keys = source.keys(modality)
    todo = vectors.missing(keys)  # a content that several items share is tried once
    done = embed(bundle, source.take(todo), modality, vectors=vectors, on_error=on_error, progress=progress, quiet=True)
    key_of = {source.ids[i]: keys[i] for i in todo}
    reasons = {key_of[name]: reason for name, reason in done.skipped}
    if source.modalities.get(modality) == "text" and done.ids:
        # `embed` keeps a vector for each text; the item's own is their mean direction
        units = done.matrix / np.linalg.norm(done.matrix, axis=1, keepdims=True)
        vectors.append([key_of[name] for name in done.ids], np.add.reduceat(units, done.offsets[:-1]))
    items, skipped = {}, []
    for i, (name, key) in enumerate(zip(source.ids, keys, strict=True)):
        if key in vectors:
            items[name] = Item(key, _meta(source, i))
        else:
            skipped.append(Skipped(name, reasons.get(key, "it changed while it was being read")))
    return items, skipped


def _first(source: Source, bundle: Bundle) -> Modality:
    """The source's first column that the bundle has a tower for."""
    first = next(iter(source.modalities), "image")  # which the bundle will say that it has no tower for
    return next((name for name in source.modalities if name in bundle.towers), first)


def _meta(source: Source, i: int) -> dict[str, Scalar]:
    """What a hit will show of item `i`: its first text, label, split, file, and the source's further columns."""
    columns: dict[str, object] = {}
    if source.texts is not None and source.texts[i]:
        columns["text"] = source.texts[i][0]
    if source.labels is not None and source.labels[i] >= 0:
        columns["label"] = source.classes[source.labels[i]] if source.classes else source.labels[i]
    if source.splits is not None:
        columns["split"] = source.splits[i]
    if source.images is not None and isinstance(image := source.images[i], Path):
        columns["image"] = image.resolve()
    for name, (kind, cells) in source.columns.items():
        if kind == "text" and cells[i]:
            columns[name] = cells[i][0]
        elif isinstance(cells[i], Path):
            columns[name] = cells[i].resolve()
    return scalars({name: column[i] for name, column in source.meta.items()} | columns)


def thumbnail_place(index: Path, id: str) -> Path:
    """Where the small picture of an item lies, once there is one; no id, whatever is in it, leads elsewhere."""
    name = hashlib.blake2b(id.encode(), digest_size=16).hexdigest()
    return index / "thumbs" / name[:2] / f"{name}.jpg"


def _save_map(path: Path, ids: list[str], places: Float[np.ndarray, "n 2"]) -> None:
    with open(path, "wb") as file:
        np.savez(file, ids=np.array(ids), places=places)


def keep_thumbnail(place: Path, content: bytes) -> None:
    """Whole or absent; it can be made again, so nobody waits until it is on the disk for certain."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    temporary.replace(place)


def _keep_thumbnails(path: Path, source: Source, found: dict[str, Item], old: dict[str, Item]) -> None:
    """Small pictures of items that have no file of their own, before the source is closed."""

    def wanted(name: str, image: Raw) -> bool:
        if isinstance(image, Path) or name not in found:
            return False
        return old.get(name) != found[name] or not thumbnail_place(path, name).exists()

    def make(one: tuple[str, Raw], _: str) -> None:
        keep_thumbnail(thumbnail_place(path, one[0]), thumbnail(one[1], THUMBNAIL, name=one[0]))

    pictures = list(zip(source.ids, source.images or (), strict=bool(source.images)))
    for _ in ahead([one for one in pictures if wanted(*one)], make):
        pass  # what has no picture is passed over: an item found by its text


# -- Texts ------------------------------------------------------------------------------------------------------------


def _embedder(
    path: Path, texts: str | TextEmbedder | None, was: Head | None, source: Source | None
) -> TextEmbedder | None:
    """The embedder of the items' texts, if they are to have one; it must be the one that they have."""
    held = was.texts if was else None
    if texts is None and was is not None:
        texts = held.embedder if held else "none"
    if texts is None:
        texts = "minilm" if source is not None and "text" in source.modalities.values() else "none"
    if texts == "none":
        return None
    embedder = text_embedder(texts) if isinstance(texts, str) else texts
    if held is not None and held.fingerprint != embedder.fingerprint:
        raise FingerprintMismatch(
            f"The texts of {path} were embedded by {held.embedder} ({held.fingerprint}), not by {embedder.name} "
            f"({embedder.fingerprint}); a score between the two would mean nothing. Run `twofold index` with "
            f"--texts none, which drops them and nothing else, then with --texts {embedder.name}."
        )
    return embedder


def _all_texts(items: dict[str, Item]) -> list[str]:
    return list(dict.fromkeys(text for item in items.values() for text in item.texts))


def _text_space(embedder: TextEmbedder, items: dict[str, Item]) -> Space:
    rows = sum(len(item.texts) for item in items.values())
    return Space("texts", embedder.fingerprint, embedder.dim, rows, embedder.name)


def _embed_texts(path: Path, embedder: TextEmbedder | None, items: dict[str, Item], progress: Progress | None) -> int:
    """Vectors of every text of the items; how many were made."""
    assert embedder is not None
    texts = _all_texts(items)
    keys = [content_key(text) for text in texts]
    vectors = Vectors(path / "vectors", embedder.fingerprint, embedder.dim)
    todo = vectors.missing(keys)
    made = embedder.embed_documents([texts[at] for at in todo], progress=progress) if todo else np.empty(0)
    for start in range(0, len(todo), CHUNK):
        some = todo[start : start + CHUNK]
        vectors.append([keys[at] for at in some], made[start : start + CHUNK])
    return len(todo)


def keep_fusion(path: Path, fusion: Fusion) -> Path:
    """Write how the two spaces of an index are fused; it holds for the encoders that made them."""
    record = {"spaces": [space.fingerprint for space in read_head(path).spaces]} | fusion.record()
    write_atomically(path / "fusion.json", lambda file: file.write_text(json.dumps(record, indent=2) + "\n", "utf-8"))
    return path / "fusion.json"


def _kept_fusion(path: Path, head: Head) -> Fusion:
    try:
        record = json.loads((path / "fusion.json").read_text("utf-8"))
        fits = record["spaces"] == [space.fingerprint for space in head.spaces]
        return Fusion.read(record) if fits else FUSION
    except FileNotFoundError:
        return FUSION
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path / 'fusion.json'} is damaged ({type(error).__name__}: {error}). Delete it, or make it again with "
            f"`twofold calibrate {path} --data DATA`."
        ) from error


def _annotated(path: Path) -> list[int]:
    """When what `calibrate` writes was last written; 0 where it was not."""
    files = (path / "fusion.json", path / "model" / "bundle.json")
    return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]


# -- The folder -------------------------------------------------------------------------------------------------------


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


def begun(
    source: Source, bundle: Bundle, path: Path, modality: Modality | None, existing: Existing, store: Kept | None = None
) -> tuple[Head | None, Head]:
    """What index.json says, if there is an index, and what it shall say; refuses another model's vectors among its own.

    Items go by the column `modality`, by that of the index, or by the source's first that the bundle has a tower for.
    """
    was = read_head(path) if (path / "index.json").exists() else None
    head = _new_head(source, bundle, modality or (was.modality if was else _first(source, bundle)), was, store)
    if was and existing != "replace":
        if was.modality != head.modality:
            raise UsageError(f"{path} is an index of {was.modality}s; make that of {head.modality}s in another folder.")
        if was.fingerprint != head.fingerprint:
            raise _mismatch(path, was, bundle, "MODEL")
    return was, head


def _new_head(source: Source, bundle: Bundle, modality: Modality, was: Head | None, store: Kept | None) -> Head:
    return Head(
        fingerprint=bundle.tower_fingerprint(modality),
        bundle=bundle.fingerprint,
        modality=modality,
        dim=bundle.dim,
        snapshot=_next_snapshot(was),
        source=source.name,
        built=_now(),
        store=store or (was.store if was else Kept()),
        id=_id(was),
    )


def _id(head: Head | None) -> str:
    return (head.id if head else "") or secrets.token_hex(6)


def _next_snapshot(head: Head | None) -> str:
    return f"{int(head.snapshot) + 1 if head else 1:04d}"


def _now() -> str:
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
    return dict(_lines(path, head))


def _lines(path: Path, head: Head) -> Iterator[tuple[str, Item]]:
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


def _exact(path: Path, space: Space, items: dict[str, Item]) -> ExactStore:
    rows = rows_of(space, items)
    store = ExactStore(fingerprint=space.fingerprint, dim=space.dim)
    vectors = Vectors(path / "vectors", space.fingerprint, space.dim)
    store.upsert(list(rows), vectors.get([row.key for row in rows.values()]), [row.meta for row in rows.values()])
    return store


def _opened(path: Path, head: Head, bundle: Bundle, *, exact: bool) -> Index:
    """An index with the stores of its spaces."""
    items = read_items(path, head) if exact else {}
    with contextlib.ExitStack() as undo:
        stores: list[Store] = []
        for space in head.spaces:
            stores.append(_exact(path, space, items) if exact else open_store(path, head, space))
            undo.callback(stores[-1].close)
        texts = None
        if head.texts is not None:
            texts = TextSpace(stores[1], lambda: _asked_by(head.texts, bundle), items=len(stores[0]))
        opened = Index(path, head, bundle, stores[0], texts)
        undo.pop_all()
    return opened


def _asked_by(space: Space | None, bundle: Bundle) -> TextEmbedder:
    """The embedder of a space of texts; the bundle's own encoder where it is the same, so that it is in memory once."""
    assert space is not None
    for tower in bundle.towers.values():
        if isinstance(tower.encoder, TextEncoder) and fingerprint(tower.encoder) == space.fingerprint:
            return LocalEmbedder(space.embedder, tower.encoder)
    return text_embedder(space.embedder)


def _keep_answers(path: Path) -> None:
    """Before another model comes in: how the one that is there answers what people judged."""
    with contextlib.suppress(StoreError, FingerprintMismatch, BundleError), Index.open(path) as old:
        keep_answers(old)  # an index that cannot be opened any more has no answers to keep


def _healthy(path: Path, head: Head, items: dict[str, Item]) -> bool:
    try:
        for space in head.spaces:
            with contextlib.closing(open_store(path, head, space)) as store:
                if store.ids() != sorted(rows_of(space, items)):
                    return False
    except StoreError:
        return False
    return True


def _write_snapshot(path: Path, head: Head, items: dict[str, Item], was: Head | None, old: dict[str, Item]) -> None:
    """Write the stores and the list of `items`: what changed in a copy of the old stores, or all in new ones."""
    # Chroma only marks what is deleted or replaced; past a half, a new store is smaller and finds better.
    same = sum(old.get(name) == item for name, item in items.items())
    if was is None or 2 * same < len(old):
        old = {}
    for space in head.spaces:
        stores, name = engine_of(path, head), store_name(head, space)
        stores.drop(name)  # of a build that was killed
        vectors = Vectors(path / "vectors", space.fingerprint, space.dim)
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
            _fill(path, head, space, rows, vectors, held)
        except (StoreError, OSError, sqlite3.Error):
            if not held:
                raise
            stores.drop(name)  # a copy of something damaged
            _fill(path, head, space, rows, vectors, {})
    write_atomically(_items_file(path, head), lambda file: _write_items(file, items))


def _fill(path: Path, head: Head, space: Space, rows: dict[str, Row], vectors: Vectors, old: dict[str, Row]) -> None:
    with contextlib.closing(open_store(path, head, space, write=True)) as store:
        if store.ids() != sorted(old):
            raise StoreError(f"The store {store_name(head, space)} does not hold the items that it should.")
        store.delete([name for name in old if name not in rows])
        todo = [name for name, row in rows.items() if old.get(name) != row]
        for start in range(0, len(todo), CHUNK):
            names = todo[start : start + CHUNK]
            store.upsert(names, vectors.get([rows[n].key for n in names]), [rows[n].meta for n in names])


def _publish(path: Path, head: Head, bundle: Bundle | None, was: Head | None) -> None:
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
    prints = {space.fingerprint for space in head.spaces}
    for folder in (path / "vectors").iterdir():
        if folder.name not in prints:
            shutil.rmtree(folder)


def _mismatch(path: Path, head: Head, bundle: Bundle, model: str) -> FingerprintMismatch:
    return FingerprintMismatch(
        f"{path} was made by the encoder {head.fingerprint}; this model's {head.modality} tower is "
        f"{bundle.tower_fingerprint(head.modality)}. Search with the model that made it, or make it again: "
        f"`twofold index {head.source} --model {model} --out {path} --existing replace`."
    )
