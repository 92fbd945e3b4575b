"""What a bundle is worth on data it did not see: neighbours and a linear probe where there are labels, names of classes
where there are words for them, recall where there are pairs."""

from collections.abc import Sequence
from typing import NamedTuple

from twofold.data.decode import OnError, Skipped
from twofold.data.sources import Modality, Source
from twofold.errors import DataError, UsageError, unknown
from twofold.measure.columns import LEAST, columns_of
from twofold.measure.embed import embed
from twofold.measure.hubness import Gap, Hubness, gap, hubness
from twofold.measure.labelled import At, FineTune, Labels, kind_seen, labelled, measured_at, pixels, stand_ins
from twofold.measure.matched import Matched, matched, pair_of
from twofold.measure.retrieval import Retrieval, retrieval
from twofold.measure.zero_shot import ZeroShot, prototypes, zero_shot
from twofold.models.bundle import Bundle

Paired = dict[str, Retrieval]  # "text_to_image" and "image_to_text", or whatever the two modalities are called


class Space(NamedTuple):
    """What is wrong with the space that two modalities share; hubs by direction, as in `Paired`."""

    gap: Gap
    hubness: dict[str, Hubness]
    hubs: dict[str, list[tuple[str, int]]]  # the worst hubs of each gallery: id, and how many queries they come up for


class Evaluation(NamedTuple):
    """`labels` by what was embedded ("trained", "head", "layer:3", the baselines); None where nothing can be."""

    labels: dict[str, Labels] | None
    paired: Paired | None
    space: Space | None = None
    zero_shot: ZeroShot | None = None
    skipped: Sequence[Skipped] = ()  # items that are in no pair


def both_ways(pairs: Matched, *, by: Sequence[str | None] | None = None) -> Paired:
    """Retrieval in both directions; `by` names the group of each item. Queries of one item stand or fall together."""
    found = {}
    for queries, gallery in _directions(pairs):
        owner = pairs.sides[queries].owner.tolist()
        found[f"{queries}_to_{gallery}"] = retrieval(
            pairs.sides[queries].matrix,
            pairs.sides[gallery].matrix,
            pairs.positives(queries, gallery),
            groups=owner,
            by=None if by is None else [by[item] for item in owner],
        )
    return found


def space_of(pairs: Matched) -> Space:
    """Modality gap, and hubness in both directions."""
    first, second = pairs.sides.values()
    found, hubs = {}, {}
    for queries, gallery in _directions(pairs):
        side = pairs.sides[gallery]
        way = f"{queries}_to_{gallery}"
        found[way] = hubness(pairs.sides[queries].matrix, side.matrix)
        hubs[way] = [(pairs.items.ids[side.owner[row]], count) for row, count in found[way].hubs]
    return Space(gap(first.matrix, second.matrix), found, hubs)


def _directions(pairs: Matched) -> list[tuple[Modality, Modality]]:
    """Words look for things first."""
    first, second = sorted(pairs.sides, key=lambda name: (name != "text", name))
    return [(first, second), (second, first)]


