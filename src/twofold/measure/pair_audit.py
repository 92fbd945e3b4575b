"""Pairs that do not belong together: evidence about each, and what it amounts to.

No label says which pairs are wrong, but wrong pairs are easily made: give items texts of others. What is measured of
the given pairs is measured of these, too; a logistic regression tells the two apart, and says of each given pair how
much more it looks like a made one. That the given pairs hold wrong ones themselves leaves their order as it is
(learning from positive and unlabeled examples, Elkan and Noto 2008), and their share follows from where made pairs are
common and right ones are not.

"First" and "second" are two modalities, such as pictures and captions; an item may have several of the second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from twofold.errors import DataError
from twofold.measure.metrics import Interval

NEIGHBOURS = 10
SAMPLE = 256  # items that tell how alike things are by chance
BLOCK = 1 << 24  # similarities, or numbers of gathered rows, at a time
QUANTILES = np.linspace(0.3, 0.9, 13)  # of the made pairs, where the share of wrong ones is looked for

Matrix = Float[np.ndarray, "n d"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pair p says that row `row[p]` of the second side belongs to item `item[p]`."""

    item: Int[np.ndarray, "p"]
    row: Int[np.ndarray, "p"]

    def __len__(self) -> int:
        return len(self.item)

    def take(self, which: np.ndarray) -> "Pairs":
        return Pairs(self.item[which], self.row[which])


class HeldOut(NamedTuple):
    """What heads that never saw these items say of pairs among them."""

    cosine: Float[np.ndarray, "p"]
    rarity_first: Float[np.ndarray, "p"]  # the cosine in standard deviations of all that the item could be paired with
    rarity_second: Float[np.ndarray, "p"]  # and of all that the second could be paired with
    rank: Int[np.ndarray, "p"]  # of the second among all of the fold's, for its item; 1 is best
    rank_back: Int[np.ndarray, "p"]  # of the item among all of the fold's, for the second


class Judgement(NamedTuple):
    """`wrong[p]` is the probability that given pair p does not belong together, `noise` the share of such pairs."""

    wrong: Float[np.ndarray, "p"]
    score: Float[np.ndarray, "p"]  # what orders pairs of one probability: larger is better
    noise: Interval
    weights: dict[str, float]  # of the evidence, standardised: positive speaks for a pair


def made(pairs: Pairs, owner: Int[np.ndarray, "m"], draw: np.random.Generator) -> Pairs:
    """As many wrong pairs: every row of the second side with a random item that is not its own.

    Of the same items, so that these have the same folds. DataError where there is one item only.
    """
    items = np.unique(pairs.item)
    if len(items) < 2:
        raise DataError("Pairs are judged by comparing them with others; there must be two items at least.")
    other = items[draw.integers(0, len(items) - 1, len(pairs))]
    return Pairs(np.where(other == owner[pairs.row], items[-1], other), pairs.row)


def folds(group: Int[np.ndarray, "n"], count: int, draw: np.random.Generator) -> Int[np.ndarray, "n"]:
    """A fold of 0..count−1 for each item, the same for items of one group, about equally large."""
    names, of = np.unique(group, return_inverse=True)
    if len(names) < count:
        raise DataError(f"{len(names)} items that differ do not make {count} folds.")
    fold = np.empty(len(names), np.int64)
    fold[draw.permutation(len(names))] = np.arange(len(names)) % count
    return fold[of]


def held_out(first: Matrix, second: Matrix, pairs: Pairs) -> HeldOut:
    """Evidence from one fold: `first` [n, d] its items and `second` [m, d] its rows, as unit vectors of one space."""
    n, m = len(first), len(second)
    means, deviations = second.mean(0), np.cov(second.T, bias=True)
    along = np.sqrt(np.maximum(np.einsum("id,de,ie->i", first, np.atleast_2d(deviations), first), 1e-12))
    back = np.sqrt(
        np.maximum(np.einsum("id,de,ie->i", second, np.atleast_2d(np.cov(first.T, bias=True)), second), 1e-12)
    )
    cosine = np.einsum("pd,pd->p", first[pairs.item], second[pairs.row])
    rank, rank_back = np.empty(len(pairs), np.int64), np.empty(len(pairs), np.int64)
    for part in _blocks(len(pairs), max(n, m)):
        rank[part] = 1 + (first[pairs.item[part]] @ second.T > cosine[part, None] + 1e-6).sum(1)
        rank_back[part] = 1 + (second[pairs.row[part]] @ first.T > cosine[part, None] + 1e-6).sum(1)
    return HeldOut(
        cosine,
        (cosine - first[pairs.item] @ means) / along[pairs.item],
        (cosine - second[pairs.row] @ first.mean(0)) / back[pairs.row],
        rank,
        rank_back,
    )


