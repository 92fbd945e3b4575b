"""How much the texts weigh beside the pictures, and what the score of both means: fitted on answered questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twofold.data.sources import Source
from twofold.errors import DataError
from twofold.measure.calibration import SHOWN, Honesty, Shown, cross_validated, fit_calibration
from twofold.measure.metrics import Interval, bootstrap
from twofold.retrieve.fusion import FUSION, Fusion
from twofold.retrieve.index import Index, keep_fusion
from twofold.retrieve.retriever import POOL
from twofold.retrieve.snapshot import Progress

WEIGHTS = [n / 20 for n in range(21)]


@dataclass(frozen=True)
class Fitted:
    """A fusion, and how it did on the questions: the share whose item comes first, 0..1, by whom."""

    fusion: Fusion
    honesty: Honesty  # of the probabilities, cross-validated
    questions: int
    first: Mapping[str, Interval]  # "items", "texts", "default", "fitted"


def fit_fusion(
    index: Index,
    data: Source,
    *,
    split: str = "val",
    cost: float = 0.05,
    most: int = 1000,
    progress: Progress | None = None,
) -> Fitted:
    """Fit weight and calibration on texts of `split` whose items the index holds; the index keeps nothing of it yet.

    Each item asks with one of its texts, which is taken for unwritten: where the index has that very text of it, it is
    passed over, so the item must be found by its look or by its other texts. Other items that have the very same text
    are as right, and left out. The model must not have been trained on the split. At most `most` items ask;
    `progress(done, total)` counts them.
    """
    texts = index.retriever.texts
    if texts is None:
        raise DataError(f"{index.path} has no space of texts: `twofold index … --texts minilm` adds one.")
    if len(index.head.modalities) > 1:
        raise DataError(
            f"{index.path} holds {index.head.modality}, whose hits come in turn and have no score of one kind: nothing "
            "can be fitted. An index of one of them can."
        )
    held = set(index.store.ids())
    asking = data.split(split)
    cells = asking.column(asking.only("text")).cells
    rows = [i for i, name in enumerate(asking.ids) if name in held and any(text.strip() for text in cells[i])]
    rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))[:most]]
    if len(rows) < 20:
        raise DataError(
            f"{len(rows)} items of {data.name}, split {split}, are in {index.path} and have a text; a fit takes 20 and "
            "more. Index the source that the questions come from."
        )
    answers: list[Answer] = []
    for done, i in enumerate(rows, 1):
        own = [text.strip() for text in cells[i] if text.strip()]
        answer = _asked(index, own[-1], asking.ids[i])
        if answer is not None:
            answers.append((asking.ids[i], *answer))
        if progress:
            progress(done, len(rows))
    if len(answers) < 20:
        raise DataError(f"All but {len(answers)} questions of {data.name} are texts that very many items have.")
    found = {one: np.mean([1 / place for place in _places(Fusion("scores", one), answers)]) for one in WEIGHTS}
    # Of weights that order alike, the one nearest the default: at an edge, one space's noise drowns the probabilities.
    weight = max(WEIGHTS, key=lambda one: (round(float(found[one]), 4), -abs(one - FUSION.weight)))
    fusion = Fusion("scores", weight)
    scores = [fusion.scores(looks, words)[:SHOWN] for _, looks, words in answers]
    k = min(map(len, scores))
    shown = Shown(
        np.array([[score for _, score in found[:k]] for found in scores]),
        np.array([[id == own for id, _ in found[:k]] for (own, *_), found in zip(answers, scores, strict=True)]),
        len(held),
        list(range(len(answers))),
    )
    about = f"{data.name}, split {split}: {len(answers):,} questions among {len(held):,} items"
    calibration = fit_calibration(shown, cost=cost, about=about)
    if calibration.scale <= 0:
        raise DataError(
            f"In {data.name}, split {split}, a higher score makes an item no likelier to be the one that is meant: "
            "nothing can be fitted. Do many items have texts that others could have as well?"
        )
    calibrated = Fusion("scores", weight, calibration)
    ways = {"items": Fusion("scores", 0.0), "texts": Fusion("scores", 1.0), "default": FUSION, "fitted": fusion}
    first = {name: bootstrap([float(p == 1) for p in _places(one, answers)]) for name, one in ways.items()}
    return Fitted(calibrated, cross_validated(shown), len(answers), first)


def keep(index: Index | Path | str, fitted: Fitted) -> Path:
    """Write a fusion into the index's folder; it holds for its model and its text embedder only."""
    return keep_fusion(index.path if isinstance(index, Index) else Path(index), fitted.fusion)


Answer = tuple[str, list[tuple[str, float]], list[tuple[str, float]]]


def _asked(index: Index, text: str, own: str) -> tuple[list[tuple[str, float]], list[tuple[str, float]]] | None:
    """What both spaces answer, without the item's having been found by this very text, and without others that have it;
    None where these are most of the answer."""
    looks = [(hit.id, hit.score) for hit in index.search(text, k=POOL, via="items")]
    texts = index.retriever.texts
    assert texts is not None
    words = texts.search(text, POOL, but=(own, text))
    same = {hit.id for hit in words if (hit.text or "").strip().casefold() == text.casefold()} - {own}
    if 2 * len(same) > len(words):
        return None
    found = [(hit.id, hit.score) for hit in words]
    return [one for one in looks if one[0] not in same], [one for one in found if one[0] not in same]


def _places(fusion: Fusion, answers: Sequence[Answer]) -> list[int]:
    """The rank of what was meant; behind everything that was found where it was not."""
    places = []
    for own, looks, words in answers:
        ids = [id for id, _ in fusion.scores(looks, words)]
        places.append(ids.index(own) + 1 if own in ids else len(ids) + 1)
    return places
