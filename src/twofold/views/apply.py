"""Batched image operations, each with its own explicit parameters for every sample. Nothing here is random.

An operation takes pictures and one parameter a sample, on any device, and returns float pictures in [0, 1]. Most are
linear, which is where the speed comes from: a resized crop, its flips and its blur are two small matrices a sample, and
all colour operations of a sample are one affine map of its colour vectors.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from twofold.errors import UsageError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601; torchvision writes .2989, a difference of at most 1e-4
DENSE = 48  # pixels a side up to which, on a CPU, two dense matrices beat one call a sample
BLOCK = 16  # pixels a side that one small matrix blurs at a time
YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # JFIF: luma, blue, red
QUANTA = (  # ITU-T T.81, tables K.1 and K.2: luma, chroma
    (
        (16, 11, 10, 16, 24, 40, 51, 61),
        (12, 12, 14, 19, 26, 58, 60, 55),
        (14, 13, 16, 24, 40, 57, 69, 56),
        (14, 17, 22, 29, 51, 87, 80, 62),
        (18, 22, 37, 56, 68, 109, 103, 77),
        (24, 35, 55, 64, 81, 104, 113, 92),
        (49, 64, 78, 87, 103, 121, 120, 101),
        (72, 92, 95, 98, 112, 100, 103, 99),
    ),
    (
        (17, 18, 24, 47, 99, 99, 99, 99),
        (18, 21, 26, 66, 99, 99, 99, 99),
        (24, 26, 56, 99, 99, 99, 99, 99),
        (47, 66, 99, 99, 99, 99, 99, 99),
        *((99,) * 8,) * 4,
    ),
)
MAXIMUM = {torch.uint8: 255, torch.uint16: 65535}


def unit(images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Pictures as float32 in [0, 1]: uint8 over 255, uint16 over 65535, floats as they are."""
    if images.dtype.is_floating_point:
        return images.float()
    if images.dtype not in MAXIMUM:
        raise UsageError(f"Pictures are uint8, uint16 or float in [0, 1]; these are {images.dtype}. Convert them.")
    return images.float().mul_(1 / MAXIMUM[images.dtype])


# Geometry


class Pose(NamedTuple):
    """One of the eight ways to lay a square: transposed or not, then mirrored left to right, top to bottom, or both."""

    transposed: Bool[Tensor, " b"]
    horizontal: Bool[Tensor, " b"]
    vertical: Bool[Tensor, " b"]


def pose(turns: Int[Tensor, " b"], horizontal: Bool[Tensor, " b"], vertical: Bool[Tensor, " b"]) -> Pose:
    """`turns` quarter turns counterclockwise and then the flips, as one pose."""
    odd = turns % 2 == 1
    return Pose(odd, horizontal ^ (turns >= 2), vertical ^ ((turns == 1) | (turns == 2)))


def lay(images: Shaped[Tensor, "b c h w"], how: Pose) -> Shaped[Tensor, "b c h w"]:
    """Each sample as its pose says; only squares can be transposed."""
    if how.transposed.any():
        images = torch.where(_each(how.transposed, images), images.mT, images)
    return flip(images, how.horizontal, how.vertical)


def flip(
    images: Shaped[Tensor, "b c h w"], horizontal: Bool[Tensor, " b"], vertical: Bool[Tensor, " b"]
) -> Shaped[Tensor, "b c h w"]:
    """The marked samples mirrored left to right, top to bottom, or both."""
    for axis, marked in ((3, horizontal), (2, vertical)):
        if marked.all():
            images = images.flip(axis)
        elif marked.any():
            images = torch.where(_each(marked, images), images.flip(axis), images)
    return images


def resized_crop(
    images: Shaped[Tensor, "b c h w"],
    boxes: Int[Tensor, "b 4"],
    size: int,
    *,
    how: Pose | None = None,
    kernels: Float[Tensor, "b taps"] | None = None,
) -> Float[Tensor, "b c {size} {size}"]:
    """Each sample's box (top, left, height, width in pixels) resized to size², antialiased; then laid and blurred.

    The filter is the triangle of torchvision's `resized_crop(antialias=True)`: bilinear where the box grows, as wide
    as a result pixel where it shrinks, and it sees nothing outside the box. On a CPU, uint8 pictures of more than 48
    pixels a side are resized in 8 bits, as Pillow does it: rounded to a level, and several times faster.

    A pose and kernels (see `lay` and `convolve`) cost next to nothing here: they change the matrices, or the box.
    """
    if images.device.type != "cpu" or max(*images.shape[2:], size) <= DENSE:
        return _crop_dense(images, boxes, size, how, kernels)
    views = (_crop_bytes if images.dtype == torch.uint8 else _crop_each)(images, boxes, size, how)
    return views if kernels is None else _convolve_blocks(views, kernels)


