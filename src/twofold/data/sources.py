"""What there is to learn from: items with pictures, texts, sounds, vectors, labels and splits, not yet decoded.

A source is opened from a folder of images, videos or sounds, a manifest (CSV, JSONL, Parquet), arrays (NPY, NPZ) or by
the name of a sample. However it was stored, it ends up as columns that go through one door, `_assemble`.
"""

import contextlib
import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from twofold import runtime
from twofold.data.tables import READERS, Columns, read_json, read_text
from twofold.data.video import Clip, Sheet, files_of, frame_names, shows
from twofold.errors import DataError, UsageError, unknown

Kind = Literal["image", "text", "audio", "video", "vector"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Modality = str  # the name of a column: "image", "text", "speech", …; its kind says what can be done with it

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".npy"),
}
AUDIO_SUFFIXES = {
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".aif", ".aiff", ".webm"),
}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv", ".3gp"}
MAY_MOVE = {".webm", ".gif"}  # a sound or a video, a picture or a video
FILES = ("filename", "file", "path")  # columns of pictures, of sounds or of videos, as their names end
FILED: tuple[Kind, ...] = ("image", "audio", "video")  # what is a file, or the content of one
ALIASES: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "images", *FILES),
    "text": ("text", "texts", "caption", "captions", "transcript", "transcripts", "transcription"),
    "audio": ("audio", "sound", "speech", "recording", *FILES),
    "video": ("video", "videos", "clip", "clips", *FILES),
    "vector": ("vector", "vectors", "embedding", "embeddings"),
}
ROLES = {"label": ("label", "labels"), "split": ("split",), "id": ("id", "ids")}
PYTHON = "python:"  # a folder whose functions and docstrings are meant
SPLITS = {
    **{name: name for name in ("train", "val", "test")},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}


class Column(NamedTuple):
    """One modality of a source: what kind of thing it is, and one cell an item.

    A picture or sound is a file, its bytes or an array, a video may also be a folder or a sheet of frames, a vector an
    array or a `.npy` file, and missing ones are empty; a text cell is a sequence of texts.
    """

    kind: Kind
    cells: Sequence


