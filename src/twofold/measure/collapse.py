"""Four numbers that tell whether embeddings collapsed. Each takes a matrix with one embedding a row.

Complete collapse is one point: spread and uniformity 0, effective rank 1. Dimensional collapse is a thin sheet: the
effective rank stays far below the width while the others may look healthy.
"""

import math

import torch

from twofold.errors import DataError
from twofold.measure.metrics import Matrix, as_rows, row_blocks, unit_rows


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
    sigma = torch.linalg.svdvals(as_rows(z))
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
    total = -float(n)  # each row with itself
    for block in row_blocks(n, n):
        cosines = u[block] @ u.T
        total += (4 * (cosines - 1)).exp_().sum(dtype=torch.float64).item()  # ‖x − y‖² = 2 − 2cos
    return math.log(total / (n * (n - 1)))


def alignment(x: Matrix, y: Matrix) -> float:
    """Mean ‖x − y‖² over partners (row i of both), on unit vectors, 0..4; 0 is best (arXiv 2005.10242)."""
    u, v = unit_rows(x), unit_rows(y)
    if u.shape != v.shape:
        raise DataError(f"Alignment pairs row i of both matrices; got {tuple(u.shape)} and {tuple(v.shape)}.")
    return (u - v).square().sum(1).mean().item()
