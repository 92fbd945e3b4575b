"""What an index takes from a source: a vector of each item, the columns that a hit shows, and small pictures."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twofold.data.decode import OnError, Raw, Skipped, ahead, thumbnail
from twofold.data.sources import Modality, Source
from twofold.data.vectors import Joined, Vectors
from twofold.data.video import Clip, still
from twofold.errors import DataError, DecodeError, UsageError
from twofold.measure.embed import embed
from twofold.models.bundle import Tower
from twofold.retrieve.modalities import MODALITY, found_by, has
from twofold.retrieve.snapshot import Item, Progress
from twofold.retrieve.store import Scalar, scalars

THUMBNAIL = 320  # pixels of the longer side


class Content(NamedTuple):
    """By what an item is found: one of the modalities that it has, and the key of what it has there."""

    modality: Modality
    key: str


def contents_of(source: Source, modalities: Sequence[Modality]) -> list[Content | None]:
    """What each item is found by, of the first of `modalities` that it has; None where it has none of them."""
    if len(modalities) == 1:  # what is missing is named by embedding, for a file and a blank are not the same there
        return [Content(modalities[0], key) for key in source.keys(modalities[0])]
    found = found_by(source, modalities)
    contents: list[Content | None] = [None] * len(source)
    for name in modalities:
        at = [i for i, own in enumerate(found) if own == name]
        keys = source.take(at).keys(name) if at else []  # a source may have lost a modality altogether
        for i, key in zip(at, keys, strict=True):
            contents[i] = Content(name, key)
    return contents


def embed_items(
    source: Source,
    towers: Mapping[Modality, Tower],
    vectors: Joined,
    on_error: OnError,
    progress: Progress | None,
) -> tuple[dict[str, Item], list[Skipped]]:
    """The source's items, after their contents have vectors; and those that cannot have one."""
    contents = contents_of(source, list(towers))
    # a content that several items share is tried once
    todo = {name: vectors.parts[name].missing(_keys(contents, name)) for name in towers}
    reasons: dict[str, str] = {}
    total, before = sum(map(len, todo.values())), 0
    for name, tower in towers.items():
        at = [i for i, content in enumerate(contents) if content is not None and content.modality == name]
        chosen = source.take([at[n] for n in todo[name]])

        def tell(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        failed = _embed_column(chosen, name, tower, vectors.parts[name], on_error, tell)
        reasons |= {vectors.key(name, key): reason for key, reason in failed.items()}
        before += len(todo[name])
    items, skipped = {}, []
    for i, (name, content) in enumerate(zip(source.ids, contents, strict=True)):
        if content is None:
            skipped.append(Skipped(name, f"has no {' and no '.join(towers)}"))
        elif content.key in vectors.parts[content.modality]:
            items[name] = Item(vectors.key(*content), _meta(source, i, content.modality if len(towers) > 1 else None))
        else:
            skipped.append(Skipped(name, reasons.get(vectors.key(*content), "it changed while it was being read")))
    if skipped and on_error == "raise":
        raise DataError(f"{source.name}: {skipped[0].id} {skipped[0].reason}.")
    return items, skipped


def _keys(contents: Sequence[Content | None], modality: Modality) -> list[str]:
    return [content.key for content in contents if content is not None and content.modality == modality]


def _embed_column(
    source: Source, modality: Modality, tower: Tower, vectors: Vectors, on_error: OnError, tell: Progress
) -> dict[str, str]:
    """Vectors of what all of `source` has in this column; why some have none, by their keys."""
    if not len(source):
        return {}
    done = embed(tower, source, modality, vectors=vectors, on_error=on_error, progress=tell, quiet=True)
    key_of = dict(zip(source.ids, source.keys(modality), strict=True))
    if tower.kind == "text" and done.ids:
        # `embed` keeps a vector for each text; the item's own is their mean direction
        units = done.matrix / np.linalg.norm(done.matrix, axis=1, keepdims=True)
        vectors.append([key_of[name] for name in done.ids], np.add.reduceat(units, done.offsets[:-1]))
    return {key_of[name]: reason for name, reason in done.skipped}


def _meta(source: Source, i: int, modality: Modality | None) -> dict[str, Scalar]:
    """What a hit will show of item `i`: its first text, label, split, file, and the source's further columns.

    In an index of several modalities, also by which it is found.
    """
    columns: dict[str, object] = {} if modality is None else {MODALITY: modality}
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
        elif kind != "text" and isinstance(cells[i], Path):
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


@dataclass(frozen=True)
class Still:
    """A clip that stands for itself by one of its frames."""

    clip: Clip


def keep_thumbnails(path: Path, source: Source, found: dict[str, Item], old: dict[str, Item]) -> None:
    """Small pictures of items that have no file of their own, before the source is closed; of clips, a frame."""

    def wanted(name: str, image: Raw | Still) -> bool:
        if isinstance(image, Path) or name not in found:
            return False
        return old.get(name) != found[name] or not thumbnail_place(path, name).exists()

    def make(one: tuple[str, Raw | Still], _: str) -> None:
        name, image = one
        try:
            pixels = still(image.clip, name=name) if isinstance(image, Still) else image
        except UsageError as error:  # no PyAV: an item with a clip that is found by something else
            raise DecodeError(name, str(error)) from error
        keep_thumbnail(thumbnail_place(path, name), thumbnail(pixels, THUMBNAIL, name=name))

    pictures: list[Raw | Still] = list(source.images or [b""] * len(source))
    for kind, cells in source.columns.values():
        if kind == "video":
            pictures = [
                Still(own) if not has(seen) and has(own) else seen for seen, own in zip(pictures, cells, strict=True)
            ]
    shown = zip(source.ids, pictures, strict=True)
    for _ in ahead([one for one in shown if has(one[1]) and wanted(*one)], make):
        pass  # what has no picture is passed over: an item found by its text
