"""Hard negatives without false ones: what a model ranks close to the right answer, unless it is another right answer.

The harder a candidate, the likelier it is right as well: a second picture of the thing, the same words, a caption that
fits by chance. Learning to push those away unlearns what was learned. So guards look at each candidate first, and what
they remove is counted and shown.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from twofold.errors import DataError, UsageError

Matrix = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
Search = Callable[[Float[Tensor, "b d"], int], Int64[Tensor, "b m"] | Int64[np.ndarray, "b m"]]

BLOCK = 1 << 24  # numbers held at once
EXAMPLES = 12  # kept of what each guard removed


@dataclass(frozen=True)
class Guards:
    """What a candidate must not be in order to count as a negative."""

    same: bool = True  # equal to a positive in a column of `Known.same`: its item, its words, its label
    near: float | None = 0.95  # as close to a positive as this cosine: a near-duplicate
    bits: int | None = 6  # its picture's perceptual hash differs in so few of 64 places: the same picture again
    share: float | None = 0.95  # beyond this share of the way from an unrelated item's score to the positive's
    zero: float | None = None  # an unrelated item's score: 0 in NV-Retriever; None is each query's mean over the corpus
    margin: float | None = None  # closer below the positive's score than this
    ceiling: float | None = None  # above the score that this share of all true pairs stay under
    skip: float = 0  # among the first so many ranks; below 1, in that share of the corpus

    def __post_init__(self) -> None:
        ranges = {"near": (-1, 1), "bits": (0, 64), "share": (0, 1), "margin": (0, 2), "ceiling": (0, 1)}
        for name, (low, high) in {**ranges, "skip": (0, math.inf)}.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"Guards take {name} from {low} to {high}; got {value}.")


NAIVE = Guards(same=False, near=None, bits=None, share=None)  # every candidate is taken for a negative


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the corpus beside its vectors; a column has one entry a row.

    `same`: columns in which a candidate must not equal a positive; None equals nothing, a frozenset whatever shares a
    member with it. `asked`: those of them in which a query has a value of its own, which then counts instead. `alike`:
    other embeddings of the rows, of the pictures that the texts belong to, in which near-duplicates may show as well.
    `prints`: `perceptual_hashes`.
    """

    same: Mapping[str, Sequence[Hashable]] = field(default_factory=dict)
    asked: Mapping[str, Sequence[Hashable]] = field(default_factory=dict)
    alike: Mapping[str, Matrix] = field(default_factory=dict)
    prints: Float[Tensor, "m 64"] | None = None


class Example(NamedTuple):
    """A candidate that a guard removed; `score` is the cosine, `positive` the query's best-scoring one."""

    query: int
    positive: int
    candidate: int
    score: float
    positive_score: float


class Removed(NamedTuple):
    """What one guard objected to. Guards overlap: `alone` counts the candidates that no other guard caught."""

    candidates: int
    alone: int
    queries: int  # that had such a candidate
    examples: list[Example]  # the highest-scoring, one a query


@dataclass(frozen=True, eq=False)
class Mined:
    """`negatives` are corpus rows, hardest first, −1 where a query has fewer than k; `scores` their cosines.

    `looked` counts the candidates that were passed on the way to each query's k-th negative, those included.
    """

    negatives: Int64[Tensor, "q k"]
    scores: Float[Tensor, "q k"]
    removed: dict[str, Removed]
    looked: int

    @property
    def short(self) -> int:
        """Queries with fewer than k negatives."""
        return int((self.negatives < 0).any(1).sum())


