"""Search with words, a picture, an item, or several of them together."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from twofold.errors import FingerprintMismatch, UsageError
from twofold.models.bundle import Bundle
from twofold.retrieve.store import Hit, Store, Where

Picture = Path | str | bytes | np.ndarray | Image.Image


class Retriever:
    """A bundle to embed what is asked for, and a store of items to find it among."""

    def __init__(self, bundle: Bundle, store: Store):
        if not any(store.fingerprint == bundle.tower_fingerprint(modality) for modality in bundle.towers):
            raise FingerprintMismatch(
                f"The store holds vectors of encoder {store.fingerprint}, which is no tower of this bundle: "
                "a score between the two would mean nothing. Use the bundle that filled the store."
            )
        self.bundle, self.store = bundle, store

    def search(
        self,
        text: str | None = None,
        *,
        image: Picture | None = None,
        id: str | None = None,
        minus: str | None = None,
        weight: float = 0.5,
        k: int = 10,
        where: Where | None = None,
    ) -> list[Hit]:
        """The k items nearest to what is given, best first; an item is not found by its own `id`.

        Of words together with a picture or an item, `weight` (0..1) is the share of the words: the query is the
        weighted sum of unit vectors, made unit again. `minus` leads away from some words, at half weight. Compare
        scores within one search only: words and pictures score at different heights.
        """
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}.")
        if not 0 <= weight <= 1:
            raise UsageError(f"weight is the share of the words, 0..1; got {weight}.")
        vector = self._query(text, image, id, weight)
        if minus is not None:
            vector = _unit(vector) - self._words(minus) / 2
        hits = self.store.query(_unit(vector), k + (id is not None), where)
        return [hit for hit in hits if hit.id != id][:k]

    def _query(self, text: str | None, image: Picture | None, id: str | None, weight: float) -> Float[np.ndarray, "d"]:
        things = []
        if image is not None:
            things.append(self._picture(image))
        if id is not None:
            things.append(self.store.vectors([id])[0])
        if text is None and not things:
            raise UsageError("There is nothing to search for: give words, an image or the id of an item.")
        if text is None:
            return np.sum(things, axis=0)
        words = self._words(text)
        return weight * words + (1 - weight) * _unit(np.sum(things, axis=0)) if things else words

    def _words(self, text: str) -> Float[np.ndarray, "d"]:
        self.bundle.tower("text")
        if not text.strip():
            raise UsageError("The words to search for are empty.")
        return self.bundle.encode([text])[0]

    def _picture(self, image: Picture) -> Float[np.ndarray, "d"]:
        self.bundle.tower("image")
        return self.bundle.encode([Path(image) if isinstance(image, str) else image])[0]


def _unit(vector: Float[np.ndarray, "d"]) -> Float[np.ndarray, "d"]:
    length = np.linalg.norm(vector)
    if not length > 1e-6:
        raise UsageError("The parts of this query cancel out: nothing is left to search for.")
    return vector / length
