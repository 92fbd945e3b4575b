"""Tables on disk as columns: CSV, JSONL and Parquet manifests, NPY and NPZ arrays.

What the columns mean is decided in `sources`.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twofold.errors import DataError

Columns = dict[str, Sequence]


def _read_csv(path: Path) -> tuple[Columns, tuple[str, ...]]:
    """Comma, semicolon or tab, whichever the header has most of; UTF-8, with or without a byte order mark."""
    text = read_text(path)
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    rows = []
    try:
        for row in reader:
            if row:  # a blank line has no fields
                rows.append(row)
            if row and len(row) != len(rows[0]):
                raise DataError(
                    f"{path} line {reader.line_num} has {len(row)} fields, its header has {len(rows[0])}. "
                    "A text that contains the separator must stand in double quotes."
                )
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is not CSV: {error}.") from error
    if not rows:
        raise DataError(f"{path} is empty; expected a header and one row an item.")
    names = [name.strip() for name in rows[0]]
    if len(set(names)) < len(names):
        raise DataError(f"{path} names a column twice in its header: {', '.join(names)}.")
    return {name: [row[at] for row in rows[1:]] for at, name in enumerate(names)}, ()


def _read_jsonl(path: Path) -> tuple[Columns, tuple[str, ...]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is not a JSON object with one entry a column.")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, ()


def _read_parquet(path: Path) -> tuple[Columns, tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        classes = json.loads((table.schema.metadata or {}).get(b"classes", b"[]"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return {name: table[name].to_pylist() for name in table.column_names}, tuple(map(str, classes))


def _read_npy(path: Path) -> tuple[Columns, tuple[str, ...]]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as NPY: {error}") from error
    if array.ndim == 2:
        return {"vector": list(_vectors(path, "array", array))}, ()
    return {"image": list(_pictures(path, "array", array))}, ()


def _read_npz(path: Path) -> tuple[Columns, tuple[str, ...]]:
    """Keys `images`, `labels`, …; also `train_images`, `train_labels`, …, and a single array under any name.

    Without pictures, each two-dimensional array is a column of vectors, under its own name.
    """
    try:
        with path.open("rb") as file:
            arrays = dict(np.load(file, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:  # TypeError: one bare array
        raise DataError(f"{path} cannot be read as NPZ: {error}") from error
    if any(array.ndim == 2 for array in arrays.values()) and not any("image" in name for name in arrays):
        return _vector_table(path, arrays), ()
    if len(arrays) == 1:
        arrays = {"images": next(iter(arrays.values()))}
    prefixes = [name[: -len("images")] for name in arrays if re.fullmatch(r"(\w+_)?images", name)]
    if not prefixes and "image" in arrays:
        arrays["images"] = arrays.pop("image")
        prefixes = [""]
    if not prefixes:
        raise DataError(f"{path} holds {', '.join(arrays)}; expected `images`, and `labels` if there are any.")
    columns: dict[str, list] = {}
    total = 0
    for prefix in prefixes:
        mine = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
        count = len(mine["images"])
        for name, array in mine.items():
            if name == "images":
                cells = list(_pictures(path, prefix + name, array))
            elif array.shape in ((count,), (count, 1)):
                cells = array.reshape(-1).tolist()
            else:
                raise DataError(
                    f"{path}: {prefix + name} has shape {array.shape}; expected one value for each of the "
                    f"{count} images."
                )
            columns.setdefault(name, [None] * total).extend(cells)
        if prefix:
            columns.setdefault("split", []).extend([prefix.rstrip("_")] * count)
        total += count
        for cells in columns.values():  # what this part lacks and an earlier one had
            cells.extend([None] * (total - len(cells)))
    return {**columns}, ()


def _vector_table(path: Path, arrays: dict[str, np.ndarray]) -> Columns:
    """Arrays of one length: vectors where they have two dimensions, one value an item where they have one."""
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{path}: its arrays have different lengths ({lengths}); expected one row an item in each.")
    return {
        name: list(_vectors(path, name, array)) if array.ndim > 1 else array.tolist() for name, array in arrays.items()
    }


READERS: dict[str, Callable[[Path], tuple[Columns, tuple[str, ...]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".npy": _read_npy,
    ".npz": _read_npz,
}


def read_text(path: Path) -> str:
    data = path.read_bytes()
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # what spreadsheets call "Unicode text"
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}). Save it as UTF-8, for instance with "
            f"`iconv -f WINDOWS-1252 -t UTF-8 {path.name}`."
        ) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error


def _vectors(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.shape[1]:
        raise DataError(f"{path}: {name} is {array.dtype} of shape {array.shape}; vectors are numbers [n, dim].")
    return np.asarray(array)


def _pictures(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[1] < array.shape[3]):
        raise DataError(
            f"{path}: {name} has shape {array.shape}; pictures are [n, height, width] or [n, height, width, channels]."
        )
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise DataError(f"{path}: {name} is {array.dtype}; pictures are uint8, uint16 or float.")
    return np.asarray(array)  # a plain array over the same memory map: its rows are cheaper to make