def hard_negatives(
    queries: Matrix,
    corpus: Matrix,
    positives: Sequence[Sequence[int]],
    *,
    k: int,
    guards: Guards = Guards(),
    known: Known = Known(),
    search: Search | None = None,
    depth: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Mined:
    """The k highest-scoring rows of `corpus` for each query that are neither its positives nor removed by a guard.

    `positives[i]` are the corpus rows that query i should find. Scores are cosines, and a query is held against its
    best positive. By default every row is compared, in blocks; `search(queries, n)` may instead propose n rows for each
    of a block of unit queries (−1 for none), from an approximate index; their scores are computed here. Only the first
    `depth` candidates (beyond `skip`) are looked at: a query whose positive ranks far below has none, and is `short`.
    A batch is a corpus too, and so is a batch with a queue behind it.
    """
    asked, answers = _unit("queries", queries), _unit("corpus", corpus)
    own = _padded(positives, len(asked), len(answers)).to(asked.device)
    if k < 1 or depth < k:
        raise UsageError(f"Mining takes k ≥ 1 and a depth of at least k; got k={k}, depth={depth}.")
    skip = math.ceil(guards.skip * len(answers)) if guards.skip < 1 else math.ceil(guards.skip)
    rules = _Rules(guards, known, asked, answers, own, skip)
    found = torch.full((len(asked), k), -1, device=asked.device)
    scores = asked.new_full((len(asked), k), -math.inf)
    removed = {name: Removed(0, 0, 0, []) for name in rules.names}
    looked = 0
    for rows in _blocks(len(asked), max(len(answers), (depth + skip) * answers.shape[1])):
        score, at = _candidates(asked[rows], answers, own[rows], depth + skip, search)
        there = score > -math.inf
        objections = rules(rows, score, at)  # [guards, b, depth]
        fine = there & ~objections.any(0)
        passed = fine.cumsum(1)
        seen = there & (passed - fine.long() < k)  # up to the k-th that is fine
        looked += int(seen.sum())
        chosen = fine & (passed <= k)
        query, place = chosen.nonzero(as_tuple=True)
        into = passed[query, place] - 1
        found[rows.start + query, into] = at[query, place]
        scores[rows.start + query, into] = score[query, place]
        objections &= seen
        once = objections.sum(0) == 1
        for name, objects in zip(removed, objections, strict=True):
            before = removed[name]
            removed[name] = Removed(
                candidates=before.candidates + int(objects.sum()),
                alone=before.alone + int((objects & once).sum()),
                queries=before.queries + int(objects.any(1).sum()),
                examples=_foremost(before.examples, objects, score, at, rules, rows),
            )
        if progress:
            progress(rows.stop, len(asked))
    return Mined(found, scores, removed, looked)


class _Rules:
    """The guards, ready to look at blocks of candidates: what they compare with is prepared once."""

    def __init__(self, guards: Guards, known: Known, asked: Tensor, answers: Tensor, own: Tensor, skip: int):
        self.guards, self.own, self.skip = guards, own, skip
        self.codes = {}
        for name, values in known.same.items() if guards.same else ():
            self.codes[f"same {name}"] = _coded(name, values, known.asked.get(name), own, len(answers))
        self.spaces: dict[str, tuple[Tensor, float]] = {}
        if guards.near is not None:
            spaces = {"": answers, **{f" {name}": _unit(name, matrix) for name, matrix in known.alike.items()}}
            self.spaces = {f"near-duplicate{name}": (matrix, guards.near) for name, matrix in spaces.items()}
        if guards.bits is not None and known.prints is not None:
            # One more bit would be below; half a bit keeps rounding from deciding.
            self.spaces["same picture"] = (_unit("prints", known.prints).to(answers), 1 - (guards.bits + 0.5) / 32)
        for name, (matrix, _) in self.spaces.items():
            if len(matrix) != len(answers):
                raise DataError(f"The corpus has {len(answers)} rows, and {name} knows {len(matrix)}.")
        best = torch.stack([(asked * answers[column]).sum(1) for column in own.unbind(1)], 1).max(1)
        self.best = best.values
        self.best_at = own.gather(1, best.indices[:, None])[:, 0]
        self.limits: dict[str, Tensor] = {}
        if guards.share is not None:
            zero = asked @ answers.mean(0) if guards.zero is None else guards.zero
            # Below the positive in any case, also where that scores less than nothing.
            self.limits["near the positive"] = self.best - (1 - guards.share) * (self.best - zero).abs()
        if guards.margin is not None:
            self.limits["within the margin"] = self.best - guards.margin
        if guards.ceiling is not None:
            self.limits["above the ceiling"] = self.best.new_full(
                (len(asked),), float(self.best.quantile(guards.ceiling))
            )
        self.names = [*self.codes, *self.spaces, *self.limits, *(["first ranks"] if skip else [])]

    def __call__(
        self, rows: slice, score: Float[Tensor, "b m"], at: Int64[Tensor, "b m"]
    ) -> Bool[Tensor, "guards b m"]:
        own = self.own[rows]
        objections = []
        for codes, theirs in self.codes.values():
            objections.append((codes[at][:, :, :, None] == theirs[rows][:, None, None, :]).any((2, 3)))
        for matrix, cosine in self.spaces.values():
            rival = matrix[at]
            near = torch.zeros_like(at, dtype=torch.bool)
            for column in own.unbind(1):
                near |= torch.einsum("bmd,bd->bm", rival, matrix[column]) >= cosine
            objections.append(near)
        for limit in self.limits.values():
            objections.append(score > limit[rows, None])
        if self.skip:
            objections.append((torch.arange(at.shape[1], device=at.device) < self.skip).expand_as(at))
        return torch.stack(objections) if objections else torch.zeros(0, *at.shape, dtype=torch.bool, device=at.device)


def _candidates(
    asked: Float[Tensor, "b d"], answers: Float[Tensor, "m d"], own: Int64[Tensor, "b p"], n: int, search: Search | None
) -> tuple[Float[Tensor, "b n"], Int64[Tensor, "b n"]]:
    """Scores and rows of the n best candidates, best first; −∞ where there is none. Positives are no candidates."""
    if search is None:
        score = (asked @ answers.T).scatter_(1, own, -math.inf)
        best = score.topk(min(n, len(answers)), dim=1)
        return best.values, best.indices
    at = torch.as_tensor(np.asarray(search(asked, n + own.shape[1]))).to(own)
    if at.ndim != 2 or len(at) != len(asked) or at.max() >= len(answers):
        raise DataError(
            f"A search function gives rows of the corpus (0..{len(answers) - 1}, −1 for none), one list of one length "
            f"for each of {len(asked)} queries; got {tuple(at.shape)}, up to {int(at.max()) if at.numel() else 'none'}."
        )
    score = torch.einsum("bnd,bd->bn", answers[at.clamp(min=0)], asked)
    score = score.masked_fill((at < 0) | (at[:, :, None] == own[:, None, :]).any(2), -math.inf)
    score, order = score.sort(dim=1, descending=True, stable=True)
    return score[:, :n], at.gather(1, order)[:, :n]


def _foremost(
    before: list[Example], objects: Bool[Tensor, "b m"], score: Tensor, at: Tensor, rules: _Rules, rows: slice
) -> list[Example]:
    """The examples so far and those of this block: of each query the best-scoring one, and of these the best."""
    value, place = score.masked_fill(~objects, -math.inf).max(1)
    top = value.topk(min(EXAMPLES, len(value)))
    fresh = [
        Example(
            query=rows.start + query,
            positive=int(rules.best_at[rows.start + query]),
            candidate=int(at[query, place[query]]),
            score=of,
            positive_score=float(rules.best[rows.start + query]),
        )
        for of, query in zip(*(part.tolist() for part in top), strict=True)
        if of > -math.inf
    ]
    return sorted(before + fresh, key=lambda example: -example.score)[:EXAMPLES]


def _coded(
    name: str, values: Sequence[Hashable], asked: Sequence[Hashable] | None, own: Int64[Tensor, "q p"], rows: int
) -> tuple[Int64[Tensor, "m v"], Int64[Tensor, "q w"]]:
    """Values as numbers: those of the corpus, and those that a query's candidates must not have."""
    if len(values) != rows or (asked is not None and len(asked) != len(own)):
        raise DataError(f"The corpus has {rows} rows and {name} {len(values)} values; it takes one each.")
    numbers: dict[Hashable, int] = {}

    def numbered(column: Sequence[Hashable]) -> Int64[Tensor, "n v"]:
        cells = [() if cell is None else cell if isinstance(cell, frozenset) else (cell,) for cell in column]
        most = max(1, *map(len, cells))
        coded = [[numbers.setdefault(value, len(numbers)) for value in cell] for cell in cells]
        return torch.tensor([[*cell, *[-1] * (most - len(cell))] for cell in coded], device=own.device)

    codes = numbered(values)
    theirs = codes[own].flatten(1) if asked is None else numbered(asked)
    return codes, theirs.masked_fill(theirs < 0, -2)  # nothing known on either side is no agreement


def _padded(positives: Sequence[Sequence[int]], queries: int, rows: int) -> Int64[Tensor, "q p"]:
    """Each query's positives in a row, filled up with the first of them."""
    if len(positives) != queries:
        raise DataError(f"Each query needs its positives: {queries} queries, {len(positives)} lists.")
    for query, own in enumerate(positives):
        if len(own) == 0 or min(own) < 0 or max(own) >= rows:
            raise DataError(f"Query {query} has the positives {list(own)}; they are rows 0..{rows - 1}, one at least.")
    longest = max(map(len, positives))
    return torch.tensor([[*own, *[own[0]] * (longest - len(own))] for own in positives])


def _unit(name: str, matrix: Matrix) -> Float[Tensor, "n d"]:
    """Rows of length 1, in float32 at least, without gradient."""
    rows = torch.as_tensor(matrix).detach()
    if rows.ndim != 2 or len(rows) == 0:
        raise DataError(f"Embeddings are one matrix [n, d] with n ≥ 1; {name} is {tuple(rows.shape)}.")
    rows = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
    if not rows.isfinite().all():
        raise DataError(f"Row {int((~rows.isfinite().all(1)).nonzero()[0])} of {name} is not finite.")
    return rows


def _blocks(rows: int, numbers: int) -> Iterator[slice]:
    """Slices that cover `rows`, of each of which `numbers` are held."""
    step = max(1, BLOCK // max(1, numbers))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
