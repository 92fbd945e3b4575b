"""Losses without negatives: they look at how the dimensions vary over the batch, and at each other.

What keeps the embeddings apart is a statistic of the whole batch: correlations (Barlow Twins), variances and
covariances (VICReg), the distribution along random directions (SIGReg). So none works on a part of a batch: with
several processes, pass the rows of all of them. Each computes in float32 (float64 stays float64) even under autocast,
and needs at least two rows.

Beside each loss stands its chance level, its value where all embeddings are one point.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BATCH_NORM_EPS = 1e-5  # of Barlow Twins: added to the variance
STD_EPS = 1e-4  # of VICReg: added to the variance under the root, whose slope at 0 is infinite


def barlow_twins(
    z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], *, off_diagonal: float = 0.0051
) -> Float[Tensor, ""]:
    """Standardises each dimension over the batch, then wants the views' correlation matrix to be the identity.

    Σᵢ (cᵢᵢ − 1)² + off_diagonal · Σᵢ≠ⱼ cᵢⱼ² with c = z1ᵀz2 / n [d, d] (Barlow Twins, arXiv 2103.03230, eq. 1 and 2),
    ≥ 0. Standardised as by BatchNorm without scale and shift: biased variance + 1e-5.

    >>> z = torch.tensor([[1.0], [-1.0]])
    >>> barlow_twins(z, -z)  # c = −1
    tensor(4.0000)
    """
    _check_views("barlow_twins", z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.batch_norm(_float(z), None, None, training=True, eps=BATCH_NORM_EPS) for z in (z1, z2))
        n = len(z1)
        diagonal = (z1 * z2).sum(0) / n
        redundancy = _squared_product(z1, z2) / n**2 - diagonal.square().sum()
        return (diagonal - 1).square().sum() + off_diagonal * redundancy


def barlow_twins_chance(d: int) -> float:
    """`barlow_twins` of d dimensions that do not vary, or vary without regard to the other view: d."""
    return float(d)


class VICRegLoss(NamedTuple):
    """`loss` is the weighted sum of the other three."""

    loss: Float[Tensor, ""]
    invariance: Float[Tensor, ""]
    variance: Float[Tensor, ""]
    covariance: Float[Tensor, ""]


def vicreg(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> VICRegLoss:
    """Wants the views equal, every dimension's deviation at least 1, and the dimensions uncorrelated.

    invariance: mean squared difference of the views; variance: mean of max(0, 1 − std), averaged over the views;
    covariance: squared covariances of different dimensions, summed, over d, added up over the views (VICReg,
    arXiv 2105.04906, eq. 1 to 6). Not normalised; variances are unbiased. The paper's variance term adds up the views;
    its official code halves that, and its weights go with the code.
    """
    _check_views("vicreg", z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = _float(z1), _float(z2)
        alike = F.mse_loss(z1, z2)
        spread, redundant = zip(*(_variance_and_covariance(z) for z in (z1, z2)), strict=True)
        varied, decorrelated = sum(spread) / 2, sum(redundant)
        loss = invariance * alike + variance * varied + covariance * decorrelated
        return VICRegLoss(loss, alike, varied, decorrelated)


def _variance_and_covariance(z: Float[Tensor, "n d"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    n, d = z.shape
    z = z - z.mean(0)
    variances = z.square().sum(0) / (n - 1)
    redundant = _squared_product(z, z) / (n - 1) ** 2 - variances.square().sum()
    return F.relu(1 - (variances + STD_EPS).sqrt()).mean(), redundant / d


def vicreg_chance(*, variance: float = 25.0) -> float:
    """`vicreg` of embeddings that are all one point: variance · (1 − √1e-4), 24.75 by default."""
    return variance * (1 - math.sqrt(STD_EPS))


def sigreg(
    z: Float[Tensor, "n d"], directions: Float[Tensor, "k d"], *, knots: int = 17, reach: float = 3.0
) -> Float[Tensor, ""]:
    """How far the rows are from a standard normal cloud, seen along `directions`; their length does not matter.

    SIGReg (LeJEPA, arXiv 2511.08544, algorithm 1): mean over directions of the statistic of Epps and Pulley,
    n ∫ |φₙ(t) − φ(t)|² φ(t) dt, where φₙ(t) = mean exp(i·t·x) over the projections x, and φ(t) = exp(−t²/2) is both
    what a standard normal has and the weight. By the trapezoidal rule on [0, reach], doubled: the integrand is even.
    About 1.05 for normal rows however many they are, 0.40 n for rows that are all zero. Draw new directions each step.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"sigreg compares a distribution of rows: z [n, d] with n ≥ 2; got {tuple(z.shape)}.")
    if directions.ndim != 2 or directions.shape[1] != z.shape[1] or len(directions) == 0:
        raise ValueError(
            f"sigreg takes directions [k, {z.shape[1]}], k ≥ 1, for rows {tuple(z.shape)}; "
            f"got {tuple(directions.shape)}."
        )
    with torch.autocast(z.device.type, enabled=False):
        z = _float(z)
        t, normal, weights = _quadrature(knots, reach, like=z)
        angles = (z @ F.normalize(directions.to(z), dim=1).T).unsqueeze(-1) * t  # [n, k, knots]
        error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
        return len(z) * (error @ weights).mean()


