"""Does a query find what belongs to it? Exact, over the whole gallery, in blocks that fit in memory."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from twofold.errors import DataError, UsageError
from twofold.measure.metrics import (
    CELLS,
    TIE,
    Interval,
    Matrix,
    average_precision,
    bootstrap,
    check_positives,
    ndcg,
    positive_ranks,
    recall_at_k,
    recall_chance,
    row_blocks,
    unit_rows,
)


class Retrieval(NamedTuple):
    """One direction of retrieval: how often, how far down, and what a random order would reach."""

    recall: dict[int, Interval]  # k → share of queries with a positive among the first k, 0..1
    median_rank: float  # of the best positive, 1..gallery; 1 is best
    map: Interval  # mean average precision over all positives, 0..1
    ndcg: Interval  # nDCG@10, 0..1
    chance: dict[int, float]  # k → recall@k of a random order
    ranks: Int[np.ndarray, "q"]  # of each query's best positive
    precisions: Float[np.ndarray, "q"]  # the average precision of each query
    gallery: int
    by: Mapping[str, "Retrieval"] = {}  # the same for the queries of each group, against the same gallery


def retrieval(
    queries: Matrix,
    gallery: Matrix,
    positives: Sequence[Sequence[int]],
    *,
    ks: Sequence[int] = (1, 5, 10),
    groups: Sequence[Hashable] | None = None,
    by: Sequence[str | None] | None = None,
    penalty: Float[np.ndarray, "g"] | None = None,
    cells: int = CELLS,
    draw: torch.Generator | None = None,
) -> Retrieval:
    """Recall@k, median rank, mAP and nDCG@10 by cosine; `positives[i]` are the gallery rows that belong to query i.

    Captions that find their picture are one call, pictures that find one of their captions another. For the first,
    pass the captions' pictures as `groups`: captions of one picture succeed and fail together, and an interval that
    takes them for independent is too narrow. `by` names a group of each query (or None) to be told apart. `penalty` is
    taken off the cosines of each gallery row (`hubness.Remedy`). At most `cells` cosines are in memory at once. Ties:
    `first_ranks`.
    """
    if not ks or min(ks) < 1:
        raise UsageError(f"Recall@k needs every k ≥ 1; got {tuple(ks)}.")
    queries, gallery = unit_rows(queries), unit_rows(gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries and gallery come from one space; got widths {queries.shape[1]} and {gallery.shape[1]}."
        )
    check_positives(positives, len(queries), len(gallery))  # here, where rows still count from the first query
    off = gallery.new_zeros(len(gallery)) if penalty is None else torch.as_tensor(penalty).to(gallery)
    parts = []
    for block in row_blocks(len(queries), len(gallery), cells):
        found = positive_ranks(queries[block] @ gallery.T - off, positives[block])
        parts.append(torch.stack([found.rank[found.place == 1].double(), average_precision(found), ndcg(found)], 1))
    each = torch.cat(parts).cpu().numpy()
    sizes = np.array([len(set(own)) for own in positives])

    def summary(rows: Int[np.ndarray, "r"], parts: Mapping[str, Retrieval]) -> Retrieval:
        ranks, precisions, gains = each[rows, 0].astype(np.int64), each[rows, 1], each[rows, 2]
        own = None if groups is None else [groups[row] for row in rows.tolist()]
        counts = Counter(sizes[rows].tolist())
        return Retrieval(
            recall={k: recall_at_k(ranks, k, groups=own, draw=draw) for k in ks},
            median_rank=float(np.median(ranks)),
            map=bootstrap(precisions, groups=own, draw=draw),
            ndcg=bootstrap(gains, groups=own, draw=draw),
            chance={
                k: sum(n * recall_chance(size, len(gallery), k) for size, n in counts.items()) / len(rows) for k in ks
            },
            ranks=ranks,
            precisions=precisions,
            gallery=len(gallery),
            by=parts,
        )

    if by is not None and len(by) != len(queries):
        raise DataError(f"Each query needs its group: {len(queries)} queries, {len(by)} groups.")
    members: dict[str, list[int]] = {}
    for row, name in enumerate(by or ()):
        if name is not None:
            members.setdefault(name, []).append(row)
    return summary(
        np.arange(len(queries)), {name: summary(np.array(rows), {}) for name, rows in sorted(members.items())}
    )


def same_label(
    z: Matrix, labels: Int[np.ndarray, "n"], *, ks: Sequence[int] = (1, 5, 10), cells: int = CELLS
) -> Retrieval:
    """Each labelled item looks for the others of its label, by cosine, among all other labelled items.

    mAP counts all of them, recall@k whether one is among the first k; a tie with an item of another label counts
    against. An item that is alone with its label is in the gallery, but asks nothing.
    """
    if not ks or min(ks) < 1:
        raise UsageError(f"Recall@k needs every k ≥ 1; got {tuple(ks)}.")
    labels = np.asarray(labels)
    kept = np.flatnonzero(labels >= 0)
    if len(kept) < 2:
        raise DataError(f"Items look for others of their label; {len(kept)} have one.")
    u, y = unit_rows(z)[kept], torch.as_tensor(labels[kept])
    y = y.to(u.device)
    n = len(u)
    others = torch.bincount(y)[y] - 1
    asks = (others > 0).nonzero().flatten()
    if len(asks) == 0:
        raise DataError("No two items have the same label, so there is nothing to find.")
    place = torch.arange(1, n, device=u.device, dtype=torch.double)
    gains = 1 / torch.log2(1 + place[:10])
    parts = []
    for block in row_blocks(len(asks), n, cells // 2):
        own = asks[block]
        same = y[own, None] == y
        scores = (u[own] @ u.T).sub_(same.float() * TIE)
        scores[torch.arange(len(own), device=u.device), own] = -4.0  # itself comes last, and is cut off
        hits = same.gather(1, scores.argsort(1, descending=True)[:, :-1])
        precision = (hits.cumsum(1) / place * hits).sum(1) / others[own]
        ideal = gains.cumsum(0)[others[own].clamp(max=len(gains)) - 1]
        gain = (hits[:, :10] * gains).sum(1) / ideal
        parts.append(torch.stack([1 + hits.int().argmax(1).double(), precision, gain], 1))
    ranks, precisions, found = torch.cat(parts).cpu().numpy().T
    sizes = Counter(others[asks].tolist())
    return Retrieval(
        recall={k: recall_at_k(ranks.astype(np.int64), k) for k in ks},
        median_rank=float(np.median(ranks)),
        map=bootstrap(precisions),
        ndcg=bootstrap(found),
        chance={k: sum(many * recall_chance(size, n - 1, k) for size, many in sizes.items()) / len(asks) for k in ks},
        ranks=ranks.astype(np.int64),
        precisions=precisions,
        gallery=n - 1,
    )
