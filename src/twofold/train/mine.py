"""Hard negatives of a data set as a file: triplets or n-tuples that sentence-transformers reads as they are.

Beside the file lies another one with the ids of all that stands in it, row by row: `align --negatives` reads that.
"""

import csv
import json
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from twofold.data.atomic import write_atomically
from twofold.data.cache import decoded
from twofold.data.decode import OnError, Skipped
from twofold.data.sources import Modality, Source
from twofold.data.tables import READERS
from twofold.errors import DataError, UsageError, unknown
from twofold.measure.embed import Embedded, embed
from twofold.methods import Method
from twofold.mining import Guards, Known, Mined, Search, hard_negatives, perceptual_hashes
from twofold.models.base import device_of, inference
from twofold.models.bundle import Bundle
from twofold.progress import Line

PRINT_SIDE = 32  # pixels a side of what perceptual hashes are taken of
COUNT = 5  # negatives of each anchor
MEETING = 30  # those that a model mines for itself: some of them belong to one item, or have met others already
DEEP = 400  # candidates that it looks at: the right answer of a model that still learns ranks low, and guards go by it
DEPTH = 100  # candidates of each that are looked at
Miner = Callable[[Method], Int64[Tensor, "n k"]]
SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Side:
    """One modality of the items, a row for each picture or single text."""

    modality: str
    matrix: Float[np.ndarray, "m d"]
    owner: Int[np.ndarray, "m"]  # the item of each row
    cells: Sequence[Any]  # a text, or what `Source.images` holds

    def written(self, row: int, source: Source) -> str:
        """A text as it is, a picture as the path of its file, or its item's id where it has none."""
        cell = self.cells[row]
        return str(cell) if isinstance(cell, str | Path) else source.ids[self.owner[row]]


@dataclass(frozen=True, eq=False)
class MinedPairs:
    """Query i is row `asked[i]` of `anchors`; `positives[i]` and `mined.negatives[i]` are rows of `candidates`."""

    source: Source
    anchors: Side
    candidates: Side
    asked: Sequence[int]
    positives: Sequence[Sequence[int]]
    mined: Mined
    skipped: list[Skipped]

    def tuples(self, *, triplets: bool = False) -> list[tuple[int, list[int]]]:
        """(query, [positive, negatives…]) for each positive of each query that has all its negatives.

        With `triplets` one for each negative, of whatever there are.
        """
        made = []
        for query, own in enumerate(self.positives):
            found = [row for row in self.mined.negatives[query].tolist() if row >= 0]
            for positive in own:
                if triplets:
                    made += [(query, [positive, row]) for row in found]
                elif len(found) == self.mined.negatives.shape[1]:
                    made.append((query, [positive, *found]))
        return made


def mine(
    data: Source,
    model: Bundle,
    *,
    anchor: str = "image",
    against: str = "text",
    k: int = COUNT,
    guards: Guards = Guards(),  # noqa: B008 — frozen
    same: Sequence[str] = (),
    search: Search | None = None,
    depth: int = DEPTH,
    on_error: OnError = "skip",
    quiet: bool = False,
) -> MinedPairs:
    """For each `anchor` of an item, the `against` of other items that `model` confuses most with its own.

    Where the data name splits, only "train" is mined. `anchor` and `against` may both be "text": then texts of one item
    are each other's positives. `same` names columns ("label" is one) whose equal values mean that two items are no
    negatives of each other. `search`, `depth`: see `hard_negatives`.
    """
    source = data.split("train") if data.splits is not None else data
    skipped: list[Skipped] = []
    for modality in dict.fromkeys((anchor, against)):
        done = embed(model, source, modality, on_error=on_error, quiet=quiet)
        skipped += done.skipped
        source = source.take(done.kept)
    anchors, candidates = (_side(model, source, modality) for modality in (anchor, against))
    rows_of: list[list[int]] = [[] for _ in range(len(source))]
    for row, item in enumerate(candidates.owner.tolist()):
        rows_of[item].append(row)
    own = [
        [other for other in rows_of[item] if anchor != against or other != row]
        for row, item in enumerate(anchors.owner.tolist())
    ]
    asked = [row for row, others in enumerate(own) if others]
    if not asked:
        both = f"two {anchor}s" if anchor == against else f"both {anchor} and {against}"
        raise DataError(f"{data.name} has no item with {both}: there is nothing that one should find.")
    positives = [own[row] for row in asked]
    known = _known(source, anchors, candidates, asked, positives, guards, same)
    with Line("mine", unit="queries", quiet=quiet) as line:
        mined = hard_negatives(
            anchors.matrix[asked],
            candidates.matrix,
            positives,
            k=k,
            guards=guards,
            known=known,
            search=search,
            depth=depth,
            progress=line.update,
        )
    return MinedPairs(source, anchors, candidates, asked, positives, mined, skipped)


