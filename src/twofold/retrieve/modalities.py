"""Which modalities an index holds, and by which of them each item is found.

An index of pictures has one. Of a source whose rows are now a picture, now a text, now a clip, an index has several, in
an order of preference: an item's vector comes from the first that it has. All lie in the one space of the model. Clips
need no tower of their own: where the model has none, its picture tower reads frames, and the index says so.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twofold.data.sources import KINDS, Kind, Modality, Source
from twofold.data.video import LONGEST
from twofold.errors import UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.clips import video_encoder
from twofold.models.images import ImageEncoder

MODALITY = "modality"  # the column that says by which an item is found, where an index has several
FRAMES = 8  # of a clip, evenly from its first to its last, whose average a picture tower makes


def named(modality: Modality | Sequence[Modality] | None) -> tuple[Modality, ...]:
    """The modalities that are asked for: one, several, or several in a word, "image,text"."""
    words = modality.split(",") if isinstance(modality, str) else modality or ()
    return tuple(dict.fromkeys(filter(None, map(str.strip, words))))


def towers_of(
    bundle: Bundle, modalities: Sequence[Modality], frames: Mapping[Modality, int] = {}
) -> dict[Modality, Tower]:
    """The tower of each; `frames` says of which clips the picture tower reads how many."""
    return {name: by_frames(bundle, frames[name]) if name in frames else bundle.tower(name) for name in modalities}


def by_frames(bundle: Bundle, frames: int) -> Tower:
    """The picture tower as one of clips: its features of `frames` frames, averaged, through its head."""
    tower = picture_tower(bundle)
    if tower is None:
        raise UsageError(
            "This bundle has neither a video tower nor a picture tower that could read frames: its towers are "
            f"{', '.join(bundle.towers)}."
        )
    assert isinstance(tower.encoder, ImageEncoder)
    return Tower(video_encoder(tower.encoder, frames=frames, stride=LONGEST, tubelet=None), tower.head)


def picture_tower(bundle: Bundle) -> Tower | None:
    """The tower that reads pictures, if there is exactly one, or one that is called "image"."""
    seeing = {name: tower for name, tower in bundle.towers.items() if isinstance(tower.encoder, ImageEncoder)}
    return seeing.get("image") or (next(iter(seeing.values())) if len(seeing) == 1 else None)


def fingerprint_of(prints: Mapping[Modality, str]) -> str:
    """Of the encoders of an index: of one its own, of several a hash of all of them."""
    if len(prints) == 1:
        return next(iter(prints.values()))
    return hashlib.blake2b(json.dumps(prints, sort_keys=True).encode(), digest_size=16).hexdigest()


def default_modality(source: Source, bundle: Bundle) -> Modality:
    """What items are found by if nothing is said: of what the bundle can embed, what most items of `source` have.

    Texts, which often only tell of the others, where there is nothing else. Several modalities are never taken unasked:
    a few rows without a picture would have their turn in every answer.
    """
    kinds = source.modalities
    known = [name for name in kinds if name in bundle.towers or (kinds[name] == "video" and picture_tower(bundle))]
    having = {name: sum(map(has, source.column(name).cells)) for name in known}
    first = next(iter(kinds), "image")
    return max(known, key=lambda name: (having[name] > 0, kinds[name] != "text", having[name]), default=first)


def left_out(source: Source, modalities: Sequence[Modality]) -> Counter[Modality]:
    """How many of the items that have none of `modalities` have which other one, the first of them; texts last."""
    others = sorted(set(source.modalities) - set(modalities), key=lambda name: source.modalities[name] == "text")
    pairs = zip(found_by(source, modalities), found_by(source, others), strict=True)
    return Counter(other for own, other in pairs if own is None and other is not None)


def read_by_frames(
    source: Source, bundle: Bundle, modalities: Sequence[Modality], held: Mapping[Modality, int] = {}
) -> dict[Modality, int]:
    """Those of the modalities that are clips and have no tower, with how many frames of each are read.

    `held` is what an index says, of a source that has no such column any more.
    """
    kinds = source.modalities
    clips = [name for name in modalities if kinds.get(name, "video" if name in held else "") == "video"]
    return {name: held.get(name, FRAMES) for name in clips if name not in bundle.towers}


def found_by(source: Source, modalities: Sequence[Modality]) -> list[Modality | None]:
    """The first of `modalities` that each item has; None where it has none of them.

    A source may have lost a modality altogether: a folder whose clips are all gone.
    """
    found: list[Modality | None] = [None] * len(source)
    for name in [name for name in reversed(modalities) if name in source.modalities]:
        cells = source.column(name).cells
        found = [name if has(cell) else other for cell, other in zip(cells, found, strict=True)]
    return found


def has(cell: Any) -> bool:
    """Whether there is something in a cell; a file may still be missing or damaged, which embedding will say."""
    if isinstance(cell, np.ndarray):
        return bool(cell.size)
    return any(map(str.strip, cell)) if isinstance(cell, list | tuple) else bool(cell)


def kinds_of(modalities: Sequence[Modality]) -> tuple[Kind, ...]:
    """Those that are called like a kind: what is taken from a folder of files of several kinds."""
    return tuple(kind for name in modalities for kind in KINDS if kind == name)
