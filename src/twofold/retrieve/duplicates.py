"""The same picture twice in a collection: as the same bytes, or in another size, format or compression."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from twofold.data.decode import DecodeError, Skipped, ahead, decode, fit
from twofold.data.vectors import Joined
from twofold.mining.prints import perceptual_hashes
from twofold.retrieve.contents import thumbnail_place
from twofold.retrieve.modalities import MODALITY
from twofold.retrieve.snapshot import Item, Progress, item_vectors, read_head, read_items

SIDE = 32  # pixels of what a print is taken of
BITS = 6  # of 64 that two prints of one picture may differ in
COSINE = 0.9  # that two of one picture have at least: prints see no colour, the encoder does
BLOCK = 1024


class Twin(NamedTuple):
    """An item of a group and what it has in common with the first one: its bytes ("same"), or its look ("near")."""

    id: str
    kind: Literal["first", "same", "near"]
    bits: int  # in which their perceptual hashes differ
    cosine: float  # of their vectors


def duplicates(
    index: str | Path, *, bits: int = BITS, cosine: float = COSINE, progress: Progress | None = None
) -> list[list[Twin]]:
    """Groups of items of an index that are one picture, largest first; each item is in one group at most.

    Contents with equal keys are "same", whatever they are. Pictures are "near" whose perceptual hashes differ in `bits`
    places at most and whose vectors have at least that `cosine`. Everyone in a group is so near to its *first* item, so
    that no chain leads from one picture to quite another. Items without a readable picture are compared by key alone.
    """
    path = Path(index)
    head = read_head(path)
    items, several = read_items(path, head), len(head.modalities) > 1
    same: dict[str, list[str]] = {}
    for name in sorted(items):
        same.setdefault(items[name].key, []).append(name)
    firsts = [names[0] for names in same.values()]
    kinds = np.array([str(items[name].meta.get(MODALITY)) if several else "" for name in firsts])
    prints = _prints(path, items, firsts, progress)
    vectors = item_vectors(path, head, aside=False)
    groups: list[list[Twin]] = []
    taken = np.zeros(len(firsts), bool)
    for start in range(0, len(firsts), BLOCK):
        agree = prints[start : start + BLOCK] @ prints.T  # 64 − 2 · bits
        for row, first in enumerate(firsts[start : start + BLOCK], start):
            if taken[row]:
                continue
            alike = np.flatnonzero((agree[row - start] >= 64 - 2 * bits).numpy() & ~taken)
            alike = alike[(alike > row) & (kinds[alike] == kinds[row])]  # a clip is no twin of one of its frames
            group = [Twin(first, "first", 0, 1.0)]
            group += [Twin(other, "same", 0, 1.0) for other in same[items[first].key][1:]]
            for other, close in zip(alike, _cosines(vectors, items, first, [firsts[i] for i in alike]), strict=True):
                if close >= cosine:
                    taken[other] = True
                    apart = int(64 - agree[row - start, other]) // 2
                    group += [Twin(name, "near", apart, round(close, 4)) for name in same[items[firsts[other]].key]]
            if len(group) > 1:
                groups.append(group)
    return sorted(groups, key=lambda group: (-len(group), group[0].id))


def _prints(path: Path, items: dict[str, Item], names: list[str], progress: Progress | None) -> torch.Tensor:
    """The perceptual hash of each item's picture, ±1 [n, 64]; 0 where there is none that can be read."""
    prints = torch.zeros(len(names), 64)

    def look(name: str, _: str) -> np.ndarray:
        named = items[name].meta.get("image")
        place = Path(named) if isinstance(named, str) else thumbnail_place(path, name)
        if not place.exists():
            raise DecodeError(name, "has no picture")
        return fit(decode(place, name=name, enough=SIDE), SIDE, how="stretch")

    skipped: list[Skipped] = []
    for row, pixels in ahead(names, look, names=names, skipped=skipped):
        prints[row] = perceptual_hashes(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None])[0]
        if progress:
            progress(row + 1, len(names))
    return prints


def _cosines(vectors: Joined, items: dict[str, Item], first: str, others: list[str]) -> list[float]:
    if not others:
        return []
    rows = vectors.get([items[name].key for name in (first, *others)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows[1:] @ rows[0]).tolist()
