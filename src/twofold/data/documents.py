"""Documents: pictures and texts in any order, as a page holds them; read from JSONL and packed into rows of one length.

A line is a document, a list of parts: [{"image": "a.jpg"}, {"text": "A red boat."}, {"image": "b.jpg"}]. Pictures are
found beside the file, or in the folder that `images` names.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from twofold.data.decode import OnError, Skipped
from twofold.data.sources import Source
from twofold.data.tables import read_text
from twofold.errors import DataError, UsageError, unknown

Part = str | int  # a text, or the number of a picture
PATCH = -1  # stands among token ids where a patch of a picture is read


@dataclass(frozen=True)
class Documents:
    """Documents of parts; a part that is a number is one of `pictures`, of which several documents may show the same.

    `skipped` are those that were left out when they were read, and why.
    """

    name: str  # what they were opened from, for messages
    ids: Sequence[str]
    parts: Sequence[tuple[Part, ...]]
    pictures: Sequence[Path | bytes | np.ndarray]
    skipped: Sequence[Skipped] = ()

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def texts(self) -> list[str]:
        return [part for parts in self.parts for part in parts if isinstance(part, str)]

    def showing(self, shown: Iterable[int]) -> "Documents":
        """The documents whose pictures are all among the numbers `shown`; the others come to be skipped."""
        shown = set(shown)
        blind = [any(isinstance(part, int) and part not in shown for part in parts) for parts in self.parts]
        kept = [at for at, without in enumerate(blind) if not without]
        why = [Skipped(self.ids[at], "a picture that cannot be read") for at, without in enumerate(blind) if without]
        return replace(
            self,
            ids=[self.ids[at] for at in kept],
            parts=[self.parts[at] for at in kept],
            skipped=[*self.skipped, *why],
        )


def open_documents(path: Path | str, *, images: Path | str | None = None, on_error: OnError = "skip") -> Documents:
    """The documents of a JSONL file. DataError names the line of what is no document.

    One that is empty, or shows a picture that does not exist, is skipped, or raises with `on_error="raise"`.
    """
    path, root = Path(path), Path(images or Path(path).parent)
    if on_error not in ("skip", "raise"):
        raise unknown("on_error", on_error, ("skip", "raise"))
    if not path.is_file():
        raise DataError(f"{path} is no file. Documents are JSONL, a list of parts a line.")
    ids, read, skipped = [], [], []
    pictures: dict[Path, int] = {}
    there: dict[Path, bool] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        name = f"{path} line {number}"
        parts = _parts(name, line, root)
        shown = [part for part in parts if isinstance(part, Path)]
        for picture in shown:
            there.setdefault(picture, picture.is_file())
        missing = next((picture for picture in shown if not there[picture]), None)
        if parts and missing is None:
            ids.append(name)
            read.append(
                tuple(pictures.setdefault(part, len(pictures)) if isinstance(part, Path) else part for part in parts)
            )
            continue
        skip = Skipped(name, "an empty document" if missing is None else f"no such picture: {missing}")
        if on_error == "raise":
            raise DataError(f"{skip.id}: {skip.reason}.")
        skipped.append(skip)
    if there and not any(there.values()):
        raise DataError(
            f"{path}: none of its {len(there):,} pictures exist, for instance {next(iter(there))}. "
            "Say where they are with images=FOLDER."
        )
    if not read:
        first = f" The first: {skipped[0].id}, {skipped[0].reason}." if skipped else ""
        raise DataError(f"{path} holds no document; expected a list of parts a line.{first}")
    return Documents(str(path), ids, read, list(pictures), skipped)


def _parts(name: str, line: str, root: Path) -> list[str | Path]:
    """The parts of a line, without texts that are blank."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON: {error}.") from error
    if not isinstance(row, list):
        raise DataError(f'{name} is no document, a list of parts: [{{"image": "a.jpg"}}, {{"text": "A boat."}}].')
    parts: list[str | Path] = []
    for number, part in enumerate(row, 1):
        if not isinstance(part, dict) or len(part) != 1 or not part.keys() <= {"image", "text"}:
            raise DataError(
                f'{name}, part {number} is not {{"image": PATH}} or {{"text": WORDS}}: {json.dumps(part):.80}'
            )
        (kind, content), *_ = part.items()
        if not isinstance(content, str) or (kind == "image" and not content):
            what = "the path of a picture" if kind == "image" else "a text"
            raise DataError(f"{name}, part {number}: {what} is a string; got {content!r:.80}.")
        if kind == "image":
            parts.append(root / content)
        elif content.strip():
            parts.append(content)
    return parts