def _side(model: Bundle, source: Source, modality: str) -> Side:
    done = embed(model, source, modality, quiet=True)  # in the cache by now
    cells = source.column(modality).cells
    kind = source.column(modality).kind
    owner = np.repeat(done.kept, np.diff(done.offsets))
    flat = [text for item in done.kept for text in cells[item]] if kind == "text" else [cells[i] for i in done.kept]
    return Side(modality, done.matrix, owner, flat)


def _known(
    source: Source,
    anchors: Side,
    candidates: Side,
    asked: Sequence[int],
    positives: Sequence[Sequence[int]],
    guards: Guards,
    columns: Sequence[str],
) -> Known:
    """All that the source tells about its items, as columns of the candidates."""
    owner = candidates.owner.tolist()
    same: dict[str, Sequence[Hashable]] = {"item": owner}
    own: dict[str, Sequence[Hashable]] = {}
    texts = [frozenset(map(normalised, each)) for each in source.texts or ()]
    if candidates.modality == "text":
        same["text"] = [normalised(text) for text in candidates.cells]
    elif texts:
        same["text"] = [texts[item] for item in owner]
    if texts and anchors.modality == "text":  # the words that are asked for, not all that is said of their item
        own["text"] = [
            frozenset(
                (normalised(anchors.cells[row]),)
                if candidates.modality != "text"
                else (normalised(anchors.cells[row]), *(normalised(candidates.cells[other]) for other in others))
            )
            for row, others in zip(asked, positives, strict=True)
        ]
    prints = None
    if source.images is not None:
        keys = source.keys("image")
        same["picture file"] = [keys[item] for item in owner]
        if guards.bits is not None:
            prints = _prints(source)[torch.from_numpy(candidates.owner)]
    for name in columns:
        values = column_of(source, name)
        same[name] = [values[item] for item in owner]
    alike = {}
    if anchors.modality != candidates.modality and len(anchors.owner) == len(source):
        alike[anchors.modality] = anchors.matrix[candidates.owner]
    return Known(same=same, asked=own, alike=alike, prints=prints)


def miner(source: Source, features: Mapping[Modality, Embedded], guards: Guards = Guards()) -> Miner:  # noqa: B008
    """How a method in training mines: the items whose second modality it confuses most with the first of each.

    `features` are what both frozen encoders made of the source's items, one row an item of the first.
    """
    (first, asks), (second, answers) = features.items()
    anchors = Side(first, asks.matrix, np.arange(len(source)), source.column(first).cells)
    kind, cells = source.column(second)
    owner = np.repeat(np.arange(len(source)), np.diff(answers.offsets))
    flat = [text for own in cells for text in own] if kind == "text" else cells
    positives = [range(start, stop) for start, stop in pairwise(answers.offsets.tolist())]
    candidates = Side(second, answers.matrix, owner, flat)
    known = _known(source, anchors, candidates, range(len(source)), positives, guards, ())

    def mine(method: Method) -> Int64[Tensor, "n k"]:
        towers, device = method.towers(), device_of(method)
        with inference(method):
            asked = towers[first](torch.from_numpy(asks.matrix).to(device))
            corpus = towers[second](torch.from_numpy(answers.matrix).to(device))
        alike = {first: asked[torch.from_numpy(owner).to(device)]}
        now = replace(known, alike=alike)
        rows = hard_negatives(asked, corpus, positives, k=MEETING, guards=guards, known=now, depth=DEEP).negatives
        return torch.where(rows < 0, rows, torch.from_numpy(owner).to(rows)[rows])

    return mine


def column_of(source: Source, name: str) -> Sequence[Hashable]:
    """A column of metadata, or "label", one value an item; None where there is none."""
    if name == "label" and source.labels is not None:
        return [None if label < 0 else int(label) for label in source.labels]
    if name not in source.meta:
        raise unknown("column", name, [*source.meta, *(["label"] if source.labels is not None else [])])
    return [None if value in ("", None) else str(value) for value in source.meta[name]]


