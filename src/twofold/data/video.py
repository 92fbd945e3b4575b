"""From a file, a folder of frames, a sheet of them or an array to a clip: whatever it is, its frames come out.

FFmpeg decodes, through PyAV: MP4, WebM, GIF and the like. As with pictures, what cannot be decoded is an ordinary event
and raises `DecodeError`, which names it; a clip has two frames at least.
"""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped

from twofold.data.audio import pyav, why_not
from twofold.data.decode import Fit, Raw, decode, fit
from twofold.errors import DecodeError, UsageError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}  # of frames, and of sheets

LONGEST = 1024
"""Frames of a clip that are looked at, from its start: 40 seconds at 25 a second."""
STILLS = 16  # frames that are kept while the one in the middle is looked for


@dataclass(frozen=True)
class Sheet:
    """A clip that is stored as one picture: its frames, all of one size, in rows from left to right."""

    picture: Path | bytes
    rows: int
    across: int


Clip = Path | bytes | np.ndarray | Sheet


def watch(
    clip: Clip, size: int, *, how: Fit = "crop", channels: int | None = 3, name: str = ""
) -> Shaped[np.ndarray, "t {size} {size} c"]:
    """The frames of a clip, each brought to `size` as pictures are, in the order in which they are shown.

    A path is a video, a folder whose pictures are the frames, in the order of their names, or one picture that is a row
    or a column of square frames; of any other sheet, a `Sheet` says how it is divided. An array is [t, h, w, c] or
    [t, h, w]. No more than the first `LONGEST` frames are decoded.
    """
    path = clip.picture if isinstance(clip, Sheet) else clip
    name = name or (str(path) if isinstance(path, Path) else type(clip).__name__)
    try:
        frames = [fit(decode(frame, channels=channels), size, how=how) for frame in islice(_frames(clip), LONGEST)]
        if len(frames) < 2:
            raise DecodeError("", "one frame: a picture, not a clip" if frames else "empty")
        if len({frame.shape for frame in frames}) > 1:
            raise DecodeError("", "its frames are not of one number of channels")
        return np.stack(frames)
    except DecodeError as error:
        raise DecodeError(name, error.reason) from None
    except UsageError:  # no PyAV
        raise
    except Exception as error:  # FFmpeg's errors of broken files are of a dozen kinds
        raise DecodeError(name, why_not(clip, error, "video")) from error


def still(clip: Clip, *, name: str = "") -> np.ndarray:
    """The frame in the middle of a clip [h, w, c], nearly: a few are kept while it is read, never all of them."""
    try:
        kept, step, count = list[tuple[int, Raw]](), 1, 0
        for frame in islice(_frames(clip), LONGEST):
            if count % step == 0:
                kept.append((count, frame))
            if len(kept) > STILLS:
                kept, step = kept[::2], 2 * step
            count += 1
        if not kept:
            raise DecodeError("", "empty")
        return decode(min(kept, key=lambda one: abs(2 * one[0] - count))[1], channels=None)
    except DecodeError as error:
        raise DecodeError(name, error.reason) from None
    except UsageError:  # no PyAV
        raise
    except Exception as error:
        raise DecodeError(name, why_not(clip, error, "video")) from error


def windows(
    counts: Int[np.ndarray, "b"], frames: int, stride: int, at: Float[np.ndarray, "b"] | float = 0.5
) -> Int[np.ndarray, "b {frames}"]:
    """Which frames, `stride` apart, to take of clips that have `counts`; `at` (0..1, not 1) says how late they begin.

    Of a clip too short for that, frames closer together, evenly, from its first to its last.
    """
    span = np.minimum((frames - 1) * stride, counts - 1)
    start = (np.asarray(at, np.float64) * (counts - span)).astype(np.int64)
    steps = np.arange(frames) / max(1, frames - 1)
    return start[:, None] + np.floor(steps * span[:, None] + 0.5).astype(np.int64)


def files_of(clip: Clip) -> list[Path]:
    """The files that a clip is made of, in order; those of a folder are its frames."""
    if isinstance(clip, Sheet):
        return files_of(clip.picture)
    if not isinstance(clip, Path):
        return []
    return [clip / name for name in sorted(frame_names(clip.iterdir()), key=_place)] if clip.is_dir() else [clip]


def frame_names(files: Iterable[Path]) -> list[str]:
    """The names of those that may be frames."""
    return [file.name for file in files if file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".")]


def _place(name: str) -> list[tuple[int, str]]:
    """What orders frames by their names: numbers by their value, so that 10 comes after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def shows(file: Path) -> bool:
    """Whether a file has moving pictures in it: of some suffixes, such as .webm, only the content tells."""
    try:
        with pyav("Videos").open(str(file)) as container:
            return bool(container.streams.video)
    except Exception:  # broken, or no PyAV; decoding will say so
        return False


def _frames(clip: Clip) -> Iterator[Raw]:
    """Frames, to be decoded as pictures are."""
    if isinstance(clip, np.ndarray):
        if clip.ndim not in (3, 4) or 0 in clip.shape:
            raise DecodeError("", f"an array of shape {clip.shape}; clips are [t, h, w, c] or [t, h, w]")
        return iter(clip)
    if isinstance(clip, Sheet):
        return iter(_divided(decode(clip.picture, channels=None), clip.rows, clip.across))
    if isinstance(clip, Path) and clip.is_dir():
        frames = files_of(clip)
        if not frames:
            raise DecodeError("", f"a folder without frames ({' '.join(sorted(PICTURE_SUFFIXES))})")
        return iter(frames)
    if isinstance(clip, Path) and clip.suffix.lower() in PICTURE_SUFFIXES:
        return iter(_strip(decode(clip, channels=None)))
    if (isinstance(clip, bytes) and not clip) or (isinstance(clip, Path) and not clip.stat().st_size):
        raise DecodeError("", "empty")
    return _played(clip)


def _divided(sheet: Shaped[np.ndarray, "h w c"], rows: int, across: int) -> Shaped[np.ndarray, "t y x c"]:
    height, width, channels = sheet.shape
    if height % rows or width % across:
        raise DecodeError("", f"{height}×{width} pixels are not {rows}×{across} frames of one size")
    frames = sheet.reshape(rows, height // rows, across, width // across, channels)
    return frames.swapaxes(1, 2).reshape(rows * across, height // rows, width // across, channels)


def _strip(sheet: Shaped[np.ndarray, "h w c"]) -> Shaped[np.ndarray, "t s s c"]:
    """The square frames of a row or a column."""
    height, width = sheet.shape[:2]
    if height == width or max(height, width) % min(height, width):
        raise DecodeError(
            "",
            f"a picture of {height}×{width}, not a clip; where it is a sheet of frames, the kind of its column says "
            "how many in rows × columns, such as video:4x4",
        )
    side = min(height, width)
    return _divided(sheet, height // side, width // side)


def _played(clip: Path | bytes) -> Iterator[np.ndarray]:
    """The frames of a video, upright."""
    with pyav("Videos").open(io.BytesIO(clip) if isinstance(clip, bytes) else str(clip)) as container:
        if not container.streams.video:
            raise DecodeError("", "has no pictures in it, only sound")
        for frame in container.decode(video=0):
            # A phone that is held upright writes lying frames and, beside them, how far to turn them.
            yield np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
