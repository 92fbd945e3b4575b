"""Search with words, a picture, an item, or several of them together."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from twofold.data.sources import Modality
from twofold.errors import FingerprintMismatch, UsageError, unknown
from twofold.measure.calibration import Calibration
from twofold.measure.hubness import Remedy
from twofold.models.bundle import Bundle, Tower
from twofold.retrieve.filters import columns_of, compiled
from twofold.retrieve.fusion import FUSION, Fusion, K
from twofold.retrieve.modalities import MODALITY, fingerprint_of
from twofold.retrieve.spaces import TextSpace
from twofold.retrieve.store import VIAS, Hit, Place, Store, Via, Where

POOL = 200  # items nearest by cosine that a remedy orders anew, at least

Picture = Path | str | bytes | np.ndarray | Image.Image


class _Asked(NamedTuple):
    """What is looked for, as `Retriever.search` takes it."""

    text: str | None
    image: Picture | None
    like: tuple[str, ...]
    unlike: tuple[str, ...]
    minus: str | None
    weight: float

    @property
    def only_words(self) -> bool:
        return self.text is not None and self.image is None and not self.like and not self.unlike


class Retriever:
    """A bundle to embed what is asked for, and a store of items to find it among.

    Where the bundle keeps a calibration for words alone (`twofold calibrate`), hits of such searches have a
    probability, and `no_good_match` says whether the best of them is one. The remedy against hubs that was chosen with
    it orders them: `remedy=None` searches by plain cosines, another `Remedy` by that one. A calibration holds for the
    scores it was fitted on, so under another remedy there are no probabilities.

    With `texts`, words are also compared with the items' texts, and `fusion` makes one answer of the two; it has
    probabilities if the fusion is calibrated itself. `columns` tells the names that a filter may use.

    `towers` are those of the items, where these are not the bundle's own, or are of several modalities. Each modality
    (the column `modality`) then answers for itself, and the hits come from them in turn (`in_turn`): a picture is never
    as near to words as a text is, and would not be seen. Scores of two modalities cannot be compared, so such hits have
    no probabilities, and no remedy orders them.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: Store,
        *,
        remedy: Remedy | Literal["kept"] | None = "kept",
        texts: TextSpace | None = None,
        fusion: Fusion = FUSION,
        columns: Callable[[], Collection[str]] | None = None,
        towers: Mapping[Modality, Tower] | None = None,
    ):
        given = bundle.towers if towers is None else towers
        self.modalities = tuple(towers or ()) if towers is not None and len(towers) > 1 else ()
        prints = {name: tower.fingerprint() for name, tower in given.items()}
        held = next((name for name, mark in prints.items() if store.fingerprint == mark), None)
        if held is None and not (self.modalities and fingerprint_of(prints) == store.fingerprint):
            raise FingerprintMismatch(
                f"The store holds vectors of encoder {store.fingerprint}, which is no tower of this bundle: "
                "a score between the two would mean nothing. Use the bundle that filled the store."
            )
        self.bundle, self.store, self.texts, self.fusion, self._columns = bundle, store, texts, fusion, columns
        calibration = None if held is None else Calibration.of(bundle, "text", held)
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
        distinct: float | None = None,
        where: Where | None = None,
        via: Via = "both",
    ) -> list[Hit]:
        """The k items nearest to what is given, best first, after the first `offset`.

        `like` and `unlike` are ids of items to look for the like of, and to lead away from; these are not found
        themselves. Of words beside pictures or items, `weight` (0..1) is the share of the words: the query is the
        weighted sum of unit vectors, made unit again. `minus` leads away from some words; it and `unlike` count half.

        `spread` (0..1) makes the hits differ: each is the one with the most of (1 − spread) · score − spread · its
        cosine with the nearest hit before it (maximal marginal relevance, Carbonell and Goldstein 1998); the scores of
        two spaces go from 0 to 1 there. `distinct` leaves out a hit whose cosine with a better one is at least that: 1
        what is the same, .95 what is much alike.

        Words alone, and words away from others, are answered by the items' own space and by that of their texts, where
        there is one: each hit's `spaces` says where it was found. `via` asks one of them only.

        Compare scores within one search only: words and pictures score at different heights. Calibration and remedy
        are for words alone; they hold for all of the store, also where `where` leaves a part of it.
        """
        like, unlike = ((ids,) if isinstance(ids, str) else tuple(ids) for ids in (like, unlike))
        if k < 1 or offset < 0:
            raise UsageError(f"k must be at least 1 and offset at least 0, got {k} and {offset}.")
        for name, share in (("weight", weight), ("spread", spread)):
            if not 0 <= share <= 1:
                raise UsageError(f"{name} is a share, 0..1; got {share}.")
        if distinct is not None and not -1 <= distinct <= 1:
            raise UsageError(f"distinct is a cosine, −1..1; got {distinct}.")
        if via not in VIAS:
            raise unknown("way to ask", via, VIAS)
        asked = _Asked(text, image, like, unlike, minus, weight)
        count = offset + k
        if spread or distinct is not None:
            count = max(POOL, 5 * count)
        hits = self._of_all(asked, count, where, via) if self.modalities else self._answer(asked, count, where, via)
        if where and not hits:
            self._check_columns(where)
        if distinct is not None:
            hits = self._distinct(hits, distinct)
        return (self._spread(hits, spread, offset + k) if spread else hits)[offset : offset + k]

    def _check_columns(self, where: Where) -> None:
        """UsageError where a filter names a column that no item has: it may be why nothing is found."""
        known = self._columns() if self._columns else ()
        for column in sorted(columns_of(compiled(where))):
            if known and column not in known:
                raise unknown("column to filter by", column, known)

    def _of_all(self, asked: _Asked, count: int, where: Where | None, via: Via) -> list[Hit]:
        """What each modality answers, in turn; as it is where only one has an answer."""
        answers = {}
        for name in self.modalities:
            own: Where = {MODALITY: name}
            hits = self._answer(asked, count, {"$and": [where, own]} if where else own, via)
            if hits:
                answers[name] = hits[:count]
        return in_turn(answers)[:count] if len(answers) > 1 else next(iter(answers.values()), [])

    def _answer(self, asked: _Asked, count: int, where: Where | None, via: Via) -> list[Hit]:
        """What the spaces that are to be asked find."""
        if via == "texts" and self.texts is None:
            raise UsageError("This index has no space of texts: `twofold index … --texts minilm` adds one.")
        if via == "texts" and not asked.only_words:
            raise UsageError("The space of texts answers words, without pictures and items beside them.")
        if self.texts is None or via == "items" or not asked.only_words:
            return self._by_items(asked, count, where)
        if via == "texts" or "text" not in self.bundle.towers:  # a model of pictures alone: their texts answer
            return self._by_texts(asked, count, where)
        return self._fused(asked, count, where)

    def _by_items(self, asked: _Asked, count: int, where: Where | None) -> list[Hit]:
        vector = _unit(self._query(asked))
        away = [self._words(asked.minus)] if asked.minus is not None else []
        away += [_unit(self.store.vectors(asked.unlike).sum(0))] if asked.unlike else []
        if asked.only_words and not away:
            return self._by_words(vector, count, where)
        examples = {*asked.like, *asked.unlike}
        hits = self.store.query(_unit(vector - np.sum(away, axis=0) / 2), count + len(examples), where)
        return [hit for hit in hits if hit.id not in examples]

    def _by_texts(self, asked: _Asked, count: int, where: Where | None) -> list[Hit]:
        assert self.texts is not None and asked.text is not None
        found = self.texts.search(asked.text, count, where, minus=asked.minus)
        return [
            Hit(hit.id, hit.score, hit.meta, None, (Place("texts", rank, hit.score, hit.text),))
            for rank, hit in enumerate(found, 1)
        ]

    def _fused(self, asked: _Asked, count: int, where: Where | None) -> list[Hit]:
        """Both answers as one. Pools grow by leaps, so that the pages of one search come from the same ones."""
        pool = POOL * math.ceil(2 * count / POOL)
        looks, words = self._by_items(asked, pool, where), self._by_texts(asked, pool, where)
        places = {hit.id: (Place("items", rank, hit.score),) for rank, hit in enumerate(looks, 1)}
        for hit in words:
            places[hit.id] = (*places.get(hit.id, ()), *hit.spaces)
        meta = {hit.id: hit.meta for hit in (*words, *looks)}
        ordered = self.fusion.scores(*([(hit.id, hit.score) for hit in side] for side in (looks, words)))
        hits = [Hit(id, score, meta[id], None, places[id]) for id, score in ordered[:count]]
        return hits if asked.minus is not None else self._with_probabilities(hits, self.fusion.calibration)

    def _distinct(self, hits: list[Hit], most: float) -> list[Hit]:
        """The hits without those that are too near to a better one."""
        if not hits:
            return []
        vectors = self.store.vectors([hit.id for hit in hits])
        kept: list[int] = []
        for at in range(len(hits)):
            if not kept or (vectors[kept] @ vectors[at]).max() < most - 1e-5:
                kept.append(at)
        return [hits[at] for at in kept]

    def _spread(self, hits: list[Hit], spread: float, k: int) -> list[Hit]:
        """Of the hits k that are near the query and far from each other, in the order in which they are chosen."""
        if not hits:
            return []
        vectors, scores = self.store.vectors([hit.id for hit in hits]), np.array([hit.score for hit in hits])
        if hits[0].spaces:  # standard deviations outweigh cosines, and nothing would differ
            scores = (scores - scores.min()) / max(np.ptp(scores), 1e-6)
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
        calibration = self.calibration_of(hits)
        return calibration is not None and calibration.rejects(hits[0].score)

    def calibration_of(self, hits: list[Hit]) -> Calibration | None:
        """What the probabilities of these hits come from, if they have any: the fusion's own, or the model's."""
        if not hits or hits[0].probability is None:
            return None
        return self.fusion.calibration if hits[0].spaces else self.calibration

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
        return self._with_probabilities(hits, self.calibration)

    def _with_probabilities(self, hits: list[Hit], calibration: Calibration | None) -> list[Hit]:
        if calibration is None or not hits:
            return hits
        found = calibration.probability(np.array([hit.score for hit in hits]), gallery=len(self.store))
        return [hit._replace(probability=float(p)) for hit, p in zip(hits, found, strict=True)]

    def _query(self, asked: _Asked) -> Float[np.ndarray, "d"]:
        things = [] if asked.image is None else [self._picture(asked.image)]
        things += list(self.store.vectors(asked.like)) if asked.like else []
        if asked.text is None and not things:
            raise UsageError("There is nothing to search for: give words, an image or the id of an item.")
        if asked.text is None:
            return np.sum(things, axis=0)
        words = self._words(asked.text)
        return asked.weight * words + (1 - asked.weight) * _unit(np.sum(things, axis=0)) if things else words

    def _words(self, text: str) -> Float[np.ndarray, "d"]:
        self.bundle.tower("text")
        if not text.strip():
            raise UsageError("The words to search for are empty.")
        return self.bundle.encode([text])[0]

    def _picture(self, image: Picture) -> Float[np.ndarray, "d"]:
        self.bundle.tower("image")
        return self.bundle.encode([Path(image) if isinstance(image, str) else image])[0]


def in_turn(answers: Mapping[Modality, list[Hit]]) -> list[Hit]:
    """The hits of several modalities as one list: the best of each, then the second of each, in their order.

    It is reciprocal rank fusion (see `Fusion`) of lists that have nothing in common: a score is (1 + K)/(K + rank), a
    little less for a later modality, and only an order. What a hit scored in its own answer stands first in `spaces`.
    """
    turned = []
    for turn, (name, hits) in enumerate(answers.items()):
        for rank, hit in enumerate(hits, 1):
            score = round((1 + K) / (K + rank + turn / len(answers)), 6)
            places = (Place(name, rank, hit.score), *hit.spaces)
            turned.append((rank, turn, Hit(hit.id, score, hit.meta, None, places)))
    return [hit for _, _, hit in sorted(turned, key=lambda one: one[:2])]


def _unit(vector: Float[np.ndarray, "d"]) -> Float[np.ndarray, "d"]:
    length = np.linalg.norm(vector)
    if not length > 1e-6:
        raise UsageError("The parts of this query cancel out: nothing is left to search for.")
    return vector / length