def neighbourly(
    near: Matrix,
    judged: Matrix,
    owner: Int[np.ndarray, "m"],
    pairs: Pairs,
    draw: np.random.Generator,
    *,
    group: Int[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "p"]:
    """How much a pair's second resembles the seconds of the items most like its item, above chance.

    `near` [n, a] are the items and `judged` [m, b] the rows of the second side, unit vectors of any two encoders. Of
    each neighbour its most alike row counts. In standard deviations of what random items give; the pair's own item, and
    the item that its row comes from, have no say, nor have others of their `group`.
    """
    group = np.arange(len(near)) if group is None else group
    start = np.searchsorted(owner, np.arange(len(near) + 1))  # the rows of an item stand together
    many = int(np.diff(start).max())
    places = np.minimum(start[:-1, None] + np.arange(many), start[1:, None] - 1)  # [n, many], the last one repeated
    items, of = np.unique(pairs.item, return_inverse=True)
    found = nearest(near[items], near, NEIGHBOURS + 2 * int(np.unique(group, return_counts=True)[1].max()))
    neighbours = found[of]  # [p, k and those that will have no say]
    allowed = group[neighbours] != group[pairs.item][:, None]
    allowed &= group[neighbours] != group[owner[pairs.row]][:, None]
    allowed &= np.cumsum(allowed, axis=1) <= NEIGHBOURS
    chance = judged[places[draw.integers(0, len(near), min(SAMPLE, len(near)))].ravel()]
    agreement = np.empty(len(pairs))
    for part in _blocks(len(pairs), neighbours.shape[1] * many * judged.shape[1]):
        own = judged[pairs.row[part]]
        alike = np.einsum("pkcd,pd->pkc", judged[places[neighbours[part]]], own).max(2)
        of_random = (own @ chance.T).reshape(len(own), -1, many).max(2)
        mean = (alike * allowed[part]).sum(1) / np.maximum(allowed[part].sum(1), 1)
        agreement[part] = (mean - of_random.mean(1)) / np.maximum(of_random.std(1), 1e-6)
    return agreement


def siblings(judged: Matrix, owner: Int[np.ndarray, "m"], pairs: Pairs) -> Float[np.ndarray, "p"]:
    """The median cosine of a pair's second with the others of its item; NaN where it is the only one."""
    start = np.searchsorted(owner, np.arange(int(owner.max(initial=0)) + 2))
    found = np.full(len(pairs), np.nan)
    for place, (item, row) in enumerate(zip(pairs.item.tolist(), pairs.row.tolist(), strict=True)):
        others = [other for other in range(start[item], start[item + 1]) if other != row]
        if others:
            found[place] = np.median(judged[others] @ judged[row])
    return found


def judge(given: dict[str, np.ndarray], fake: dict[str, np.ndarray], *, seed: int = 0) -> Judgement:
    """From the same evidence about the given pairs and about made ones to a probability for each given pair.

    Evidence is larger for better pairs; NaN where there is none.
    """
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression

    names = [name for name in given if np.isfinite(given[name]).any()]
    table, other = (np.stack([evidence[name] for name in names], 1) for evidence in (given, fake))
    middle, spread = np.nanmean(table, 0), np.maximum(np.nanstd(table, 0), 1e-9)
    table, other = (np.nan_to_num((each - middle) / spread) for each in (table, other))
    rows = np.concatenate([table, other])
    truth = np.repeat([1, 0], [len(table), len(other)])
    model = LogisticRegression(C=1.0, class_weight="balanced", random_state=seed, max_iter=1000).fit(rows, truth)
    score, of_made = model.decision_function(table), model.decision_function(other)
    noise = _share(-score, -of_made)
    # How often a score as high is that of a made pair: a curve that only falls, so that probabilities add up.
    balance = np.repeat([1 / len(table), 1 / len(other)], [len(table), len(other)])
    curve = IsotonicRegression(y_min=1e-6, y_max=1 - 1e-6, increasing=False)
    made = curve.fit(np.concatenate([score, of_made]), 1 - truth, sample_weight=balance).predict(score)
    wrong = np.minimum(1.0, noise.value * made / (1 - made))
    return Judgement(wrong, score, noise, dict(zip(names, model.coef_[0].round(3).tolist(), strict=True)))


def _share(given: Float[np.ndarray, "p"], fake: Float[np.ndarray, "p"]) -> Interval:
    """The share of wrong pairs: beyond a point that few right ones reach, given pairs are as rare as it says.

    given = (1 − s) · right + s · made: the rate of given pairs beyond a point, by that of made ones, is at least s.
    """
    found = []
    for quantile in QUANTILES:
        point = np.quantile(fake, quantile)
        beyond, rate = float((given > point).mean()), float((fake > point).mean())
        half = 1.96 * np.sqrt(max(beyond * (1 - beyond), 1 / len(given)) / len(given))
        if rate > 0:
            found.append(Interval(*(min(1.0, max(0.0, (beyond + side) / rate)) for side in (0.0, -half, half))))
    # The first point counts most pairs; a later one is better only where right pairs reach beyond the first.
    for at, share in enumerate(found):
        if all(share.value <= later.high for later in found[at + 1 :]):
            return share
    return Interval(1.0, 0.0, 1.0)


def oddities(texts: list[str]) -> list[str]:
    """What is strange about each text by itself, in words; "" where nothing is.

    Blank, hardly any letters, a script that hardly any other text is in, or far longer or shorter than the rest: beyond
    four times the middle half of the lengths, in logarithms, from their middle.
    """
    lengths = np.log([max(1, len(text.strip())) for text in texts]) if texts else np.zeros(0)
    low, middle, high = np.quantile(lengths, (0.25, 0.5, 0.75)) if texts else (0, 0, 0)
    reach = 4 * max(high - low, 0.2)
    scripts = [_script(text) for text in texts]
    common = {script for script in set(scripts) if scripts.count(script) >= max(2, 0.02 * len(texts))}
    found = []
    for text, length, script in zip(texts, lengths, scripts, strict=True):
        bare = text.strip()
        letters = sum(character.isalpha() or character.isspace() for character in bare)
        if not bare:
            found.append("blank")
        elif letters < 0.5 * len(bare):
            found.append("hardly any letters")
        elif script and script not in common:
            found.append(f"in {script.title()} script, unlike the others")
        elif abs(length - middle) > reach:
            found.append(f"{len(bare):,} characters, where most have about {round(float(np.exp(middle))):,}")
        else:
            found.append("")
    return found


def _script(text: str) -> str:
    """The script of most letters: the first word of their Unicode names."""
    import unicodedata

    names = [unicodedata.name(character, "").split(" ")[0] for character in text[:200] if character.isalpha()]
    return max(set(names), key=names.count) if names else ""


def alike(unit: Matrix, *, least: float = 0.985, most: int = 200) -> list[tuple[int, int, float]]:
    """Pairs of rows whose cosine is `least` or more, the most alike first; at most `most`."""
    found: list[tuple[int, int, float]] = []
    for part in _blocks(len(unit), len(unit)):
        scores = unit[part] @ unit.T
        rows, others = np.nonzero(scores >= least)
        rows_at = rows + part.start
        found += [
            (int(a), int(b), round(float(scores[r, b]), 4))
            for a, b, r in zip(rows_at, others, rows, strict=True)
            if a < b
        ]
    return sorted(found, key=lambda each: (-each[2], each[0], each[1]))[:most]


def nearest(queries: Matrix, gallery: Matrix, k: int) -> Int[np.ndarray, "q k"]:
    """For each query the k rows of the gallery with the largest products, best first; all where there are fewer."""
    k = min(k, len(gallery))
    found = np.empty((len(queries), k), np.int64)
    for part in _blocks(len(queries), len(gallery)):
        scores = queries[part] @ gallery.T
        near = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, near, 1), axis=1, kind="stable")
        found[part] = np.take_along_axis(near, order, 1)
    return found


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def unit(matrix: Matrix) -> Matrix:
    """Rows of length 1."""
    matrix = np.asarray(matrix, np.float32)
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
