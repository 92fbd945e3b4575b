"""What a result is worth: recall, accuracy, their intervals and their chance levels. Each is defined here once."""

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from twofold.errors import DataError, UsageError
from twofold.runtime import generator

Matrix = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]

TIE = 1e-6  # cosines closer than this are equal: rounding moves them by about 1e-7, from machine to machine
CELLS = 2**24  # scores held in memory at once, 64 MiB in float32


class Interval(NamedTuple):
    """A measured value and the range its resampling gives, in the value's own unit."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Sequence[float] | Float[np.ndarray, "n"] | Tensor,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    draw: torch.Generator | None = None,
) -> Interval:
    """The mean of `values` and its percentile bootstrap interval: where it would fall for other queries of the kind.

    Values of one group (five captions of one picture) are drawn together; without `groups` each is its own. The
    interval has no width where all values are equal. Without `draw`, the same values always give the same interval.
    """
    if not 0 < level < 1 or resamples < 1:
        raise UsageError(f"bootstrap needs 0 < level < 1 and resamples ≥ 1; got {level} and {resamples}.")
    each = torch.as_tensor(values).flatten().double().cpu()
    if len(each) == 0:
        raise DataError("There is nothing to average: no query or test item is left.")
    if groups is None:
        totals, sizes = each, torch.ones_like(each)
    else:
        _same_length("values", each, "groups", groups)
        names: dict[Hashable, int] = {}
        group = torch.tensor([names.setdefault(name, len(names)) for name in groups])
        totals = torch.zeros(len(names), dtype=each.dtype).index_add_(0, group, each)
        sizes = torch.bincount(group).double()
    draw = draw or generator("bootstrap")
    means = []
    for block in row_blocks(resamples, len(totals), CELLS // 4):
        drawn = torch.randint(len(totals), (block.stop - block.start, len(totals)), generator=draw)
        means.append(totals[drawn].sum(1) / sizes[drawn].sum(1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=each.dtype)
    low, high = torch.cat(means).quantile(tails).tolist()
    return Interval(each.mean().item(), low, high)


class Difference(NamedTuple):
    """How much more one model gets than another on the same items, and how easily chance would make as much of it."""

    gap: Interval  # mean difference; the interval is paired
    p: float  # two-sided; small where the signs of the items' differences are no coincidence

    @property
    def sure(self) -> bool:
        """The interval does not hold 0."""
        return self.gap.low > 0 or self.gap.high < 0

    def __str__(self) -> str:
        return points(self.gap)


def points(value: Interval) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * value.value:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]".replace("-", "−")


def paired(
    one: Sequence[float] | Float[np.ndarray, "n"],
    other: Sequence[float] | Float[np.ndarray, "n"],
    *,
    flips: int = 9_999,
    draw: torch.Generator | None = None,
) -> Difference:
    """`one` against `other`, item by item: a bootstrap of the differences, and a test that gives each a random sign.

    Were both models equally good, each difference would as well have the other sign; p is the share of sign flips with
    a sum as far from 0. Of hits and misses this is McNemar's test, by simulation: p cannot fall below 1/(flips + 1).
    """
    _same_length("one", one, "other", other)
    each = torch.as_tensor(np.subtract(one, other), dtype=torch.double)
    draw = draw or generator("paired")
    moved = each[each != 0]
    total, beyond = moved.sum().abs() - 1e-9, 0
    for block in row_blocks(flips, max(1, len(moved)), CELLS // 4):
        signs = torch.randint(2, (block.stop - block.start, len(moved)), generator=draw, dtype=torch.int8)
        beyond += int(((2 * signs.double() - 1) @ moved).abs().ge(total).sum())
    return Difference(bootstrap(each), (1 + beyond) / (1 + flips))


def accuracy(
    predicted: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"], *, draw: torch.Generator | None = None
) -> Interval:
    """The share of labelled items whose label is predicted, 0..1; items labelled −1 do not count."""
    _same_length("predicted", predicted, "labels", labels)
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    return bootstrap((predicted == labels)[labels >= 0], draw=draw)


def accuracy_chance(labels: Int[np.ndarray, "n"]) -> float:
    """The accuracy of the best constant answer: the share of the most frequent label, −1 not counted."""
    labels = np.asarray(labels)
    counts = np.unique(labels[labels >= 0], return_counts=True)[1]
    if len(counts) == 0:
        raise DataError("No item has a label.")
    return float(counts.max() / counts.sum())


def first_ranks(
    scores: Float[Tensor, "q m"], positives: Sequence[Sequence[int]], *, tie: float = TIE
) -> Int[Tensor, "q"]:
    """The rank of each query's best positive among the m items, 1..m; 1 is best.

    It is 1 + the items, other than the query's own positives, that score as high as the best of them. A tie (scores
    within `tie`) counts against the query, so an encoder that collapsed to a point does not score 1.
    """
    row, own = _own_scores(scores, positives)
    best = own.new_full((len(scores),), -math.inf).scatter_reduce_(0, row, own, "amax")
    above = (scores >= best[:, None] - tie).sum(1)
    return 1 + above - torch.zeros_like(above).index_add_(0, row, (own >= best[row] - tie).to(above.dtype))


class Ranked(NamedTuple):
    """Every positive of every query, best first: `place` counts a query's positives, `rank` all items, both from 1."""

    query: Int[Tensor, "p"]
    place: Int[Tensor, "p"]
    rank: Int[Tensor, "p"]


