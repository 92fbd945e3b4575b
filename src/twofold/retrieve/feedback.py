"""What people said of what they found: an append-only file beside an index, and the training data it amounts to."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twofold.data.atomic import sync_folder
from twofold.errors import StoreError

FILE = "feedback.jsonl"


class Click(NamedTuple):
    """Somebody looked for `text` (or for the like of the items `like`) and found that `id` is, or is not, meant."""

    text: str | None
    like: tuple[str, ...]
    id: str
    relevant: bool
    when: str = ""  # ISO 8601, local time with offset

    @property
    def question(self) -> tuple[str | None, tuple[str, ...]]:
        return self.text, self.like


class Judged(NamedTuple):
    """One question with the items that were found right and wrong; the last word on an item counts."""

    text: str | None
    like: tuple[str, ...]
    positives: list[str]
    negatives: list[str]


class Feedback:
    """The clicks of one index. Each is on the disk when `add` returns; processes may add at the same time."""

    def __init__(self, index: Path | str):
        self.path = Path(index) / FILE

    def add(self, click: Click) -> None:
        """Append a click. A disk that has no room for all of it keeps none of it; OSError says so."""
        row = click._replace(when=click.when or time.strftime("%Y-%m-%dT%H:%M:%S%z"))._asdict()
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)  # by now: others may have written while this one waited
            if not end:
                sync_folder(self.path.parent)
            elif not self._ends_a_line(end):
                line = b"\n" + line  # whoever was killed in the middle of a line must not spoil the next one
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def _ends_a_line(self, end: int) -> bool:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), 1, end - 1) == b"\n"

    def __iter__(self) -> Iterator[Click]:
        """Every click, oldest first; a line that was cut short, wherever that was, is passed over."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line.decode("utf-8"))
                except ValueError:
                    continue
                try:
                    yield Click(row["text"], tuple(row["like"]), row["id"], row["relevant"], row["when"])
                except (KeyError, TypeError) as error:
                    raise StoreError(f"{self.path} holds a line that is no click ({error}): {line[:80]!r}") from error

    @property
    def size(self) -> int:
        """In bytes: what grows with every click."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def judged(self) -> list[Judged]:
        """Every question that got an answer, in the order in which they were first asked."""
        questions: dict[tuple, dict[str, bool]] = {}
        for click in self:
            answers = questions.setdefault(click.question, {})
            answers.pop(click.id, None)  # the last word also comes last
            answers[click.id] = click.relevant
        return [
            Judged(text, like, [name for name, yes in found.items() if yes], [n for n, yes in found.items() if not yes])
            for (text, like), found in questions.items()
        ]

    def triplets(self) -> list[tuple[str, str, str]]:
        """(words, item that is meant, item that is not) of every question in words that has both."""
        return [
            (one.text, positive, negative)
            for one in self.judged()
            if one.text
            for positive in one.positives
            for negative in one.negatives
        ]

    def tuples(self, columns: Mapping[str, Mapping[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
        """`triplets` as rows (anchor, positive, negative) to train with, and the ids of each row beside.

        `columns` are those of the items: an item stands there by its text, else by the path of its picture, else by its
        id. The id of an anchor is that of its positive: its words are one more text of that item.
        """
        words, ids = [], []
        for text, positive, negative in self.triplets():
            if positive in columns and negative in columns:
                words.append([text, *(_written(name, columns[name]) for name in (positive, negative))])
                ids.append([positive, positive, negative])
        return words, ids


def _written(name: str, meta: Mapping[str, Any]) -> str:
    return str(meta.get("text") or meta.get("image") or name)
