"""How an index is searched, and how much that costs: its approximate answers beside exact ones."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from twofold.errors import StoreError
from twofold.retrieve.index import Index
from twofold.retrieve.modalities import MODALITY
from twofold.retrieve.store import Hit

QUERIES = 100


@dataclass(frozen=True)
class Explained:
    """What answers, and how well. Recall and times are of plain nearest neighbours, before filters and remedies."""

    store: str
    parameters: dict[str, Any]
    items: int
    dim: int
    fingerprint: str
    modalities: dict[str, int]  # how many items are found by each
    frames: dict[str, int]  # of clips that the picture tower reads
    remedy: str | None  # what orders the hits of words anew
    texts: str | None  # the second space that words are asked in, and how the two answers become one
    asked_with: str  # what the measured queries are
    queries: int
    k: int
    recall: float  # share of the exact k nearest that the store finds, 0..1; ties count as found
    milliseconds: float  # median of one query, without embedding it
    exact_milliseconds: float

    def lines(self) -> list[str]:
        """The same in words."""
        given = ", ".join(f"{name} {value}" for name, value in sorted(self.parameters.items()))
        return [
            f"{self.items:,} items, vectors [{self.dim}] of encoder {self.fingerprint}",
            *([self._turns()] if len(self.modalities) > 1 else []),
            f"{self.store}" + (f": {given}" if given else ""),
            f"hits of words are ordered by {self.remedy}" if self.remedy else "scores are plain cosines",
            *([f"words are asked in {self.texts}, too"] if self.texts else []),
            f"recall@{self.k} {self.recall:.3f} against every vector, {self.queries} queries: {self.asked_with}",
            f"{self.milliseconds:.2f} ms a query; comparing with every vector {self.exact_milliseconds:.2f} ms",
        ]

    def _turns(self) -> str:
        read = {name: f" (by {count} frames)" for name, count in self.frames.items()}
        counted = ", ".join(f"{count:,} {name}{read.get(name, '')}" for name, count in self.modalities.items())
        return f"{counted}; hits come from each in turn"


def explain(index: Index, *, queries: int = QUERIES, k: int = 10, seed: int = 0) -> Explained:
    """Search the index's store and every vector with the same queries, and compare.

    Where the model reads words and the items have a text, their texts are the queries: across modalities a graph finds
    less than among pictures, and that is what people ask. Else the items' own vectors are. It reads all vectors.
    """
    with Index.open(index.path, index.bundle, exact=True) as exact:
        if exact.head != index.head:
            raise StoreError(f"A build of {index.path} has ended since it was opened: ask again.")
        k = min(k, len(exact.store))
        vectors, asked_with = _queries(index, queries, seed)
        found, took = _timed(index, vectors, k)
        right, slow = _timed(exact, vectors, k)
    shares = [
        sum(hit.score >= best[-1].score - 2e-6 for hit in hits) / k  # both are rounded to 1e-6
        for hits, best in zip(found, right, strict=True)
    ]
    return Explained(
        store=index.head.store.described,
        parameters=index.store.parameters,
        items=len(index.store),
        dim=index.head.dim,
        fingerprint=index.head.fingerprint,
        modalities=_counted(index),
        frames=dict(index.head.frames),
        remedy=index.retriever.remedy.kind if index.retriever.remedy else None,
        texts=_texts(index),
        asked_with=asked_with,
        queries=len(vectors),
        k=k,
        recall=float(np.mean(shares)),
        milliseconds=took,
        exact_milliseconds=slow,
    )


def _counted(index: Index) -> dict[str, int]:
    several = len(index.head.modalities) > 1
    held = Counter(str(meta.get(MODALITY)) if several else index.head.modality for _, meta in index.items())
    return {name: held[name] for name in index.head.modalities}


def _texts(index: Index) -> str | None:
    space, fusion = index.head.texts, index.retriever.fusion
    if space is None:
        return None
    fitted = "fitted" if fusion.calibration else "as it comes"
    return (
        f"{space.rows:,} texts [{space.dim}] by {space.embedder} ({fusion.kind}, weight {fusion.weight:.2f}, {fitted})"
    )


def _queries(index: Index, count: int, seed: int) -> tuple[Float[np.ndarray, "q d"], str]:
    names, texts = zip(*((name, meta.get("text")) for name, meta in index.items()), strict=True)
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    words = [str(texts[i]) for i in chosen if texts[i]]
    if "text" in index.bundle.towers and words:
        return index.bundle.encode(words), "texts of items"
    return index.store.vectors([names[i] for i in chosen]), "items' own vectors"


def _timed(index: Index, vectors: Float[np.ndarray, "q d"], k: int) -> tuple[list[list[Hit]], float]:
    answers, took = [], []
    for vector in vectors:
        started = time.perf_counter()
        answers.append(index.store.query(vector, k))
        took.append(time.perf_counter() - started)
    return answers, round(1000 * float(np.median(took)), 3)
