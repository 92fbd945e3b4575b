"""A score that can be read as a probability, and the score below which nothing found is a match.

A cosine of .3 says nothing by itself. What a person wants to know of a hit is "does this belong to what I asked for?",
and the answer depends on three things: the score, how scores of true and of false pairs are distributed, and *how many
items there were to choose from*. SigLIP's sigmoid knows the first two, at the odds it was trained at: one true text
among the B of a batch. In a gallery of n the odds are 1 : n − 1, and the log-odds move by ln (B − 1)/(n − 1):

    p(pair | score, n) = sigmoid(t·cosine + b + ln (B − 1) − ln (n − 1))

The same holds for a curve that was fitted on held-out pairs in a gallery of another size. It takes each query to have
one item that belongs to it, whatever the gallery: a large one that holds many is promised too little.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from twofold.errors import BundleError, DataError, UsageError, unknown
from twofold.measure.hubness import PLAIN, Remedy
from twofold.measure.metrics import Interval, Matrix, bootstrap, row_blocks
from twofold.models.bundle import Bundle
from twofold.runtime import generator

SHOWN = 10  # hits of a query that are looked at: what a search shows
BINS = 15

Fitted = Literal["platt", "isotonic"]


class Shown(NamedTuple):
    """What held-out queries were shown: the scores of their best hits, best first, and which of them are true."""

    scores: Float[np.ndarray, "q k"]
    matches: Bool[np.ndarray, "q k"]
    gallery: int
    groups: Sequence[Hashable]  # captions of one picture are not independent

    def take(self, rows: Int[np.ndarray, "r"]) -> "Shown":
        return Shown(self.scores[rows], self.matches[rows], self.gallery, [self.groups[row] for row in rows.tolist()])


class Bin(NamedTuple):
    """Pairs of about one probability: what was promised, and what came true."""

    promised: float
    true: Interval
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """From a score to the probability that a hit belongs to the query, in a gallery of any size.

    The log-odds are `scale`·score + `offset`, or the line through `knots` (score, log-odds), flat beyond its ends. They
    hold at the odds of one true item among `gallery`. `threshold` is the score below which a best hit is no match:
    a share `cost` of held-out queries that do have an answer falls below it, too. `remedy` is what makes the scores.
    """

    kind: Literal["siglip", "platt", "isotonic"]
    gallery: int
    scale: float = 0.0
    offset: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()
    threshold: float | None = None
    cost: float = 0.05
    remedy: Remedy | None = None
    about: str = ""  # what it was fitted on, for people

    def probability(self, score: Float[np.ndarray, "*n"] | float, gallery: int | None = None) -> Any:
        """The probability, 0..1, that an item with this score belongs to the query, in a gallery of so many items.

        Without `gallery`, at the odds of the fit (for SigLIP's own sigmoid, of the training batch).
        """
        score = np.asarray(score, np.float64)
        if self.knots:
            at, logits = np.array(self.knots).T
            logit = np.interp(score, at, logits)
        else:
            logit = self.scale * score + self.offset
        if gallery is not None:
            logit = logit + math.log(max(self.gallery - 1, 1)) - math.log(max(gallery - 1, 1))
        found = _sigmoid(logit)
        return found if score.ndim else float(found)

    def rejects(self, score: float) -> bool:
        """Whether a best hit of this score is "no good match"."""
        return self.threshold is not None and score < self.threshold

    def record(self) -> dict[str, Any]:
        """As JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "knots": [list(knot) for knot in self.knots], "remedy": self.remedy and self.remedy.record()}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Calibration":
        """What `record` wrote."""
        knots = tuple((float(score), float(logit)) for score, logit in record["knots"])
        return cls(**{**record, "knots": knots, "remedy": record["remedy"] and Remedy.read(record["remedy"])})

    @classmethod
    def of(cls, bundle: Bundle, queries: str, gallery: str) -> "Calibration | None":
        """What `bundle` keeps for queries of one modality in a gallery of another, if anything."""
        kept = bundle.meta.get("calibration", {}).get(direction(queries, gallery))
        try:
            return None if kept is None else cls.read(kept)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"The calibration that the bundle keeps for {direction(queries, gallery)} cannot be read "
                f"({type(error).__name__}: {error}). `twofold calibrate` makes it again."
            ) from error


