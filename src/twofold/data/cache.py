"""Every picture, clip or sound of a source decoded once, into one memory-mapped array that all later runs share."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twofold import runtime
from twofold.data.atomic import sync_folder
from twofold.data.audio import hear
from twofold.data.decode import Fit, OnError, Skipped, ahead, promote, stream
from twofold.data.sources import Modality, Source, content_key
from twofold.data.video import watch
from twofold.errors import DataError, DecodeError

VERSION = 1  # of the pixels: raise it when the same file should decode to other pixels

DEPTHS = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))


class Decoded(NamedTuple):
    """The pictures of a source as pixels, and those that are missing among them."""

    pixels: np.ndarray  # [n, c, size, size] of uint8, uint16 or float32; a memory map, read-only
    kept: np.ndarray  # int64 [n]: pixels[i] is the picture of the source's item kept[i]
    skipped: list[Skipped]


class DecodedClips(NamedTuple):
    """The clips of a source as frames, and those that are missing among them."""

    frames: np.ndarray  # [all frames, c, size, size] of uint8, uint16 or float32; a memory map, read-only
    offsets: np.ndarray  # int64 [n + 1]: frames[offsets[i]:offsets[i + 1]] are the clip of the source's item kept[i]
    kept: np.ndarray  # int64 [n]
    skipped: list[Skipped]


def decoded(
    source: Source,
    size: int,
    *,
    how: Fit = "crop",
    channels: int | None = 3,
    on_error: OnError = "skip",
    progress: Callable[[int, int], None] | None = None,
) -> Decoded:
    """The source's pictures at `size`, decoded now or found in the cache.

    The cache is keyed by the content of the pictures and how they are decoded, not by their names. One process builds,
    others that want the same wait for it; a build that is killed leaves nothing that is taken for complete. Where
    pictures of 8 and 16 bits (or floats) meet, all get the deepest type. `progress(done, total)` is told every picture.
    """
    if source.images is None:
        raise DataError(f"{source.name} has no images to decode.")
    key = content_key("\n".join([json.dumps([VERSION, size, how, channels]), *source.keys("image")]))
    folder = runtime.cache_dir() / "pixels" / key
    skipped: list[Skipped] = []
    pictures = stream(
        source.images, size, how=how, channels=channels, on_error=on_error, names=source.ids, skipped=skipped
    )
    frames, _, kept, skipped = _kept(folder, source, "pictures", pictures, skipped, progress)
    if skipped and on_error == "raise":
        raise DecodeError(*skipped[0])
    return Decoded(frames, kept, skipped)


def decoded_clips(
    source: Source,
    modality: Modality,
    size: int,
    *,
    how: Fit = "crop",
    channels: int | None = 3,
    on_error: OnError = "skip",
    progress: Callable[[int, int], None] | None = None,
) -> DecodedClips:
    """All frames of the source's clips at `size`, decoded now or found in the cache, as `decoded` does pictures."""
    clips = source.column(modality).cells
    key = content_key("\n".join([json.dumps([VERSION, "clips", size, how, channels]), *source.keys(modality)]))
    skipped: list[Skipped] = []

    def work(clip: Any, name: str) -> np.ndarray:
        return watch(clip, size, how=how, channels=channels, name=name)

    watched = ahead(clips, work, on_error=on_error, names=source.ids, skipped=skipped)
    found = _kept(runtime.cache_dir() / "pixels" / key, source, "clips", watched, skipped, progress)
    if found.skipped and on_error == "raise":
        raise DecodeError(*found.skipped[0])
    return found


class DecodedSounds(NamedTuple):
    """The sounds of a source as waveforms, and those that are missing among them."""

    waves: list[np.ndarray]  # float32 [samples] each; memory maps, read-only
    kept: np.ndarray  # int64 [n]: waves[i] is the sound of the source's item kept[i]
    skipped: list[Skipped]


