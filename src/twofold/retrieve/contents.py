"""What an index takes from a source: a vector of each item, the columns that a hit shows, and small pictures."""

import hashlib
import secrets
from pathlib import Path

import numpy as np

from twofold.data.decode import OnError, Raw, Skipped, ahead, thumbnail
from twofold.data.sources import Modality, Source
from twofold.data.vectors import Vectors
from twofold.measure.embed import embed
from twofold.models.bundle import Bundle
from twofold.retrieve.snapshot import Item, Progress
from twofold.retrieve.store import Scalar, scalars

THUMBNAIL = 320  # pixels of the longer side


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


def keep_thumbnail(place: Path, content: bytes) -> None:
    """Whole or absent; it can be made again, so nobody waits until it is on the disk for certain."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    temporary.replace(place)


def keep_thumbnails(path: Path, source: Source, found: dict[str, Item], old: dict[str, Item]) -> None:
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
