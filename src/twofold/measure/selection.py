"""Which checkpoint, when there are no labels? Scores of embeddings alone, higher where they promise more."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twofold.errors import DataError
from twofold.measure.collapse import alignment, alpha_req, anisotropy, effective_rank, lidar, spread, uniformity
from twofold.measure.metrics import CELLS, TIE, Interval, Matrix, row_blocks, unit_rows
from twofold.runtime import generator

Values = Sequence[float] | Float[np.ndarray, "n"]


def view_retrieval(x: Matrix, y: Matrix) -> float:
    """How often a view (row i of `x`) is nearer to the other view of its picture (row i of `y`) than to any other
    picture's, 0..1; a tie is a miss, so one point scores 0."""
    u, v = unit_rows(x), unit_rows(y)
    if u.shape != v.shape:
        raise DataError(f"View retrieval pairs row i of both matrices; got {tuple(u.shape)} and {tuple(v.shape)}.")
    found = 0
    for block in row_blocks(len(u), len(v), CELLS):
        cosines = u[block] @ v.T
        own = (u[block] * v[block]).sum(1, keepdim=True)
        found += int(((cosines >= own - TIE).sum(1) == 1).sum())
    return found / len(u)


def scores(z: Matrix, views: Float[Tensor, "m q d"] | None = None) -> dict[str, float]:
    """Label-free scores of embeddings of plain pictures, and of q embeddings of views of each of m pictures.

    The signs of alignment, uniformity and anisotropy are turned, and α-ReQ is minus its distance from 1, so that more
    is better in each.
    """
    alpha = alpha_req(z)
    found = {
        "RankMe": effective_rank(z),
        "α-ReQ": -abs(alpha - 1) if alpha == alpha else -10.0,  # NaN: fewer than three axes
        "spread": spread(z),
        "isotropy": -anisotropy(z),
        "uniformity": -uniformity(z),
    }
    if views is not None:
        first, second = views[:, 0], views[:, 1]
        found |= {
            "LiDAR": lidar(views),
            "alignment": -alignment(first, second),
            "alignment + uniformity": -alignment(first, second) - uniformity(first),
            "view retrieval": view_retrieval(first, second),
        }
    return found


def ranks(values: Values) -> Float[np.ndarray, "n"]:
    """Places in ascending order from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(x: Values, y: Values, *, within: Sequence[Hashable] | None = None) -> float:
    """The correlation of ranks, −1..1; 0 where all of one side are equal.

    With `within`, ranks are taken within each group and around the group's mean: what is left to say of two runs of
    one method. Groups of one run say nothing.
    """
    if len(x) != len(y) or (within is not None and len(within) != len(x)):
        raise DataError(f"A score and a result of each run; got {len(x)} and {len(y)}.")
    groups = [0] * len(x) if within is None else list(within)
    members = {name: [i for i, own in enumerate(groups) if own == name] for name in dict.fromkeys(groups)}
    a, b = np.zeros(len(x)), np.zeros(len(x))
    for at in members.values():
        for side, values in ((a, x), (b, y)):
            own = ranks(np.asarray(values, float)[at])
            side[at] = (own - own.mean()) / max(1, len(at))
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length else 0.0


def correlation(
    x: Values, y: Values, *, within: Sequence[Hashable] | None = None, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """`spearman` with its percentile bootstrap interval over runs; runs of a group are drawn within it."""
    groups = [0] * len(x) if within is None else list(within)
    members = [[i for i, own in enumerate(groups) if own == name] for name in dict.fromkeys(groups)]
    draw = generator("correlation")
    x, y = np.asarray(x, float), np.asarray(y, float)
    found = []
    for _ in range(resamples):
        at = [own[k] for own in members for k in torch.randint(len(own), (len(own),), generator=draw).tolist()]
        found.append(spearman(x[at], y[at], within=[groups[i] for i in at]))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(spearman(x, y, within=within), low, high)
