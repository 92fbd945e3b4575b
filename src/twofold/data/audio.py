"""From a file, bytes or an array to a waveform: whatever a sound is stored as, one channel at one rate comes out.

FFmpeg decodes and resamples, through PyAV: WAV, FLAC, Ogg, MP3, AAC, the sound of a film. As with pictures, what cannot
be decoded is an ordinary event and raises `DecodeError`, which names it.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from twofold.errors import DecodeError, UsageError

Sound = Path | bytes | np.ndarray

RATE = 16_000
"""Samples a second: twice the highest frequency that matters in speech."""

SHORTEST = 0.025
"""Seconds. Anything shorter is less than one period of the deepest voice, and less than one frame of a spectrogram."""


def hear(sound: Sound, *, rate: int = RATE, seconds: float = 30.0, name: str = "") -> Float[np.ndarray, "samples"]:
    """The first `seconds` of a sound as float32 in about -1..1, its channels averaged, `rate` samples a second.

    No more than that is decoded, however long the file; of one that was cut off, what is there. An array is a waveform
    [n] that has this rate already.
    """
    name = name or (str(sound) if isinstance(sound, Path) else type(sound).__name__)
    most = round(rate * seconds)
    try:
        wave = _checked(sound)[:most] if isinstance(sound, np.ndarray) else _decoded(sound, rate, most)
        if not len(wave):
            raise DecodeError("", "empty")
        if len(wave) < SHORTEST * rate:
            count = "one sample" if len(wave) == 1 else f"{len(wave)} samples"
            raise DecodeError("", f"too short: {count}; a sound lasts {SHORTEST * 1000:.0f} ms at least")
        if not np.isfinite(wave).all():
            raise DecodeError("", "holds values that are not finite (NaN or infinite)")
        return wave
    except DecodeError as error:
        raise DecodeError(name, error.reason) from None
    except UsageError:  # no PyAV
        raise
    except Exception as error:  # FFmpeg's errors of broken files are of a dozen kinds
        raise DecodeError(name, why_not(sound, error, "sound")) from error


def _checked(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or array.dtype.kind != "f":
        raise DecodeError("", f"an array {list(array.shape)} of {array.dtype}; a waveform is [samples] of float")
    return np.asarray(array, np.float32)


def _decoded(sound: Path | bytes, rate: int, most: int) -> np.ndarray:
    av = pyav("Sounds")
    parts: list[np.ndarray] = []
    have = 0
    with av.open(io.BytesIO(sound) if isinstance(sound, bytes) else str(sound)) as container:
        if not container.streams.audio:
            raise DecodeError("", "has no sound in it")
        for part in _resampled(av, container, rate):
            parts.append(part)
            have += len(part)
            if have >= most:
                break
    return np.concatenate(parts)[:most] if parts else np.zeros(0, np.float32)


def _resampled(av: Any, container: Any, rate: int) -> Iterator[np.ndarray]:
    resampler = av.AudioResampler(format="fltp", rate=rate)  # FFmpeg's own mix to one channel is louder than the mean
    for frame in container.decode(audio=0):
        for part in resampler.resample(frame):
            yield part.to_ndarray().mean(0)
    for part in resampler.resample(None):  # what its filter still holds
        yield part.to_ndarray().mean(0)


def pyav(what: str) -> Any:
    """PyAV, which reads `what` ("Sounds", "Videos"); a UsageError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UsageError(f"{what} are read by PyAV, which is not installed: pip install 'twofold[audio]'.") from error
    av.logging.set_level(None)  # FFmpeg complains on stderr about what becomes an error here
    return av


def why_not(item: Any, error: Exception, what: str) -> str:
    """What FFmpeg's error in reading a "sound" or "video" means."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError) or (isinstance(item, Path) and item.is_dir()):
        return f"a folder, not a {what}"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if (isinstance(item, bytes) and not item) or (isinstance(item, Path) and item.stat().st_size == 0):
        return "empty"
    why = "it ends too early" if isinstance(error, EOFError) else type(error).__name__
    return f"not a {what} that can be decoded ({why})"
