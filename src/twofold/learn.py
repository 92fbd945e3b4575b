"""What people said of an index's hits, made into a model that answers better: feedback in, bundle out."""

from pathlib import Path

from twofold.data.sources import Source, open_source
from twofold.errors import DataError, UsageError
from twofold.retrieve.feedback import Feedback
from twofold.retrieve.index import Index
from twofold.train.feedback import Learnt, Lesson, Question, learn_from
from twofold.train.mine import write_rows


def learn(
    index: Path | str,
    *,
    out: Path | str,
    pairs: Source | None = None,
    lesson: Lesson = Lesson(),  # noqa: B008 — frozen
    quiet: bool = False,
) -> Learnt:
    """Go on training the model of `index` with what was said of its hits; leaves a bundle in `out`/bundle.

    The pairs to replay are `pairs`, else what the model was made from, else what the index was made from. Items that
    are gone from the index are passed over. `Index.build` with the bundle then takes it over, and keeps how the old
    model answered.
    """
    with Index.open(index) as opened:
        there = set(opened.store.ids())
        questions = [
            Question(one.text, right, wrong)
            for one in Feedback(index).judged()
            if one.text and not one.like
            for right, wrong in [[[id for id in ids if id in there] for ids in (one.positives, one.negatives)]]
            if right or wrong
        ]
        if not questions:
            raise UsageError(
                f"Nobody has judged a hit of words in {index} yet: `twofold serve {index}`, then Right and Wrong."
            )
        names = sorted({id for one in questions for id in (*one.right, *one.wrong)})
        vectors = dict(zip(names, opened.store.vectors(names), strict=True))
        bundle, head = opened.bundle, opened.head
    if len(head.modalities) > 1:
        raise UsageError(
            f"{index} holds {head.modality}; a model learns from hits of one modality. Index one alone, and have its "
            "hits judged."
        )
    source = pairs or _pairs(index, [bundle.meta.get("data"), head.source], head.modality)
    return learn_from(bundle, questions, vectors, source, modality=head.modality, out=out, lesson=lesson, quiet=quiet)


def _pairs(index: Path | str, names: list[str | None], modality: str) -> Source:
    for name in dict.fromkeys(filter(None, names)):
        try:
            source = open_source(name)
        except DataError:
            continue
        if {modality, "text"} <= set(source.modalities):
            return source
    raise UsageError(
        f"So that nothing is forgotten, pairs are replayed; neither the model's data nor {index}'s source can be "
        f"opened with {modality} and text. Name some: `twofold align captions.csv --feedback {index} --out DIR`."
    )


def export(index: Path | str, out: Path) -> int:
    """Write judged questions in words as (anchor, positive, negative), with their ids beside; the number of rows.

    sentence-transformers trains with the file as it is, `align --negatives` reads both.
    """
    with Index.open(index) as opened:
        words, ids = Feedback(index).tuples(dict(opened.items()))
    if not words:
        raise UsageError(f"No question in words in {index} has both an item found right and one found wrong.")
    write_rows(out, ["anchor", "positive", "negative"], words, ids)
    return len(words)
