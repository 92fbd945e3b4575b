"""The same picture twice, by what it looks like: no encoder is asked, which might take different things for one."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from twofold.mining.prints import perceptual_hashes

SIDE = 32  # pixels of what a print is taken of
BITS = 6  # of 64 that two prints of one picture may differ in
CELLS, CELL = 8, 0.06  # along a thumbnail; what the same cell of two copies may differ by, of 1: prints see no colour


def small(pictures: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 32 32"]:
    """Pictures as they are compared."""
    return F.interpolate(pictures.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)


def picture_groups(smalls: Float[Tensor, "n c 32 32"]) -> Int[np.ndarray, "n"]:
    """A number for each picture (`small`, of floats in 0..1), the same for copies of one, also if they are of other
    compression."""
    prints = perceptual_hashes(smalls)
    thumbs = F.adaptive_avg_pool2d(smalls, CELLS).flatten(1)
    group = np.full(len(smalls), -1)
    for row in range(len(smalls)):
        if group[row] >= 0:
            continue
        alike = (prints[row] @ prints.T >= 64 - 2 * BITS) & torch.as_tensor(group < 0)
        near = (thumbs - thumbs[row]).abs().amax(1) <= CELL
        group[(alike & near).numpy()] = row
        group[row] = row
    return np.unique(group, return_inverse=True)[1]


def loss_allowed(groups: Int[np.ndarray, "n"], batch: int, *, seed: int = 0, drawn: int = 200) -> float:
    """The least NT-Xent of batches in which copies cannot be told apart: the mean of ln(1 + 2c) over anchors.

    An anchor with c copies of its picture in the batch has 2c negatives that score what its positive does. 0 where
    there are no copies.
    """
    sizes = np.bincount(groups)[groups]
    share = (sizes - 1) / max(len(groups) - 1, 1)
    copies = np.random.default_rng(seed).binomial(batch - 1, share, (drawn, len(groups)))
    return float(np.log1p(2 * copies).mean())
