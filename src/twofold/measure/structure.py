"""What a space holds together and what it keeps apart: classes or clusters, their borders, hubs, outliers, copies.

Everything here goes by cosines, as a search does. With labels it says which classes run into each other, and where;
where there are none, `clusters` finds groups and `naming_words` says what their captions have that others lack.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.errors import DataError
from twofold.measure.columns import words_in
from twofold.measure.metrics import Interval, Matrix, bootstrap, row_blocks, unit_rows
from twofold.runtime import generator

NEAREST = 10  # neighbours of an item
GROUPS = (4, 6, 8, 12, 16)  # numbers of clusters that are tried
COPIES = 0.999  # cosine from which two items are one
SHOWN = 8  # hubs, outliers, strays and borders
RARE = 3  # items that a naming word is in, at the least


class Near(NamedTuple):
    """The nearest others of every item, nearest first."""

    rows: Int[Tensor, "n k"]
    cosines: Float[Tensor, "n k"]


class Border(NamedTuple):
    """Two classes that run into each other."""

    first: int
    second: int
    share: float  # of the neighbours of the items of both, those that lie across; 0..1
    pairs: list[tuple[int, int, float]]  # the nearest items of either side, with their cosine; no item twice


class Stray(NamedTuple):
    """An item among those of another class: a hard one, or one whose label is wrong."""

    row: int
    own: int
    other: int
    share: float  # of its neighbours that are of the other class


class Hierarchy(NamedTuple):
    """Average linkage of the classes' mean directions.

    A merge joins two nodes at a height, their mean cosine distance: nodes below the number of classes are classes,
    class count + i is what merge i made. `order` puts the classes side by side so that no lines cross.
    """

    merges: list[tuple[int, int, float]]
    order: list[int]


class Group(NamedTuple):
    """A class, or a cluster: what it is called, how many items, those at its heart, how well it holds together."""

    name: str
    size: int
    exemplars: list[int]
    silhouette: float  # mean of its items, −1..1


class Structure(NamedTuple):
    """A space as its items lie in it; rows are those of the matrix."""

    labels: Int[np.ndarray, "n"]  # what the rest goes by; −1 where an item has none
    found: bool  # the labels are clusters that were found, not given
    groups: list[Group]
    between: float  # the share of the variance that lies between groups, 0..1
    silhouette: float  # mean over items, −1..1
    confusion: Float[np.ndarray, "c c"]  # whose the neighbours of a row's items are; rows sum to 1
    hierarchy: Hierarchy
    borders: list[Border]
    strays: list[Stray]
    hubs: list[tuple[int, int]]  # item, how many others have it among their nearest; most first
    outliers: list[tuple[int, float]]  # item, mean cosine to its nearest; least first
    copies: list[list[int]]  # groups of items that are one to the encoder, largest first


def structure(
    z: Matrix,
    labels: Int[np.ndarray, "n"] | None = None,
    *,
    classes: Sequence[str] = (),
    texts: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> Structure:
    """All of it; by `labels` (−1 has none), or by clusters that are found, and named by `texts` where there are any.

    Raises DataError for fewer than eight items: nothing could be said of them.
    """
    if len(z) < 8:
        raise DataError(f"Eight items are the least whose structure says anything; got {len(z)}.")
    near = nearest(z)
    found = labels is None or len(np.unique(labels[labels >= 0])) < 2
    given = clusters(z, seed=seed) if labels is None or found else np.asarray(labels)
    # Numbers in a row, for what has items here.
    there, own = np.unique(given[given >= 0], return_inverse=True)
    numbered = np.full(len(given), -1)
    numbered[given >= 0] = own
    names = _names(there, numbered, classes, texts, found)
    widths = silhouettes(z, numbered)
    groups = [
        Group(
            name,
            int((numbered == c).sum()),
            exemplars(z, numbered == c, 5),
            float(widths[numbered == c].mean()),
        )
        for c, name in enumerate(names)
    ]
    table = confusion(near, numbered)
    return Structure(
        labels=numbered,
        found=found,
        groups=groups,
        between=between(z, numbered),
        silhouette=float(widths[numbered >= 0].mean()),
        confusion=table,
        hierarchy=hierarchy(z, numbered),
        borders=borders(z, near, numbered),
        strays=strays(near, numbered),
        hubs=hubs(near),
        outliers=outliers(near),
        copies=copies(z),
    )


def _names(
    there: np.ndarray,
    numbered: np.ndarray,
    classes: Sequence[str],
    texts: Sequence[Sequence[str]] | None,
    found: bool,
) -> list[str]:
    if not found:
        return [classes[k] if k < len(classes) else str(k) for k in there.tolist()]
    said = naming_words(texts, numbered) if texts is not None else [[] for _ in there]
    return [", ".join(words) or f"cluster {c + 1}" for c, words in enumerate(said)]


def nearest(z: Matrix, k: int = NEAREST) -> Near:
    """The k nearest others of every item by cosine, exactly."""
    u = unit_rows(z)
    k = min(k, len(u) - 1)
    parts = []
    for block in row_blocks(len(u), len(u)):
        cosines = u[block] @ u.T
        rows = torch.arange(block.start, block.stop, device=u.device)
        cosines[torch.arange(len(rows)), rows] = -math.inf
        parts.append(cosines.topk(k, 1))
    return Near(torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts]))


def between(z: Matrix, labels: Int[np.ndarray, "n"]) -> float:
    """The share of the variance of unit vectors that lies between the means of classes, 0..1 (η²); 1 − it is within."""
    u = unit_rows(z).double()[torch.as_tensor(labels >= 0)]
    sums, counts = _sums(u, labels[labels >= 0])
    means, mean = sums / counts[:, None], u.mean(0)
    total = (u - mean).square().sum()
    return ((counts * (means - mean).square().sum(1)).sum() / total.clamp_min(1e-12)).item()


def silhouettes(z: Matrix, labels: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """How much nearer an item lies to its own class than to the next one, −1..1 (Rousseeuw 1987), by cosine distance.

    NaN for items without a label, 0 for one that is alone in its class. The mean distance to a class follows from the
    sum of its unit vectors, so no table of all pairs is made.
    """
    u = unit_rows(z).double().cpu()
    has = torch.as_tensor(labels >= 0)
    own = torch.as_tensor(labels[labels >= 0]).long()
    sums, counts = _sums(u[has], labels[labels >= 0])
    if len(counts) < 2:
        raise DataError("A silhouette compares classes; there is one alone.")
    away = counts - u[has] @ sums.T  # the sum of distances to each class; its own distance to itself is 0
    at = torch.arange(len(own))
    inside = away[at, own] / (counts[own] - 1).clamp_min(1)
    others = away / counts
    others[at, own] = math.inf
    outside = others.min(1).values
    width = (outside - inside) / torch.maximum(inside, outside).clamp_min(1e-12)
    found = np.full(len(u), np.nan)
    found[has.numpy()] = torch.where(counts[own] > 1, width, 0.0).numpy()
    return found


def _sums(u: Float[Tensor, "n d"], labels: Int[np.ndarray, "n"]) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c"]]:
    """The sum of each class's rows and how many there are; labels are 0, 1, … without gaps."""
    own = torch.as_tensor(labels, device=u.device).long()
    counts = torch.bincount(own).to(u.dtype)
    return torch.zeros(len(counts), u.shape[1], dtype=u.dtype, device=u.device).index_add_(0, own, u), counts