@dataclass(frozen=True, eq=False)
class Source:
    """Items of one data set, undecoded; every column is None where nothing is known, or has one entry an item.

    A modality is a column by its name: "image" and "text" are `images` and `texts`, all others are in `columns`.
    """

    name: str  # what it was opened from, for messages
    ids: Sequence[str]  # unique
    images: Sequence[Path | bytes | np.ndarray] | None = None
    texts: Sequence[Sequence[str]] | None = None  # several captions an item, or none
    labels: np.ndarray | None = None  # int64 [n], -1 where an item has none
    classes: Sequence[str] = ()  # the names of labels 0, 1, …
    splits: Sequence[str] | None = None
    columns: Mapping[Modality, Column] = field(default_factory=dict)  # modalities that are neither image nor text
    meta: Mapping[str, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {"images": self.images, "texts": self.texts, "labels": self.labels, "splits": self.splits}
        others = {name: column.cells for name, column in self.columns.items()}
        if taken := others.keys() & {"image", "text"}:
            raise UsageError(f"{self.name}: the column {min(taken)!r} is given as images= or texts=, not in columns=.")
        for name, column in {**columns, **others, **self.meta}.items():
            if column is not None and len(column) != len(self.ids):
                raise DataError(f"{self.name} has {len(self.ids)} ids and {len(column)} {name}; they must agree.")
        if len(set(self.ids)) < len(self.ids):
            raise DataError(
                f"{self.name}: the id {_repeated(self.ids)!r} stands for two items. Ids must be unique, "
                "across splits too."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def modalities(self) -> dict[Modality, Kind]:
        """The columns that an encoder can read, and the kind of each."""
        own: dict[Modality, Kind] = {"image": "image"} if self.images is not None else {}
        if self.texts is not None:
            own["text"] = "text"
        return own | {name: column.kind for name, column in self.columns.items()}

    def column(self, modality: Modality) -> Column:
        """The column of a modality; a DataError that says which there are."""
        if modality in self.columns:
            return self.columns[modality]
        if modality == "image" and self.images is not None:
            return Column("image", self.images)
        if modality == "text" and self.texts is not None:
            return Column("text", self.texts)
        what = f"{modality}s" if modality in ("image", "text") else f"modality {modality!r}"
        there = ", ".join(f"{name} ({kind})" for name, kind in self.modalities.items()) or "none"
        raise DataError(
            f"{self.name} has no {what}: its modalities are {there}. A manifest's column becomes one with "
            f"columns={{{modality!r}: KIND}}, a kind of {', '.join(KINDS)}."
        )

    def only(self, kind: Kind) -> Modality:
        """The modality of a kind: the one that is called like it, else the only one; a DataError where neither is."""
        fit = [name for name, own in self.modalities.items() if own == kind]
        if kind in fit or len(fit) == 1:
            return kind if kind in fit else fit[0]
        if fit:
            raise DataError(f"{self.name} has {len(fit)} modalities of {kind}: {', '.join(fit)}. Keep one of them.")
        self.column(kind)  # says what there is instead
        raise AssertionError

    def take(self, indices: Iterable[int]) -> "Source":
        """The items at these indices, in this order."""
        at = [int(index) for index in indices]

        def rows(column: Any) -> Any:
            if column is None:
                return None
            return column[at] if isinstance(column, np.ndarray) else [column[index] for index in at]

        columns = {name: rows(getattr(self, name)) for name in ("ids", "images", "texts", "labels", "splits")}
        others = {name: Column(column.kind, rows(column.cells)) for name, column in self.columns.items()}
        meta = {name: rows(column) for name, column in self.meta.items()}
        return Source(self.name, classes=self.classes, columns=others, meta=meta, **columns)

    def sample(self, count: int | None) -> "Source":
        """At most `count` items in their order, drawn at random but always the same: what is first is often one class.

        A smaller sample is part of a larger one. None is all of them.
        """
        if count is None or count >= len(self):
            return self
        return self.take(sorted(torch.randperm(len(self), generator=runtime.generator("sample"))[:count].tolist()))

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
        """What each item's picture, sound, video, vector or texts are, as a hash: equal content, equal key.

        A file is read once; its hash is remembered with its size and time of change.
        """
        kind, cells = self.column(modality)
        if kind == "text":
            return [content_key("\0".join(texts)) for texts in cells]
        if kind == "video":
            return _clip_keys(cells)
        files = _file_keys([cell for cell in cells if isinstance(cell, Path)])
        return [files[cell] if isinstance(cell, Path) else content_key(cell) for cell in cells]


def content_key(content: bytes | str | np.ndarray) -> str:
    """The name of a content: 32 hexadecimal digits of its BLAKE2b hash. Arrays of another dtype or shape differ."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if isinstance(content, np.ndarray):
        head = f"{content.dtype.str}{content.shape}".encode()
        return hashlib.blake2b(np.ascontiguousarray(content).tobytes(), digest_size=16, key=head).hexdigest()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def open_source(
    path: str | Path,
    *,
    images: str | Path | None = None,
    columns: Mapping[Modality, Kind | str | Path] | None = None,
    kinds: Sequence[Kind] = (),
) -> Source:
    """The items that a path stands for.

    A folder of images, or else of videos, or else of sounds (subfolders are labels; train, val and test at the top are
    splits), a folder that holds train.parquet and test.parquet (or another table), a manifest (.csv .tsv .jsonl
    .parquet), arrays (.npy .npz), "python:FOLDER" for functions and their docstrings (`code.open_functions`), or the
    name of a sample: "openmoji" is shipped, "motion" drawn when asked for. A manifest's files are looked for beside it,
    then in `images/` beside it; `images` says where else.

    `columns` says which further columns of a manifest are modalities: each by its name, with its kind ("image", "text",
    "audio", "video", "vector"), or with a `.npy` file that has one vector for each row. A video that is a sheet of
    frames says in how many rows and columns: "video:4x4". Of a folder, {"video": "video"} says that GIFs and folders of
    frames are videos, {"video": "video:4x4"} that its pictures are sheets.

    A folder is of one kind of files. Where several `kinds` are named, it is of all of them: each file is an item, with
    one modality and the others blank. Of a .txt file the paragraphs are the texts.
    """
    if str(path) in ("openmoji", "motion") and not Path(path).exists():
        from twofold.data import samples

        return samples.openmoji() if str(path) == "openmoji" else samples.motion()
    if str(path).startswith(PYTHON):
        from twofold.data.code import open_functions

        return open_functions(str(path).removeprefix(PYTHON))
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"There is no {path}. A source is a folder, {' '.join(READERS)}, python:FOLDER, 'openmoji' or 'motion'."
        )
    if images is not None and not Path(images).is_dir():
        raise DataError(f"There is no folder {images} to look for pictures in.")
    told: dict[Modality, Kind] = {}
    grids: dict[Modality, tuple[int, int]] = {}
    for modality, said in (columns or {}).items():
        told[modality], grid = _kind(str(said))
        if grid:
            grids[modality] = grid
    tables = _tables_of(path)
    if not tables:
        if images is not None or (columns and (len(kinds) > 1 or [*told.values()] != ["video"])):
            given = f"images={images}" if images is not None else f"columns={', '.join(columns or ())}"
            raise UsageError(f"{given} goes with a manifest; {path} is a folder of files.")
        if len(kinds) > 1:
            return _open_folder_of(path, kinds)
        return _divided(_open_folder(path, next(iter(told), None), sheets=bool(grids)), grids)
    beside = path if path.is_dir() else path.parent
    roots = [Path(images)] if images is not None else [beside, beside / "images"]
    names: tuple[str, ...] = ()
    parts: list[tuple[Columns, str | None, str]] = []  # columns, split, what generated ids start with
    for table in tables:
        read, classes = READERS[table.suffix.lower()](table)
        names = names or classes
        split = _table_split(table) if path.is_dir() else None
        parts.append((read, split, f"{table.stem}/" if split else ""))
    if not names and (beside / "classes.json").is_file():
        names = tuple(map(str, read_json(beside / "classes.json")))
    for modality, said in (columns or {}).items():
        if str(said).endswith(".npy"):
            if len(parts) > 1:
                raise UsageError(f"{said} cannot be laid beside {len(parts)} tables; give the vectors as a column.")
            parts[0] = ({**parts[0][0], modality: _rows_of(Path(said), parts[0][0])}, *parts[0][1:])
    return _divided(_assemble(str(path), parts, roots, names, told), grids)


def _kind(said: str) -> tuple[Kind, tuple[int, int] | None]:
    """The kind that a column is said to be of, and how a sheet of frames is divided: "video:4x4"."""
    if said.endswith(".npy"):
        return "vector", None
    sheet = re.fullmatch(r"video:([1-9]\d*)x([1-9]\d*)", said)
    if sheet:
        return "video", (int(sheet[1]), int(sheet[2]))
    if said not in KINDS:
        raise unknown("kind of column", said, KINDS)
    return said, None  # type: ignore[return-value]  # it is one of KINDS


def _divided(source: Source, grids: Mapping[Modality, tuple[int, int]]) -> Source:
    """The source with its sheets of frames as such."""
    columns = dict(source.columns)
    for modality, grid in grids.items():
        cells = columns[modality].cells
        sheets = [Sheet(cell, *grid) if isinstance(cell, Path) or cell else cell for cell in cells]
        columns[modality] = Column("video", sheets)
    return replace(source, columns=columns) if grids else source


def _rows_of(path: Path, table: Columns) -> list[np.ndarray]:
    """The vectors of a `.npy` file, one for each row of the table."""
    if not path.is_file():
        raise DataError(f"There is no file {path} of vectors.")
    (vectors,) = READERS[".npy"](path)[0].values()
    rows = len(next(iter(table.values()), ()))
    if len(vectors) != rows:
        raise DataError(f"{path} has {len(vectors)} rows and the table {rows}; the vectors must be one a row.")
    return list(vectors)


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


def _files_below(root: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder in their order, and the folders that hold frames; what is hidden is passed over."""
    files: list[Path] = []
    frames: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # links may go round in circles
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        files += here
        if frame_names(here) and Path(folder) != root:
            frames.append(Path(folder))
    return files, frames


def _open_folder(root: Path, modality: Modality | None = None, *, sheets: bool = False) -> Source:
    """The files below a folder; what is in it is said to be videos where `modality` names them."""
    files, frames = _files_below(root)
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if modality is not None:
        moving = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES | MAY_MOVE]
        named, found = modality, pictures if sheets else sorted(moving + frames)
    elif pictures:
        named, found = "image", pictures
    else:
        suffixes = {file: file.suffix.lower() for file in files}
        moving = [file for file, suffix in suffixes.items() if suffix in VIDEO_SUFFIXES]
        moving += [file for file, suffix in suffixes.items() if suffix in MAY_MOVE and shows(file)]
        named, found = "video", sorted(moving)
        if not found:
            named, found = "audio", [file for file, suffix in suffixes.items() if suffix in AUDIO_SUFFIXES]
    if not found:
        raise DataError(
            f"{root} holds no pictures ({' '.join(sorted(IMAGE_SUFFIXES))}), videos "
            f"({' '.join(sorted(VIDEO_SUFFIXES | MAY_MOVE))}), sounds ({' '.join(sorted(AUDIO_SUFFIXES))}), nor tables "
            "such as train.csv."
        )
    kinds: dict[Modality, Kind] = {modality: "video"} if modality is not None else {}
    return _assemble(str(root), [({named: found} | _places(root, found), "", "")], [root], (), kinds)


def _open_folder_of(root: Path, kinds: Sequence[Kind]) -> Source:
    """The files of several kinds below a folder, each an item that has one of them."""
    if unfit := [kind for kind in kinds if kind not in (*FILED, "text")]:
        raise UsageError(f"No file of a folder is a {unfit[0]}; it may hold {', '.join((*FILED, 'text'))}.")
    found: list[Path] = []
    columns: dict[Modality, list] = {kind: [] for kind in kinds}
    for file in _files_below(root)[0]:
        own = _kind_of_file(file)
        if own in columns:
            found.append(file)
            for kind, cells in columns.items():
                cells.append("" if kind != own else _paragraphs(file) if kind == "text" else file)
    if not found:
        raise DataError(f"{root} holds no files of the kinds {', '.join(kinds)}.")
    table: Columns = {kind: cells for kind, cells in columns.items() if any(cells)}
    held: dict[Modality, Kind] = {kind: kind for kind in kinds if kind in table}
    return _assemble(str(root), [(table | _places(root, found), "", "")], [root], (), held)


def _kind_of_file(file: Path) -> Kind | None:
    """What a file is by its name; of .webm the content tells."""
    suffix = file.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix == ".txt":
        return "text"
    if suffix in VIDEO_SUFFIXES or (suffix in MAY_MOVE and shows(file)):
        return "video"
    return "audio" if suffix in AUDIO_SUFFIXES else None


def _paragraphs(file: Path) -> list[str]:
    """What blank lines divide, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", read_text(file)) if part.strip()]


def _places(root: Path, found: Sequence[Path]) -> dict[str, Sequence]:
    """What the places of files say: their ids, labels, and splits."""
    folders = [path.relative_to(root).parts[:-1] for path in found]
    split = all(parts and parts[0] in SPLITS for parts in folders)
    labels = [parts[split] if len(parts) > split else None for parts in folders]
    columns: dict[str, Sequence] = {
        # A name that is not UTF-8 cannot be printed or stored as it is.
        "id": [path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode() for path in found],
        "label": labels,
    }
    if split:
        columns["split"] = [parts[0] for parts in folders]
    return columns


# -- One door: columns become items -----------------------------------------------------------------------------------


def _assemble(
    name: str,
    parts: Sequence[tuple[Columns, str | None, str]],
    roots: Sequence[Path],
    classes: tuple[str, ...],
    kinds: Mapping[Modality, Kind],
) -> Source:
    """Items out of the rows of one or several tables; rows that share the picture or sound (and id) are one item."""
    columns, row_ids = _concatenate(parts)
    if not row_ids:
        raise DataError(f"{name} has no rows.")
    known = ", ".join(columns)
    read = _modalities(name, columns, kinds)
    if not read:
        raise DataError(
            f"{name} has neither pictures nor texts: its columns are {known}; expected `image` or `text`, or "
            f"columns={{NAME: KIND}} to say which are modalities."
        )
    roles = {role: columns.pop(named) for role, aliases in ROLES.items() if (named := _named(columns, aliases))}
    cells = {modality: _cells(name, *column, roots) for modality, column in read.items()}
    filed = [read[modality].cells for modality in cells if read[modality].kind in FILED]
    files = [next((cell for cell in own if _is_named(cell)), None) for own in zip(*filed, strict=True)]
    captioned = any(column.kind == "text" for column in read.values())
    single: dict[str, Sequence] = {
        **{modality: column.cells for modality, column in read.items() if column.kind != "text"},
        **{role: roles[role] for role in ("label", "split") if role in roles},
    }

    items: dict[Any, int] = {}
    rows: list[list[int]] = []  # those of each item
    ids: list[str] = []
    row_id: Any
    for row, row_id in enumerate(row_ids):
        shared: Any = row_id  # what makes this row and another one item
        if "id" in roles:
            shared = row_id = _id(name, row, roles["id"][row])
        elif files and isinstance(files[row], str) and files[row]:
            shared = row_id = files[row]
        elif files and isinstance(files[row], bytes) and captioned:
            shared = files[row]
        at = items.setdefault(shared, len(rows))
        if at == len(rows):
            rows.append([])
            ids.append(row_id)
        elif odd := [what for what, column in single.items() if _differ(column[row], column[rows[at][0]])]:
            raise DataError(
                f"{name}: rows {rows[at][0] + 1} and {row + 1} are both {ids[at]!r} but differ in {' and '.join(odd)}. "
                "Rows that share their picture or id are one item with several texts; where they are not, give each "
                "an id of its own."
            )
        rows[at].append(row)

    first = [own[0] for own in rows]
    made: dict[Modality, Any] = {
        modality: _gathered(cells[modality], rows, once=modality != "text")
        if column.kind == "text"
        else [cells[modality][row] for row in first]
        for modality, column in read.items()
    }
    labels, names = _labels(name, [roles["label"][row] for row in first], classes) if "label" in roles else (None, ())
    splits = [_split_name(roles["split"][row]) for row in first] if "split" in roles else []
    return Source(
        name,
        ids,
        images=made.get("image"),
        texts=made.get("text"),
        labels=labels,
        classes=names,
        splits=splits if any(splits) else None,
        columns={
            modality: Column(column.kind, made[modality])
            for modality, column in read.items()
            if modality not in ("image", "text")
        },
        meta={column: [values[row] for row in first] for column, values in columns.items()},
    )


def _is_named(cell: Any) -> bool:
    return isinstance(cell, str | bytes | Path) and bool(cell)


def _gathered(texts: Sequence[Sequence[str]], rows: Sequence[Sequence[int]], *, once: bool) -> list[list[str]]:
    """The texts of each item's rows; `once` where a column only repeats, row by row, what belongs to the item."""
    gathered = [[text for row in own for text in texts[row]] for own in rows]
    return [[*dict.fromkeys(own)] for own in gathered] if once else gathered


def _named(columns: Mapping[str, Any], aliases: Iterable[str]) -> str | None:
    """The column that has one of these names, whatever its case; of several, that of the first name."""
    lowered = {column.strip().lower(): column for column in columns}
    return next((lowered[alias] for alias in aliases if alias in lowered), None)


def _modalities(name: str, columns: dict[str, list], kinds: Mapping[Modality, Kind]) -> dict[Modality, Column]:
    """The columns that are modalities, taken out of `columns`: those said to be, then those that are named like one."""
    for modality in kinds:
        if modality not in columns:
            raise unknown(f"column of {name} called", modality, columns)
        if modality in KINDS[:2] and kinds[modality] != modality:
            raise UsageError(f"{name}: a column {modality!r} is taken for {modality}s, not for {kinds[modality]}s.")
    read = {modality: Column(kind, columns.pop(modality)) for modality, kind in kinds.items()}
    for kind in KINDS:
        named = _named(columns, ALIASES[kind]) if kind not in read else None
        if named and _looks_like(kind, named.strip().lower(), columns[named]):
            read[kind] = Column(kind, columns.pop(named))
    # Hugging Face data sets store a picture or sound as {"bytes": …, "path": …}.
    return {
        modality: Column(kind, [_content(cell) for cell in cells] if kind in FILED else cells)
        for modality, (kind, cells) in read.items()
    }


def _content(cell: Any) -> Any:
    return cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell


def _looks_like(kind: Kind, named: str, cells: Sequence) -> bool:
    """Whether a column with a modality's name holds such things: `path` may lead to pictures, sounds or videos."""
    written = next((cell for cell in map(_content, cells) if isinstance(cell, str | Path) and str(cell)), None)
    suffix = Path(written).suffix.lower() if written is not None else ""
    heard, moving = suffix in AUDIO_SUFFIXES, suffix in VIDEO_SUFFIXES
    stored = named not in FILES and any(isinstance(_content(cell), bytes) for cell in cells)
    if kind == "audio":
        return heard or stored
    if kind == "video":
        return moving or stored or (named not in FILES and suffix in MAY_MOVE)
    if kind == "vector":
        return any(isinstance(cell, list | np.ndarray) for cell in cells)
    return not (kind == "image" and named in FILES and (heard or moving))


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


def _cells(name: str, kind: Kind, cells: Sequence, roots: Sequence[Path]) -> list:
    if kind == "text":
        return [_texts(cell) for cell in cells]
    if kind == "vector":
        cells = [np.asarray(cell, np.float32) if isinstance(cell, list) else cell for cell in cells]
    return _located(name, kind, cells, roots)


def _located(name: str, kind: Kind, cells: Sequence, roots: Sequence[Path]) -> list[Path | bytes | np.ndarray]:
    """Paths found among `roots`, bytes and arrays as they are; what is missing is empty, for decoding to name."""
    noun = {"image": "picture", "audio": "sound", "video": "video", "vector": "vector"}[kind]
    located: dict[str, Path] = {}
    found = False
    for written in dict.fromkeys(cell for cell in cells if isinstance(cell, str) and cell):
        places = [root / written for root in roots]
        there = next((place for place in places if place.exists()), None)
        located[written] = there or places[0]
        found = found or there is not None
    if located and not found:
        raise DataError(
            f"{name}: none of its {len(located):,} {noun}s exist, for instance {next(iter(located.values()))}. "
            f"Looked in {' and '.join(map(str, roots))}; say where they are with images=FOLDER."
        )
    contents: list[Path | bytes | np.ndarray] = []
    for row, cell in enumerate(cells):
        if isinstance(cell, str):
            contents.append(located.get(cell, b""))
        elif cell is None or isinstance(cell, Path | bytes | np.ndarray):
            contents.append(b"" if cell is None else cell)
        else:
            raise DataError(f"{name} row {row + 1}: a {noun} is a path or bytes, not {type(cell).__name__}.")
    return contents


def _differ(a: Any, b: Any) -> bool:
    return not np.array_equal(a, b) if isinstance(a, np.ndarray) else a != b


def _texts(cell: Any) -> list[str]:
    cells = cell if isinstance(cell, list | tuple) else [cell]
    return [str(text) for text in cells if text is not None and str(text).strip()]


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


def _clip_keys(clips: Sequence[Clip]) -> list[str]:
    """The content key of each video: of a folder, that of its frames in their order."""
    made = [files_of(clip) for clip in clips]
    files = _file_keys([file for own in made for file in own])
    keys = []
    for clip, own in zip(clips, made, strict=True):
        stored = clip.picture if isinstance(clip, Sheet) else clip
        key = content_key("\n".join(files[file] for file in own) if isinstance(stored, Path) else stored)
        keys.append(content_key(f"{key} {clip.rows}x{clip.across}") if isinstance(clip, Sheet) else key)
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