def decoded_sounds(
    source: Source,
    modality: Modality,
    rate: int,
    seconds: float,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedSounds:
    """The first `seconds` of the source's sounds, `rate` samples a second, decoded now or found in the cache."""
    sounds = source.column(modality).cells
    key = content_key("\n".join([json.dumps([VERSION, "sounds", rate, seconds]), *source.keys(modality)]))
    skipped: list[Skipped] = []

    def work(sound: Any, name: str) -> np.ndarray:
        return hear(sound, rate=rate, seconds=seconds, name=name)[:, None, None, None]  # samples, as frames of a clip

    heard = ahead(sounds, work, on_error="skip", names=source.ids, skipped=skipped)
    found = _kept(runtime.cache_dir() / "sounds" / key, source, "sounds", heard, skipped, progress)
    waves = np.asarray(found.frames).reshape(-1)
    return DecodedSounds([waves[a:b] for a, b in pairwise(found.offsets.tolist())], found.kept, found.skipped)


def _kept(
    folder: Path,
    source: Source,
    what: str,
    drawn: Iterator[tuple[int, np.ndarray]],
    skipped: list[Skipped],
    progress: Callable[[int, int], None] | None,
) -> DecodedClips:
    """What the cache has in `folder`; where it has nothing, what is `drawn` is kept, and that fills `skipped`."""
    found = _opened(folder, source)
    if found is None:
        with _claimed(folder.with_suffix(".lock")):
            found = _opened(folder, source)  # by the process that we waited for
            if found is None:
                _build(folder, source, what, drawn, skipped, progress)
                found = _opened(folder, source)
    if found is None:
        raise DataError(f"The cache at {folder} was written but cannot be read back. Is the disk in order?")
    return found


def _opened(folder: Path, source: Source) -> DecodedClips | None:
    """What lies in the cache; None where nothing does, or nothing whole."""
    try:
        about = json.loads((folder / "about.json").read_text("utf-8"))
        pixels = np.memmap(folder / "pixels", np.dtype(about["dtype"]), "r", shape=tuple(about["shape"]))
        counts = about.get("frames", [1] * len(pixels))  # of a picture, itself
    except (OSError, ValueError, KeyError):  # ValueError: also a file shorter than its shape
        return None
    skipped = [Skipped(source.ids[index], reason) for index, reason in about["skipped"]]
    missing = [index for index, _ in about["skipped"]]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return DecodedClips(pixels, offsets, np.delete(np.arange(len(source)), missing), skipped)


def _build(
    folder: Path,
    source: Source,
    what: str,
    drawn: Iterator[tuple[int, np.ndarray]],
    skipped: list[Skipped],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the cache beside its place and rename it; `skipped` is filled while pictures or clips are drawn."""
    partial = folder.with_suffix(".partial")  # ours alone while we hold the claim; left over if a build was killed
    for stale in (partial, folder):  # the latter is damaged, or we would not be here
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        about = _write(partial / "pixels", source, what, drawn, skipped, progress)
        (partial / "about.json").write_text(json.dumps(about), "utf-8")
        for name in ("pixels", "about.json"):
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise DataError(
            f"The decoded {what} could not be written to {partial}: {error}. Make room there, or let TWOFOLD_CACHE "
            "name another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    path: Path,
    source: Source,
    what: str,
    drawn: Iterator[tuple[int, np.ndarray]],
    skipped: list[Skipped],
    progress: Callable[[int, int], None] | None,
) -> dict:
    """The pixels one after the other, [c, h, w] a picture or frame, and what there is to know about them."""
    shape: tuple[int, ...] = ()
    dtype = DEPTHS[0]
    kept: list[int] = []
    frames: list[int] = []
    for index, pixels in drawn:
        shape = shape or pixels.shape[-3:]
        if pixels.shape[-3:] != shape:
            reason = f"has {pixels.shape[-1]} channels, the {what} before it {shape[2]}"
            skipped.append(Skipped(source.ids[index], reason))
            continue
        if DEPTHS.index(pixels.dtype) > DEPTHS.index(dtype):
            if kept:
                _deepen(path, dtype, pixels.dtype)
            dtype = pixels.dtype
        with open(path, "ab") as file:
            file.write(np.moveaxis(promote(pixels, dtype), -1, -3).tobytes())
        kept.append(index)
        frames.append(len(pixels) if pixels.ndim == 4 else 1)
        if progress:
            progress(index + 1, len(source))
    if not kept:
        first = f": {skipped[0].id}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"None of the {len(source):,} {what} of {source.name} could be used{first}.")
    missing = sorted(set(range(len(source))) - set(kept))
    reasons = [(index, each.reason) for index, each in zip(missing, skipped, strict=True)]
    height, width, channels = shape
    about = {"dtype": dtype.name, "shape": [sum(frames), channels, height, width], "skipped": reasons}
    return about | ({"frames": frames} if what != "pictures" else {})


def _deepen(path: Path, old: np.dtype, new: np.dtype) -> None:
    """Rewrite the pixels that are there in a deeper type."""
    pixels = np.memmap(path, old, "r")
    deeper = path.with_suffix(".deeper")
    with open(deeper, "wb") as file:
        for start in range(0, len(pixels), 1 << 22):
            file.write(promote(pixels[start : start + (1 << 22)], new).tobytes())
    os.replace(deeper, path)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when the process dies, however it dies."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