def positive_ranks(scores: Float[Tensor, "q m"], positives: Sequence[Sequence[int]], *, tie: float = TIE) -> Ranked:
    """Where each query's positives stand among the m items; ties with other items count against them, as in
    `first_ranks`, which is the rank at place 1."""
    q, m = scores.shape
    row, own = _own_scores(scores, positives)
    order = own.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, own = row[order], own[order]
    counts = torch.bincount(row, minlength=q)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    mine = own.new_full((q, int(counts.max())), math.inf)
    mine[row, place] = own
    least = mine - tie  # what an item must score to stand before the positive
    among_all = m - torch.searchsorted(scores.sort(1).values, least)
    among_own = counts[:, None] - torch.searchsorted(mine.sort(1).values, least)
    rivals = among_all - among_own
    return Ranked(row, 1 + place, 1 + place + rivals[row, place])


def average_precision(ranked: Ranked) -> Float[Tensor, "q"]:
    """Per query the mean, over its positives, of the share of positives among all items down to it; 0..1, 1 is best.

    Its mean over queries is mAP. With one positive a query it is 1/rank, and mAP the mean reciprocal rank.
    """
    counts = torch.bincount(ranked.query).double()
    return torch.zeros_like(counts).index_add_(0, ranked.query, ranked.place.double() / ranked.rank) / counts


def ndcg(ranked: Ranked, k: int = 10) -> Float[Tensor, "q"]:
    """nDCG@k per query, with gain 1 for a positive and discount log₂(1 + rank); 0..1, 1 where the positives lead."""
    counts = torch.bincount(ranked.query)
    found = torch.where(ranked.rank <= k, 1 / torch.log2(1 + ranked.rank.double()), 0.0)
    ideal = (1 / torch.log2(2 + torch.arange(k, dtype=torch.double, device=counts.device))).cumsum(0)
    return (
        torch.zeros(len(counts), dtype=torch.double, device=counts.device).index_add_(0, ranked.query, found)
        / ideal[counts.clamp(max=k) - 1]
    )


def _own_scores(
    scores: Float[Tensor, "q m"], positives: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "p"], Float[Tensor, "p"]]:
    """The query and the score of each positive; one listed twice is one."""
    q, m = scores.shape
    check_positives(positives, q, m)
    if scores.isnan().any():  # NaN compares false with everything and would rank first
        raise DataError(f"Query {int(scores.isnan().any(1).nonzero()[0])} has scores that are not a number.")
    entries = sorted({i * m + item for i, own in enumerate(positives) for item in own})
    pairs = torch.tensor(entries, dtype=torch.long, device=scores.device)
    return pairs // m, scores.flatten()[pairs]


def check_positives(positives: Sequence[Sequence[int]], queries: int, gallery: int) -> None:
    """A DataError names the first query without a positive, or with one that is no row of the gallery."""
    if len(positives) != queries:
        raise DataError(f"Each query needs its positives: {queries} queries, {len(positives)} lists.")
    for query, own in enumerate(positives):
        if len(own) == 0:
            raise DataError(f"Query {query} has no positive item; leave such queries out.")
        for item in own:
            if not 0 <= item < gallery:
                raise DataError(f"Query {query} has the positive {item}; the gallery has rows 0..{gallery - 1}.")


