"""Which negatives get the gradient: a contrastive loss under the microscope, on embeddings as they are.

The gradient of InfoNCE with respect to the similarity of an anchor and a negative is that negative's softmax
probability over the temperature (arXiv 2012.09740, section 3.1); SigLIP's is a sigmoid over it. So the shares that
negatives have of it follow from similarities alone, for the temperature of the training and for any other.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twofold.errors import DataError, UsageError
from twofold.measure.metrics import Matrix, unit_rows

TEMPERATURES = tuple(np.geomspace(0.01, 2, 24).round(4).tolist())
HARDEST = 0.01  # of the negatives: their part of the gradient says how much goes to few
BINS = 60  # of the histograms, over cosines −1..1
ALERT, FLAT = 0.05, 0.9  # effective shares of negatives between which a temperature tells hard from easy
NEAR = "as near as the positive"  # by what reason a negative is suspected where nothing is known of it


class Shares(NamedTuple):
    """Who gets the gradient at one temperature, on average over anchors."""

    temperature: float
    effective: float  # exp of the entropy of the negatives' shares: as many equal ones would spread it so, 1..negatives
    hardest: float  # the part that the hardest hundredth of negatives takes, 0..1
    push: float  # all that the negatives of an anchor push, times the temperature: 1 − the positive's probability
    suspects: float  # the part of the gradient that suspected false negatives take, 0..1


class Microscope(NamedTuple):
    """A sample of anchors and their negatives: similarities, and who gets the gradient now and otherwise."""

    anchors: int
    negatives: float  # of an anchor, on average
    suspects: float  # the part of the negatives that are suspected to be false, 0..1
    agreement: float  # the median cosine of an anchor and its positive
    hardness: float  # the mean cosine of an anchor and the hardest hundredth of its negatives
    now: Shares
    curve: list[Shares]  # the same embeddings at other temperatures
    positive: list[float]  # histograms: the share of cosines in each of `BINS` bins over −1..1
    negative: list[float]
    closest: list[tuple[int, int, float]]  # anchor, negative, cosine: the hardest ones that are not suspects
    suspected: list[tuple[int, int, float]]  # and the suspects that take most
    kinds: dict[str, tuple[float, float]]  # of suspects: the part of the negatives, and of the gradient that they take

    @property
    def suggested(self) -> tuple[float, float] | None:
        """The temperatures at which an anchor's gradient goes to more than a few negatives and not to all alike.

        It holds for these embeddings: trained at another temperature they would lie differently. None where no
        temperature of the curve does so, as for embeddings that collapsed.
        """
        fit = [at.temperature for at in self.curve if ALERT <= at.effective / self.negatives <= FLAT]
        return (min(fit), max(fit)) if fit else None


def microscope(
    similarities: Float[Tensor, "q m"],
    positives: Bool[Tensor, "q m"],
    *,
    temperature: float,
    excluded: Bool[Tensor, "q m"] | None = None,
    suspects: Mapping[str, Bool[Tensor, "q m"]] = {},
    loss: Literal["softmax", "sigmoid"] = "softmax",
    examples: int = 12,
) -> Microscope:
    """Look at the cosines of q anchors and m candidates, of which each anchor has one positive or more.

    `excluded` cells are neither (an anchor itself); `suspects` are negatives that may show the same thing as the
    anchor, by the reason: one label, one caption, or what `twofold.mining` finds. With SigLIP's `loss` the bias is the
    one at which all positives pull as much as all negatives push, where a training would have it. Raises DataError
    where an anchor lacks a positive or a negative.
    """
    if not temperature > 0:
        raise UsageError(f"A temperature is greater than 0; got {temperature}.")
    s = similarities.detach().float()
    negative = ~positives if excluded is None else ~positives & ~excluded
    if not (positives.any(1) & negative.any(1)).all():
        raise DataError("Every anchor needs a positive and a negative to be looked at.")
    kinds = {name: cells & negative for name, cells in suspects.items()}
    doubted = torch.stack([torch.zeros_like(negative), *kinds.values()]).any(0)
    counts = negative.sum(1)

    def at(value: float, cells: Tensor = doubted) -> Shares:
        by = _by_softmax if loss == "softmax" else _by_sigmoid
        return _shares(by(s, positives, negative, value), negative, cells, value)

    return Microscope(
        anchors=len(s),
        negatives=counts.float().mean().item(),
        suspects=(doubted.sum() / counts.sum()).item(),
        agreement=s[positives].median().item(),
        hardness=_hardest(s, negative),
        now=at(temperature),
        curve=[at(value) for value in TEMPERATURES],
        positive=_histogram(s[positives]),
        negative=_histogram(s[negative]),
        closest=_highest(s, negative & ~doubted, examples),
        suspected=_highest(s, doubted, examples),
        kinds={
            name: ((cells.sum() / counts.sum()).item(), at(temperature, cells).suspects)
            for name, cells in kinds.items()
            if cells.any()
        },
    )


def of_views(
    first: Matrix,
    second: Matrix,
    *,
    temperature: float,
    same: Mapping[str, Bool[Tensor, "n n"]] = {},
    alike: float = 0.0,
) -> Microscope:
    """The microscope on a batch of two views (NT-Xent): 2n anchors, each with the other view of its item as positive.

    `same` says by what reason items i and j are known to show the same (copies, one label). `alike` suspects negatives
    that score above that share of their anchor's positive, as the positive-aware rule of NV-Retriever does (arXiv
    2407.15831): 0.95 is theirs, 0 suspects none.
    """
    z = torch.cat([unit_rows(first), unit_rows(second)])
    s = z @ z.T
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = itself.roll(len(z) // 2, 0)
    suspects = {reason: cells.to(z.device).repeat(2, 2) for reason, cells in same.items()}
    suspects |= _as_near(s, positives, alike)
    return microscope(s, positives, temperature=temperature, excluded=itself, suspects=suspects)


def of_pairs(
    first: Matrix,
    second: Matrix,
    *,
    temperature: float,
    same: Mapping[str, Bool[Tensor, "n n"]] = {},
    alike: float = 0.0,
    loss: Literal["softmax", "sigmoid"] = "softmax",
) -> Microscope:
    """The microscope on n pairs (CLIP, SigLIP): one of the first against all of the second; as `of_views`."""
    s = unit_rows(first) @ unit_rows(second).T
    positives = torch.eye(len(s), dtype=torch.bool, device=s.device)
    suspects = {reason: cells.to(s.device) for reason, cells in same.items()}
    suspects |= _as_near(s, positives, alike)
    return microscope(s, positives, temperature=temperature, suspects=suspects, loss=loss)


def of_bank(
    anchors: Matrix,
    keys: Matrix,
    bank: Matrix,
    *,
    temperature: float,
    alike: float = 0.0,
    excluded: Bool[Tensor, "n m"] | None = None,
) -> Microscope:
    """The microscope on a queue (MoCo) or a sample of a corpus: n anchors, their keys, m negatives for all.

    `excluded` says which of the bank are an anchor's own item. Candidate 0 is the key, and the bank's follow.
    """
    q, k = unit_rows(anchors), unit_rows(keys)
    s = torch.cat([(q * k).sum(1, keepdim=True), q @ unit_rows(bank).T], 1)
    positives = torch.zeros(s.shape, dtype=torch.bool, device=s.device)
    positives[:, 0] = True
    apart = None if excluded is None else torch.nn.functional.pad(excluded.to(s.device), (1, 0))
    return microscope(s, positives, temperature=temperature, excluded=apart, suspects=_as_near(s, positives, alike))


def _as_near(s: Float[Tensor, "q m"], positives: Bool[Tensor, "q m"], alike: float) -> dict[str, Bool[Tensor, "q m"]]:
    if not alike:
        return {}
    own = s.masked_fill(~positives, -math.inf).amax(1, keepdim=True)
    return {NEAR: (s >= alike * own) & (own > 0)}


class _Pushed(NamedTuple):
    """Each negative's share of its anchor's gradient, and all that they push."""

    share: Float[Tensor, "q m"]
    push: Float[Tensor, "q"]


def _by_softmax(
    s: Float[Tensor, "q m"], positives: Bool[Tensor, "q m"], negative: Bool[Tensor, "q m"], temperature: float
) -> _Pushed:
    logits = s / temperature
    against = logits.masked_fill(~negative, -math.inf)
    positive = logits.masked_fill(~positives, -math.inf).logsumexp(1)
    return _Pushed(against.softmax(1), torch.sigmoid(against.logsumexp(1) - positive))  # a share of the whole softmax


def _by_sigmoid(
    s: Float[Tensor, "q m"], positives: Bool[Tensor, "q m"], negative: Bool[Tensor, "q m"], temperature: float
) -> _Pushed:
    """At the bias where negatives push as much as positives pull, which is where its own gradient is 0."""
    logits = s.double() / temperature
    low, high = -logits.max() - 60, -logits.min() + 60
    for _ in range(60):
        bias = (low + high) / 2
        push, pull = (logits + bias)[negative].sigmoid().sum(), (-logits - bias)[positives].sigmoid().sum()
        low, high = (bias, high) if push < pull else (low, bias)
    against = (logits + bias).masked_fill(~negative, -math.inf)
    share = torch.nn.functional.logsigmoid(against).softmax(1)  # by logarithms, so that none vanishes
    return _Pushed(share.float(), against.sigmoid().sum(1).float())


def _shares(pushed: _Pushed, negative: Bool[Tensor, "q m"], doubted: Bool[Tensor, "q m"], temperature: float) -> Shares:
    share, push = pushed
    entropy = -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum(1)
    ranked = share.sort(1, descending=True).values.cumsum(1)
    top = (HARDEST * negative.sum(1)).ceil().long().clamp_min(1)
    suspected = (share * doubted).sum(1)
    total = push.sum()
    return Shares(
        temperature=temperature,
        effective=entropy.exp().mean().item(),
        hardest=ranked.gather(1, top[:, None] - 1).mean().item(),
        push=push.mean().item(),
        suspects=((suspected * push).sum() / total if total > 0 else suspected.mean()).item(),
    )


def _hardest(s: Float[Tensor, "q m"], negative: Bool[Tensor, "q m"]) -> float:
    ranked = s.masked_fill(~negative, -math.inf).sort(1, descending=True).values
    top = (HARDEST * negative.sum(1)).ceil().long().clamp_min(1)
    within = torch.arange(s.shape[1], device=s.device) < top[:, None]
    return (ranked.masked_fill(~within, 0).sum(1) / top).mean().item()


def _histogram(cosines: Float[Tensor, "p"]) -> list[float]:
    counts = torch.histc(cosines.clamp(-1, 1), BINS, -1, 1)
    return (counts / counts.sum().clamp_min(1)).tolist()


def _highest(s: Float[Tensor, "q m"], among: Bool[Tensor, "q m"], k: int) -> list[tuple[int, int, float]]:
    """The k highest cells, no anchor twice."""
    best, at = s.masked_fill(~among, -math.inf).max(1)
    rows = best.topk(min(k, len(best))).indices.tolist()
    return [(row, int(at[row]), float(best[row])) for row in rows if best[row] > -math.inf]
