"""What an encoder has to be better than: features that nobody trained, and weights that are to be had."""

import numpy as np
from jaxtyping import Float

from twofold.errors import DataError

IMAGENET = "efficientnet-lite0"  # an encoder with ImageNet's labels behind it, whose weights are installed
THUMBNAIL = 16  # pixels a side of the pictures that raw pixels are: 768 columns in colour
BINS = 6  # of each colour: 216 of them together
GRAYS = 32  # bins of each channel, where there are not three


def thumbnails(pixels: np.ndarray, mean: np.ndarray | None = None) -> tuple[Float[np.ndarray, "n d"], np.ndarray]:
    """Pixels as they are, around `mean`, and that mean: their own where None. Cosines of raw pixels mostly compare
    brightness."""
    rows = pixels.reshape(len(pixels), -1).astype(np.float32)
    mean = rows.mean(0) if mean is None else mean
    return rows - mean, mean


def colour_histogram(pixels: np.ndarray) -> Float[np.ndarray, "n bins"]:
    """The square roots of the shares of each colour [n, c, h, w] → [n, 216]; of other than three channels, of each one.

    Rows have length 1 and their dot product is the Bhattacharyya coefficient of two histograms: 1 for the same colours,
    wherever they are. Pixels are of 8 or 16 bits, or floats in 0..1.
    """
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise DataError(f"Histograms are taken of pictures [n, c, h, w]; got {pixels.shape}.")
    top = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1.0
    n, channels = pixels.shape[:2]
    bins = BINS if channels == 3 else GRAYS
    found = []
    for picture in pixels:
        level = np.minimum((picture.reshape(channels, -1) / top * bins).astype(np.int64), bins - 1)
        if channels == 3:
            counts = np.bincount(level[0] + bins * (level[1] + bins * level[2]), minlength=bins**3)
        else:
            counts = np.concatenate([np.bincount(own, minlength=bins) for own in level])
        found.append(np.sqrt(counts / counts.sum()))
    return np.asarray(found, np.float32).reshape(n, -1)