def recall_at_k(
    ranks: Int[Tensor, "q"] | Int[np.ndarray, "q"],
    k: int,
    *,
    groups: Sequence[Hashable] | None = None,
    draw: torch.Generator | None = None,
) -> Interval:
    """Recall@k, the share of queries with at least one positive among the first k items, 0..1.

    `ranks` come from `first_ranks`. The literature on cross-modal retrieval means this share, not that of the positives
    found, also where a query has several.
    """
    return bootstrap(torch.as_tensor(ranks) <= k, groups=groups, draw=draw)


def recall_chance(positives: int, gallery: int, k: int) -> float:
    """Recall@k of a random order, exactly: 1 − C(gallery − positives, k) / C(gallery, k), hypergeometric."""
    k = min(k, gallery)
    orders = math.comb(gallery, k)
    return (orders - math.comb(gallery - positives, k)) / orders


class Nearest(NamedTuple):
    """The k rows of a bank that are nearest to each query, nearest first."""

    cosines: Float[Tensor, "q k"]
    rows: Int[Tensor, "q k"]


STRIPE = 64  # columns that are looked at through their maximum


def nearest(queries: Float[Tensor, "q d"], bank: Float[Tensor, "n d"], k: int, *, cells: int = CELLS) -> Nearest:
    """The `k` nearest of `bank` by dot product, exactly; at most `cells` products are in memory at once.

    Of each stripe of the bank only the maximum is looked at first: the k best rows lie in the k stripes of highest
    maxima. That leaves a selection among k stripes, and what takes time is the product of the matrices.
    """
    n = len(bank)
    k = min(k, n)
    stripes = n // STRIPE  # row r < stripes · STRIPE is in stripe r mod stripes: the maximum runs along memory
    cosines, rows = queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
    rows = rows.to(queries.device)
    held: Tensor | None = None
    for block in row_blocks(len(queries), n, cells):
        some = queries[block]
        if held is None or len(held) != len(some):
            held = queries.new_empty(len(some), n)
        table = torch.mm(some, bank.T, out=held)
        if stripes <= 2 * k:
            best = table.topk(k)
            cosines[block], rows[block] = best.values, best.indices
            continue
        striped = table[:, : stripes * STRIPE].view(len(some), STRIPE, stripes)
        chosen = striped.amax(1).topk(k).indices
        inside = striped.gather(2, chosen[:, None].expand(-1, STRIPE, -1)).flatten(1)
        at = (torch.arange(STRIPE, device=chosen.device)[None, :, None] * stripes + chosen[:, None]).flatten(1)
        rest = table[:, stripes * STRIPE :]
        best = torch.cat((inside, rest), 1).topk(k)
        more = torch.arange(stripes * STRIPE, n, device=at.device).expand(len(some), -1)
        cosines[block], rows[block] = best.values, torch.cat((at, more), 1).gather(1, best.indices)
    return Nearest(cosines, rows)


def as_rows(x: Matrix) -> Float[Tensor, "n d"]:
    """`x` as a float32 tensor on its own device; a DataError names the first row that is not finite."""
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.require(x, np.float32, ["C", "W"]))
    if x.ndim != 2 or len(x) == 0:
        raise DataError(f"Embeddings are one matrix [n, d] with n ≥ 1; got {tuple(x.shape)}.")
    x = x.detach().float()
    broken = ~x.isfinite().all(1)
    if broken.any():
        raise DataError(f"Row {int(broken.nonzero()[0])} of the embeddings is not finite ({int(broken.sum())} rows).")
    return x


def unit_rows(x: Matrix) -> Float[Tensor, "n d"]:
    """`as_rows`, each row scaled to length 1."""
    return F.normalize(as_rows(x), dim=1)


def row_blocks(rows: int, columns: int, cells: int = CELLS) -> Iterator[slice]:
    """Slices that cover `rows` in order, each of at most `cells` entries of a [rows, columns] table, at least a row."""
    step = max(1, cells // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _same_length(one: str, x, other: str, y) -> None:
    if len(x) != len(y):
        raise DataError(f"{one} and {other} belong together row by row; got {len(x)} and {len(y)}.")
