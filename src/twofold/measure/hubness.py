"""Two diseases of a space that two modalities share, and what helps.

The *modality gap*: pictures lie in one cone and texts in another (arXiv 2203.02053). The *hubs*: a few items are among
the nearest of very many queries, and others of none (Radovanović et al., JMLR 11, 2010). A `Remedy` changes the scores
so that hubs give way; `remedies` tries them all on held-out pairs and says what each has gained there.
"""

import base64
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int

from twofold.errors import DataError, unknown
from twofold.measure.metrics import Interval, Matrix, bootstrap, row_blocks, unit_rows
from twofold.measure.retrieval import Retrieval, retrieval

BANK = 1000  # queries that a remedy keeps, to know hubs by

Kind = Literal["centring", "qb-norm", "nnn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# The constants that are tried: inverse temperatures of qb-norm, (α, k) of nnn.
SHARPNESS = (10.0, 25.0)
SHARES = ((0.25, 8), (0.5, 8), (0.25, 32), (0.5, 32), (0.75, 32))


class Gap(NamedTuple):
    """How far two modalities lie apart as wholes."""

    distance: float  # between the means of their unit vectors, 0..2; 0 is none
    share: float  # of the mean squared distance between an item of one and an item of the other, 0..1
    norms: tuple[float, float]  # of the two means, 0..1: what all vectors of a modality have in common


class Hubness(NamedTuple):
    """How unevenly queries fall upon the items of a gallery."""

    k: int
    skewness: float  # of the k-occurrence, how many queries have an item among their first k; 0 where it is symmetric
    anti_hubs: float  # share of items that no query has among its first k, 0..1
    chance: float  # that share if every query drew its k items at random
    hubs: list[tuple[int, int]]  # the items that come most often, as (row, queries), worst first
    mean: float  # queries an item, on average


def gap(first: Matrix, second: Matrix) -> Gap:
    """The modality gap of arXiv 2203.02053, section 2: the distance of the two means, on unit vectors."""
    a, b = (unit_rows(x).double().mean(0) for x in (first, second))
    squared = float(((a - b) ** 2).sum())
    return Gap(
        distance=math.sqrt(squared),
        share=squared / max(2 - 2 * float(a @ b), 1e-12),
        norms=(float(a.norm()), float(b.norm())),
    )


def hubness(
    queries: Matrix, gallery: Matrix, *, k: int = 10, worst: int = 5, remedy: "Remedy | None" = None
) -> Hubness:
    """The k-occurrence of the gallery's items over all queries: its skewness, the items left out, the worst hubs."""
    k = min(k, len(gallery))
    counts = np.zeros(len(gallery), np.int64)
    for block in row_blocks(len(queries), len(gallery)):
        scores = torch.from_numpy((remedy or PLAIN).scores(queries[block], gallery))
        counts += np.bincount(scores.topk(k, 1).indices.flatten().numpy(), minlength=len(gallery))
    away = counts - counts.mean()
    deviation = math.sqrt(float((away**2).mean()))
    hubs = np.argsort(-counts, kind="stable")[:worst]
    return Hubness(
        k=k,
        skewness=float((away**3).mean()) / deviation**3 if deviation > 0 else 0.0,
        anti_hubs=float((counts == 0).mean()),
        chance=(1 - k / len(gallery)) ** len(queries),
        hubs=[(int(row), int(counts[row])) for row in hubs],
        mean=float(counts.mean()),
    )


class Gain(NamedTuple):
    """What a remedy gained over plain cosines, on the same held-out queries; paired, so intervals are narrow."""

    recall: dict[int, Interval]
    map: Interval
    split: str = ""


@dataclass(frozen=True, eq=False)
class Remedy:
    """Another score than the cosine, for queries of one modality against a gallery of another.

    `centring`: cosines after each modality's mean (the two rows of `vectors`) is taken off.
    `qb-norm`: the cosine, less how much a bank of queries (`vectors`) likes the item: ln mean exp(β·cosine) / β. It
    orders as the inverted softmax of arXiv 2112.12777 does, and stays on the scale of a cosine.
    `nnn`: the cosine, less α times the mean of the item's k best cosines with the bank (arXiv 2410.24114).

    An item's score depends on the query, the item and the constants, never on what else is in the gallery.
    """

    kind: Kind | Literal["none"]
    vectors: Float[np.ndarray, "v d"]
    strength: float = 1.0  # β of qb-norm, α of nnn
    neighbours: int = 1  # k of nnn
    gain: Gain | None = None

    def moved(self, queries: Matrix, gallery: Matrix) -> tuple[Float[np.ndarray, "q d"], Float[np.ndarray, "n d"]]:
        """Both sides as unit vectors, centred if this is what the remedy does."""
        sides = [unit_rows(side).cpu().numpy() for side in (queries, gallery)]
        if self.kind == "centring":
            sides = [unit_rows(side - mean).numpy() for side, mean in zip(sides, self.vectors, strict=True)]
        return sides[0], sides[1]

    def penalty(self, gallery: Matrix) -> Float[np.ndarray, "n"]:
        """What is taken off every cosine with an item, because queries like it too much."""
        items = unit_rows(gallery).cpu()
        if self.kind in ("none", "centring"):
            return np.zeros(len(items), np.float32)
        bank = torch.from_numpy(self.vectors)
        parts = []
        for block in row_blocks(len(items), len(bank)):
            liked = items[block] @ bank.T
            if self.kind == "nnn":
                parts.append(self.strength * liked.topk(min(self.neighbours, len(bank)), 1).values.mean(1))
            else:
                parts.append((torch.logsumexp(self.strength * liked, 1) - math.log(len(bank))) / self.strength)
        return torch.cat(parts).numpy()

    def scores(self, queries: Matrix, gallery: Matrix) -> Float[np.ndarray, "q n"]:
        """The corrected scores, higher is better; their zero has no meaning."""
        asked, items = self.moved(queries, gallery)
        return asked @ items.T - self.penalty(gallery)

    def record(self) -> dict[str, Any]:
        """As JSON; vectors as base64 of float16."""
        packed = base64.b64encode(self.vectors.astype("<f2").tobytes()).decode()
        return {
            "kind": self.kind,
            "strength": self.strength,
            "neighbours": self.neighbours,
            "dim": self.vectors.shape[1],
            "vectors": packed,
            "gain": None
            if self.gain is None
            else {**self.gain._asdict(), "recall": {str(k): list(v) for k, v in self.gain.recall.items()}},
        }

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Remedy":
        """What `record` wrote."""
        vectors = np.frombuffer(base64.b64decode(record["vectors"]), "<f2").reshape(-1, record["dim"])
        gain = record["gain"]
        return cls(
            record["kind"],
            vectors.astype(np.float32),
            strength=record["strength"],
            neighbours=record["neighbours"],
            gain=gain
            and Gain({int(k): Interval(*v) for k, v in gain["recall"].items()}, Interval(*gain["map"]), gain["split"]),
        )


PLAIN = Remedy("none", np.zeros((0, 1), np.float32))


def remedies(
    queries: Matrix,
    gallery: Matrix,
    positives: Sequence[Sequence[int]],
    *,
    banks: tuple[Matrix, Matrix],
    groups: Sequence[Hashable] | None = None,
    kinds: Sequence[str] = KINDS,
    split: str = "",
) -> list[Remedy]:
    """The remedies, each with the best of a few constants and its gain on these held-out pairs, largest gain first.

    `banks` are other queries and other items, from which means and hubs are known: never those held out, since a query
    that is in the bank is punished for finding its own item. Constants and order are chosen by mAP.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("remedy", kind, KINDS)
    asked, items = (unit_rows(bank).cpu().numpy() for bank in banks)
    # Rounded as they will be kept, so that what is measured is what is applied.
    means = np.stack([asked.mean(0), items.mean(0)]).astype(np.float16).astype(np.float32)
    bank = asked[_spread(len(asked), BANK)].astype(np.float16).astype(np.float32)
    tried: dict[str, list[Remedy]] = {
        "centring": [Remedy("centring", means)],
        "qb-norm": [Remedy("qb-norm", bank, strength=beta) for beta in SHARPNESS],
        "nnn": [Remedy("nnn", bank, strength=alpha, neighbours=k) for alpha, k in SHARES],
    }
    before = retrieval(queries, gallery, positives, groups=groups)

    def gained(remedy: Remedy) -> Remedy:
        after = remedied(remedy, queries, gallery, positives, groups=groups)
        return replace(remedy, gain=compared(before, after, groups=groups, split=split))

    best = [max(map(gained, tried[kind]), key=_by_map) for kind in kinds]
    return sorted(best, key=_by_map, reverse=True)


def remedied(
    remedy: Remedy,
    queries: Matrix,
    gallery: Matrix,
    positives: Sequence[Sequence[int]],
    *,
    groups: Sequence[Hashable] | None = None,
) -> Retrieval:
    """`retrieval` by the scores of a remedy."""
    return retrieval(*remedy.moved(queries, gallery), positives, groups=groups, penalty=remedy.penalty(gallery))


def compared(before: Retrieval, after: Retrieval, *, groups: Sequence[Hashable] | None = None, split: str = "") -> Gain:
    """`after` less `before`, of the same queries in the same order."""
    if len(before.ranks) != len(after.ranks):
        raise DataError(f"Compare the same queries; got {len(before.ranks)} and {len(after.ranks)}.")
    return Gain(
        recall={
            k: bootstrap((after.ranks <= k).astype(float) - (before.ranks <= k), groups=groups) for k in before.recall
        },
        map=bootstrap(after.precisions - before.precisions, groups=groups),
        split=split,
    )


def _by_map(remedy: Remedy) -> float:
    assert remedy.gain is not None
    return remedy.gain.map.value


def _spread(total: int, wanted: int) -> Int[np.ndarray, "w"]:
    """Rows at even distances, so that a bank holds texts of many items."""
    return np.linspace(0, total - 1, min(total, wanted)).round().astype(np.int64)
