"""Vectors on disk, found by the content they were made from.

They are the truth of every index, and what lets an embedding that was interrupted go on.
"""

import contextlib
import hashlib
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from twofold.data.atomic import write_atomically
from twofold.errors import StoreError, UsageError

BLOCK = 8192  # vectors looked at together


class ByContent(Protocol):
    """Vectors by content key, of one encoder (`Vectors`) or of several (`Joined`)."""

    damaged: list[str]

    def __len__(self) -> int: ...

    def __contains__(self, key: str) -> bool: ...

    def missing(self, keys: Sequence[str]) -> list[int]: ...

    def get(self, keys: Sequence[str]) -> np.ndarray: ...

    def broken(self, keys: Sequence[str]) -> list[str]: ...

    def drop(self, keys: Sequence[str]) -> None: ...


class Vectors:
    """The vectors that one encoder (`fingerprint`) has made so far, one for each content key.

    They lie in `root/fingerprint/` as Arrow files, each of which holds keys with their vectors and is named after the
    hash of its bytes. A file is complete or absent, is never changed, and processes may append at the same time. Which
    key lies where is read from the files themselves; there is no second ledger that could disagree.

    A file that is damaged is moved aside with a warning, so that its vectors are made again; with `aside=False` it is
    left where it is, and only named in `damaged`.
    """

    def __init__(self, root: Path, fingerprint: str, dim: int, *, aside: bool = True):
        if not re.fullmatch(r"[\w.-]+", fingerprint) or fingerprint.startswith("."):
            raise UsageError(f"{fingerprint!r} is no fingerprint: letters, digits, '-', '_' and '.' name its folder.")
        self.folder = Path(root) / fingerprint
        self.dim = dim
        self.damaged: list[str] = []  # names of files
        self._aside = aside
        self._shards: dict[str, np.ndarray] = {}  # file name → float32 [rows, dim], mapped from disk
        self._place: dict[str, tuple[str, int]] = {}  # key → (file name, row)
        self._refresh()

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def keys(self) -> list[str]:
        """Every key that has a vector."""
        return list(self._place)

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Where in `keys` a vector is still to be made; a key that stands there twice is named once."""
        self._refresh()
        return [index for key, index in _first_places(keys).items() if key not in self._place]

    def append(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """Keep these vectors [n, dim]: they survive a crash once this returns. Keys that are held stay as they are."""
        vectors = np.asarray(vectors, np.float32)
        if vectors.shape != (len(keys), self.dim):
            raise StoreError(
                f"{self.folder}: {len(keys)} keys came with vectors of shape {vectors.shape}; expected "
                f"({len(keys)}, {self.dim})."
            )
        fresh = [index for key, index in _first_places(keys).items() if key not in self._place]
        broken = [keys[index] for index in fresh if not np.isfinite(vectors[index]).all()]
        if broken:
            raise StoreError(f"{self.folder}: the vector of {broken[0]} is not finite (NaN or infinite); not kept.")
        if fresh:
            self._map(self._write([keys[index] for index in fresh], vectors[fresh]))

    def get(self, keys: Sequence[str]) -> np.ndarray:
        """Their vectors, float32 [n, dim], in this order."""
        absent = [key for key in keys if key not in self._place]
        if absent:
            raise StoreError(
                f"{self.folder} has no vector for {len(absent)} of {len(keys)} keys, for instance {absent[0]}. "
                "Embed what `missing` names first."
            )
        rows: dict[str, list[tuple[int, int]]] = {}
        for index, key in enumerate(keys):
            shard, row = self._place[key]
            rows.setdefault(shard, []).append((index, row))
        out = np.empty((len(keys), self.dim), np.float32)
        for shard, pairs in rows.items():
            to, at = np.array(pairs).T
            out[to] = self._shards[shard][at]
        return out

    def broken(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that are held and whose vector has no direction: it is zero or not finite."""
        held = [key for key in _first_places(keys) if key in self._place]
        found = []
        for start in range(0, len(held), BLOCK):
            some = held[start : start + BLOCK]
            lengths = np.linalg.norm(self.get(some), axis=1)
            found += [key for key, length in zip(some, lengths, strict=True) if not 0 < length < np.inf]
        return found

    def drop(self, keys: Sequence[str]) -> None:
        """Forget these vectors: the files that hold them are written anew without them."""
        gone = set(keys)
        shards = {self._place[key][0] for key in gone if key in self._place}
        if not shards:
            return
        for name in shards:
            kept = [key for key, place in self._place.items() if place[0] == name and key not in gone]
            if kept:
                self._write(kept, self.get(kept))
            (self.folder / name).unlink(missing_ok=True)
        self._shards, self._place = {}, {}
        self._refresh()

    def compact(self) -> None:
        """Merge all files into one, which opens faster; safe to interrupt, since what is there twice does no harm."""
        old = set(self._shards)
        if len(old) < 2:
            return
        keys = self.keys()
        merged = self._write(keys, self.get(keys))
        for name in old - {merged}:
            (self.folder / name).unlink(missing_ok=True)
        self._shards, self._place = {}, {}
        self._refresh()

    def _refresh(self) -> None:
        """Take in the files that were added since, by this process or another."""
        for path in sorted(self.folder.glob("*.arrow")):
            if path.name not in self._shards:
                self._map(path.name)
        for path in self.folder.glob(".*.tmp"):  # left by a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()

    def _map(self, name: str) -> None:
        import pyarrow as pa

        path = self.folder / name
        try:
            with pa.memory_map(str(path)) as file:
                if _digest(file.read_buffer()) != path.stem:
                    raise ValueError("its bytes do not have the hash that its name says")
                table = pa.ipc.open_file(file).read_all().combine_chunks()
            keys = table["key"].to_pylist()
            vectors = table["vector"].chunk(0).flatten().to_numpy().reshape(len(keys), -1)
        except FileNotFoundError:  # another process compacted the folder
            return
        except (OSError, ValueError, KeyError, IndexError, pa.ArrowException) as error:
            if name not in self.damaged:
                self.damaged.append(name)
            if not self._aside:
                return
            aside = path.with_name(path.name + ".damaged")
            with contextlib.suppress(FileNotFoundError):  # another process saw it too
                path.replace(aside)
            warnings.warn(
                f"{path} is damaged ({error}). It was moved to {aside.name}; its vectors count as missing and will be "
                "embedded again.",
                stacklevel=3,
            )
            return
        if vectors.shape[1] != self.dim and not self._aside:
            self.damaged.append(name)
            return
        if vectors.shape[1] != self.dim:
            raise StoreError(f"{path} holds vectors of {vectors.shape[1]} numbers, this encoder makes {self.dim}.")
        self._shards[name] = vectors
        for row, key in enumerate(keys):
            self._place.setdefault(key, (name, row))

    def _write(self, keys: Sequence[str], vectors: np.ndarray) -> str:
        import pyarrow as pa

        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), self.dim)
        table = pa.table({"key": pa.array(keys, pa.string()), "vector": column})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        name = f"{_digest(data)}.arrow"
        write_atomically(self.folder / name, lambda path: path.write_bytes(data))
        return name


