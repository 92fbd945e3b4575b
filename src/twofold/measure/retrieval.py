"""Does a query find what belongs to it? Exact, over the whole gallery, in blocks that fit in memory."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from twofold.errors import DataError, UsageError
from twofold.measure.metrics import (
    CELLS,
    Interval,
    Matrix,
    check_positives,
    first_ranks,
    recall_at_k,
    recall_chance,
    row_blocks,
    unit_rows,
)


class Retrieval(NamedTuple):
    """One direction of retrieval: how often, how far down, and what a random order would reach."""

    recall: dict[int, Interval]  # k → share of queries with a positive among the first k, 0..1
    median_rank: float  # of the best positive, 1..gallery; 1 is best
    chance: dict[int, float]  # k → recall@k of a random order
    ranks: Int[np.ndarray, "q"]  # of each query's best positive
    gallery: int


def retrieval(
    queries: Matrix,
    gallery: Matrix,
    positives: Sequence[Sequence[int]],
    *,
    ks: Sequence[int] = (1, 5, 10),
    groups: Sequence[Hashable] | None = None,
    cells: int = CELLS,
    draw: torch.Generator | None = None,
) -> Retrieval:
    """Recall@k and median rank by cosine; `positives[i]` are the gallery rows that belong to query i, one or more.

    Captions that find their picture are one call, pictures that find one of their captions another. For the first,
    pass the captions' pictures as `groups`: captions of one picture succeed and fail together, and an interval that
    takes them for independent is too narrow. At most `cells` cosines are in memory at once. Ties: `first_ranks`.
    """
    if not ks or min(ks) < 1:
        raise UsageError(f"Recall@k needs every k ≥ 1; got {tuple(ks)}.")
    queries, gallery = unit_rows(queries), unit_rows(gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries and gallery come from one space; got widths {queries.shape[1]} and {gallery.shape[1]}."
        )
    check_positives(positives, len(queries), len(gallery))  # here, where rows still count from the first query
    ranks = torch.cat(
        [
            first_ranks(queries[block] @ gallery.T, positives[block])
            for block in row_blocks(len(queries), len(gallery), cells)
        ]
    ).cpu()
    sizes = Counter(len(set(own)) for own in positives)
    return Retrieval(
        recall={k: recall_at_k(ranks, k, groups=groups, draw=draw) for k in ks},
        median_rank=float(np.median(ranks.numpy())),
        chance={
            k: sum(n * recall_chance(size, len(gallery), k) for size, n in sizes.items()) / len(queries) for k in ks
        },
        ranks=ranks.numpy(),
        gallery=len(gallery),
    )
