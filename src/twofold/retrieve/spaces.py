"""The spaces of an index: that of its items, and beside it one of their texts.

A space is what one encoder made: vectors, and a store that finds them. The items' own is the bundle's, where words,
pictures and whatever else the bundle reads meet. The texts' is a text embedder's, which compares words with the words
that belong to an item, each of its texts apart. What it finds are items, each by its nearest text.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from twofold.data.sources import Source, content_key
from twofold.errors import FingerprintMismatch, UsageError
from twofold.retrieve.store import Scalar, Store, Where
from twofold.retrieve.text_embedders import TextEmbedder

SPARE = 50  # more texts than that are looked at: an item may have many near ones
TEXT = "@text"  # the column of a text's own words in the store of texts
Name = Literal["items", "texts"]


@dataclass(frozen=True)
class Space:
    """What index.json says of a space."""

    name: Name
    fingerprint: str  # of what made its vectors
    dim: int
    rows: int = 0  # texts, of which an item may have several
    embedder: str = ""  # the name of a text embedder; none for the items' own


class Row(NamedTuple):
    """One entry of a space's store, besides its id: which vector it has, and its columns."""

    key: str
    meta: dict[str, Scalar]


def texts_of(source: Source, i: int) -> tuple[str, ...]:
    """Every text of item `i`, of all columns of texts: each once, and none that is blank."""
    columns = [source.column(name).cells[i] for name, kind in source.modalities.items() if kind == "text"]
    return tuple(dict.fromkeys(text for cells in columns for text in map(str.strip, cells) if text))


def text_rows(id: str, texts: Iterable[str], meta: dict[str, Scalar]) -> dict[str, Row]:
    """An item's entries in the store of texts: 0@id, 1@id, …, with the item's columns, so that filters hold there."""
    return {f"{n}@{id}": Row(content_key(text), meta | {TEXT: text}) for n, text in enumerate(texts)}


class TextHit(NamedTuple):
    """An item found by one of its texts; `score` is the cosine of that text with what was asked for, −1..1."""

    id: str
    score: float
    text: str
    meta: dict[str, Scalar]


class TextSpace:
    """The texts of an index, asked in words. The embedder is opened by the first question.

    `items` counts the items that have a text; it tells how many texts one has.
    """

    def __init__(self, store: Store, open_embedder: Callable[[], TextEmbedder], *, items: int):
        self.store, self.items = store, items
        self._open = open_embedder
        self._embedder: TextEmbedder | None = None

    @property
    def embedder(self) -> TextEmbedder:
        if self._embedder is None:
            embedder = self._open()
            if embedder.fingerprint != self.store.fingerprint:
                raise FingerprintMismatch(
                    f"The texts of this index were embedded by {self.store.fingerprint}; {embedder.name} is now "
                    f"{embedder.fingerprint}, and a score between the two would mean nothing. Embed the texts again: "
                    "`twofold index` with --texts none, then once more without."
                )
            self._embedder = embedder
        return self._embedder

    def search(
        self,
        words: str,
        count: int,
        where: Where | None = None,
        *,
        minus: str | None = None,
        but: tuple[str, str] | None = None,
    ) -> list[TextHit]:
        """The `count` items with the texts nearest to these words, led away from `minus` by half.

        `but` is an item and a text of it that is taken for unwritten: whoever asks with it wants to know what else
        would lead there.
        """
        asked = [words] if minus is None else [words, minus]
        if not all(text.strip() for text in asked):
            raise UsageError("The words to search for are empty.")
        units = _units(self.embedder.embed_queries(asked))
        vector = units[0] if minus is None else units[0] - units[1] / 2
        a_piece = math.ceil(len(self.store) / max(self.items, 1))
        found: dict[str, TextHit] = {}
        for hit in self.store.query(vector, a_piece * count + SPARE, where):
            name = hit.id.partition("@")[2]
            if name not in found and (name, hit.meta[TEXT]) != but:  # the first is its best
                meta = {column: value for column, value in hit.meta.items() if column != TEXT}
                found[name] = TextHit(name, hit.score, str(hit.meta[TEXT]), meta)
        ordered = sorted(found.values(), key=lambda hit: (-hit.score, hit.id))
        return ordered[:count]

    def close(self) -> None:
        self.store.close()


def _units(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
