"""Which pairs of a data set do not belong together? Judged by heads that never saw them, by neighbours and siblings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from twofold.data.decode import OnError, Skipped
from twofold.data.sources import Modality, Source
from twofold.errors import DataError, UsageError
from twofold.measure import pair_audit
from twofold.measure.metrics import Interval
from twofold.measure.pair_audit import HeldOut, Judgement, Pairs, unit
from twofold.models.base import inference
from twofold.models.encoders import encoder
from twofold.progress import Line
from twofold.train.align import TOWERS, Recipe, align, embedded, linked, with_texts

FOLDS = 4
JUDGES = Recipe(epochs=30, views=0)  # heads of half the usual length rank pairs as well as longer ones
EVIDENCE = ("cosine", "rarity_first", "rarity_second")  # of `HeldOut`, what is judged by
BEST = 3  # of what would fit better, for the page


@dataclass(frozen=True)
class Pair:
    """One pair, judged. Ranks are among what was held out together with it, `among` many; 1 is best."""

    id: str
    text: str  # the second of the pair where that is a text, else ""
    wrong: float  # probability that the two do not belong together
    rank: int
    rank_back: int
    among: int
    reasons: tuple[str, ...]
    item: int  # of the source
    place: int  # of the item's texts

    @property
    def weight(self) -> float:
        """The share of its visits that training should keep."""
        return round(1 - self.wrong, 4)


@dataclass(frozen=True, eq=False)
class Audit:
    """Every pair of `source`, worst first."""

    source: Source
    towers: Mapping[Modality, str]
    pairs: list[Pair]
    noise: Interval  # share of pairs that do not belong together
    evidence: Mapping[str, float]  # what the judgement weighs, standardised
    better: Mapping[int, list[tuple[str, str]]]  # place in `pairs` → (id, text) of seconds that fit its item better
    alike: Mapping[Modality, list[tuple[str, str, float]]]  # items that are hardly different, with their cosine
    skipped: list[Skipped]

    def to_dict(self, worst: int = 100) -> dict[str, Any]:
        return {
            "data": self.source.name,
            "towers": dict(self.towers),
            "items": len(self.source),
            "pairs": len(self.pairs),
            "noise": self.noise._asdict(),
            "evidence": dict(self.evidence),
            "worst": [
                {"id": one.id, "text": one.text, "wrong": one.wrong, "rank": one.rank, "reasons": list(one.reasons)}
                for one in self.pairs[:worst]
            ],
            "alike": {name: found[:worst] for name, found in self.alike.items()},
            "skipped": [skip._asdict() for skip in self.skipped],
        }


class _Fold(NamedTuple):
    """What one fold's judges say: of given pairs and of made ones, and which of its rows fit each item best."""

    given: HeldOut
    made: HeldOut
    fake: Pairs  # the made ones
    items: np.ndarray
    rows: np.ndarray
    best: np.ndarray


def audit_pairs(
    pairs: Source,
    *,
    out: Path | str,
    towers: Mapping[Modality, str] = TOWERS,
    recipe: Recipe = JUDGES,
    folds: int = FOLDS,
    worst: int = 200,
    on_error: OnError = "skip",
    quiet: bool = False,
) -> Audit:
    """Judge every pair of the data (of its split "train", where it names splits) by heads that did not learn from it.

    The items fall into `folds`; heads learn from all but one of them and judge that one. Items that share a text or a
    file are in one fold. The encoders stay as they are, so everything is embedded once. Heads come to lie in
    `out`/folds, where the same call finds them again. `worst` pairs are given reasons and what would fit better.
    """
    if folds < 2:
        raise UsageError(f"folds must be at least 2, one to judge and one to learn from; got {folds}.")
    if recipe.train != "none":
        raise UsageError("Pairs are judged by heads on frozen encoders; leave train at none.")
    train = pairs if pairs.splits is None else replace(pairs.split("train"), splits=None)
    train, mute = with_texts(train, towers)
    encoders = {
        name: encoder(spec, train.column(name).kind, column=train.column(name)) for name, spec in towers.items()
    }
    train, features, skipped = embedded(train, encoders, on_error=on_error, quiet=quiet)
    skipped = [*mute, *skipped]
    one, two = towers
    if train.modalities[one] == "text" != train.modalities[two]:  # several texts an item are the second side
        one, two = two, one
    owner = np.repeat(np.arange(len(train)), np.diff(features[two].offsets))
    draw = np.random.default_rng(recipe.seed)
    fold = pair_audit.folds(linked(train, towers), folds, draw)
    first = _means(unit(features[one].matrix), features[one].offsets)
    second = unit(features[two].matrix)

    given = Pairs(owner, np.arange(len(owner)))
    parts: list[_Fold] = []
    with Line("judge", unit="folds", quiet=quiet) as line:
        for number in range(folds):
            done = align(
                train.take(np.flatnonzero(fold != number)),
                out=Path(out) / "folds" / str(number),
                towers=towers,
                recipe=recipe,
                quiet=True,
            )
            mine = np.flatnonzero(fold == number)
            za, zb = (_through(done.bundle.tower(name).head, features[name].matrix) for name in (one, two))
            za = _means(za, features[one].offsets)
            here = np.flatnonzero(fold[owner] == number)
            fake = pair_audit.made(given.take(here), owner, draw)
            at_item, at_row = np.full(len(train), -1), np.full(len(owner), -1)
            at_item[mine], at_row[here] = np.arange(len(mine)), np.arange(len(here))
            held, held_fake = (
                pair_audit.held_out(za[mine], zb[here], Pairs(at_item[which.item], at_row[which.row]))
                for which in (given.take(here), fake)
            )
            parts.append(_Fold(held, held_fake, fake, mine, here, pair_audit.nearest(za[mine], zb[here], 4 * BEST)))
            line.update(number + 1, folds)
    fake = Pairs(*(np.concatenate([getattr(part.fake, of) for part in parts]) for of in ("item", "row")))
    order = np.argsort(np.concatenate([part.rows for part in parts]))
    held = HeldOut(*(np.concatenate(column)[order] for column in zip(*(part.given for part in parts), strict=True)))
    held_fake = HeldOut(*map(np.concatenate, zip(*(part.made for part in parts), strict=True)))
    about = [
        {name: getattr(seen, name) for name in EVIDENCE} | _around(first, second, owner, which, draw)
        for which, seen in ((given, held), (fake, held_fake))
    ]
    judgement = pair_audit.judge(*about, seed=recipe.seed)
    return _told(
        train, towers, (one, two), owner, fold, parts, held, about[0], judgement, first, second, worst, skipped
    )


