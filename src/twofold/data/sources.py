"""What there is to learn from: items with pictures, texts, labels and splits, named but not yet decoded.

A source is opened from a folder of images, a manifest (CSV, JSONL, Parquet), arrays (NPY, NPZ) or by the name of the
shipped sample. However it was stored, it ends up as columns that go through one door, `_assemble`.
"""

import contextlib
import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from twofold import runtime
from twofold.data.tables import READERS, Columns, read_json
from twofold.errors import DataError, UsageError, unknown

Modality = Literal["image", "text"]

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".npy"),
}
ROLES = {
    "image": ("image", "images", "filename", "file", "path"),
    "text": ("text", "texts", "caption", "captions"),
    "label": ("label", "labels"),
    "split": ("split",),
    "id": ("id", "ids"),
}
SPLITS = {
    **{name: name for name in ("train", "val", "test")},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}


@dataclass(frozen=True, eq=False)
class Source:
    """Items of one data set, undecoded; every column is None where nothing is known, or has one entry an item."""

    name: str  # what it was opened from, for messages
    ids: Sequence[str]  # unique
    images: Sequence[Path | bytes | np.ndarray] | None = None
    texts: Sequence[Sequence[str]] | None = None  # several captions an item, or none
    labels: np.ndarray | None = None  # int64 [n], -1 where an item has none
    classes: Sequence[str] = ()  # the names of labels 0, 1, …
    splits: Sequence[str] | None = None
    meta: Mapping[str, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {"images": self.images, "texts": self.texts, "labels": self.labels, "splits": self.splits}
        for name, column in {**columns, **self.meta}.items():
            if column is not None and len(column) != len(self.ids):
                raise DataError(f"{self.name} has {len(self.ids)} ids and {len(column)} {name}; they must agree.")
        if len(set(self.ids)) < len(self.ids):
            raise DataError(
                f"{self.name}: the id {_repeated(self.ids)!r} stands for two items. Ids must be unique, "
                "across splits too."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Iterable[int]) -> "Source":
        """The items at these indices, in this order."""
        at = [int(index) for index in indices]

        def rows(column: Any) -> Any:
            if column is None:
                return None
            return column[at] if isinstance(column, np.ndarray) else [column[index] for index in at]

        columns = {name: rows(getattr(self, name)) for name in ("ids", "images", "texts", "labels", "splits")}
        meta = {name: rows(column) for name, column in self.meta.items()}
        return Source(self.name, classes=self.classes, meta=meta, **columns)

    def split(self, name: str) -> "Source":
        """The items of one split; `val` may also be called `valid`, `validation` or `dev`."""
        if self.splits is None:
            raise DataError(f"{self.name} has no splits, so there is no {name!r}. A manifest names them in `split`.")
        wanted = _split_name(name)
        kept = [index for index, split in enumerate(self.splits) if split == wanted]
        if not kept:
            there = ", ".join(sorted({split for split in self.splits if split})) or "none"
            raise DataError(f"{self.name} has no split {name!r}. Its splits: {there}.")
        return self.take(kept)

    def keys(self, modality: Modality = "image") -> list[str]:
        """What each item's picture (or texts) is, as a hash of its content: equal content, equal key.

        A file is read once; its hash is remembered with its size and time of change.
        """
        if modality not in ("image", "text"):
            raise unknown("modality", modality, ("image", "text"))
        column: Sequence | None = self.images if modality == "image" else self.texts
        if column is None:
            raise DataError(f"{self.name} has no {modality}s.")
        if modality == "text":
            return [content_key("\0".join(texts)) for texts in column]
        files = _file_keys([image for image in column if isinstance(image, Path)])
        return [files[image] if isinstance(image, Path) else content_key(image) for image in column]


def content_key(content: bytes | str | np.ndarray) -> str:
    """The name of a content: 32 hexadecimal digits of its BLAKE2b hash. Arrays of another dtype or shape differ."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if isinstance(content, np.ndarray):
        head = f"{content.dtype.str}{content.shape}".encode()
        return hashlib.blake2b(np.ascontiguousarray(content).tobytes(), digest_size=16, key=head).hexdigest()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def open_source(path: str | Path, *, images: str | Path | None = None) -> Source:
    """The items that a path stands for.

    A folder of images (subfolders are labels; train, val and test at the top are splits), a folder that holds
    train.parquet and test.parquet (or another table), a manifest (.csv .tsv .jsonl .parquet), arrays (.npy .npz), or
    the name of the shipped sample, "openmoji". A manifest's pictures are looked for beside it, then in `images/` beside
    it; `images` says where else.
    """
    if str(path) == "openmoji" and not Path(path).exists():
        from twofold.data.samples import openmoji

        return openmoji()
    path = Path(path)
    if not path.exists():
        raise DataError(f"There is no {path}. A source is a folder, {' '.join(READERS)}, or the name 'openmoji'.")
    if images is not None and not Path(images).is_dir():
        raise DataError(f"There is no folder {images} to look for pictures in.")
    tables = _tables_of(path)
    if not tables:
        if images is not None:
            raise UsageError(f"images={images} goes with a manifest; {path} is a folder of pictures.")
        return _open_folder(path)
    beside = path if path.is_dir() else path.parent
    roots = [Path(images)] if images is not None else [beside, beside / "images"]
    names: tuple[str, ...] = ()
    parts: list[tuple[Columns, str | None, str]] = []  # columns, split, what generated ids start with
    for table in tables:
        columns, classes = READERS[table.suffix.lower()](table)
        names = names or classes
        split = _table_split(table) if path.is_dir() else None
        parts.append((columns, split, f"{table.stem}/" if split else ""))
    if not names and (beside / "classes.json").is_file():
        names = tuple(map(str, read_json(beside / "classes.json")))
    return _assemble(str(path), parts, roots, names)


# -- Folders ----------------------------------------------------------------------------------------------------------


def _tables_of(path: Path) -> list[Path]:
    """The tables to read: the file itself, or those of a folder that are named after splits."""
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if file.suffix.lower() in READERS and _table_split(file)]
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} is none of {' '.join(READERS)}, nor a folder: it cannot be opened as a source.")
    return [path]


def _table_split(path: Path) -> str | None:
    """`train` for train.parquet, and for its part train-00003-of-00008.parquet."""
    return SPLITS.get(re.sub(r"-\d+-of-\d+$", "", path.stem))


def _open_folder(root: Path) -> Source:
    found: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # links may go round in circles
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))
        found += [Path(folder, name) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise DataError(f"{root} holds no pictures ({' '.join(sorted(IMAGE_SUFFIXES))}), nor tables such as train.csv.")
    folders = [path.relative_to(root).parts[:-1] for path in found]
    split = all(parts and parts[0] in SPLITS for parts in folders)
    labels = [parts[split] if len(parts) > split else None for parts in folders]
    columns: Columns = {
        "image": found,
        # A name that is not UTF-8 cannot be printed or stored as it is.
        "id": [path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode() for path in found],
        "label": labels,
    }
    if split:
        columns["split"] = [parts[0] for parts in folders]
    return _assemble(str(root), [(columns, "", "")], [root], ())


# -- One door: columns become items -----------------------------------------------------------------------------------


def _assemble(
    name: str,
    parts: Sequence[tuple[Columns, str | None, str]],
    roots: Sequence[Path],
    classes: tuple[str, ...],
) -> Source:
    """Items out of the rows of one or several tables; rows that share the picture (and id) are one item."""
    columns, row_ids = _concatenate(parts)
    if not row_ids:
        raise DataError(f"{name} has no rows.")
    known = ", ".join(columns)
    lowered = {column.strip().lower(): column for column in columns}
    roles: dict[str, list] = {}
    for role, aliases in ROLES.items():
        named = [lowered[alias] for alias in aliases if alias in lowered]
        if named:
            roles[role] = columns.pop(named[0])
    if not roles.keys() & {"image", "text"}:
        raise DataError(f"{name} has neither pictures nor texts: its columns are {known}; expected `image` or `text`.")
    # Hugging Face data sets store a picture as {"bytes": …, "path": …}.
    cells = [
        cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell for cell in roles.get("image", ())
    ]
    images = _images(name, cells, roots)

    items: dict[Any, int] = {}
    first: list[int] = []  # the first row of each item
    ids: list[str] = []
    texts: list[list[str]] = []
    row_id: Any
    for row, row_id in enumerate(row_ids):
        shared: Any = row_id  # what makes this row and another one item
        if "id" in roles:
            shared = row_id = _id(name, row, roles["id"][row])
        elif cells and isinstance(cells[row], str) and cells[row]:
            shared = row_id = cells[row]
        elif cells and isinstance(cells[row], bytes) and "text" in roles:
            shared = cells[row]
        at = items.setdefault(shared, len(first))
        if at == len(first):
            first.append(row)
            ids.append(row_id)
            texts.append([])
        elif odd := [
            role
            for role, column in {**roles, "image": cells}.items()
            if role in ("image", "label", "split") and column and _differ(column[row], column[first[at]])
        ]:
            raise DataError(
                f"{name}: rows {first[at] + 1} and {row + 1} are both {ids[at]!r} but differ in {' and '.join(odd)}. "
                "Rows that share their picture or id are one item with several texts; where they are not, give each "
                "an id of its own."
            )
        if "text" in roles:
            texts[at] += _texts(roles["text"][row])

    labels, names = _labels(name, [roles["label"][row] for row in first], classes) if "label" in roles else (None, ())
    splits = [_split_name(roles["split"][row]) for row in first] if "split" in roles else []
    return Source(
        name,
        ids,
        images=[images[row] for row in first] if cells else None,
        texts=texts if "text" in roles else None,
        labels=labels,
        classes=names,
        splits=splits if any(splits) else None,
        meta={column: [values[row] for row in first] for column, values in columns.items()},
    )


def _concatenate(parts: Sequence[tuple[Columns, str | None, str]]) -> tuple[dict[str, list], list[str]]:
    """The tables as one, and an id for each row in case that they have none of their own."""
    columns: dict[str, list] = {column: [] for part, _, _ in parts for column in part}
    if any(split for _, split, _ in parts):
        columns.setdefault("split", [])
    row_ids: list[str] = []
    for part, split, prefix in parts:
        rows = len(next(iter(part.values()), ()))
        for column, values in columns.items():
            values += part.get(column, [split if column == "split" else None] * rows)
        row_ids += [f"{prefix}{row}" for row in range(rows)]
    return columns, row_ids


def _images(name: str, cells: Sequence, roots: Sequence[Path]) -> list[Path | bytes | np.ndarray]:
    """Paths found among `roots`, bytes and arrays as they are; what is missing is empty, for `decode` to name."""
    located: dict[str, Path] = {}
    found = False
    for written in dict.fromkeys(cell for cell in cells if isinstance(cell, str) and cell):
        places = [root / written for root in roots]
        there = next((place for place in places if place.exists()), None)
        located[written] = there or places[0]
        found = found or there is not None
    if located and not found:
        raise DataError(
            f"{name}: none of its {len(located):,} pictures exist, for instance {next(iter(located.values()))}. "
            f"Looked in {' and '.join(map(str, roots))}; say where they are with images=FOLDER."
        )
    images: list[Path | bytes | np.ndarray] = []
    for row, cell in enumerate(cells):
        if isinstance(cell, str):
            images.append(located.get(cell, b""))
        elif cell is None or isinstance(cell, Path | bytes | np.ndarray):
            images.append(b"" if cell is None else cell)
        else:
            raise DataError(f"{name} row {row + 1}: a picture is a path or bytes, not {type(cell).__name__}.")
    return images


def _differ(a: Any, b: Any) -> bool:
    return not np.array_equal(a, b) if isinstance(a, np.ndarray) else a != b


def _texts(cell: Any) -> list[str]:
    cells = cell if isinstance(cell, list | tuple) else [cell]
    return [str(text) for text in cells if text not in (None, "")]


def _id(name: str, row: int, cell: Any) -> str:
    if cell in (None, ""):
        raise DataError(f"{name} row {row + 1} has no id; a table with a column `id` needs one in each row.")
    return str(cell)


def _labels(name: str, cells: Sequence, classes: tuple[str, ...]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Whole numbers stay what they are, anything else is numbered in alphabetical order."""
    values = [_whole(cell) for cell in cells]
    present: set[Any] = {value for value in values if value is not None and value != -1}
    if not present:
        return None, ()
    words = {str(value) for value in present}
    if words <= set(classes):
        numbers = {word: number for number, word in enumerate(classes)}
    elif all(isinstance(value, int) and 0 <= value < (len(classes) or 1 << 16) for value in present):
        classes = classes or tuple(map(str, range(max(present) + 1)))
        numbers = {str(number): number for number in range(len(classes))}
    elif classes:
        odd = min(words - set(classes) - set(map(str, range(len(classes)))))
        raise DataError(
            f"{name} has the label {odd!r}, which is none of its {len(classes)} classes: {', '.join(classes)}."
        )
    else:
        whole = sorted(value for value in present if isinstance(value, int))
        classes = (*map(str, whole), *sorted(value for value in present if isinstance(value, str)))
        numbers = {word: number for number, word in enumerate(classes)}
    return np.array([-1 if value is None else numbers.get(str(value), -1) for value in values], np.int64), classes


def _whole(cell: Any) -> int | str | None:
    """A label as a whole number where it is one (3, "3", 3.0), else as text; None where there is none."""
    if cell is None or cell == "" or cell != cell:  # NaN is not itself
        return None
    if isinstance(cell, int) and not isinstance(cell, bool):
        return cell
    with contextlib.suppress(ValueError):
        if not isinstance(cell, bool) and float(cell).is_integer() and abs(float(cell)) < 2**53:
            return int(float(cell))
    return str(cell)


def _split_name(name: Any) -> str:
    name = "" if name is None else str(name).strip()
    return SPLITS.get(name.lower(), name)


def _repeated(values: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(value for value in values if value in seen or seen.add(value))  # type: ignore[func-returns-value]


# -- Content keys of files --------------------------------------------------------------------------------------------


def _file_keys(paths: Iterable[Path]) -> dict[Path, str]:
    """The content key of each file, read only if it changed since it was last asked for."""
    keys: dict[Path, str] = {}
    states: dict[Path, tuple[bytes, int, int]] = {}
    for path in dict.fromkeys(paths):
        try:
            stat = path.stat()
            states[path] = (os.fsencode(os.path.abspath(path)), stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            keys[path] = _unreadable(path, error)
    known = _recall(states)
    fresh = []
    for path, state in states.items():
        if path in known:
            keys[path] = known[path]
            continue
        try:
            with path.open("rb") as file:
                keys[path] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            keys[path] = _unreadable(path, error)
            continue
        # A file that changed a moment ago may change again within the resolution of its clock.
        if time.time_ns() - state[2] > 2e9:
            fresh.append((*state, keys[path]))
    _remember(fresh)
    return keys


def _unreadable(path: Path, error: OSError) -> str:
    """A key for what `decode` will name: it changes as soon as the file can be read."""
    return content_key(f"{type(error).__name__} {os.fsencode(path)!r}")


def _recall(states: Mapping[Path, tuple[bytes, int, int]]) -> dict[Path, str]:
    known: dict[Path, str] = {}
    with contextlib.suppress(sqlite3.Error, OSError), contextlib.closing(_memo()) as memo:
        for path, state in states.items():
            row = memo.execute("SELECT key FROM files WHERE path=? AND size=? AND changed=?", state).fetchone()
            if row:
                known[path] = row[0]
    return known


def _remember(rows: Sequence[tuple[bytes, int, int, str]]) -> None:
    # Only a memory: where it cannot be kept (read-only, locked, damaged), files are read again.
    with (
        contextlib.suppress(sqlite3.Error, OSError),
        contextlib.closing(_memo()) as memo,
        memo,
    ):
        memo.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)


def _memo() -> sqlite3.Connection:
    folder = runtime.cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    memo = sqlite3.connect(folder / "files.sqlite", timeout=60)
    memo.execute("CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INT, changed INT, key TEXT)")
    return memo
