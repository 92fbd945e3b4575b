"""Losses that predict one embedding from another: BYOL's regression and SimSiam's cosine.

Both normalise, compare in float32 at least (float64 stays float64) even under autocast, and average over the batch.
None communicates: with several processes, pass the rows of all of them.

There is no chance level: what tells least, all embeddings in one point, is the best that these losses can see. What
keeps a method from going there is a target without gradient, which is the caller's to detach.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def negative_cosine(p: Float[Tensor, "n d"], z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Minus the cosine of each prediction and its target, mean over the batch, −1..1 (SimSiam, eq. 1).

    0 is what unrelated directions score; −1 is perfect prediction, and also a collapse.

    >>> negative_cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(-0.6000)
    """
    if p.ndim != 2 or p.shape != z.shape or len(p) == 0:
        raise ValueError(
            f"A prediction is compared with its target: two [n, d] of the same shape, n ≥ 1; "
            f"got {tuple(p.shape)} and {tuple(z.shape)}."
        )
    return -(_unit(p) * _unit(z)).sum(1).mean()


def cosine_regression(p: Float[Tensor, "n d"], z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """‖p̂ − ẑ‖² = 2 − 2cos of the normalised prediction and target, mean over the batch, 0..4 (BYOL, eq. 2).

    2 is what unrelated directions score; 0 is perfect prediction, and also a collapse.

    >>> cosine_regression(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.8000)
    """
    return 2 + 2 * negative_cosine(p, z)


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
