"""From a bundle and held-out pairs to a calibration that the bundle keeps: what `twofold calibrate` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twofold.data.decode import OnError, Skipped
from twofold.data.sources import Modality, Source
from twofold.errors import DataError, UsageError, unknown
from twofold.measure.calibration import (
    Calibration,
    Honesty,
    cross_validated,
    direction,
    fit_calibration,
    from_siglip,
    honesty,
    shown,
    threshold,
)
from twofold.measure.hubness import KINDS, Remedy, remedies
from twofold.measure.matched import Matched, matched, pair_of
from twofold.models.bundle import Bundle, annotate

Kind = Literal["platt", "isotonic", "siglip"]
Choice = Literal["none", "best", "centring", "qb-norm", "nnn"]


@dataclass(frozen=True)
class Calibrated:
    """A calibration, how honest it is on pairs it was not fitted on, and what was tried on the way."""

    calibration: Calibration
    way: str  # "text_to_image"
    honesty: Honesty  # cross-validated; of SigLIP's sigmoid, which is not fitted, as it is
    raw: Honesty | None  # SigLIP's sigmoid at its training odds, where the bundle knows it
    tried: list[Remedy]  # with their gains, largest first
    skipped: Sequence[Skipped] = ()  # items of the split that are in no pair


def calibrate(
    bundle: Bundle,
    data: Source,
    *,
    split: str = "val",
    queries: Modality | None = None,
    kind: Kind = "platt",
    cost: float = 0.05,
    remedy: Choice = "none",
    between: Sequence[Modality] = (),
    on_error: OnError = "skip",
    quiet: bool = False,
) -> Calibrated:
    """Fit a calibration on the pairs of one split, which must not have been trained on.

    `queries` is the modality that is searched with, text unless said. A `remedy` other than "none" is tried, with the
    split "train" for its bank; "best" tries all of them and takes the one of the largest gain in mAP, if its interval
    lies above 0. Nothing is changed in the bundle: `keep` does that.
    """
    modalities = pair_of(bundle, data, between)
    if modalities is None:
        raise DataError(
            f"A calibration takes pairs of two modalities; {data.name} has {', '.join(data.modalities) or 'none'}, and "
            f"this bundle towers for {', '.join(bundle.towers)}."
        )
    queries = queries or ("text" if "text" in modalities else modalities[0])
    if queries not in modalities:
        raise unknown("modality", queries, modalities)
    gallery = modalities[1] if queries == modalities[0] else modalities[0]
    if split == "train":
        raise UsageError("Scores of pairs that were trained on promise too much; calibrate on a split held out.")
    if remedy not in ("none", "best", *KINDS):
        raise unknown("remedy", remedy, ("none", "best", *KINDS))
    held_out = matched(bundle, data.split(split), modalities, on_error=on_error, quiet=quiet)
    tried: list[Remedy] = []
    if remedy != "none":
        kinds = KINDS if remedy == "best" else (remedy,)
        bank = matched(bundle, _bank(data), modalities, on_error=on_error, quiet=quiet)
        tried = _tried(held_out, bank, queries, gallery, kinds=kinds, split=split)
    best = tried[0] if tried else None
    chosen = best if best and (remedy != "best" or (best.gain is not None and best.gain.map.low > 0)) else None
    pairs = _sides(held_out, queries, gallery)
    seen = shown(*pairs, groups=held_out.sides[queries].owner.tolist(), remedy=chosen)
    about = f"{data.name}, split {split}: {len(seen.scores):,} queries among {seen.gallery:,} items"
    own = _own_sigmoid(bundle)
    raw = None if own is None else honesty(own, shown(*pairs, groups=seen.groups))
    if kind == "siglip":
        if own is None:
            raise UsageError(
                "This bundle keeps no scale and bias of SigLIP's: it was trained otherwise, or by an older twofold. "
                "Fit a curve with kind platt or isotonic."
            )
        if chosen is not None:
            raise UsageError("SigLIP's sigmoid is one of plain cosines; with a remedy, fit platt or isotonic.")
        least = threshold(seen.scores[:, 0], cost)
        made = Calibration("siglip", own.gallery, own.scale, own.offset, threshold=least, cost=cost, about=about)
        own_way = honesty(made, seen, gallery=seen.gallery)
        return Calibrated(made, direction(queries, gallery), own_way, raw, tried, held_out.skipped)
    made = fit_calibration(seen, kind=kind, cost=cost, remedy=chosen, about=about)
    return Calibrated(made, direction(queries, gallery), cross_validated(seen, kind=kind), raw, tried, held_out.skipped)


def keep(model: Path | str, done: Calibrated) -> Path:
    """Write a calibration into the bundle on disk, beside those of other directions; returns the bundle's folder."""
    return annotate(model, "calibration", done.way, done.calibration.record())


def _own_sigmoid(bundle: Bundle) -> Calibration | None:
    own = bundle.meta.get("siglip")
    return from_siglip(own["scale"], own["bias"], batch=own["batch"]) if own else None


def _bank(data: Source) -> Source:
    if data.splits is None or "train" not in data.splits:
        raise DataError(
            f"A remedy takes its bank of queries from the split train, apart from the pairs it is chosen on; "
            f"{data.name} has no such split."
        )
    return data.split("train")


def _tried(
    held_out: Matched, bank: Matched, queries: Modality, gallery: Modality, *, kinds: Sequence[str], split: str
) -> list[Remedy]:
    return remedies(
        *_sides(held_out, queries, gallery),
        banks=(bank.sides[queries].matrix, bank.sides[gallery].matrix),
        groups=held_out.sides[queries].owner.tolist(),
        kinds=kinds,
        split=split,
    )


def _sides(pairs: Matched, queries: Modality, gallery: Modality):
    return pairs.sides[queries].matrix, pairs.sides[gallery].matrix, pairs.positives(queries, gallery)