def captioned(source: Source) -> Documents:
    """Pairs as documents: each caption behind its picture."""
    if source.images is None or source.texts is None:
        raise DataError(f"{source.name} has no pictures with captions: {', '.join(source.modalities) or 'nothing'}.")
    said = [
        (item, place, text) for item, own in enumerate(source.texts) for place, text in enumerate(own) if text.strip()
    ]
    ids = [f"{source.ids[item]}#{place}" for item, place, _ in said]
    return Documents(source.name, ids, [(item, text) for item, _, text in said], source.images)


class Packed(NamedTuple):
    """Documents side by side in rows of one length; what belongs together, `document` says, and nothing else does."""

    tokens: Int[np.ndarray, "n length"]  # ids; PATCH where a patch is, a picture's one after the other
    document: Int[np.ndarray, "n length"]  # counts from 1 in each row; 0 is padding behind the last one
    pictures: list[list[int]]  # the numbers of each row's pictures, in order
    split: int  # documents that were longer than a row and go on, as another one, elsewhere


def packed(
    documents: Documents,
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    *,
    length: int,
    cells: int,
    start: int,
    end: int,
) -> Packed:
    """Documents as tokens, `start` before and `end` behind each, in as few rows as best-fit decreasing finds.

    `encode` gives texts' ids; a picture takes `cells` places. Since documents that share a row never see each other,
    it does not matter which do. What is longer than a row is split, between two words' tokens but never in a picture.
    """
    if length < max(2, cells + 1):
        raise UsageError(
            f"A row of {length} tokens has no room for {f'a picture of {cells} patches' if cells > 1 else 'a text'}. "
            "Make rows longer, or patches larger."
        )
    texts = list(dict.fromkeys(documents.texts))
    ids = dict(zip(texts, encode(texts), strict=True)) if texts else {}
    pieces: list[tuple[list[int], list[int]]] = []  # tokens, pictures
    split = 0
    for parts in documents.parts:
        before = len(pieces)
        tokens, shown = [start], list[int]()
        for part in parts:
            rest = [PATCH] * cells if isinstance(part, int) else list(ids[part])
            if isinstance(part, int):
                if len(tokens) + cells > length:
                    pieces.append((tokens, shown))
                    tokens, shown = [start], []
                shown.append(part)
            while len(tokens) + len(rest) > length:
                room = length - len(tokens)
                pieces.append((tokens + rest[:room], shown))
                tokens, shown, rest = [start], [], rest[room:]
            tokens += rest
        if len(tokens) < length:
            tokens.append(end)
        pieces.append((tokens, shown))
        split += len(pieces) - before > 1
    rows = _rows([len(tokens) for tokens, _ in pieces], length)
    laid = np.zeros((len(rows), length), np.int64)
    document = np.zeros_like(laid)
    for row, own in enumerate(rows):
        place = 0
        for number, piece in enumerate(own, 1):
            tokens = pieces[piece][0]
            laid[row, place : place + len(tokens)] = tokens
            document[row, place : place + len(tokens)] = number
            place += len(tokens)
    return Packed(laid, document, [[picture for piece in own for picture in pieces[piece][1]] for own in rows], split)


def _rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which pieces share a row: the largest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room that is left
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        room = next((room for room in range(sizes[piece], length) if with_room[room]), length)
        if room == length:
            rows.append([])
            row = len(rows) - 1
        else:
            row = with_room[room].pop()
        rows[row].append(piece)
        with_room[room - sizes[piece]].append(row)
    return rows


@dataclass(frozen=True)
class Shown:
    """A column for `Batches`: the pictures of each row, a tensor [m, …] of what `content` holds of each picture."""

    content: Any  # pixels [n, c, h, w] or features [n, cells, d]; array or tensor
    rows: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Tensor:
        at = np.asarray(self.rows[row], np.int64)
        if isinstance(self.content, Tensor):
            return self.content[torch.from_numpy(at).to(self.content.device)]
        return torch.from_numpy(np.asarray(self.content[at]))
