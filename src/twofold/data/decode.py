"""From a file, bytes or an array to pixels: whatever a picture is stored as, [h, w, c] comes out, upright.

A picture that cannot be decoded is an ordinary event: it raises `DecodeError`, which names it; `stream` can skip it.
"""

import contextlib
import io
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps

from twofold.errors import DecodeError, unknown

Raw = Path | bytes | np.ndarray | Image.Image
Fit = Literal["crop", "pad", "stretch"]
OnError = Literal["skip", "raise"]
T = TypeVar("T")

MAX_PIXELS = 89_000_000
"""Larger pictures are refused before they are decoded: a file of a few kilobytes can ask for gigabytes of memory."""


class Skipped(NamedTuple):
    """An item that was left out, and why."""

    id: str
    reason: str


def decode(image: Raw, *, channels: int | None = 3, name: str = "", enough: int | None = None) -> np.ndarray:
    """The pixels of one picture, upright, as [h, w, c] of uint8, uint16 or float32.

    EXIF rotation is applied, CMYK and palettes become RGB, what is transparent becomes white, 16 bits stay 16 bits. Of
    several frames the first counts. `channels=3` repeats a grey picture, `channels=1` takes the luminance of a colour
    picture, any other number must be what is there; None keeps what is there. A path that ends in `.npy` is an array:
    [h, w] or [h, w, c] of uint8, uint16 or float. Where `enough` pixels a side will do, a JPEG is read at a half, a
    quarter or an eighth of its size, in a fraction of the time.
    """
    name = name or (str(image) if isinstance(image, Path) else type(image).__name__)
    try:
        if isinstance(image, Path) and image.suffix.lower() == ".npy":
            image = np.lib.format.open_memmap(image, mode="r")
        pixels = _checked(image) if isinstance(image, np.ndarray) else _read(image, enough)
        return _with_channels(pixels, channels)
    except DecodeError as error:
        raise DecodeError(name, error.reason) from None
    # Decoders of broken files raise about everything: OSError, SyntaxError, struct.error, IndexError, zlib.error, …
    except Exception as error:
        raise DecodeError(name, _reason(image, error)) from error


def area(image: bytes, *, enough: int | None = None) -> int:
    """How many pixels a picture has, by what its first bytes say; 0 where they say nothing.

    Where `enough` pixels a side will do, as many as have to be decoded for that: of a JPEG, a part.
    """
    with contextlib.suppress(Exception), _open(image) as picture:
        if enough:
            picture.draft(None, (enough, enough))
        return picture.height * picture.width
    return 0


def thumbnail(image: Raw, side: int, *, name: str = "", kind: Literal["JPEG", "WEBP"] = "JPEG") -> bytes:
    """A picture made small, upright and without metadata: its longer side is `side` pixels, or its own if less.

    A WebP is about a fourth smaller than a JPEG, and takes ten times as long to make. Of more than three channels the
    first three are shown, and what is not 8 bits is brought to 8.
    """
    pixels = decode(image, channels=None, name=name, enough=side)
    pixels = pixels[:, :, :3] if pixels.shape[2] > 2 else pixels[:, :, :1].repeat(3, axis=2)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype == np.float32:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    picture, out = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    picture.save(out, kind, quality=80)
    return out.getvalue()


def fit(image: np.ndarray, size: int, *, how: Fit = "crop") -> np.ndarray:
    """The picture as [size, size, c], antialiased, its dtype kept.

    `crop` scales the shorter side to `size` and keeps the middle, `pad` scales the longer side and fills up with zeros,
    `stretch` changes the aspect. The filter is the triangle, which never overshoots the range of the pixels.
    """
    height, width = image.shape[:2]
    if how == "stretch":
        return _resize(image, size, size)
    if how == "crop":
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return _resize(image, size, size, box=(left, top, left + side, top + side))
    if how == "pad":
        scale = size / max(height, width)
        small = _resize(image, max(1, round(width * scale)), max(1, round(height * scale)))
        padded = np.zeros((size, size, image.shape[2]), image.dtype)
        top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
        padded[top : top + small.shape[0], left : left + small.shape[1]] = small
        return padded
    raise unknown("way to fit a picture", how, ("crop", "pad", "stretch"))


