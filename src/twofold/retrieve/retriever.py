"""Search with words, a picture, an item, or several of them together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from twofold.errors import FingerprintMismatch, UsageError
from twofold.measure.calibration import Calibration
from twofold.measure.hubness import Remedy
from twofold.models.bundle import Bundle
from twofold.retrieve.store import Hit, Store, Where

POOL = 200  # items nearest by cosine that a remedy orders anew, at least

Picture = Path | str | bytes | np.ndarray | Image.Image


class Retriever:
    """A bundle to embed what is asked for, and a store of items to find it among.

    Where the bundle keeps a calibration for words alone (`twofold calibrate`), hits of such searches have a
    probability, and `no_good_match` says whether the best of them is one. The remedy against hubs that was chosen with
    it orders them: `remedy=None` searches by plain cosines, another `Remedy` by that one. A calibration holds for the
    scores it was fitted on, so under another remedy there are no probabilities.
    """

    def __init__(self, bundle: Bundle, store: Store, *, remedy: Remedy | Literal["kept"] | None = "kept"):
        held = next((name for name in bundle.towers if store.fingerprint == bundle.tower_fingerprint(name)), None)
        if held is None:
            raise FingerprintMismatch(
                f"The store holds vectors of encoder {store.fingerprint}, which is no tower of this bundle: "
                "a score between the two would mean nothing. Use the bundle that filled the store."
            )
        self.bundle, self.store = bundle, store
        calibration = Calibration.of(bundle, "text", held)
        kept = None if calibration is None else calibration.remedy
        self.remedy = kept if remedy == "kept" else remedy
        self.calibration = calibration if self.remedy is kept else None

    def search(
        self,
        text: str | None = None,
        *,
        image: Picture | None = None,
        like: str | Sequence[str] = (),
        unlike: str | Sequence[str] = (),
        minus: str | None = None,
        weight: float = 0.5,
        k: int = 10,
        offset: int = 0,
        spread: float = 0.0,
        where: Where | None = None,
    ) -> list[Hit]:
        """The k items nearest to what is given, best first, after the first `offset`.

        `like` and `unlike` are ids of items to look for the like of, and to lead away from; these are not found
        themselves. Of words beside pictures or items, `weight` (0..1) is the share of the words: the query is the
        weighted sum of unit vectors, made unit again. `minus` leads away from some words; it and `unlike` count half.

        `spread` (0..1) makes the hits differ: each is the one with the most of (1 − spread) · score − spread · its
        cosine with the nearest hit before it (maximal marginal relevance, Carbonell and Goldstein 1998).

        Compare scores within one search only: words and pictures score at different heights. Calibration and remedy
        are for words alone; they hold for all of the store, also where `where` leaves a part of it.
        """
        like, unlike = ((ids,) if isinstance(ids, str) else tuple(ids) for ids in (like, unlike))
        if k < 1 or offset < 0:
            raise UsageError(f"k must be at least 1 and offset at least 0, got {k} and {offset}.")
        for name, share in (("weight", weight), ("spread", spread)):
            if not 0 <= share <= 1:
                raise UsageError(f"{name} is a share, 0..1; got {share}.")
        vector = _unit(self._query(text, image, like, weight))
        away = [self._words(minus)] if minus is not None else []
        away += [_unit(self.store.vectors(unlike).sum(0))] if unlike else []
        count = offset + k if not spread else max(POOL, 5 * (offset + k))
        if text is not None and image is None and not like and not away:
            hits = self._by_words(vector, count, where)
        else:
            examples = {*like, *unlike}
            hits = self.store.query(_unit(vector - np.sum(away, axis=0) / 2), count + len(examples), where)
            hits = [hit for hit in hits if hit.id not in examples]
        return (self._spread(hits, spread, offset + k) if spread else hits)[offset : offset + k]

    def _spread(self, hits: list[Hit], spread: float, k: int) -> list[Hit]:
        """Of the hits k that are near the query and far from each other, in the order in which they are chosen."""
        if not hits:
            return []
        vectors, scores = self.store.vectors([hit.id for hit in hits]), np.array([hit.score for hit in hits])
        nearest = np.full(len(hits), -1.0)  # cosine with the nearest one that is chosen
        chosen: list[int] = []
        while len(chosen) < min(k, len(hits)):
            gain = (1 - spread) * scores - spread * nearest
            gain[chosen] = -np.inf
            chosen.append(int(gain.argmax()))
            nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
        return [hits[index] for index in chosen]

    def no_good_match(self, hits: list[Hit]) -> bool:
        """Whether a search that has probabilities has found nothing that fits: its best hit scores too low."""
        calibrated = self.calibration is not None and hits and hits[0].probability is not None
        return bool(calibrated and self.calibration.rejects(hits[0].score))  # type: ignore[union-attr]

    def _by_words(self, vector: Float[np.ndarray, "d"], k: int, where: Where | None) -> list[Hit]:
        """The hits of words alone: of a pool by cosine the best by the remedy, with probabilities."""
        if self.remedy is None:
            hits = self.store.query(vector, k, where)
        else:
            pool = self.store.query(vector, max(POOL, 10 * k), where)
            if not pool:
                return []
            scores = self.remedy.scores(vector[None], self.store.vectors([hit.id for hit in pool]))[0]
            scored = [hit._replace(score=round(float(s), 6)) for hit, s in zip(pool, scores, strict=True)]
            hits = sorted(scored, key=lambda hit: (-hit.score, hit.id))[:k]
        if self.calibration is None:
            return hits
        found = self.calibration.probability(np.array([hit.score for hit in hits]), gallery=len(self.store))
        return [hit._replace(probability=float(p)) for hit, p in zip(hits, found, strict=True)]

    def _query(
        self, text: str | None, image: Picture | None, like: Sequence[str], weight: float
    ) -> Float[np.ndarray, "d"]:
        things = [] if image is None else [self._picture(image)]
        things += list(self.store.vectors(like)) if like else []
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
