"""Losses that ask which row belongs to which: NT-Xent, InfoNCE, CLIP and SigLIP.

Each function L2-normalises its embeddings itself, compares them in float32 (float64 stays float64) even under
autocast, and returns a scalar ≥ 0. None communicates: with several processes, pass the rows of all of them.

Beside each loss stands its chance level, the value at which the embeddings tell nothing: all of them in one point,
or a temperature so high that all similarities look alike. A training loss that rests there has collapsed.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def nt_xent(z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], *, temperature: float = 0.5) -> Float[Tensor, ""]:
    """Normalises, then finds each view's partner among all other views of the batch (SimCLR, eq. 1).

    Both views are anchors: the mean of 2n cross-entropies, each among the 2n − 1 views that are not the anchor.

    >>> eye = torch.eye(2)
    >>> nt_xent(eye, eye, temperature=1.0)  # ln(1 + 2/e): one candidate at similarity 1, two at 0
    tensor(0.5514)
    """
    _check_pairs("nt_xent", z1, z2)
    _check_positive("nt_xent", "temperature", temperature)
    n = len(z1)
    z = _unit(torch.cat((z1, z2)))
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = (_products(z, z) / temperature).masked_fill(itself, -math.inf)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(logits, partner)


def nt_xent_chance(n: int) -> float:
    """`nt_xent` of n pairs whose embeddings tell nothing: ln(2n − 1)."""
    return math.log(2 * n - 1)


def info_nce(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    *,
    negatives: Float[Tensor, "m d"] | None = None,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Normalises, then finds each query's key among negatives (CPC, eq. 4; MoCo, eq. 1).

    Without `negatives` the other keys of the batch are the negatives: n candidates a query. With them (MoCo's
    queue) they alone are: 1 + m candidates. A queue must not hold `k` yet: a positive that is also its own
    negative keeps the loss above ln 2, however good the encoder.
    """
    _check_pairs("info_nce", q, k)
    _check_positive("info_nce", "temperature", temperature)
    q, k = _unit(q), _unit(k)
    if negatives is None:
        logits = _products(q, k)
        answer = torch.arange(len(q), device=q.device)
    else:
        if negatives.ndim != 2 or negatives.shape[1] != q.shape[1]:
            raise ValueError(
                f"info_nce takes negatives [m, {q.shape[1]}], as wide as its queries {tuple(q.shape)}; "
                f"got {tuple(negatives.shape)}."
            )
        logits = torch.cat(((q * k).sum(1, keepdim=True), _products(q, _unit(negatives))), dim=1)
        answer = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits / temperature, answer)


def info_nce_chance(candidates: int) -> float:
    """`info_nce` of embeddings that tell nothing: ln of the candidates, n or, with m negatives, 1 + m."""
    return math.log(candidates)


def clip(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], *, scale: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Normalises, then finds each a's b among all b and each b's a among all a (CLIP, figure 3).

    The mean of both cross-entropies. `scale` = exp(log-scale) multiplies the cosines; CLIP learns the log-scale
    from ln(1/0.07) and keeps it ≤ ln 100.
    """
    _check_pairs("clip", a, b)
    _check_positive("clip", "scale", scale)
    logits = scale * _products(_unit(a), _unit(b))
    answer = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


def clip_chance(n: int) -> float:
    """`clip` of n pairs whose embeddings tell nothing: ln n."""
    return math.log(n)


def siglip(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    *,
    scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Normalises, then asks of each of the n² pairs whether it belongs together (SigLIP, algorithm 1).

    The sum over all pairs divided by n, not by n². SigLIP learns the log of `scale` from ln 10 and `bias` from
    −10, which suits batches of about 22 000; for batches of n, −ln(n − 1) is the better start.
    """
    _check_pairs("siglip", a, b)
    _check_positive("siglip", "scale", scale)
    logits = scale * _products(_unit(a), _unit(b)) + bias
    sign = 2 * torch.eye(len(a), dtype=logits.dtype, device=a.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(a)


def siglip_chance(n: int) -> float:
    """`siglip` of n pairs whose embeddings tell nothing, with the bias that suits them: about 1 + ln n.

    One logit c for every pair costs softplus(−c) + (n − 1)·softplus(c), which is least at σ(c) = 1/n, that is
    c = −ln(n − 1), and there ln n + (n − 1)·ln(n/(n − 1)): n times the entropy, in nats, of a coin that falls
    heads once in n. Any other bias costs more: a small batch under a bias of −10 starts above this.
    """
    return math.log(n) + (n - 1) * math.log(n / (n - 1)) if n > 1 else 0.0


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _products(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    # Autocast would multiply in bfloat16, whose steps below 1 are 0.004: at temperature 0.005 most of a logit.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def _check_pairs(name: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"{name} pairs row i of one matrix with row i of the other: two [n, d] of the same shape, n ≥ 1; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )


def _check_positive(name: str, what: str, value: float | Tensor) -> None:
    # A learned scale is exp(·), positive as it is; looking at it would stall a GPU.
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} needs {what} > 0; got {value}.")
