"""Losses that predict: one embedding from another (BYOL, SimSiam), what a mask hides (MAE, the JEPAs), the next token.

All normalise their targets, and compare in float32 at least (float64 stays float64) even under autocast. None
communicates. The first kind averages over the batch: with several processes, pass the rows of all of them. The second
gives a loss a sample, of which those of all processes are averaged: tokens are too many to be sent around.

Where embeddings predict each other there is no chance level: what tells least, all of them in one point, is the best
that such a loss can see. What keeps a method from going there is a target without gradient, which is the caller's to
detach. Pixels cannot collapse.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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
    return F.normalize(_wide(x), dim=1)


def masked_pixels(p: Float[Tensor, "n *k d"], pixels: Float[Tensor, "n *k d"]) -> Float[Tensor, "n"]:
    """Mean squared error of each sample's predicted patches, against pixels normalised within each patch (MAE).

    A patch of `pixels` becomes (pixels − mean) / √(variance + 1e-6), unbiased (arXiv 2111.06377, section 3 and code).

    >>> masked_pixels(torch.zeros(1, 2), torch.tensor([[3.0, 5.0]]))
    tensor([0.5000])
    """
    _check_tokens(p, pixels)
    variance, mean = torch.var_mean(_wide(pixels), -1, keepdim=True)
    return (_wide(p) - (_wide(pixels) - mean) / (variance + 1e-6).sqrt()).square().flatten(1).mean(1)


def masked_pixels_chance(d: int) -> float:
    """What predicting each patch's mean costs, where no patch is flat: (d − 1)/d for d numbers a patch."""
    return (d - 1) / d


def latent_regression(
    p: Float[Tensor, "n *k d"], h: Float[Tensor, "n *k d"], *, beta: float = 1.0
) -> Float[Tensor, "n"]:
    """Smooth L1 distance of each sample's predicted tokens from `normal_tokens(h)`: e²/2β below β, |e| − β/2 above.

    β = 1 is I-JEPA's (its official code), 0 the plain L1 of V-JEPA (arXiv 2404.08471, section 3.1).

    >>> latent_regression(torch.tensor([[0.5, 1.0]]), torch.tensor([[7.0, 3.0]]), beta=0.0)  # the target is (1, −1)
    tensor([1.2500])
    """
    _check_tokens(p, h)
    return F.smooth_l1_loss(_wide(p), normal_tokens(h), reduction="none", beta=beta).flatten(1).mean(1)


def normal_tokens(h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Each token with mean 0 and deviation 1: what the JEPAs predict (a LayerNorm without scale and shift)."""
    return F.layer_norm(_wide(h), h.shape[-1:])


def token_variance(h: Float[Tensor, "n *k d"]) -> Float[Tensor, ""]:
    """How much of normalised tokens differs from one to the other, 0..1: 0 is the same token everywhere, a collapse.

    Their mean square around their mean: with a squared loss, what predicting the mean of all would cost.
    """
    return normal_tokens(h).flatten(0, -2).var(0, correction=0).mean()


def next_token(logits: Float[Tensor, "n v"], ids: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """What each token costs in nats: minus the logarithm of the probability that was given to it.

    >>> next_token(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    """
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(f"Each token [n] has a row of logits [n, v]; got {tuple(ids.shape)}, {tuple(logits.shape)}.")
    return F.cross_entropy(_wide(logits), ids, reduction="none")


def next_token_chance(v: int) -> float:
    """What a token costs where all v of the vocabulary are as likely."""
    return math.log(v)


def _check_tokens(p: Tensor, target: Tensor) -> None:
    if p.ndim < 2 or p.shape != target.shape or p.numel() == 0:
        raise ValueError(
            f"Predicted tokens and their targets are two [n, …, d] of the same shape, n ≥ 1; "
            f"got {tuple(p.shape)} and {tuple(target.shape)}."
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