def direction(queries: str, gallery: str) -> str:
    return f"{queries}_to_{gallery}"


def from_siglip(scale: float, bias: float, *, batch: int) -> Calibration:
    """SigLIP's own sigmoid(t·cosine + b), whose odds are those of its training batch."""
    return Calibration("siglip", gallery=batch, scale=scale, offset=bias, about=f"training in batches of {batch:,}")


def shown(
    queries: Matrix,
    gallery: Matrix,
    positives: Sequence[Sequence[int]],
    *,
    groups: Sequence[Hashable] | None = None,
    k: int = SHOWN,
    remedy: Remedy | None = None,
) -> Shown:
    """The k best hits of every query, as a search would show them."""
    k = min(k, len(gallery))
    scores, matches = [], []
    for block in row_blocks(len(queries), len(gallery)):
        table = torch.from_numpy((remedy or PLAIN).scores(queries[block], gallery))
        best = table.topk(k, 1)
        scores.append(best.values.double().numpy())
        own = positives[block]
        matches.append(
            np.array([np.isin(row, list(mine)) for row, mine in zip(best.indices.numpy(), own, strict=True)])
        )
    return Shown(np.concatenate(scores), np.concatenate(matches), len(gallery), list(groups or range(len(queries))))


def fit_calibration(
    held_out: Shown, *, kind: str = "platt", cost: float = 0.05, remedy: Remedy | None = None, about: str = ""
) -> Calibration:
    """A calibration fitted on what held-out queries were shown, and its threshold for "no good match".

    `platt` is a logistic curve of two numbers (Platt 1999, with his smoothed targets), `isotonic` any rising curve (a
    thousand true hits and more). `remedy` must be what made the scores.
    """
    if kind not in ("platt", "isotonic"):
        raise unknown("kind of calibration", kind, ("platt", "isotonic"))
    scores, matches = held_out.scores.ravel(), held_out.matches.ravel()
    if not 0 < matches.sum() < len(matches):
        raise DataError(
            f"{int(matches.sum())} of the {len(matches)} pairs shown belong together; a calibration needs pairs that "
            "do and pairs that do not. Give more held-out pairs, and check that the model finds any."
        )
    fitted = Calibration(
        kind,  # type: ignore[arg-type]  # checked above
        gallery=held_out.gallery,
        threshold=threshold(held_out.scores[:, 0], cost),
        cost=cost,
        remedy=remedy,
        about=about,
    )
    if kind == "platt":
        scale, offset = platt(scores, matches)
        return replace(fitted, scale=scale, offset=offset)
    return replace(fitted, knots=tuple(isotonic(scores, matches)))


def threshold(best: Float[np.ndarray, "q"], cost: float) -> float:
    """The highest score such that at most a share `cost` of the best hits of true queries lies below it."""
    if not 0 <= cost < 1:
        raise UsageError(f"The cost is a share of true queries, 0 ≤ cost < 1; got {cost}.")
    ordered = np.sort(np.asarray(best, np.float64))
    return float(ordered[math.floor(cost * len(ordered) + 1e-9)])


def platt(scores: Float[np.ndarray, "n"], matches: Bool[np.ndarray, "n"]) -> tuple[float, float]:
    """Scale and offset of the log-odds, by Newton's method on the logistic loss with Platt's targets.

    The targets are (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) instead of 1 and 0, so separable scores have a finite fit.
    """
    x, y = np.asarray(scores, np.float64), np.asarray(matches, bool)
    true = int(y.sum())
    targets = np.where(y, (true + 1) / (true + 2), 1 / (len(y) - true + 2))
    middle, width = x.mean(), x.std() or 1.0
    design = np.stack([(x - middle) / width, np.ones_like(x)], 1)
    weights = np.array([0.0, math.log(targets.mean() / (1 - targets.mean()))])

    def loss(w: np.ndarray) -> float:
        z = design @ w
        return float((np.logaddexp(0, z) - targets * z).sum())

    for _ in range(100):
        p = _sigmoid(design @ weights)
        gradient = design.T @ (p - targets)
        if np.abs(gradient).max() < 1e-9 * len(x):
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design + 1e-12 * len(x) * np.eye(2)
        step, length = np.linalg.solve(curvature, gradient), 1.0
        while length > 1e-8 and loss(weights - length * step) > loss(weights):
            length /= 2
        weights = weights - length * step
    scale = float(weights[0] / width)
    return scale, float(weights[1] - scale * middle)