def evaluate(
    bundle: Bundle,
    data: Source,
    *,
    split: str = "test",
    limit: int | None = None,
    at: At = "encoder",
    attentive: bool = False,
    fine_tune: FineTune | None = None,
    baselines: bool = True,
    by: str | None = None,
    templates: Sequence[str] = (),
    between: Sequence[Modality] = (),
    on_error: OnError = "skip",
    quiet: bool = False,
) -> Evaluation:
    """Measure `bundle` on one split of `data` (on all of it where it names none, if no labels need a training split).

    Labelled pictures or videos: a kNN and a linear probe, class means of 1, 5 and 10 examples, linear probes of 1 % and
    10 % of the labels, in many draws, are fitted on the split "train" (at most `limit` items) and tested on `split`;
    among the items of `split`, which find others of their label, and which clusters are their labels. `attentive` adds
    a probe of the encoder's tokens, which are held in memory, and `fine_tune` one that trains the encoder along
    (`twofold.train.fine_tune.fine_tune`). `at="head"` measures behind the training head as well, where the loss was
    taken (the bundle must have been loaded with its heads), `at="layer:3"` at the encoder's third layer as well.
    Beside it stand `baselines`: raw pixels and colours (of a video, those of its average frame), the same encoder
    untrained, and of pictures one with ImageNet's weights. With `templates` ("a photo of a {}") the pictures are
    classified by the names of their classes, without any fitting. Two modalities that the bundle and the data share,
    such as pictures and captions: recall both ways, for each value of the column `by` too, the gap between them and
    their hubs; always by plain cosines. `between` names the two where there are more.
    """
    labels = pairs = None
    fitted = data.splits is not None and ("train" in data.splits or not templates)
    seen = kind_seen(bundle, data)
    if attentive and seen is None:
        raise UsageError(f"An attentive probe reads pictures or videos; this bundle and {data.name} share neither.")
    if data.labels is not None and fitted and seen is not None:
        train, tested = data.split("train"), data.split(split)
        parts = (train.sample(limit), tested)
        modality = data.only(seen)
        models = measured_at(bundle, seen, at)
        labels = labelled(
            models | (stand_ins(bundle.towers[seen]) if baselines else {}),
            parts,
            modality,
            attentive=attentive,
            fine_tune=fine_tune,
            on_error=on_error,
            quiet=quiet,
        )
        if baselines:
            labels |= pixels(parts, modality, int(bundle.towers[seen].encoder.spec["channels"]), on_error)
    elif at != "encoder":
        measured_at(bundle, "image", at)
    tested = data if data.splits is None else data.split(split)
    named = _zero_shot(bundle, tested, templates, on_error=on_error, quiet=quiet) if templates else None
    space, skipped = None, []
    if (modalities := pair_of(bundle, data, between)) is not None:
        both = matched(bundle, tested, modalities, on_error=on_error, quiet=quiet)
        pairs = both_ways(both, by=_groups(both.items, by))
        space, skipped = space_of(both), both.skipped
    elif by is not None:
        raise UsageError(f"by={by!r} divides queries; {data.name} and this bundle share no two modalities.")
    if labels is None and pairs is None and named is None:
        raise DataError(
            f"There is nothing to evaluate on in {data.name}: it takes labels with the splits train and {split}, or "
            f"two modalities that the bundle has towers for, such as pictures and captions (this one has "
            f"{', '.join(bundle.towers)})."
        )
    return Evaluation(labels, pairs, space, named, skipped)


def _zero_shot(bundle: Bundle, data: Source, templates: Sequence[str], *, on_error: OnError, quiet: bool) -> ZeroShot:
    bundle.tower("text")
    if data.labels is None or not data.classes:
        raise DataError(f"{data.name} has no labels with names; zero-shot classification takes both.")
    modality = "image" if "image" in bundle.towers else next(name for name in bundle.towers if name != "text")
    done = embed(bundle, data, modality, on_error=on_error, quiet=quiet)
    vectors = prototypes(bundle, data.classes, templates)
    return zero_shot(done.matrix, data.labels[done.kept], data.classes, vectors, templates=templates)


def _groups(items: Source, by: str | None) -> list[str | None] | None:
    """The value of the column `by` for each item, None where few share it: "label", "split" or a column of metadata."""
    if by is None:
        return None
    if by == "split" and items.splits is not None:
        return list(items.splits)
    try:
        (column,) = columns_of(items, [by])
    except UsageError as error:
        there = [*items.meta, *(["label"] if items.labels is not None else []), *(["split"] if items.splits else [])]
        raise unknown("column", by, there) from error
    if not column.classes:
        raise UsageError(f"No value of {by!r} belongs to {LEAST} items or more, so there are no groups to compare.")
    return [column.classes[value] if value >= 0 else None for value in column.values.tolist()]