def _around(
    first: np.ndarray, second: np.ndarray, owner: np.ndarray, pairs: Pairs, draw: np.random.Generator
) -> dict[str, np.ndarray]:
    """What neighbours and siblings say, by the encoders as they are."""
    start = np.searchsorted(owner, np.arange(len(first)))
    return {
        "neighbours": pair_audit.neighbourly(first, second, owner, pairs, draw),
        # The other way round: each row of the second side is a thing of its own, and what it has is its item.
        "neighbours_back": pair_audit.neighbourly(
            second, first[owner], np.arange(len(owner)), Pairs(pairs.row, start[pairs.item]), draw, group=owner
        ),
        "siblings": pair_audit.siblings(second, owner, pairs),
    }


def _told(
    source: Source,
    towers: Mapping[Modality, str],
    sides: tuple[Modality, Modality],
    owner: np.ndarray,
    fold: np.ndarray,
    parts: Sequence[_Fold],
    held: HeldOut,
    evidence: Mapping[str, np.ndarray],
    judgement: Judgement,
    first: np.ndarray,
    second: np.ndarray,
    worst: int,
    skipped: list[Skipped],
) -> Audit:
    """The judgement in words, worst first."""
    kind, cells = source.column(sides[1])
    texts = [text for own in cells for text in own] if kind == "text" else [""] * len(owner)
    odd = pair_audit.oddities(texts) if kind == "text" else [""] * len(owner)
    repeated = {text: texts.count(text) for text in {texts[row] for row in np.argsort(-judgement.wrong)[:worst]}}
    order = np.lexsort((judgement.score, -judgement.wrong))
    start = np.searchsorted(owner, np.arange(len(source)))
    low = {
        name: np.nanquantile(values, 0.1) if np.isfinite(values).any() else -np.inf for name, values in evidence.items()
    }
    pairs, better = [], {}
    for place, row in enumerate(order.tolist()):
        item = int(owner[row])
        part = parts[int(fold[item])]
        rows_there, items_there = len(part.rows), len(part.items)
        reasons = []
        if place < worst:
            if held.rank[row] > 0.1 * rows_there:
                reasons.append(f"{held.rank[row] - 1:,} of {rows_there - 1:,} others fit it better")
            if held.rank_back[row] > 0.1 * items_there:
                reasons.append(f"it fits {held.rank_back[row] - 1:,} of {items_there - 1:,} other items better")
            if evidence["siblings"][row] <= low["siblings"]:
                reasons.append("unlike the item's other texts")
            if evidence["neighbours"][row] <= low["neighbours"]:
                reasons.append(f"unlike the {sides[1]}s of items that are like this one")
            if evidence["neighbours_back"][row] <= low["neighbours_back"]:
                reasons.append(f"items with a {sides[1]} like this look different")
            if kind == "text" and repeated.get(texts[row], 1) > 1:
                reasons.append(f"the same text stands {repeated[texts[row]]} times")
            fits = part.rows[part.best[np.searchsorted(part.items, item)]]
            fits = [other for other in fits.tolist() if owner[other] != item]
            better[place] = [(source.ids[owner[other]], texts[other]) for other in fits[:BEST]]
        if odd[row]:
            reasons.append(odd[row])
        pairs.append(
            Pair(
                source.ids[item],
                texts[row],
                round(float(judgement.wrong[row]), 4),
                int(held.rank[row]),
                int(held.rank_back[row]),
                rows_there,
                tuple(reasons),
                item,
                row - int(start[item]),
            )
        )
    twins = {
        sides[0]: [(source.ids[a], source.ids[b], cosine) for a, b, cosine in pair_audit.alike(first)],
        sides[1]: [
            (source.ids[owner[a]], source.ids[owner[b]], cosine)
            for a, b, cosine in pair_audit.alike(second)
            if owner[a] != owner[b]
        ],
    }
    return Audit(source, towers, pairs, judgement.noise, judgement.weights, better, twins, skipped)


def _through(head: torch.nn.Module, matrix: np.ndarray) -> np.ndarray:
    device = next(head.parameters()).device
    with inference(head):
        return unit(head(torch.from_numpy(matrix).to(device)).float().cpu().numpy())


def _means(rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """One unit vector an item: the mean direction of its rows."""
    if len(offsets) == len(rows) + 1:
        return rows
    if (np.diff(offsets) == 0).any():
        raise DataError("An item without a row has no direction.")
    return unit(np.add.reduceat(rows, offsets[:-1]))