def isotonic(scores: Float[np.ndarray, "n"], matches: Bool[np.ndarray, "n"]) -> list[tuple[float, float]]:
    """The rising curve nearest to the outcomes (pool adjacent violators), as knots (score, log-odds).

    A block of equal probability is a knot at its first and at its last score. No finite sample shows certainty: a block
    of n pairs of which all or none came true is held to 1 − 1/(n + 2) or 1/(n + 2), or to its neighbour's share where
    the curve would bend back.
    """
    values, at = np.unique(np.asarray(scores, np.float64), return_inverse=True)
    hits, counts = np.bincount(at, weights=np.asarray(matches, float)), np.bincount(at)
    blocks: list[list[float]] = []  # first score, last score, true, pairs
    for score, true, pairs in zip(values.tolist(), hits.tolist(), counts.tolist(), strict=True):
        blocks.append([score, score, true, pairs])
        while len(blocks) > 1 and blocks[-2][2] * blocks[-1][3] >= blocks[-1][2] * blocks[-2][3]:
            _, last, true, pairs = blocks.pop()
            blocks[-1][1:] = [last, blocks[-1][2] + true, blocks[-1][3] + pairs]
    shares = [true / pairs for _, _, true, pairs in blocks]  # rising, so only the first can be 0 and the last 1
    if shares[0] == 0:
        shares[0] = min([1 / (blocks[0][3] + 2), *shares[1:2]])
    if shares[-1] == 1:
        shares[-1] = max([1 - 1 / (blocks[-1][3] + 2), *shares[-2:-1]])
    knots = []
    for (first, last, _, _), share in zip(blocks, shares, strict=True):
        logit = math.log(share / (1 - share))
        knots += [(first, logit)] if first == last else [(first, logit), (last, logit)]
    return knots


# -- How far promises hold --------------------------------------------------------------------------------------------


def reliability(
    probabilities: Float[np.ndarray, "n"], matches: Bool[np.ndarray, "n"], *, bins: int = BINS
) -> list[Bin]:
    """What was promised and what came true, in bins of equally many pairs (equal mass: arXiv 1904.01685)."""
    p, y = _pairs(probabilities, matches)
    return [
        Bin(float(p[rows].mean()), bootstrap(y[rows]), len(rows))
        for rows in np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    ]


def expected_error(
    probabilities: Float[np.ndarray, "n"],
    matches: Bool[np.ndarray, "n"],
    *,
    bins: int = BINS,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    draw: torch.Generator | None = None,
) -> Interval:
    """ECE: the mean over pairs of |promised − came true| of their bin, 0..1; 0 is best. Bins have equal mass.

    The interval is a percentile bootstrap over `groups`. Noise in a bin adds to an absolute difference, in each
    resample once more: the interval is moved back by what resampling has added on average, and not below 0.
    """
    p, y = _pairs(probabilities, matches)
    order = np.argsort(p, kind="stable")
    place = np.empty(len(p), np.int64)
    for number, rows in enumerate(np.array_split(order, min(bins, len(p)))):
        place[rows] = number
    names: dict[Hashable, int] = {}
    owner = np.array([names.setdefault(name, len(names)) for name in (groups or range(len(p)))])
    excess = np.zeros((len(names), int(place.max()) + 1))
    np.add.at(excess, (owner, place), p - y)
    sizes = np.bincount(owner).astype(float)
    value = float(np.abs(excess.sum(0)).sum() / len(p))
    draw = draw or generator("bootstrap")
    found = []
    for _ in range(resamples):
        drawn = torch.randint(len(names), (len(names),), generator=draw).numpy()
        times = np.bincount(drawn, minlength=len(names))
        found.append(float(np.abs(times @ excess).sum() / (times @ sizes)))
    low, high = np.quantile(found, [0.025, 0.975]) - (np.mean(found) - value)
    return Interval(value, max(0.0, float(low)), float(high))


def brier(
    probabilities: Float[np.ndarray, "n"], matches: Bool[np.ndarray, "n"], *, groups: Sequence[Hashable] | None = None
) -> Interval:
    """The mean squared difference of promise and outcome, 0..1; 0 is best. It pays for being sharp as well."""
    p, y = _pairs(probabilities, matches)
    return bootstrap((p - y) ** 2, groups=groups)