def confusion(near: Near, labels: Int[np.ndarray, "n"]) -> Float[np.ndarray, "c c"]:
    """Row i: of the neighbours of the items of class i, the share that is of each class; neighbours without a label do
    not count, and a class none of whose neighbours has one has a row of zeros."""
    count = int(labels.max()) + 1
    own = np.repeat(labels, near.rows.shape[1])
    other = labels[near.rows.cpu().numpy()].ravel()
    both = (own >= 0) & (other >= 0)
    table = np.bincount(own[both] * count + other[both], minlength=count * count).reshape(count, count).astype(float)
    return table / np.maximum(table.sum(1, keepdims=True), 1)


def hierarchy(z: Matrix, labels: Int[np.ndarray, "n"]) -> Hierarchy:
    """Which classes are alike: their mean directions, joined two by two (UPGMA, on cosine distances)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    sums, _ = _sums(unit_rows(z).double().cpu()[torch.as_tensor(labels >= 0)], labels[labels >= 0])
    u = torch.nn.functional.normalize(sums, dim=1)
    distances = (1 - u @ u.T).clamp_(0, 2)
    distances.fill_diagonal_(0)
    joined = linkage(squareform(distances.numpy(), checks=False), "average", optimal_ordering=True)
    return Hierarchy([(int(a), int(b), float(height)) for a, b, height, _ in joined], leaves_list(joined).tolist())


def borders(z: Matrix, near: Near, labels: Int[np.ndarray, "n"], *, count: int = SHOWN, pairs: int = 4) -> list[Border]:
    """The softest borders, softest first: pairs of classes whose items have most neighbours across."""
    own = np.repeat(labels, near.rows.shape[1])
    other = labels[near.rows.cpu().numpy()].ravel()
    across: Counter[tuple[int, int]] = Counter()
    for a, b in zip(own.tolist(), other.tolist(), strict=True):
        if a >= 0 and b >= 0 and a != b:
            across[min(a, b), max(a, b)] += 1
    sizes = np.bincount(labels[labels >= 0])
    k = near.rows.shape[1]
    shares = {(a, b): times / (k * (sizes[a] + sizes[b])) for (a, b), times in across.items()}
    softest = sorted(shares, key=lambda pair: (-shares[pair], pair))[:count]
    u = unit_rows(z).cpu()
    return [Border(a, b, float(shares[a, b]), _across(u, labels, a, b, pairs)) for a, b in softest]


def _across(u: Tensor, labels: np.ndarray, a: int, b: int, count: int) -> list[tuple[int, int, float]]:
    first, second = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
    cosines = u[first] @ u[second].T
    found: list[tuple[int, int, float]] = []
    for _ in range(min(count, *cosines.shape)):
        row, column = divmod(int(cosines.argmax()), cosines.shape[1])
        found.append((int(first[row]), int(second[column]), float(cosines[row, column])))
        cosines[row], cosines[:, column] = -math.inf, -math.inf
    return found


def strays(near: Near, labels: Int[np.ndarray, "n"], *, count: int = SHOWN) -> list[Stray]:
    """Items most of whose neighbours are of one other class, the surest first."""
    found = []
    for row, (own, others) in enumerate(zip(labels.tolist(), labels[near.rows.cpu().numpy()], strict=True)):
        if own < 0 or not (others >= 0).any():
            continue
        classes, times = np.unique(others[others >= 0], return_counts=True)
        most = int(times.argmax())
        if classes[most] != own and times[most] > len(others) / 2:
            weight = float(near.cosines[row].mean())
            found.append((weight, Stray(row, own, int(classes[most]), float(times[most] / len(others)))))
    found.sort(key=lambda each: (-each[1].share, -each[0], each[1].row))
    return [stray for _, stray in found[:count]]


def hubs(near: Near, *, count: int = SHOWN) -> list[tuple[int, int]]:
    """The items that most others have among their nearest (k-occurrence), and how many; the mean is k."""
    times = torch.bincount(near.rows.flatten(), minlength=len(near.rows)).cpu()
    order = times.argsort(descending=True, stable=True)[:count]
    return [(int(row), int(times[row])) for row in order]


def outliers(near: Near, *, count: int = SHOWN) -> list[tuple[int, float]]:
    """The items that lie farthest from whatever is nearest to them: the least mean cosines."""
    mean = near.cosines.mean(1).cpu()
    return [(int(row), float(mean[row])) for row in mean.argsort(stable=True)[:count]]


def copies(z: Matrix, *, at: float = COPIES) -> list[list[int]]:
    """Groups of items that have a cosine of `at` or more with their first, largest first; each item is in one at most.

    All are so near to the first one, so that no chain leads from one thing to quite another.
    """
    u = unit_rows(z)
    taken = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    groups = []
    for block in row_blocks(len(u), len(u)):
        same = u[block] @ u.T >= at
        for row in range(block.start, block.stop):
            if taken[row]:
                continue
            members = same[row - block.start] & ~taken
            members[: row + 1] = False
            if members.any():
                taken |= members
                groups.append([row, *members.nonzero().flatten().tolist()])
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def exemplars(z: Matrix, members: np.ndarray, count: int) -> list[int]:
    """The members (a mask of rows) nearest to their common direction, nearest first."""
    rows = np.flatnonzero(members)
    u = unit_rows(z).cpu()[rows]
    order = (u @ u.sum(0)).argsort(descending=True, stable=True)[:count]
    return [int(rows[k]) for k in order]


def clusters(z: Matrix, *, seed: int = 0, tried: Sequence[int] = GROUPS) -> Int[np.ndarray, "n"]:
    """Groups of items by k-means of unit vectors, for that number of those `tried` whose silhouette is the highest."""
    from sklearn.cluster import KMeans

    u = unit_rows(z).cpu().numpy()
    best, score = np.zeros(len(u), np.int64), -math.inf
    distinct = len(np.unique(u.round(4), axis=0))
    for k in tried:
        if 2 * k > len(u) or k > distinct:
            break
        labels = KMeans(k, n_init=3, random_state=seed).fit_predict(u)
        _, labels = np.unique(labels, return_inverse=True)
        width = float(np.mean(silhouettes(u, labels)))
        if width > score:
            best, score = labels, width
    if math.isinf(score):
        best[len(u) // 2 :] = 1  # nothing tells them apart: two halves, which every figure shows to be one
    return best


def naming_words(texts: Sequence[Sequence[str]], labels: Int[np.ndarray, "n"], *, count: int = 3) -> list[list[str]]:
    """For each group the words that its items' texts have more often than those of others, the most telling first.

    By the z-score of the log-odds with all texts as the prior (Monroe, Colaresi and Quinn 2008, section 3.5.1), of how
    many items a word is in; words below a z of 2 name nothing.
    """
    said = [frozenset(word for text in own for word in words_in(text)) for own in texts]
    everywhere = Counter(word for own in said for word in own)
    total = sum(everywhere.values())
    names = []
    for c in range(int(labels.max()) + 1):
        inside = Counter(word for own, label in zip(said, labels, strict=True) if label == c for word in own)
        size = sum(inside.values())
        scored = []
        for word, times in inside.items():
            if everywhere[word] < RARE:
                continue
            # The prior is as large as the texts: every word has been seen once more, as often as it is everywhere.
            alpha, rest = everywhere[word], everywhere[word] - times
            odds = math.log((times + alpha) / (size + total - times - alpha))
            odds -= math.log((rest + alpha) / max(2 * total - size - rest - alpha, 1))
            scored.append((odds / math.sqrt(1 / (times + alpha) + 1 / (rest + alpha)), word))
        names.append([word for z, word in sorted(scored, key=lambda each: (-each[0], each[1]))[:count] if z >= 2])
    return names


# -- Two encoders beside each other -----------------------------------------------------------------------------------


class Moved(NamedTuple):
    """An item, as a query, in both spaces."""

    row: int
    first: float
    second: float


class Comparison(NamedTuple):
    """The same items in two spaces. What an item scores as a query is `measure`."""

    cka: float
    overlap: Interval  # of the k nearest neighbours of an item, the share that both spaces have, 0..1
    chance: float  # that share of two spaces that have nothing to do with each other
    measure: str
    first: Interval
    second: Interval
    gain: Interval  # of the second over the first, paired by item
    better: list[Moved]  # what the second space answers better, largest gain first
    worse: list[Moved]


def cka(x: Matrix, y: Matrix) -> float:
    """How alike two spaces of the same items are up to rotation and scale, about 0..1: linear CKA (arXiv 1905.00414).

    With the unbiased estimate of HSIC (Song et al. 2012), so that it is about 0 for unrelated spaces also where they
    have more dimensions than there are items; it needs four items. 1 is the same space.
    """
    if len(x) != len(y) or len(x) < 4:
        raise DataError(f"CKA compares two spaces of the same four items or more; got {len(x)} and {len(y)}.")
    k, m = (_gram(each) for each in (x, y))
    return (_hsic(k, m) / (_hsic(k, k) * _hsic(m, m)).sqrt().clamp_min(1e-12)).item()


def _gram(z: Matrix) -> Float[Tensor, "n n"]:
    u = torch.as_tensor(z).double().cpu()
    u = u - u.mean(0)  # which changes nothing, and keeps the numbers small
    gram = u @ u.T
    return gram.fill_diagonal_(0)


def _hsic(k: Float[Tensor, "n n"], m: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    n = len(k)
    whole = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + whole - 2 * (k.sum(0) * m.sum(0)).sum() / (n - 2)) / (n * (n - 3))


def overlaps(first: Near, second: Near) -> Float[np.ndarray, "n"]:
    """Of each item's nearest in one space, the share that are among its nearest in the other, 0..1."""
    same = (first.rows[:, :, None] == second.rows[:, None, :]).any(2)
    return same.float().mean(1).cpu().numpy()