def triangle(
    start: Int[Tensor, " b"], length: Int[Tensor, " b"], *, source: int, size: int
) -> Float[Tensor, "b {size} {source}"]:
    """The antialiased resize of one axis, a matrix a sample: row i weighs what result pixel i is made of."""
    pixels = torch.arange(source, device=start.device)
    scale = (length / size)[:, None, None]
    centre = start[:, None, None] - 0.5 + scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    weights = (1 - (pixels - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights *= ((pixels >= start[:, None]) & (pixels < (start + length)[:, None]))[:, None]
    return weights / weights.sum(2, keepdim=True)


def _crop_dense(
    images: Tensor, boxes: Tensor, size: int, how: Pose | None = None, kernels: Tensor | None = None
) -> Tensor:
    (h, w), (top, left, height, width) = images.shape[2:], boxes.to(images.device).unbind(1)
    rows = triangle(top, height, source=h, size=size)
    columns = triangle(left, width, source=w, size=size)
    if how is not None:
        # A transposed view's left and right are the crop's top and bottom.
        rows = _reversed(rows, torch.where(how.transposed, how.horizontal, how.vertical))
        columns = _reversed(columns, torch.where(how.transposed, how.vertical, how.horizontal))
    if kernels is not None:
        smooth = reflected(kernels.to(images.device), size)
        rows, columns = torch.bmm(smooth, rows), torch.bmm(smooth, columns)
    views = _sandwich(rows, unit(images), columns)
    if how is not None and how.transposed.any():
        views = torch.where(_each(how.transposed, views), views.mT, views)
    return views


def _reversed(matrices: Tensor, marked: Tensor) -> Tensor:
    return torch.where(_each(marked, matrices), matrices.flip(1), matrices) if marked.any() else matrices


def _sandwich(rows: Tensor, images: Tensor, columns: Tensor) -> Tensor:
    """rows · image · columnsᵀ, for each sample and channel."""
    b, c, h, w = images.shape
    x = torch.bmm(images.reshape(b, c * h, w), columns.mT).view(b, c, h, -1)
    # Channels side by side: one matrix a sample serves them all, where `matmul` would copy it for each.
    return torch.bmm(rows, x.transpose(1, 2).flatten(2)).unflatten(2, (c, -1)).transpose(1, 2)


def _crop_each(images: Tensor, boxes: Tensor, size: int, how: Pose | None) -> Tensor:
    views = torch.empty(*images.shape[:2], size, size)
    for view, box in zip(views, _boxes(images, boxes, how), strict=True):
        view.copy_(_interpolate(unit(box[None]), size)[0])
    return views


def _crop_bytes(images: Tensor, boxes: Tensor, size: int, how: Pose | None) -> Tensor:
    # PyTorch's 8-bit kernel is at its best with four interleaved channels. Three bytes packed into one int32 a pixel
    # are exactly that (the fourth stays empty), and arithmetic is vectorised where a transposing copy is not.
    c = images.shape[1]
    views = torch.empty(len(images), c, size, size)
    masks = torch.tensor([255, 255 << 8, 255 << 16], dtype=torch.int32).view(3, 1, 1)
    scales = masks.reciprocal()
    for first in range(0, c, 3):
        group = images[:, first : first + 3]
        mask, scale = masks[: group.shape[1]], scales[: group.shape[1]]
        packed = group[:, 0].int()
        for place in range(1, group.shape[1]):
            packed.add_(group[:, place], alpha=256**place)
        for box, view in zip(_boxes(packed, boxes, how), views[:, first : first + 3], strict=True):
            pixels = box.contiguous().view(torch.uint8).view(1, *box.shape, 4).permute(0, 3, 1, 2)
            small = _interpolate(pixels, size).permute(0, 2, 3, 1).contiguous().view(torch.int32)[..., 0]
            view.copy_(small.bitwise_and(mask)).mul_(scale)
    return views


def _boxes(images: Tensor, boxes: Tensor, how: Pose | None) -> Iterator[Tensor]:
    """Each sample's box, laid so that it only needs resizing."""
    ways = zip(*(part.tolist() for part in how), strict=True) if how else [(False,) * 3] * len(boxes)
    for x, (top, left, h, w), (transposed, horizontal, vertical) in zip(images, boxes.tolist(), ways, strict=True):
        box = x[..., top : top + h, left : left + w]
        box = box.mT if transposed else box
        axes = [-1] * horizontal + [-2] * vertical
        yield box.flip(axes) if axes else box


def _interpolate(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def affine_crop(
    images: Shaped[Tensor, "b c h w"],
    boxes: Int[Tensor, "b 4"],
    size: int,
    *,
    rotation: Float[Tensor, " b"],
    shear: Float[Tensor, " b"],
    how: Pose | None = None,
) -> Float[Tensor, "b c {size} {size}"]:
    """Each sample's box, turned about its centre and sheared, resized to size × size in the same one resampling.

    The view shows the picture turned counterclockwise by `rotation` degrees, and leaning to the right by `shear`
    degrees. What lies beyond the picture's edge is its mirror image: black corners would tell one view from another.
    A result pixel is the mean of k × k bilinear samples, k source pixels a result pixel, rounded up.
    """
    h, w = images.shape[2:]
    top, left, height, width = boxes.double().unbind(1)
    angle, lean = (rotation.double() * (math.pi / 180)), (shear.double() * (math.pi / 180)).tan()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    # From a point of the view, its centre at 0 and its sides at ±½, to the picture: what follows undoes what was done.
    turn = _matrices((angle.cos(), -angle.sin()), (angle.sin(), angle.cos())) @ _matrices((one, lean), (zero, one))
    linear = _matrices((width, zero), (zero, height))
    if how is not None:
        x, y = 1 - 2 * how.horizontal.double(), 1 - 2 * how.vertical.double()
        trade = how.transposed
        linear = linear @ _matrices(
            (torch.where(trade, zero, x), torch.where(trade, y, zero)),
            (torch.where(trade, x, zero), torch.where(trade, zero, y)),
        )
    # `grid_sample` counts the view from −1 to 1 and the picture too.
    linear = torch.diag(torch.tensor((1 / w, 1 / h), dtype=torch.float64)) @ turn @ linear
    centre = torch.stack(((2 * left + width) / w - 1, (2 * top + height) / h - 1), 1)
    theta = torch.cat((linear, centre[:, :, None]), 2).float()

    samples = (boxes[:, 2:].amax(1) / size).ceil().int()
    views = torch.empty(*images.shape[:2], size, size, device=images.device)
    for k in samples.unique().tolist():
        at = (samples == k).nonzero()[:, 0]
        grid = F.affine_grid(theta[at].to(images.device), [len(at), 1, k * size, k * size], align_corners=False)
        x = F.grid_sample(unit(images[at.to(images.device)]), grid, padding_mode="reflection", align_corners=False)
        views[at.to(images.device)] = F.avg_pool2d(x, k)
    return views


def _matrices(*rows: tuple[Tensor, Tensor]) -> Float[Tensor, "b 2 2"]:
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


# Colour


class ColorMap(NamedTuple):
    """An affine map of colour vectors a sample: x → matrix · x + pull · (the view's mean colour) + offset."""

    matrix: Float[Tensor, "b c c"]
    pull: Float[Tensor, "b c c"]
    offset: Float[Tensor, "b c"]


def color_map(
    channels: int,
    *,
    brightness: Float[Tensor, " b"],
    contrast: Float[Tensor, " b"],
    saturation: Float[Tensor, " b"],
    hue: Float[Tensor, " b"],
    gain: Float[Tensor, "b c"] | None = None,
    offset: Float[Tensor, "b c"] | None = None,
) -> ColorMap:
    """Brightness, contrast, saturation (factors; 1 changes nothing) and hue (in turns, −½..½) composed into one map.

    With luma Y, its mean Ȳ over the view, and R a turn about the gray axis of RGB that leaves Y as it was,
        x → brightness · (contrast · (Y + saturation · R(x − Y)) + (1 − contrast) · Ȳ),
    and then each channel's own gain · x + offset. Saturation and hue leave luma alone, brightness and contrast treat
    all channels alike: the four commute, and the order that torchvision draws at random has nothing to decide. Two
    things differ from torchvision. Values are clamped to [0, 1] once, at the end, not after each operation. And hue
    turns at constant luma, which is linear, where HSV turns it at constant maximum, which is not: for turns uniform in
    ±.2 of 400 CIFAR-10 pictures, HSV moves a value by 6.8 levels of 255 on average; this ends 6.0 levels from there.

    Saturation 0 is grayscale. Saturation and hue exist for three channels; for other counts pass 1 and 0, luma then is
    the mean of the channels.
    """
    neutral = bool((saturation == 1).all() and (hue == 0).all())
    if channels != 3 and not neutral:
        raise UsageError(f"Saturation, hue and grayscale need 3 channels; these pictures have {channels}.")
    # In float64: the map of a neutral sample shall be the identity to the last bit that float32 has.
    eye = torch.eye(channels, dtype=torch.float64)
    luma = torch.tensor(LUMA, dtype=torch.float64) if channels == 3 else eye.mean(0)
    gray = luma.expand(channels, channels)
    matrix = eye.expand(len(hue), -1, -1)
    if not neutral:
        turn = _each(2 * torch.pi * hue.cpu().double(), matrix)
        chroma = turn.cos() * (eye - gray) + turn.sin() * _quarter_turn()
        matrix = gray + _each(saturation.cpu().double(), matrix) * chroma
    brightness, contrast = (_each(factor.cpu().double(), matrix) for factor in (brightness, contrast))
    matrix, pull = brightness * contrast * matrix, brightness * (1 - contrast) * gray
    if gain is not None:
        matrix, pull = (gain.cpu().double()[:, :, None] * part for part in (matrix, pull))
    offset = torch.zeros(len(hue), channels) if offset is None else offset.cpu()
    return ColorMap(matrix.float(), pull.float(), offset.float())


def _quarter_turn() -> Float[Tensor, "3 3"]:
    """Drops luma and turns what is left by 90° about the gray axis, from red towards green."""
    about_gray = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / 3**0.5
    return about_gray - torch.tensor(LUMA, dtype=torch.float64) @ about_gray


def recolor(
    images: Float[Tensor, "b c h w"], colors: ColorMap, out: Float[Tensor, "b c h w"] | None = None
) -> Float[Tensor, "b c h w"]:
    """Each sample through its colour map, clamped to [0, 1]."""
    matrix, pull, offset = (part.to(images.device) for part in colors)
    x = images.flatten(2)
    offset = torch.baddbmm(offset[:, :, None], pull, x.mean(2, keepdim=True))
    # The memory of `out` is new and cold: it is written once, with what a warm block holds.
    return torch.clamp(torch.baddbmm(offset, matrix, x).view_as(images), 0, 1, out=out)


def color(
    images: Float[Tensor, "b c h w"],
    *,
    brightness: Float[Tensor, " b"],
    contrast: Float[Tensor, " b"],
    saturation: Float[Tensor, " b"],
    hue: Float[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Colour jitter: see `color_map` for the factors, their formula and where it departs from torchvision's."""
    colors = color_map(images.shape[1], brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    return recolor(images, colors)


def grayscale(images: Float[Tensor, "b 3 h w"], marked: Bool[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """The marked samples with their luma in all three channels."""
    ones = torch.ones(len(marked))
    return color(
        images, brightness=ones, contrast=ones, saturation=1 - marked.cpu().float(), hue=torch.zeros(len(marked))
    )


# Filters and the rest


def gaussian(sigma: Float[Tensor, " b"], *, radius: int) -> Float[Tensor, "b {2*radius+1}"]:
    """Normalised Gaussian weights of 2·radius + 1 pixels; beyond 4σ, where 3e-5 of them lie, they are zero."""
    at = torch.arange(-radius, radius + 1, device=sigma.device)
    sigma = sigma[:, None].clamp(min=1e-6)
    weights = torch.exp(-0.5 * (at / sigma) ** 2) * (at.abs() <= torch.ceil(4 * sigma))
    return weights / weights.sum(1, keepdim=True)


def blur(images: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], *, radius: int) -> Float[Tensor, "b c h w"]:
    """Gaussian blur of each sample, σ in pixels (0 leaves it as it is), window 2·radius + 1, edges reflected."""
    return convolve(images, gaussian(sigma, radius=radius))


def convolve(images: Float[Tensor, "b c h w"], kernels: Float[Tensor, "b taps"]) -> Float[Tensor, "b c h w"]:
    """Each sample convolved along both axes with its own symmetric kernel, edges reflected."""
    h, w = images.shape[2:]
    if images.device.type == "cpu" and max(h, w) > DENSE and min(h, w) > 2 * max(BLOCK, kernels.shape[1] // 2):
        return _convolve_blocks(images.clone(), kernels)
    kernels = kernels.to(images.device)
    return _sandwich(reflected(kernels, h), images, reflected(kernels, w))


def reflected(kernels: Float[Tensor, "b taps"], size: int) -> Float[Tensor, "b {size} {size}"]:
    """The convolution of one axis as a matrix, for symmetric kernels: what would fall beyond an edge is reflected."""
    middle = kernels.shape[1] // 2
    return (kernels[:, middle:] @ _places(middle, size).to(kernels.device)).view(-1, size, size)


@lru_cache(maxsize=32)
def _places(radius: int, size: int) -> Float[Tensor, "taps pixels"]:
    """For each tap, how often result pixel i takes pixel j with it: a row of size² numbers."""
    i = torch.arange(size)
    # How far pixel j lies from pixel i, and so do its mirror images about the first pixel and about the last.
    distances = (i[:, None] - i).abs(), (i[:, None] + i)[:, 1:], (2 * (size - 1) - i[:, None] - i)[:, :-1]
    taps = torch.arange(radius + 1)[:, None, None]
    edges = (0, 0), (1, 0), (0, 1)
    each = [F.pad((at == taps).float(), edge) for at, edge in zip(distances, edges, strict=True)]
    return torch.stack(each).sum(0).flatten(1)


def _convolve_blocks(images: Float[Tensor, "b c h w"], kernels: Float[Tensor, "b taps"]) -> Float[Tensor, "b c h w"]:
    """`convolve` in place, for the samples whose kernel has more than one tap."""
    # 16 result pixels in a row depend on 16 + 2·radius. That is one small matrix, the same for every block but the
    # first and the last, where reflection folds into it: windows are read, and blocks written, where they lie.
    middle = kernels.shape[1] // 2
    used = kernels[:, :middle] > 0
    marked, reach = used.any(1).nonzero()[:, 0].tolist(), used.sum(1).tolist()
    for sample in marked:
        radius = reach[sample]
        block = max(BLOCK, radius)
        band = reflected(kernels[sample, None, middle - radius : middle + radius + 1], block + 2 * radius + 1)[0]
        x = images[sample].transpose(0, 1).contiguous()  # rows with their channels side by side
        y = torch.empty_like(x)
        _by_blocks(band, x.flatten(1).T, y.flatten(1).T, block, radius)
        _by_blocks(band, y.flatten(0, 1), x.flatten(0, 1), block, radius)
        images[sample].copy_(x.transpose(0, 1))
    return images


def _by_blocks(
    band: Float[Tensor, "n n"], lines: Float[Tensor, "l w"], out: Float[Tensor, "l w"], block: int, radius: int
) -> None:
    """The convolution along the second axis, which may be strided, from the first rows of its matrix."""
    width, (down, across) = lines.shape[1], lines.stride()
    inner = (width - radius) // block - 1  # blocks whose windows lie inside
    rest = width - (inner + 1) * block
    head, tail = band[:block, : block + radius], band[:rest, : rest + radius].flip(0, 1)
    body = band[radius : radius + block, : block + 2 * radius]
    start = lines.storage_offset() + (block - radius) * across
    windows = lines.as_strided((inner, len(lines), body.shape[1]), (block * across, down, across), start)
    torch.mm(lines[:, : head.shape[1]], head.T, out=out[:, :block])
    torch.bmm(windows, body.T.expand(inner, -1, -1), out=out[:, block:-rest].unflatten(1, (-1, block)).transpose(0, 1))
    torch.mm(lines[:, -tail.shape[1] :], tail.T, out=out[:, -rest:])


def solarize(
    images: Float[Tensor, "b c h w"], marked: Bool[Tensor, " b"], *, threshold: float = 0.5
) -> Float[Tensor, "b c h w"]:
    """The marked samples with every value at or above the threshold inverted to 1 − value."""
    if not marked.any():
        return images
    return torch.where(_each(marked, images) & (images >= threshold), 1 - images, images)


def posterize(images: Float[Tensor, "b c h w"], bits: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Each sample rounded down to 2^bits values; 0 bits leave it as it is."""
    if not bits.any():
        return images
    levels = _each(2.0**bits, images)
    return torch.where(_each(bits > 0, images), (images * levels).floor_().clamp_(max=levels - 1) / levels, images)


def noise(
    images: Float[Tensor, "b c h w"],
    *,
    sigma: Float[Tensor, " b"],
    shot: Float[Tensor, " b"],
    seed: Int[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Gaussian noise of variance sigma² + shot² · value, then clamped: a sensor's own, and that of counted photons.

    `shot` is the deviation at value 1, so 1 / shot² photons make full brightness; the Poisson distribution of their
    count is taken for the Gaussian of its mean and variance, and the two noises for one.
    """
    if not (sigma.any() or shot.any()):
        return images
    variance = (_each(shot.float() ** 2, images) * images).add_(_each(sigma.float() ** 2, images))
    return (images + variance.sqrt_().mul_(gaussians(seed, images[0].numel(), images.device).view_as(images))).clamp_(
        0, 1
    )


def gaussians(seed: Int[Tensor, " b"], count: int, device: torch.device) -> Float[Tensor, "b {count}"]:
    """`count` standard normal numbers a seed of 32 bits: a function of seed and place, the same on every device."""
    pairs = (count + 1) // 2
    place = _scrambled(torch.arange(pairs, dtype=torch.int32, device=device))
    bits = _scrambled(place + seed.to(torch.int32).to(device)[:, None])
    radius = ((bits & 0xFFFF) + 0.5).mul_(2**-16).log_().mul_(-2).sqrt_()  # Box and Muller
    angle = (bits >> 16).float().mul_(2 * math.pi * 2**-16)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :count]


def _scrambled(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    # A hash of 32 bits that is one to one, each bit of it depending on each (its constants: C. Wellons, "lowbias32").
    x = (x ^ (x >> 16 & 0xFFFF)).mul_(0x7FEB352D)
    x = (x ^ (x >> 15 & 0x1FFFF)).mul_(0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def jpeg(images: Float[Tensor, "b c h w"], quality: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """What a JPEG of that quality (1 to 100; 0: as it was) keeps, blocks and all, without chroma subsampling.

    The tables are those of annex K of the standard, scaled as libjpeg does: luma's and chroma's for three channels, and
    luma's for each channel otherwise.
    """
    if not quality.any():
        return images
    (_, c, h, w), device = images.shape, images.device
    percent = quality.clamp(min=1).double()
    percent = torch.where(percent < 50, 5000 / percent, 200 - 2 * percent)
    kinds = (0, 1, 1) if c == 3 else (0,) * c
    table = torch.tensor([QUANTA[kind] for kind in kinds], dtype=torch.float64).view(1, c, 1, 8, 1, 8)
    table = ((table * _each(percent, table) + 50) / 100).floor().clamp(1, 255).float().to(device)

    i = torch.arange(8, dtype=torch.float64)
    cosines = (
        torch.cos((2 * i + 1) * i[:, None] * (torch.pi / 16)) / 2 * torch.where(i == 0, 0.5**0.5, 1)[:, None]
    ).float()
    cosines = cosines.to(device)
    x = 255 * images
    if c == 3:
        to_luma = torch.tensor(YCC, device=device)
        x = torch.einsum("ij,bjhw->bihw", to_luma, x)
    x[:, : 1 if c == 3 else c] -= 128
    x = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    blocks = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # [b, c, down, 8, across, 8]
    kept = torch.einsum("ui,bcdiaj,vj->bcduav", cosines, blocks, cosines).div_(table).round_().mul_(table)
    x = torch.einsum("ui,bcduav,vj->bcdiaj", cosines, kept, cosines).flatten(4, 5).flatten(2, 3)[..., :h, :w]
    x[:, : 1 if c == 3 else c] += 128
    if c == 3:
        x = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_luma), x)
    return torch.where(_each(quality > 0, images), x.div(255).clamp_(0, 1), images)


def cutout(images: Float[Tensor, "b c h w"], holes: Float[Tensor, "b 4"]) -> Float[Tensor, "b c h w"]:
    """Each sample with a hole (top, left, height, width as shares of its sides) filled with its mean colour."""
    if not holes.any():
        return images
    (h, w), holes = images.shape[2:], holes.to(images.device)
    (top, left), (bottom, right) = holes[:, :2].T, (holes[:, :2] + holes[:, 2:]).T
    rows, columns = (torch.arange(length, device=images.device) + 0.5 for length in (h, w))
    inside = ((rows / h >= top[:, None]) & (rows / h < bottom[:, None]))[:, None, :, None]
    inside = inside & ((columns / w >= left[:, None]) & (columns / w < right[:, None]))[:, None, None]
    return torch.where(inside, images.mean((2, 3), keepdim=True), images)


def normalise(
    images: Float[Tensor, "b c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b c h w"]:
    """(images − mean) / std, one number a channel or one for all."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def _each(values: Shaped[Tensor, " b"], images: Tensor) -> Shaped[Tensor, "b ..."]:
    """One value a sample, shaped to broadcast over that sample."""
    return values.to(images.device).view(-1, *[1] * (images.ndim - 1))
