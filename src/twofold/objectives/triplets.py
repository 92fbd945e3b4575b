"""Losses of triplets: an anchor should be nearer to its positive than to its negative, by a margin.

The distance is FaceNet's: squared Euclidean between unit vectors, 2 − 2 cos, from 0 to 4. Its gradient is finite where
two points coincide, which that of the root is not. Both functions L2-normalise their embeddings and compare them in
float32 (float64 stays float64).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def triplet_margin(
    anchor: Float[Tensor, "t d"],
    positive: Float[Tensor, "t d"],
    negative: Float[Tensor, "t d"],
    *,
    margin: float = 0.2,
) -> Float[Tensor, ""]:
    """Normalises, then the mean of max(0, ‖a − p‖² − ‖a − n‖² + margin) (FaceNet, arXiv 1503.03832, section 3.1).

    The mean is over all triplets, those that keep the margin and cost nothing too; without any it is 0.

    >>> a, p, n = torch.eye(3)
    >>> triplet_margin(a[None], a[None], p[None]), triplet_margin(a[None], p[None], n[None])
    (tensor(0.), tensor(0.2000))
    """
    if anchor.ndim != 2 or not anchor.shape == positive.shape == negative.shape:
        raise ValueError(
            "triplet_margin takes three [t, d] of the same shape; "
            f"got {tuple(anchor.shape)}, {tuple(positive.shape)} and {tuple(negative.shape)}."
        )
    _check_margin("triplet_margin", margin)
    a, p, n = _unit(anchor), _unit(positive), _unit(negative)
    excess = (a - p).square().sum(1) - (a - n).square().sum(1) + margin
    return excess.relu().sum() / max(1, len(excess))


def triplet_batch_all(z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], *, margin: float = 0.2) -> Float[Tensor, ""]:
    """Normalises, then the mean over all triplets of the batch that violate the margin (arXiv 1703.07737, section 2).

    Only those count ("batch all ≠0"): with the many that keep it in the mean, what is left to learn would vanish. There
    are O(n³) triplets, but a distance has the same part in each of them: it is enough to know in how many it stands,
    which sorted distances tell. O(n²) memory, O(n² log n) time.
    """
    if z.ndim != 2 or labels.shape != z.shape[:1]:
        raise ValueError(
            f"triplet_batch_all takes [n, d] and a label for each row; got {tuple(z.shape)} and {tuple(labels.shape)}."
        )
    _check_margin("triplet_batch_all", margin)
    unit = _unit(z)
    with torch.autocast(z.device.type, enabled=False):
        distance = 2 - 2 * unit @ unit.T
    with torch.no_grad():
        same = labels[:, None] == labels
        positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        reach = distance + margin  # a positive's: the negatives within are too near
        negatives = distance.masked_fill(same, math.inf).sort(1).values
        reaches = reach.masked_fill(~positive, -math.inf).sort(1).values
        as_positive = torch.searchsorted(negatives, reach).masked_fill(~positive, 0)
        as_negative = (len(z) - torch.searchsorted(reaches, distance, right=True)).masked_fill(same, 0)
        active = as_positive.sum().to(distance.dtype)
        times = (as_positive - as_negative).to(distance.dtype)
    return ((times * distance).sum() + margin * active) / active.clamp(min=1)


def triplet_chance(margin: float = 0.2) -> float:
    """Both losses of embeddings that tell nothing, all in one point: the margin."""
    return margin


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _check_margin(name: str, margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"{name} needs margin > 0; got {margin}.")
