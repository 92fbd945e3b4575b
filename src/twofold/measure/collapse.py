"""Numbers that tell whether embeddings collapsed, wholly or in part. Each takes a matrix with one embedding a row.

Complete collapse is one point: spread and uniformity 0, effective rank 1. Dimensional collapse is a thin sheet: the
effective rank stays far below the width while the others may look healthy.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twofold.errors import DataError
from twofold.measure.metrics import TIE, Matrix, as_rows, row_blocks, unit_rows


def spread(z: Matrix) -> float:
    """How far directions lie from their mean, root mean square on the unit sphere, 0..1; 0 is one direction.

    1 means that the directions cancel out. The form of SimSiam's standard deviation (section 4.1, there divided by √d)
    that does not change with the coordinate system.
    """
    u = unit_rows(z)
    return (u - u.mean(0)).square().sum(1).mean().sqrt().item()


def effective_rank(z: Matrix) -> float:
    """RankMe: exp of the entropy of the normalised singular values, 1..min(n, d) (arXiv 2210.02885).

    Neither centred nor scaled to unit length: an offset common to all rows counts as one strong direction.
    """
    x = as_rows(z).double()
    # Squared singular values are eigenvalues of the smaller table of products: a fifth of an SVD's time at 512 × 2048.
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + 1e-7
    return math.exp(-(p * p.log()).sum().item())


def uniformity(z: Matrix) -> float:
    """log mean exp(−2‖x − y‖²) over pairs of different rows, on unit vectors, −8..0 (arXiv 2005.10242).

    0 is one point; many directions spread evenly in a wide space reach about −4. Lower is more uniform.
    """
    u = unit_rows(z)
    n = len(u)
    if n < 2:
        raise DataError("Uniformity compares rows with each other and needs at least two; got 1.")
    lengths = u.square().sum(1)  # 1, or 0 for a row of zeros
    total = -float(n)  # each row with itself
    for block in row_blocks(n, n):
        distances = lengths[block, None] + lengths - 2 * (u[block] @ u.T)
        total += distances.mul_(-2).exp_().sum(dtype=torch.float64).item()
    return math.log(total / (n * (n - 1)))


def alignment(x: Matrix, y: Matrix) -> float:
    """Mean ‖x − y‖² over partners (row i of both), on unit vectors, 0..4; 0 is best (arXiv 2005.10242)."""
    u, v = unit_rows(x), unit_rows(y)
    if u.shape != v.shape:
        raise DataError(f"Alignment pairs row i of both matrices; got {tuple(u.shape)} and {tuple(v.shape)}.")
    return (u - v).square().sum(1).mean().item()


def anisotropy(z: Matrix) -> float:
    """The mean cosine of two different rows, −1/(n − 1)..1: 0 where directions cancel out, 1 where all are one."""
    u = unit_rows(z)
    n = len(u)
    if n < 2:
        raise DataError("Anisotropy compares rows with each other and needs at least two; got 1.")
    return ((u.sum(0).square().sum() - n) / (n * (n - 1))).item()


def spectrum(z: Matrix) -> Float[Tensor, "m"]:
    """The share of the variance along each principal axis, largest first; they sum to 1 (all 0 for a single point)."""
    x = as_rows(z)
    variances = torch.linalg.svdvals(x - x.mean(0)).square()
    return variances / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)


def axes_holding(shares: Float[Tensor, "m"], part: float = 0.9) -> int:
    """How many principal axes hold `part` of the variance; 0 for a single point."""
    if not shares.any():
        return 0
    return int((shares.cumsum(0) < part * shares.sum() - TIE).sum()) + 1


def alpha_req(z: Matrix) -> float:
    """α of the power law k^−α that the eigenvalues of the covariance follow (α-ReQ, arXiv 2202.05808), by least squares
    on logarithms.

    Near 1 representations are said to generalise best; 0 is white noise, far above 1 is a thin sheet. Eigenvalues below
    the precision of the arithmetic are left out; NaN where fewer than three remain.
    """
    shares = spectrum(z)
    kept = shares[shares > shares[0] * torch.finfo(torch.float32).eps * len(shares)].double()
    if len(kept) < 3:
        return math.nan
    k = torch.arange(1, len(kept) + 1, dtype=torch.double).log()
    k, log = k - k.mean(), kept.cpu().log()
    return -((k * log).sum() / k.square().sum()).item()


def lidar(views: Float[Tensor, "n q d"] | Float[np.ndarray, "n q d"], *, ridge: float = 1e-4) -> float:
    """LiDAR: the effective rank of what tells pictures apart in units of what views of a picture differ by, 1..min(n −
    1, d) (arXiv 2312.04000, section 4.2).

    Each picture's q views are a class of linear discriminant analysis: the eigenvalues of W^−½ B W^−½, with the
    covariance within pictures W (plus `ridge`) and that of their means B, and exp of the entropy of their shares.
    """
    x = torch.as_tensor(views).double()
    if x.ndim != 3 or len(x) < 2 or x.shape[1] < 2:
        raise DataError(f"LiDAR takes two or more views of two or more pictures [n, q, d]; got {tuple(x.shape)}.")
    n, q, d = x.shape
    means = x.mean(1)
    away = (x - means[:, None]).reshape(n * q, d)
    within = away.T @ away / (n * (q - 1)) + ridge * torch.eye(d, dtype=x.dtype, device=x.device)
    values, axes = torch.linalg.eigh(within)
    between = (means - means.mean(0)) @ (axes / values.sqrt())
    shares = torch.linalg.svdvals(between).square()
    p = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny) + 1e-7
    return math.exp(-(p * p.log()).sum().item())


def dead_units(z: Matrix) -> float:
    """The share of columns that are the same in every row, 0..1: units that say nothing about any picture."""
    x = as_rows(z)
    deviation = x.std(0, correction=0)
    scale = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
    return (deviation <= scale * 1e-6).float().mean().item()


class Health(NamedTuple):
    """What a matrix of embeddings looks like; `agreement` and `lidar` only where views of the same items are known."""

    n: int
    width: int
    spread: float
    rank: float  # `effective_rank`
    axes: int  # principal axes that hold 90 % of the variance
    alpha: float
    anisotropy: float
    uniformity: float
    dead: float
    norm: float  # mean length of a row
    norm_varies: float  # standard deviation over mean
    spectrum: list[float]
    alignment: float | None = None
    lidar: float | None = None


def health(z: Matrix, views: Float[Tensor, "m q d"] | Float[np.ndarray, "m q d"] | None = None) -> Health:
    """Every figure of this file; `views` are q embeddings of each of m items, as the training's policy shows them."""
    x = as_rows(z)
    lengths = x.norm(dim=1)
    mean = lengths.mean().item()
    shares = spectrum(x)
    return Health(
        n=len(x),
        width=x.shape[1],
        spread=spread(x),
        rank=effective_rank(x),
        axes=axes_holding(shares),
        alpha=alpha_req(x),
        anisotropy=anisotropy(x),
        uniformity=uniformity(x),
        dead=dead_units(x),
        norm=mean,
        norm_varies=lengths.std(correction=0).item() / mean if mean else 0.0,
        spectrum=shares.tolist(),
        alignment=None if views is None else alignment(views[:, 0], views[:, 1]),
        lidar=None if views is None else lidar(views),
    )