class Honesty(NamedTuple):
    """How far a calibration's promises hold on pairs it was not fitted on."""

    ece: Interval
    brier: Interval
    bins: list[Bin]


def honesty(calibration: Calibration, held_out: Shown, *, gallery: int | None = None) -> Honesty:
    """ECE, Brier score and bins over all that was shown; at the odds of `gallery`, if it is not that of the fit."""
    return _honesty(calibration.probability(held_out.scores, gallery), held_out)


def cross_validated(held_out: Shown, *, kind: str = "platt", folds: int = 5) -> Honesty:
    """`honesty` of a calibration on what it was fitted on, each fifth of the groups judged by a fit on the others."""
    names = list(dict.fromkeys(held_out.groups))
    shuffled = torch.randperm(len(names), generator=generator("folds")).tolist()
    fold = {names[at]: turn % folds for turn, at in enumerate(shuffled)}
    mine = np.array([fold[name] for name in held_out.groups])
    promised = np.zeros(held_out.scores.shape)
    for number in set(mine.tolist()):
        fitted = fit_calibration(held_out.take(np.flatnonzero(mine != number)), kind=kind)
        promised[mine == number] = fitted.probability(held_out.scores[mine == number])
    return _honesty(promised, held_out)


def diagram(curves: Mapping[str, Sequence[Bin]], *, title: str = "Reliability") -> str:
    """A reliability diagram as SVG: promised against came true, with 95 % intervals; the diagonal is honest."""
    side, left, top = 360, 56, 34
    colours = ("#a8321c", "#1d6b3a", "#2f5d9b", "#8a6d1b")

    def x(p: float) -> float:
        return left + side * p

    def y(p: float) -> float:
        return top + side * (1 - p)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + side + 20} {top + side + 52}" width="640" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{left}" y="20" font-size="15">{escape(title)}</text>',
        f'<path d="M{x(0)} {y(0)}L{x(1)} {y(1)}" stroke="#b8b8be" stroke-dasharray="4 4"/>',
        f'<path d="M{x(0)} {y(1)}V{y(0)}H{x(1)}" stroke="#6b6b73" fill="none"/>',
    ]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{y(0) + 17:.1f}" text-anchor="middle" fill="#6b6b73">{tick:.1f}</text>'
        )
        parts.append(
            f'<text x="{x(0) - 7:.1f}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#6b6b73">{tick:.1f}</text>'
        )
    parts.append(f'<text x="{x(0.5):.1f}" y="{y(0) + 40:.1f}" text-anchor="middle">promised probability</text>')
    parts.append(
        f'<text transform="translate({left - 38} {y(0.5):.1f}) rotate(-90)" text-anchor="middle">'
        "share that came true</text>"
    )
    for number, (name, bins) in enumerate(curves.items()):
        colour = colours[number % len(colours)]
        line = " ".join(f"{x(each.promised):.1f},{y(each.true.value):.1f}" for each in bins)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for each in bins:
            at = x(each.promised)
            parts.append(f'<path d="M{at:.1f} {y(each.true.low):.1f}V{y(each.true.high):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{y(each.true.value):.1f}" r="3" fill="{colour}"/>')
        row = top + 16 + 17 * number
        parts.append(f'<circle cx="{left + 16}" cy="{row - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 26}" y="{row}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _honesty(promised: Float[np.ndarray, "q k"], held_out: Shown) -> Honesty:
    groups = [name for name in held_out.groups for _ in range(held_out.scores.shape[1])]
    p, y = promised.ravel(), held_out.matches.ravel()
    return Honesty(expected_error(p, y, groups=groups), brier(p, y, groups=groups), reliability(p, y))


def _pairs(probabilities: Any, matches: Any) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    p, y = np.asarray(probabilities, np.float64).ravel(), np.asarray(matches, np.float64).ravel()
    if len(p) != len(y) or len(p) == 0:
        raise DataError(f"Each probability needs its outcome, one at least; got {len(p)} and {len(y)}.")
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("Probabilities lie in 0..1.")
    return p, y


def _sigmoid(z: Any) -> Any:
    return np.exp(-np.logaddexp(0, -np.asarray(z, np.float64)))
