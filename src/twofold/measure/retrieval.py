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