def sigreg_chance(n: int, *, knots: int = 17, reach: float = 3.0) -> float:
    """`sigreg` of n rows that are all zero, the least that one point can have: about 0.40 n."""
    _, normal, weights = _quadrature(knots, reach, like=torch.empty(0, dtype=torch.float64))
    return n * float((1 - normal).square() @ weights)


def _quadrature(
    knots: int, reach: float, *, like: Tensor
) -> tuple[Float[Tensor, " knots"], Float[Tensor, " knots"], Float[Tensor, " knots"]]:
    """Knots t in [0, reach], φ(t) there, and weights w such that ∫ f(t) φ(t) dt over ±reach is about w·f(t)."""
    t = torch.linspace(0, reach, knots, dtype=like.dtype, device=like.device)
    normal = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * reach / (knots - 1))
    weights[0] = weights[-1] = reach / (knots - 1)
    return t, normal, weights * normal


class LeJEPALoss(NamedTuple):
    """`loss` = (1 − weight) · prediction + weight · sigreg."""

    loss: Float[Tensor, ""]
    prediction: Float[Tensor, ""]
    sigreg: Float[Tensor, ""]


def lejepa(
    z: Float[Tensor, "v n d"], directions: Float[Tensor, "k d"], *, global_views: int = 2, weight: float = 0.05
) -> LeJEPALoss:
    """Wants every view at the mean of its global views, and each view's rows to be a standard normal cloud.

    `z` holds v views of n things, the first `global_views` of them global. prediction: mean squared difference, over
    dimensions too, without a stop-gradient; sigreg: mean over the views of `sigreg` (arXiv 2511.08544, algorithm 2).
    """
    if z.ndim != 3 or not 1 <= global_views <= len(z):
        raise ValueError(
            f"lejepa takes views [v, n, d], of which the first {global_views} are global (from 1 to v of them); "
            f"got {tuple(z.shape)}."
        )
    with torch.autocast(z.device.type, enabled=False):
        z = _float(z)
        prediction = (z - z[:global_views].mean(0)).square().mean()
        normality = torch.stack([sigreg(view, directions) for view in z]).mean()
        return LeJEPALoss((1 - weight) * prediction + weight * normality, prediction, normality)


def lejepa_chance(n: int, *, weight: float = 0.05) -> float:
    """`lejepa` of n things whose embeddings are all zero, where it is least for one point: weight · 0.40 n."""
    return weight * sigreg_chance(n)


def _squared_product(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """‖aᵀb‖²: the sum of the squares of all d² entries.

    tr(bᵀa·aᵀb) = tr(aaᵀ·bbᵀ), so for few rows the tables of products between rows give the same sum: n² entries and
    n²d multiplications each, where aᵀb has d² and nd². At n = 256 and d = 8192, a sixteenth of the work.
    """
    n, d = a.shape
    if 2 * n > d:
        return (a.T @ b).square().sum()
    rows = a @ a.T
    return (rows * (rows if b is a else b @ b.T)).sum()


def _float(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _check_views(name: str, z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(
            f"{name} takes two views [n, d] of the same shape, n ≥ 2, for one row does not vary; "
            f"got {tuple(z1.shape)} and {tuple(z2.shape)}."
        )
