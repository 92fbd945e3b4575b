"""Which triplets to learn from: embeddings and labels in, index tensors out.

Anchor and positive are two rows of one label, the negative is a row of another. Miners L2-normalise, compare in float32
at least, and pass no gradient: take the rows (`z[mined.anchor]`) and give them to `objectives.triplet_margin`. They go
through the anchors block by block: beside the triplets themselves, what they hold at once does not grow with the batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from twofold.objectives.tiled import hardest

BLOCK = 1 << 22  # entries of the tables that are looked at together


class Triplets(NamedTuple):
    """Row numbers; the i-th triplet is (anchor[i], positive[i], negative[i]). Empty where no triplet is valid."""

    anchor: Int64[Tensor, "t"]
    positive: Int64[Tensor, "t"]
    negative: Int64[Tensor, "t"]


def batch_all(z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], *, margin: float = math.inf) -> Triplets:
    """Every valid triplet whose negative is not farther than its positive by `margin`, in squared distance.

    The list is as long as it is: up to n³/4, for two labels. `objectives.triplet_batch_all` is the loss of all of them
    without the list.
    """
    found = []
    for at, cosine, positive, negative in _blocks(z, labels, row=len(z) ** 2):
        # ‖a − p‖² − ‖a − n‖² + margin > 0, where ‖a − b‖² is 2 − 2 cos
        violates = 2 * (cosine[:, None, :] - cosine[:, :, None]) + margin > 0
        anchor, *others = (positive[:, :, None] & negative[:, None, :] & violates).nonzero(as_tuple=True)
        found.append(Triplets(at[anchor], *others))
    return _joined(found)


def batch_hard(z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"]) -> Triplets:
    """The farthest positive and the nearest negative of each anchor that has both (arXiv 1703.07737, section 2)."""
    positive, negative = hardest(_unit(z, labels), labels)
    (anchor,) = ((positive >= 0) & (negative >= 0)).nonzero(as_tuple=True)
    return Triplets(anchor, positive[anchor], negative[anchor])


def semi_hard(z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"]) -> Triplets:
    """For each anchor and positive the nearest of the negatives that are farther away (arXiv 1503.03832, section 3.2).

    FaceNet's semi-hard ones lie inside the margin, too; where none does, this one costs nothing. Where every negative
    is nearer than the positive, the farthest of them is taken: the least wrong, which pushes least towards collapse.
    """
    found = []
    for at, cosine, positive, negative in _blocks(z, labels):
        far_to_near = cosine.masked_fill(~negative, math.inf).sort(dim=1, stable=True)
        farther = torch.searchsorted(far_to_near.values, cosine)  # how many negatives are, for each possible positive
        chosen = far_to_near.indices.gather(1, (farther - 1).clamp(min=0))
        anchor, other = (positive & negative.any(1, keepdim=True)).nonzero(as_tuple=True)
        found.append(Triplets(at[anchor], other, chosen[anchor, other]))
    return _joined(found)


def distance_weighted(
    z: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    draw: torch.Generator,
    *,
    nearest: float = 0.5,
    farthest: float = 1.4,
) -> Triplets:
    """For each anchor and positive a random negative, of all distances alike (arXiv 1706.07567, section 4).

    The chance of a negative at distance D is in proportion to 1/q(D), where q(D) ∝ Dᵈ⁻²(1 − D²/4)^((d−3)/2) is how
    often two random points of the sphere are that far apart. Nearer than `nearest` counts as `nearest` (the paper's λ),
    and what lies beyond `farthest` is drawn only where nothing else is left (the authors' code).
    """
    unit = _unit(z, labels)
    most = int(labels.unique(return_counts=True)[1].max()) - 1  # positives of one anchor
    noise = torch.rand(len(z), most, generator=draw, device=draw.device).to(unit)
    d = z.shape[1]
    found = []
    for at, cosine, positive, negative in _blocks(z, labels):
        square = 2 - 2 * cosine
        within = negative & (square < farthest**2)
        square = square.clamp(nearest**2, farthest**2)
        log_weight = (2 - d) / 2 * square.log() + (3 - d) / 2 * (1 - square / 4).log()
        among = torch.where(within.any(1, keepdim=True), within, negative)
        weight = log_weight.masked_fill(~among, -math.inf).softmax(1)
        # Where rounding lets the sum creep up on a row that has no weight, that row must not be drawn.
        reached = weight.cumsum(1).masked_fill(weight == 0, -math.inf).cummax(1).values
        chosen = torch.searchsorted(reached, noise[at] * reached[:, -1:], right=True)
        turn = positive.cumsum(1) - 1  # an anchor's positives take their noise one after the other
        anchor, other = (positive & negative.any(1, keepdim=True)).nonzero(as_tuple=True)
        found.append(Triplets(at[anchor], other, chosen[anchor, turn[anchor, other]]))
    return _joined(found)


def _blocks(
    z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], *, row: int | None = None
) -> Iterator[tuple[Int64[Tensor, "b"], Float[Tensor, "b n"], Bool[Tensor, "b n"], Bool[Tensor, "b n"]]]:
    """A block of anchors at a time: which rows, their cosines to all rows, and which of these are positive or negative.

    `row` is how many entries a single anchor takes, n where it is not told.
    """
    unit = _unit(z, labels)
    rows = torch.arange(len(z), device=z.device)
    for at in rows.split(max(1, BLOCK // (row or len(z)))):
        same = labels[at, None] == labels
        with torch.autocast(z.device.type, enabled=False):
            cosine = unit[at] @ unit.T
        yield at, cosine, same & (at[:, None] != rows), ~same


def _joined(found: Sequence[Triplets]) -> Triplets:
    return Triplets(*(torch.cat(part) for part in zip(*found, strict=True)))


def _unit(z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"]) -> Float[Tensor, "n d"]:
    if z.ndim != 2 or len(z) == 0 or labels.shape != z.shape[:1]:
        raise ValueError(
            "A miner takes embeddings [n, d], n ≥ 1, and a label for each row; "
            f"got {tuple(z.shape)} and {tuple(labels.shape)}."
        )
    return F.normalize(z.detach().to(torch.promote_types(z.dtype, torch.float32)), dim=1)
