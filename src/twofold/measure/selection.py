"""Which checkpoint, when there are no labels? Scores of embeddings alone, higher where they promise more."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.data.cache import decoded
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.measure.collapse import alignment, alpha_req, anisotropy, effective_rank, lidar, spread, uniformity
from twofold.measure.metrics import CELLS, TIE, Interval, Matrix, row_blocks, unit_rows
from twofold.models.bundle import Bundle
from twofold.models.encoders import ImageEncoder, device_of, inference
from twofold.runtime import generator
from twofold.views import Policy, policies

BATCH, VIEWED = 64, 512  # pictures embedded at once; pictures whose views are compared
BEST = "view retrieval"


class Trust(NamedTuple):
    """How well a score went with kNN accuracy: rank correlations over 36 trainings, and among those of one method."""

    across: Interval
    within: Interval


TRUST: dict[str, Trust] = {
    "view retrieval": Trust(Interval(0.90, 0.80, 0.95), Interval(0.78, 0.47, 0.92)),
    "alignment + uniformity": Trust(Interval(0.72, 0.46, 0.88), Interval(0.83, 0.53, 0.96)),
    "uniformity": Trust(Interval(0.59, 0.31, 0.77), Interval(0.62, 0.26, 0.82)),
    "α-ReQ": Trust(Interval(0.56, 0.25, 0.77), Interval(0.53, 0.10, 0.76)),
    "RankMe": Trust(Interval(0.51, 0.18, 0.75), Interval(0.47, 0.02, 0.71)),
    "spread": Trust(Interval(0.25, -0.11, 0.55), Interval(0.28, -0.17, 0.64)),
    "isotropy": Trust(Interval(0.25, -0.11, 0.55), Interval(0.28, -0.17, 0.64)),
    "alignment": Trust(Interval(0.02, -0.34, 0.40), Interval(0.12, -0.32, 0.53)),
    "LiDAR": Trust(Interval(-0.20, -0.59, 0.21), Interval(-0.15, -0.57, 0.26)),
}
"""On CIFAR-10, by views that are the same for all: benchmarks/selection.py, docs/how-to/which-checkpoint.md."""

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


def ranks(values: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
    """Places along the last axis in ascending order from 0; equal values share the mean of theirs."""
    values = np.asarray(values, float)
    one, other = values[..., :, None], values[..., None, :]
    return (one > other).sum(-1) + ((one == other).sum(-1) - 1) / 2


def spearman(x: Values, y: Values, *, within: Sequence[Hashable] | None = None) -> float:
    """The correlation of ranks, −1..1; 0 where all of one side are equal.

    With `within`, ranks are taken within each group and around the group's mean: what is left to say of two runs of
    one method. Groups of one run say nothing.
    """
    members = _members(x, y, within)
    return float(_spearman(np.asarray(x, float), np.asarray(y, float), [at[None] for at in members])[0])


def correlation(
    x: Values, y: Values, *, within: Sequence[Hashable] | None = None, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """`spearman` with its percentile bootstrap interval over runs; runs of a group are drawn within it."""
    members = _members(x, y, within)
    draw = generator("correlation")
    drawn = [
        [at[torch.randint(len(at), (len(at),), generator=draw).numpy()] for at in members] for _ in range(resamples)
    ]
    found = _spearman(np.asarray(x, float), np.asarray(y, float), [np.stack(at) for at in zip(*drawn, strict=True)])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(spearman(x, y, within=within), low, high)


def _members(x: Values, y: Values, within: Sequence[Hashable] | None) -> list[Int[np.ndarray, "m"]]:
    """The runs of each group."""
    groups = [0] * len(x) if within is None else list(within)
    if not len(x) == len(y) == len(groups):
        raise DataError(f"A score and a result of each run; got {len(x)} and {len(y)}.")
    return [np.array([i for i, own in enumerate(groups) if own == name]) for name in dict.fromkeys(groups)]


def _spearman(
    x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], members: Sequence[Int[np.ndarray, "r m"]]
) -> Float[np.ndarray, "r"]:
    """The correlation for each of r choices of runs, group by group; ranks within a group go by their share of it."""
    product, one, other = (np.zeros(len(members[0])) for _ in range(3))
    for at in members:
        a, b = (ranks(side[at]) / at.shape[1] for side in (x, y))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        product, one, other = product + (a * b).sum(1), one + (a * a).sum(1), other + (b * b).sum(1)
    length = np.sqrt(one * other)
    return np.divide(product, length, out=np.zeros_like(product), where=length > 0)


def judging(name: str, size: int, channels: int) -> Policy:
    """The views by which models are judged, whatever they trained with: pixels in 0..1, at the encoder's size."""
    policy = replace(policies(name)[0], size=size, mean=(), std=())
    return policy if channels == 3 else policy.without("saturation", "hue", "gray")


def trusted(name: str = BEST) -> str:
    """How far a score can be trusted, in words; where it went with accuracy in no sure way, it says so."""
    trust = TRUST[name]
    sure = "" if trust.across.low > 0 else "; do not choose by it"
    across, within = (f"{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in trust)
    return f"rank correlation with kNN {across} over 36 CIFAR-10 trainings, {within} within a method{sure}"


def looked_at(
    models: Mapping[str, Bundle], source: Source, *, policy: str = "simclr", limit: int = 2000
) -> dict[str, dict[str, float]]:
    """`scores` of models by pictures that need no labels, the most promising first.

    All see the same views, whatever they trained with: a training on easy views would otherwise look best. `limit`
    pictures are embedded, and four views of the first 512.
    """
    found = {}
    source = source.sample(limit)
    for name, bundle in models.items():
        tower = bundle.tower("image")
        if not isinstance(tower.encoder, ImageEncoder):
            raise UsageError(f"{name}: scores without labels are of encoders of pictures.")
        size = tower.encoder.size
        stored = size if size <= 64 else size * 8 // 7
        pixels = torch.from_numpy(np.array(decoded(source, stored, channels=tower.encoder.channels).pixels))
        if len(pixels) < 8:
            raise DataError(
                f"{source.name} has {len(pixels)} readable pictures; eight are the least to say anything of."
            )
        judge, plain = (judging(each, size, tower.encoder.channels) for each in (policy, "none"))
        draw, device = generator("selection"), device_of(tower)

        def embedded(view, pictures: Tensor, draw=draw, device=device, tower=tower) -> Tensor:
            with inference(tower):
                return torch.cat([tower(view(some, draw).to(device)).float().cpu() for some in pictures.split(BATCH)])

        views = torch.stack([embedded(judge, pixels[:VIEWED]) for _ in range(4)], 1)
        found[name] = scores(embedded(plain, pixels), views)
    return dict(sorted(found.items(), key=lambda entry: -entry[1][BEST]))