class Joined:
    """The vectors of several encoders into one space, by modality. Of several, a key is "image/…": `key` makes it."""

    def __init__(self, parts: Mapping[str, Vectors]):
        self.parts = parts
        self.damaged = [name for part in parts.values() for name in part.damaged]

    def key(self, modality: str, content: str) -> str:
        """What a content is called here: one and the same may have a vector of each of several encoders."""
        return f"{modality}/{content}" if len(self.parts) > 1 else content

    def _sorted(self, keys: Sequence[str]) -> list[tuple[Vectors, list[int], list[str]]]:
        """Each part with those of the keys that are its own: where they stand, and what it calls them."""
        if len(self.parts) == 1:
            return [(part, list(range(len(keys))), list(keys)) for part in self.parts.values()]
        at: dict[str, list[int]] = {name: [] for name in self.parts}
        for row, key in enumerate(keys):
            at[key.rpartition("/")[0]].append(row)
        return [(self.parts[name], rows, [keys[row].rpartition("/")[2] for row in rows]) for name, rows in at.items()]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __contains__(self, key: str) -> bool:
        return any(own in part for part, _, owns in self._sorted([key]) for own in owns)

    def missing(self, keys: Sequence[str]) -> list[int]:
        return sorted(rows[one] for part, rows, owns in self._sorted(keys) for one in part.missing(owns))

    def get(self, keys: Sequence[str]) -> np.ndarray:
        made = [(rows, part.get(owns)) for part, rows, owns in self._sorted(keys)]
        out = np.empty((len(keys), made[0][1].shape[1]), np.float32)
        for rows, vectors in made:
            out[rows] = vectors
        return out

    def broken(self, keys: Sequence[str]) -> list[str]:
        found = []
        for part, rows, owns in self._sorted(keys):
            bad = set(part.broken(owns))
            found += [keys[row] for row, own in zip(rows, owns, strict=True) if own in bad]
        return list(dict.fromkeys(found))

    def drop(self, keys: Sequence[str]) -> None:
        for part, _, owns in self._sorted(keys):
            part.drop(owns)


def _digest(data: object) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()  # type: ignore[arg-type]


def _first_places(keys: Sequence[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for index, key in enumerate(keys):
        places.setdefault(key, index)
    return places