def compare_spaces(
    first: Matrix, second: Matrix, labels: Int[np.ndarray, "n"] | None = None, *, count: int = SHOWN
) -> Comparison:
    """How two spaces differ, and which items gained or lost as queries.

    With labels an item scores the share of its nearest that are of its class; without, there is no better or worse, and
    it scores the mean cosine of its nearest, in units of how the space's cosines deviate.
    """
    a, b = nearest(first), nearest(second)
    common = overlaps(a, b)
    if labels is not None:
        kept = np.flatnonzero(labels >= 0)
        scores = [(labels[near.rows.cpu().numpy()] == labels[:, None]).mean(1)[kept] for near in (a, b)]
        measure = f"share of the {a.rows.shape[1]} nearest that are of its class"
    else:
        kept = np.arange(len(common))
        scores = [_standing(z, near) for z, near in ((first, a), (second, b))]
        measure = f"how far its {a.rows.shape[1]} nearest stand out, in deviations of all cosines"
    gain = scores[1] - scores[0]
    order = np.argsort(-gain, kind="stable")
    moved = [Moved(int(kept[k]), float(scores[0][k]), float(scores[1][k])) for k in order]
    k = a.rows.shape[1]
    return Comparison(
        cka=cka(first, second),
        overlap=bootstrap(common),
        chance=k / (len(common) - 1),
        measure=measure,
        first=bootstrap(scores[0], draw=generator("compare")),
        second=bootstrap(scores[1], draw=generator("compare")),
        gain=bootstrap(gain, draw=generator("compare")),
        better=[each for each in moved[:count] if each.second > each.first],
        worse=[each for each in moved[::-1][:count] if each.second < each.first],
    )


def _standing(z: Matrix, near: Near) -> Float[np.ndarray, "n"]:
    u = unit_rows(z).double()
    n, total = len(u), u.sum(0)
    mean = (u @ total - 1) / (n - 1)  # of an item's cosines with all others
    gram = u.T @ u
    squares = ((u @ gram) * u).sum(1) - 1
    deviation = (squares / (n - 1) - mean.square()).clamp_min(1e-12).sqrt()
    return ((near.cosines.double().mean(1) - mean) / deviation).cpu().numpy()