def normalised(text: str) -> str:
    """A text as a reader takes it: without differences of case, width and spacing, or a full stop at its end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .!")


def _prints(source: Source) -> Float[Tensor, "n 64"]:
    """The perceptual hash of each item's picture; 0, which is like nothing, where it cannot be read."""
    pictures = decoded(source, PRINT_SIDE, channels=3)
    prints = torch.zeros(len(source), 64)
    prints[torch.from_numpy(pictures.kept)] = perceptual_hashes(torch.from_numpy(np.array(pictures.pixels)))
    return prints


# -- Files ------------------------------------------------------------------------------------------------------------


def ids_path(path: Path) -> Path:
    """Where the ids lie: negatives.ids.jsonl beside negatives.jsonl."""
    return path.with_name(f"{path.stem}.ids{path.suffix}")


def write(done: MinedPairs, path: Path, *, triplets: bool = False) -> int:
    """Write columns anchor, positive, negative_1 … (or negative), and their ids beside; the number of rows.

    sentence-transformers takes columns by their order, each as one more text: so the ids are in a file of their own.
    """
    rows = done.tuples(triplets=triplets)
    k = done.mined.negatives.shape[1]
    names = ["anchor", "positive", *(["negative"] if triplets else [f"negative_{i + 1}" for i in range(k)])]
    source, anchors, candidates = done.source, done.anchors, done.candidates
    words, ids = [], []
    for query, others in rows:
        at = done.asked[query]
        words.append([anchors.written(at, source), *(candidates.written(row, source) for row in others)])
        ids.append([source.ids[anchors.owner[at]], *(source.ids[candidates.owner[row]] for row in others)])
    write_rows(path, names, words, ids)
    return len(rows)


def check_name(path: Path) -> None:
    """A UsageError where negatives could not be written to a file of this name."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: mined negatives are written as {', '.join(SUFFIXES)}, by the file's name.")


def write_rows(path: Path, names: list[str], words: list[list[str]], ids: list[list[str]]) -> None:
    """Write a table with these columns, and the ids of its cells beside it."""
    check_name(path)
    _write_table(path, names, words)
    _write_table(ids_path(path), [f"{name}_id" for name in names], ids)


def read_negatives(path: Path, ids: Sequence[str]) -> Int64[Tensor, "n k"]:
    """The items that each item's negatives belong to, hardest first, −1 for none: what `Batches` takes as `beside`.

    `ids` are the items'. Those that the file does not know have none; a file of other data is refused.
    """
    for each in (path, ids_path(path)):
        if not each.is_file() or each.suffix.lower() not in SUFFIXES:
            raise DataError(f"There is no {each}. `twofold mine --out {path}` writes it, and its ids beside it.")
    columns, names = READERS[path.suffix.lower()](path)[0], READERS[path.suffix.lower()](ids_path(path))[0]
    negatives = [name for name in columns if name.startswith("negative")]
    if "anchor_id" not in names or not negatives or len(names["anchor_id"]) != len(columns[negatives[0]]):
        raise DataError(f"{path} and {ids_path(path)} are not what `twofold mine` wrote together. Mine again.")
    place = {name: item for item, name in enumerate(ids)}
    found: list[dict[int, None]] = [{} for _ in ids]
    strangers = 0
    for name in negatives:
        for anchor, other in zip(names["anchor_id"], names[f"{name}_id"], strict=True):
            if str(anchor) in place and str(other) in place:
                found[place[str(anchor)]][place[str(other)]] = None
            else:
                strangers += 1
    most = max(map(len, found), default=0)
    if not most or strangers > len(negatives) * len(names["anchor_id"]) / 2:
        raise DataError(f"{path} was mined from other data: most of its negatives are not among these items.")
    return torch.tensor([[*items, *[-1] * (most - len(items))] for items in found])


def _write_table(path: Path, names: list[str], rows: list[list[str]]) -> None:
    def text(write: Callable[[Any], None]) -> Callable[[Path], None]:
        def into(temporary: Path) -> None:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                write(file)

        return into

    def as_csv(file: Any) -> None:
        csv.writer(file).writerows([names, *rows])

    def as_jsonl(file: Any) -> None:
        file.writelines(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)

    def as_parquet(temporary: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: pa.array([row[at] for row in rows], pa.string()) for at, name in enumerate(names)}
        pq.write_table(pa.table(columns), temporary)

    writers: Mapping[str, Callable[[Path], None]] = {
        ".csv": text(as_csv),
        ".jsonl": text(as_jsonl),
        ".parquet": as_parquet,
    }
    write_atomically(path, writers[path.suffix.lower()])
