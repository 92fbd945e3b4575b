"""Do groups that nobody named coincide with labels? K-means of embeddings, against what the items are."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from twofold.errors import DataError
from twofold.measure.metrics import Interval, Matrix, unit_rows
from twofold.runtime import seed_of

Clusters = Int[np.ndarray, "n"]


class Clustering(NamedTuple):
    """K-means with as many clusters as labels; the figures of the best of several starts, and the range of all."""

    nmi: Interval
    ari: Interval
    clusters: Clusters  # of every item, −1 where it has no label
    k: int


def clustering(z: Matrix, labels: Clusters, *, starts: int = 10) -> Clustering:
    """Clusters of the labelled items' unit vectors. The start of least squares counts: choosing it takes no label."""
    from sklearn.cluster import KMeans

    labels = np.asarray(labels)
    kept = np.flatnonzero(labels >= 0)
    own = labels[kept]
    k = len(np.unique(own))
    if k < 2:
        raise DataError(f"Clusters are compared with labels of two kinds or more; these items have {k}.")
    rows = unit_rows(z).cpu().numpy()[kept]
    if len(np.unique(rows, axis=0)) < k:  # a collapsed encoder has fewer points than clusters: all of it is one
        nothing = np.where(labels >= 0, 0, -1)
        return Clustering(Interval(0.0, 0.0, 0.0), Interval(0.0, 0.0, 0.0), nothing, k)
    fits = [KMeans(k, n_init=1, random_state=seed_of("clustering", start) % 2**32).fit(rows) for start in range(starts)]
    best = min(fits, key=lambda fit: fit.inertia_)

    def ranged(measure) -> Interval:
        values = [measure(own, fit.labels_) for fit in fits]
        return Interval(measure(own, best.labels_), min(values), max(values))

    found = np.full(len(labels), -1)
    found[kept] = best.labels_
    return Clustering(ranged(normalised_information), ranged(adjusted_rand), found, k)


def normalised_information(one: Clusters, other: Clusters) -> float:
    """NMI: what each of two partitions says of the other, over the mean of their entropies, 0..1; 1 is the same one."""
    share = _table(one, other) / len(one)
    a, b = share.sum(1), share.sum(0)
    entropies = _entropy(a) + _entropy(b)
    if entropies == 0:
        return 1.0
    return float(max(0.0, 2 * (entropies - _entropy(share.ravel())) / entropies))


def adjusted_rand(one: Clusters, other: Clusters) -> float:
    """ARI: the pairs that two partitions agree on, 1 for the same partition, 0 on average by chance."""
    table = _table(one, other)

    def pairs(counts: Float[np.ndarray, "..."]) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    both, a, b, every = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(np.array([len(one)]))
    expected = a * b / every if every else 0.0
    most = (a + b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _table(one: Clusters, other: Clusters) -> Float[np.ndarray, "a b"]:
    """How many items are in each pair of parts."""
    if len(one) != len(other) or len(one) == 0:
        raise DataError(f"Two partitions of the same items; got {len(one)} and {len(other)}.")
    (_, a), (_, b) = (np.unique(part, return_inverse=True) for part in (one, other))
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return table


def _entropy(shares: Float[np.ndarray, "m"]) -> float:
    kept = shares[shares > 0]
    return float(-(kept * np.log(kept)).sum())