def stream(
    images: Sequence[Raw],
    size: int,
    *,
    how: Fit = "crop",
    channels: int | None = 3,
    on_error: OnError = "skip",
    names: Sequence[str] | None = None,
    skipped: list[Skipped] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Each picture's index and its pixels [size, size, c], in order, decoded by as many threads as there are cores.

    What cannot be decoded is appended to `skipped` and left out, or raises its `DecodeError` with `on_error="raise"`.
    """

    def work(image: Raw, name: str) -> np.ndarray:
        return fit(decode(image, channels=channels, name=name), size, how=how)

    return ahead(images, work, on_error=on_error, names=names, skipped=skipped)


def ahead(
    items: Sequence[Any],
    work: Callable[[Any, str], T],
    *,
    on_error: OnError = "skip",
    names: Sequence[str] | None = None,
    skipped: list[Skipped] | None = None,
    workers: int | None = None,
) -> Iterator[tuple[int, T]]:
    """Each item's index and `work(item, name)`, in order, computed ahead by `workers` threads, or one for each core.

    What raises a `DecodeError` is appended to `skipped` and left out, or raises it with `on_error="raise"`.
    """
    if on_error not in ("skip", "raise"):
        raise unknown("on_error", on_error, ("skip", "raise"))

    def attempt(index: int) -> T | DecodeError:
        try:
            return work(items[index], names[index] if names is not None else "")
        except DecodeError as error:
            return error

    def settle(index: int, future: Future) -> tuple[int, T] | None:
        made = future.result()
        if not isinstance(made, DecodeError):
            return index, made
        if on_error == "raise":
            raise made
        if skipped is not None:
            skipped.append(Skipped(made.item, made.reason))
        return None

    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    queue: deque[tuple[int, Future]] = deque()  # bounded: memory does not depend on the number of items
    try:
        for index in range(len(items)):
            queue.append((index, pool.submit(attempt, index)))
            if len(queue) == 4 * workers and (done := settle(*queue.popleft())):
                yield done
        while queue:
            if done := settle(*queue.popleft()):
                yield done
    finally:
        pool.shutdown(cancel_futures=True)


def skip_report(skipped: Sequence[Skipped], total: int, *, show: int = 10) -> str:
    """What was left out, for people: the count, the reasons, the first names."""
    if not skipped:
        return f"All {total:,} items could be read."
    reasons = ", ".join(f"{count:,} × {reason}" for reason, count in Counter(s.reason for s in skipped).most_common(5))
    names = ", ".join(s.id for s in skipped[:show]) + (", …" if len(skipped) > show else "")
    return f"Skipped {len(skipped):,} of {total:,} items ({reasons}): {names}"


def promote(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same picture in a wider dtype: uint8 in uint16 (×257), integers in float32 (full scale is 1)."""
    if pixels.dtype == dtype:
        return pixels
    if dtype == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def _reason(image: Raw, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"larger than {MAX_PIXELS:,} pixels"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a picture"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if _is_empty(image):
        return "empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a format that can be read (more than 4 channels: store it as .npy)"
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "truncated"
    return f"damaged ({type(error).__name__}: {error})"


def _is_empty(image: Raw) -> bool:
    if isinstance(image, Path):
        with contextlib.suppress(OSError):
            return image.stat().st_size == 0
    return isinstance(image, bytes) and not image


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError("", f"{width}×{height} is larger than {MAX_PIXELS:,} pixels")


def _checked(array: np.ndarray) -> np.ndarray:
    """An array as [h, w, c] of uint8, uint16 or float32, or a `DecodeError`."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise DecodeError("", f"an array of shape {array.shape}; pictures are [h, w] or [h, w, c]")
    _check_size(*array.shape[:2])
    if array.dtype.kind == "f":
        array = np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            raise DecodeError("", "holds values that are not finite (NaN or infinite)")
    if array.dtype not in (np.uint8, np.uint16, np.float32):
        raise DecodeError("", f"an array of {array.dtype}; pictures are uint8, uint16 or float")
    return np.asarray(array)


def _open(image: Path | bytes) -> ImageFile.ImageFile:
    # A file is read as a whole: Pillow's way to its parts through Python takes a fifth of a small picture's time.
    return Image.open(io.BytesIO(image if isinstance(image, bytes) else image.read_bytes()))


def _read(image: Path | bytes | Image.Image, enough: int | None = None) -> np.ndarray:
    if isinstance(image, Image.Image):
        _check_size(image.height, image.width)
        return _on_white(_upright(image))
    with _open(image) as picture:
        _check_size(picture.height, picture.width)
        layouts = _sixteen_bit(picture)
        if enough:
            picture.draft(None, (enough, enough))
        pixels = _upright(picture)
    if layouts:
        layout, other = layouts
        with _open(image) as picture:
            picture.tile = [
                tile._replace(args=other if isinstance(tile.args, str) else (other, *(tile.args or ())[1:]))
                for tile in picture.tile
            ]
            low = _upright(picture)
        pixels = pixels.astype(np.uint16) << 8 | (low[:, :, [1, 1, 1, 3]] if layout == "LA;16B" else low)
    return _on_white(pixels)


def _sixteen_bit(picture: ImageFile.ImageFile) -> tuple[str, str] | None:
    """For 16-bit colour: the layout in which Pillow reads it, and the one that gives the bytes which it drops.

    Pillow has no mode for 16-bit colour and keeps the high byte of each sample. With the byte order swapped it keeps
    the low one; grey and alpha, read as four plain bytes, keeps both.
    """
    if not picture.tile or "transparency" in picture.info:
        return None
    args = picture.tile[0].args
    layout = args if isinstance(args, str) else str((args or ("",))[0])
    if layout == "LA;16B":
        return layout, "RGBA"
    if layout[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16"):
        return None
    native = "L" if sys.byteorder == "little" else "B"
    order = native if layout[-1] == "N" else layout[-1]
    return layout, layout[:-1] + {"B": "L", "L": "B"}[order]


def _upright(picture: Image.Image) -> np.ndarray:
    """Pixels after EXIF rotation as [h, w, c]: 1 grey, 3 colour, 4 colour and alpha."""
    picture.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block costs the rotation, not the picture
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        return _checked(np.asarray(picture))
    if picture.mode.startswith("I;16"):
        pixels = np.asarray(picture, np.uint16)
    elif picture.mode == "I":  # 32-bit integers: how some formats hand out 16 bits
        pixels = np.asarray(picture)
        narrow = pixels.min() >= 0 and pixels.max() <= 65535
        pixels = pixels.astype(np.uint16 if narrow else np.float32)
    elif picture.has_transparency_data:
        pixels = np.asarray(picture.convert("RGBA"))
    elif picture.mode in ("1", "L"):
        pixels = np.asarray(picture.convert("L"))
    else:
        pixels = np.asarray(picture.convert("RGB"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Colour and alpha composited on white, in integers: exact for 8 and 16 bits. Without alpha, as it is."""
    if pixels.shape[2] != 4:
        return pixels
    top = np.uint32(np.iinfo(pixels.dtype).max)
    out = np.empty((*pixels.shape[:2], 3), pixels.dtype)
    rows = max(1, 2**20 // pixels.shape[1])  # at once: in 32 bits a large picture would take gigabytes
    for start in range(0, len(pixels), rows):
        some = pixels[start : start + rows].astype(np.uint32)
        color, alpha = some[:, :, :-1], some[:, :, -1:]
        out[start : start + rows] = (color * alpha + top * (top - alpha) + top // 2) // top
    return out


def _with_channels(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    have = pixels.shape[2]
    if channels is None or channels == have:
        return pixels
    if channels == 3 and have == 1:
        return np.repeat(pixels, 3, axis=2)
    if channels == 1 and have == 3:
        grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's "L"
        return (grey if pixels.dtype == np.float32 else np.round(grey).astype(pixels.dtype))[:, :, None]
    raise DecodeError("", f"has {have} channels, expected {channels}; --channels {have} takes it as it is")


def _resize(image: np.ndarray, width: int, height: int, box: tuple | None = None) -> np.ndarray:
    box = box or (0, 0, image.shape[1], image.shape[0])
    if box == (0, 0, width, height):
        return image
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box))
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR, box))
        for plane in np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
    ]
    pixels = np.stack(planes, axis=2)
    return pixels if image.dtype == np.float32 else np.round(pixels).astype(image.dtype)
