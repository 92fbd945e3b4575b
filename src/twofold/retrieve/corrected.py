"""What feedback changed: how an index answered the questions that people judged before it got another model, and now.

    corrected.json    the answers of the model before; written when a build replaces the model

The answers of now are asked for anew, so they are those of the index as it is.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from twofold.data.atomic import write_atomically
from twofold.errors import StoreError, UsageError
from twofold.retrieve.feedback import Feedback, Judged

if TYPE_CHECKING:
    from twofold.retrieve.index import Index

FILE = "corrected.json"
DEEP = 100  # how far down a judged item is looked for


class Answered(NamedTuple):
    """The ids that a model found for a question, best first, `DEEP` at most."""

    ids: list[str]

    def rank(self, ids: list[str]) -> int | None:
        """The place of the first of `ids`, 1 is best; None where none is among those found."""
        return next((place for place, one in enumerate(self.ids, 1) if one in ids), None)


class Corrected(NamedTuple):
    """A judged question with the answers of the model before and of the one now."""

    judged: Judged
    before: Answered
    after: Answered

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """Where the first item that was found right stood, and stands."""
        return self.before.rank(self.judged.positives), self.after.rank(self.judged.positives)


class Change(NamedTuple):
    """All questions in three numbers each, before and after; ranks beyond `DEEP` count as one more."""

    questions: int
    right: int  # questions that have an item found right
    rank: tuple[float, float]  # mean place of the first of these, 1 is best
    first: tuple[float, float]  # share of questions that have it in the first place, 0..1
    wrong: tuple[float, float]  # items found wrong that are among the first ten, a question


def keep_answers(index: "Index") -> None:
    """Keep how the index answers what was judged, before its model is replaced."""
    answers = [
        {"text": judged.text, "like": judged.like, "ids": answer.ids}
        for judged in Feedback(index.path).judged()
        if (answer := _answer(index, judged)) is not None
    ]
    text = json.dumps({"bundle": index.head.bundle, "answers": answers}, ensure_ascii=False) + "\n"
    write_atomically(index.path / FILE, lambda path: path.write_text(text, "utf-8"))


def corrected(index: "Index") -> list[Corrected]:
    """The questions that were judged before the index got the model that it has; [] while it has its first one."""
    path = index.path / FILE
    try:
        kept = json.loads(path.read_text("utf-8"))
        if kept["bundle"] == index.head.bundle:  # the build that was to replace the model did not come to its end
            return []
        before = {(row["text"], tuple(row["like"])): Answered(row["ids"]) for row in kept["answers"]}
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}). It may be deleted.") from error
    return list(_compared(index, before))


def _compared(index: "Index", before: dict[tuple, Answered]) -> Iterator[Corrected]:
    for judged in Feedback(index.path).judged():
        old = before.get((judged.text, judged.like))
        if old is not None and (new := _answer(index, judged)) is not None:
            yield Corrected(judged, old, new)


def change(rows: list[Corrected]) -> Change:
    """What `rows` come to; NaN where there is nothing to take a mean of."""
    right = [row for row in rows if row.judged.positives]
    ranks = [tuple(DEEP + 1 if rank is None else rank for rank in row.ranks) for row in right]
    wrong = [
        tuple(len(set(row.judged.negatives) & set(answer.ids[:10])) for answer in (row.before, row.after))
        for row in rows
    ]
    return Change(
        len(rows),
        len(right),
        _means(ranks),
        _means([tuple(float(rank == 1) for rank in both) for both in ranks]),
        _means(wrong),
    )


def _means(pairs: list[tuple]) -> tuple[float, float]:
    before, after = (sum(one[at] for one in pairs) / len(pairs) if pairs else float("nan") for at in (0, 1))
    return before, after


def _answer(index: "Index", judged: Judged) -> Answered | None:
    """None where the question can no longer be asked: an item that it names is gone."""
    with contextlib.suppress(StoreError, UsageError):
        return Answered([hit.id for hit in index.search(judged.text, like=judged.like, k=DEEP)])
    return None
