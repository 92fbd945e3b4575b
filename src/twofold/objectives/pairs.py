"""Losses that ask which row belongs to which: NT-Xent, DCL, SupCon, InfoNCE, CLIP and SigLIP.

Each function L2-normalises its embeddings itself, compares them in float32 (float64 stays float64) even under
autocast, and returns a scalar. None communicates: with several processes, pass the rows of all of them. None holds a
table of all similarities: memory grows with the rows, not with their square (see `tiled`).

All are written from two quantities of an anchor: the logit of its positive, a row-wise product, and the log-sum-exp of
its rivals' logits. Cross-entropy, −ln of the positive's share among itself and its rivals, is −ln σ(positive − rivals).
A temperature divides the cosines, a scale multiplies them; both may be tensors that learn.

Beside each loss stands its chance level, the value at which the embeddings tell nothing: all of them in one point,
or a temperature so high that all similarities look alike. A training loss that rests there has collapsed.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from twofold.objectives.tiled import log_sum_exp, log_sum_exp_both_ways, softplus_sum

Number = float | Float[Tensor, ""]


def nt_xent(z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], *, temperature: Number = 0.5) -> Float[Tensor, ""]:
    """Normalises, then finds each view's partner among all other views of the batch (SimCLR, eq. 1).

    Both views are anchors: the mean of 2n cross-entropies, each among the 2n − 1 views that are not the anchor.

    >>> eye = torch.eye(2)
    >>> nt_xent(eye, eye, temperature=1.0)  # ln(1 + 2/e): one candidate at similarity 1, two at 0
    tensor(0.5514)
    """
    return -F.logsigmoid(-_decoupled("nt_xent", z1, z2, temperature)).mean()


def nt_xent_chance(n: int) -> float:
    """`nt_xent` of n pairs whose embeddings tell nothing: ln(2n − 1)."""
    return math.log(2 * n - 1)


def dcl(z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], *, temperature: Number = 0.1) -> Float[Tensor, ""]:
    """`nt_xent` without the positive in the denominator (DCL, arXiv 2110.06848, eq. 6), which takes n ≥ 2.

    The pull on a pair that agrees already does not fade, so smaller batches do. May be negative.
    """
    loss = _decoupled("dcl", z1, z2, temperature)
    if len(z1) == 1:
        raise ValueError("dcl pushes away from other pairs and got one alone; give it n ≥ 2.")
    return loss.mean()


def dcl_chance(n: int) -> float:
    """`dcl` of n ≥ 2 pairs whose embeddings tell nothing: ln(2n − 2)."""
    return math.log(2 * n - 2)


def sup_con(z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], *, temperature: Number = 0.1) -> Float[Tensor, ""]:
    """Normalises, then finds the rows of its label among all other rows (SupCon's L_out, arXiv 2004.11362, eq. 2).

    An anchor's loss is the mean over its positives of their cross-entropies among the n − 1 other rows. Anchors
    without a positive are left out of the mean; n counts all views, and views of one picture share its label.
    """
    if z.ndim != 2 or labels.shape != z.shape[:1]:
        raise ValueError(f"sup_con takes [n, d] and a label for each row; got {tuple(z.shape)}, {tuple(labels.shape)}.")
    _check_positive("sup_con", "temperature", temperature)
    z = _unit(z, (1 / temperature) ** 0.5)
    _, of = labels.unique(return_inverse=True)
    positives = torch.bincount(of)[of] - 1
    has = positives > 0
    if not has.any():
        raise ValueError(f"sup_con found no two rows of one label among {len(z)}: draw several of each, or two views.")
    # The mean logit over the positives is the product with their mean: that of the label's rows without the anchor.
    of_label = torch.zeros_like(z).index_add(0, of, z)[of]
    logit = (z * (of_label - z)).sum(1) / positives.clamp(min=1)
    return (log_sum_exp(z, bound=_bound(1 / temperature)) - logit)[has].mean()


def sup_con_chance(n: int) -> float:
    """`sup_con` of n ≥ 2 rows whose embeddings tell nothing, whatever their labels: ln(n − 1)."""
    return math.log(n - 1)


def info_nce(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    *,
    negatives: Float[Tensor, "m d"] | None = None,
    temperature: Number = 0.07,
) -> Float[Tensor, ""]:
    """Normalises, then finds each query's key among negatives (CPC, eq. 4; MoCo, eq. 1).

    Without `negatives` the other keys of the batch are the negatives: n candidates a query. With them (MoCo's
    queue) they alone are: 1 + m candidates. A queue must not hold `k` yet: a positive that is also its own
    negative keeps the loss above ln 2, however good the encoder.
    """
    _check_pairs("info_nce", q, k)
    _check_positive("info_nce", "temperature", temperature)
    _check_negatives("info_nce", negatives, q)
    q, k, bound = _unit(q, 1 / temperature), _unit(k), _bound(1 / temperature)
    if negatives is None:
        rivals = log_sum_exp(q, k, bound=bound)
    else:
        rivals = log_sum_exp(q, _unit(negatives), skip=(), bound=bound)
    return _cross_entropy((q * k).sum(1), rivals)


def info_nce_chance(candidates: int) -> float:
    """`info_nce` of embeddings that tell nothing: ln of the candidates, n or, with m negatives, 1 + m."""
    return math.log(candidates)


def clip(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    *,
    scale: Number,
    negatives: Float[Tensor, "m d"] | None = None,
    debias: float = 0.0,
) -> Float[Tensor, ""]:
    """Normalises, then finds each a's b among all b and each b's a among all a (CLIP, figure 3).

    The mean of both cross-entropies. `scale` = exp(log-scale) multiplies the cosines; CLIP learns the log-scale
    from ln(1/0.07) and keeps it ≤ ln 100. `negatives` are more rows of b's kind that belong to no a: the a's have
    n + m candidates. `debias` is the share of all rivals that are right in truth, taken out as `_debiased` says.
    """
    _check_pairs("clip", a, b)
    _check_positive("clip", "scale", scale)
    _check_negatives("clip", negatives, a)
    if not 0 <= debias < 1:
        raise ValueError(f"clip takes debias, a share of the rivals, from 0 to below 1; got {debias}.")
    a, b, bound = _unit(a, scale), _unit(b), _bound(scale)
    positive = (a * b).sum(1)
    among_b, among_a = log_sum_exp_both_ways(a, b, bound=bound)
    m = 0
    if negatives is not None and len(negatives):
        m, others = len(negatives), log_sum_exp(a, _unit(negatives), skip=(), bound=bound)
        among_b = torch.logaddexp(among_b, others)
    if debias:
        n = len(a)
        among_b = _debiased(among_b, positive, n - 1 + m, debias, scale)
        among_a = _debiased(among_a, positive, n - 1, debias, scale)
    return (_cross_entropy(positive, among_b) + _cross_entropy(positive, among_a)) / 2


def clip_chance(n: int, negatives: int = 0) -> float:
    """`clip` of n pairs, and so many negatives, whose embeddings tell nothing: ln n where there are none."""
    return (math.log(n + negatives) + math.log(n)) / 2


def siglip(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    *,
    scale: Number,
    bias: Number,
    negatives: Float[Tensor, "m d"] | None = None,
) -> Float[Tensor, ""]:
    """Normalises, then asks of each of the n² pairs whether it belongs together (SigLIP, algorithm 1).

    The sum over all pairs divided by n, not by n². SigLIP learns the log of `scale` from ln 10 and `bias` from
    −10, which suits batches of about 22 000; for batches of n, −ln(n − 1) is the better start. `negatives` are more
    rows of b's kind that belong to no a: n·m more pairs.
    """
    _check_pairs("siglip", a, b)
    _check_positive("siglip", "scale", scale)
    _check_negatives("siglip", negatives, a)
    a, b, bound = _unit(a, scale), _unit(b), _bound(scale) + _bound(bias)
    together = (a * b).sum(1) + bias
    bias = torch.as_tensor(bias, dtype=a.dtype, device=a.device)
    apart = softplus_sum(a, b, bias=bias, bound=bound)
    if negatives is not None and len(negatives):
        apart = apart + softplus_sum(a, _unit(negatives), bias=bias, skip=(), bound=bound)
    return (apart - F.logsigmoid(together).sum()) / len(a)


def siglip_chance(n: int, negatives: int = 0) -> float:
    """`siglip` of n pairs, and so many negatives, whose embeddings tell nothing, with the bias that suits: ≈ 1 + ln n.

    One logit c for every pair costs softplus(−c) + (n − 1)·softplus(c), which is least at σ(c) = 1/n, that is
    c = −ln(n − 1), and there ln n + (n − 1)·ln(n/(n − 1)): n times the entropy, in nats, of a coin that falls
    heads once in n. Any other bias costs more: a small batch under a bias of −10 starts above this. A negative is one
    more candidate of each a.
    """
    n += negatives
    return math.log(n) + (n - 1) * math.log(n / (n - 1)) if n > 1 else 0.0


def _debiased(
    rivals: Float[Tensor, "n"], positive: Float[Tensor, "n"], count: int, share: float, scale: Number
) -> Float[Tensor, "n"]:
    """The log-sum-exp of `count` rivals, of which `share` are right in truth (arXiv 2007.00224, eq. 7 and 8).

    A right one is taken to score as the positive does. So the mean over wrong ones is (mean − share·e^positive) over
    (1 − share), and at least e^−scale, than which no logit is less.
    """
    if not count:
        return rivals
    mean = rivals - math.log(count)
    least = -torch.as_tensor(scale, dtype=rivals.dtype, device=rivals.device)
    # What is taken out over what it is taken from; cut off before exp, whose overflow would make gradients NaN.
    gone = (math.log(share) + positive - mean).clamp(max=-1e-6).exp()
    corrected = mean + torch.log1p(-gone) - math.log1p(-share)
    return math.log(count) + torch.maximum(corrected, least)


def _decoupled(name: str, z1: Tensor, z2: Tensor, temperature: Number) -> Float[Tensor, "2n"]:
    """For each of the 2n views, the log-sum-exp of all that are neither itself nor its partner, less its partner."""
    _check_pairs(name, z1, z2)
    _check_positive(name, "temperature", temperature)
    n = len(z1)
    z = _unit(torch.cat((z1, z2)), (1 / temperature) ** 0.5)
    partners = (z[:n] * z[n:]).sum(1)
    return log_sum_exp(z, skip=(0, n, -n), bound=_bound(1 / temperature)) - torch.cat((partners, partners))


def _cross_entropy(positive: Float[Tensor, "n"], rivals: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """−ln of the positive's share among itself and its rivals, whose log-sum-exp is given."""
    return -F.logsigmoid(positive - rivals).mean()


def _unit(x: Float[Tensor, "n d"], length: Number = 1.0) -> Float[Tensor, "n d"]:
    """Rows of length 1, or of another, in float32 at least: one factor a row, so that rows are gone through once."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (length / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12))


def _bound(number: Number) -> float:
    """|number|, or ∞ for one that lies on a GPU, where looking would stall it."""
    return (
        math.inf
        if isinstance(number, Tensor) and number.device.type != "cpu"
        else abs(float(number.detach() if isinstance(number, Tensor) else number))
    )


def _check_pairs(name: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"{name} pairs row i of one matrix with row i of the other: two [n, d] of the same shape, n ≥ 1; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )


def _check_negatives(name: str, negatives: Tensor | None, q: Tensor) -> None:
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != q.shape[1]):
        raise ValueError(
            f"{name} takes negatives [m, {q.shape[1]}], as wide as its queries {tuple(q.shape)}; "
            f"got {tuple(negatives.shape)}."
        )


def _check_positive(name: str, what: str, value: Number) -> None:
    # A learned scale is exp(·), positive as it is; looking at it would stall a GPU.
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} needs {what} > 0; got {value}.")
