"""Batched image operations, each with its own explicit parameters for every sample. Nothing here is random.

An operation takes pictures and one parameter a sample, on any device, and returns float pictures in [0, 1]. Resizing
and recolouring are linear, which is where the speed comes from: a resized crop is two small matrices a sample, and
all colour operations of a sample are one affine map of its colour vectors.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from twofold.errors import UsageError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601; torchvision writes .2989, a difference of at most 1e-4
DENSE = 48  # pixels a side up to which, on a CPU, two dense matrices beat one call a sample
MAXIMUM = {torch.uint8: 255, torch.uint16: 65535}


def unit(images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Pictures as float32 in [0, 1]: uint8 over 255, uint16 over 65535, floats as they are."""
    if images.dtype.is_floating_point:
        return images.float()
    if images.dtype not in MAXIMUM:
        raise UsageError(f"Pictures are uint8, uint16 or float in [0, 1]; these are {images.dtype}. Convert them.")
    return images.float().mul_(1 / MAXIMUM[images.dtype])


# Geometry


def resized_crop(
    images: Shaped[Tensor, "b c h w"], boxes: Int[Tensor, "b 4"], size: int
) -> Float[Tensor, "b c {size} {size}"]:
    """Each sample's box (top, left, height, width in pixels) resized to size × size, antialiased.

    The filter is the triangle of torchvision's `resized_crop(antialias=True)`: bilinear where the box grows, as wide
    as a result pixel where it shrinks, and it sees nothing outside the box. On a CPU, uint8 pictures of more than 48
    pixels a side are resized in 8 bits, as Pillow does it: rounded to a level, and several times faster.
    """
    if images.device.type != "cpu" or max(*images.shape[2:], size) <= DENSE:
        return _crop_dense(images, boxes, size)
    if images.dtype == torch.uint8:
        return _crop_bytes(images, boxes, size)
    crops = (
        x[None, :, top : top + h, left : left + w] for x, (top, left, h, w) in zip(images, boxes.tolist(), strict=True)
    )
    return torch.cat([_interpolate(unit(crop), size) for crop in crops])


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


def _crop_dense(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    (b, c, h, w), (top, left, height, width) = images.shape, boxes.to(images.device).unbind(1)
    rows = triangle(top, height, source=h, size=size)
    columns = triangle(left, width, source=w, size=size)
    x = torch.bmm(unit(images).reshape(b, c * h, w), columns.mT).view(b, c, h, size)
    return torch.matmul(rows[:, None], x)


def _crop_bytes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    # PyTorch's 8-bit kernel is at its best with four interleaved channels. Three bytes packed into one int32 a pixel
    # are exactly that (the fourth stays empty), and arithmetic is vectorised where a transposing copy is not.
    b, c = images.shape[:2]
    views = torch.empty(b, c, size, size)
    small = torch.empty(b, size, size, 4, dtype=torch.uint8)
    for first in range(0, c, 3):
        group = images[:, first : first + 3]
        packed = group[:, 0].int()
        for place in range(1, group.shape[1]):
            packed.add_(group[:, place], alpha=256**place)
        for x, (top, left, h, w), y in zip(packed, boxes.tolist(), small, strict=True):
            box = x[None, top : top + h, left : left + w].contiguous().view(torch.uint8).view(1, h, w, 4)
            y.copy_(_interpolate(box.permute(0, 3, 1, 2), size)[0].permute(1, 2, 0))
        views[:, first : first + 3] = small.permute(0, 3, 1, 2)[:, : group.shape[1]]
    return views.mul_(1 / 255)


def _interpolate(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


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


# Colour


class ColorMap(NamedTuple):
    """An affine map of colour vectors a sample: x → matrix · x + shade · (the view's mean colour) in every channel."""

    matrix: Float[Tensor, "b c c"]
    shade: Float[Tensor, "b c"]


def color_map(
    channels: int,
    *,
    brightness: Float[Tensor, " b"],
    contrast: Float[Tensor, " b"],
    saturation: Float[Tensor, " b"],
    hue: Float[Tensor, " b"],
) -> ColorMap:
    """Brightness, contrast, saturation (factors; 1 changes nothing) and hue (in turns, −½..½) composed into one map.

    With luma Y, its mean Ȳ over the view, and R a turn about the gray axis of RGB that leaves Y as it was,
        x → brightness · (contrast · (Y + saturation · R(x − Y)) + (1 − contrast) · Ȳ).
    Saturation and hue leave luma alone, brightness and contrast treat all channels alike: the four commute, and the
    order that torchvision draws at random has nothing to decide. Two things differ from torchvision. Values are
    clamped to [0, 1] once, at the end, not after each operation. And hue turns at constant luma, which is linear,
    where HSV turns it at constant maximum, which is not: for turns uniform in ±.2 of 400 CIFAR-10 pictures, HSV moves
    a value by 6.8 levels of 255 on average, and this ends 6.0 levels from there.

    Saturation 0 is grayscale. Saturation and hue exist for three channels; for other counts pass 1 and 0, luma then is
    the mean of the channels.
    """
    neutral = bool((saturation == 1).all() and (hue == 0).all())
    if channels != 3 and not neutral:
        raise UsageError(f"Saturation, hue and grayscale need 3 channels; these pictures have {channels}.")
    # In float64: the map of a neutral sample shall be the identity to the last bit that float32 has.
    eye = torch.eye(channels, dtype=torch.float64)
    luma = torch.tensor(LUMA, dtype=torch.float64) if channels == 3 else eye.mean(0)
    matrix = eye.expand(len(hue), -1, -1)
    if not neutral:
        gray = luma.expand(3, 3)
        turn = _each(2 * torch.pi * hue.cpu().double(), matrix)
        chroma = turn.cos() * (eye - gray) + turn.sin() * _quarter_turn()
        matrix = gray + _each(saturation.cpu().double(), matrix) * chroma
    brightness, contrast = brightness.cpu().double()[:, None], contrast.cpu().double()[:, None]
    matrix = (brightness * contrast)[:, None] * matrix
    return ColorMap(matrix.float(), (brightness * (1 - contrast) * luma).float())


def _quarter_turn() -> Float[Tensor, "3 3"]:
    """Drops luma and turns what is left by 90° about the gray axis, from red towards green."""
    about_gray = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / 3**0.5
    return about_gray - torch.tensor(LUMA, dtype=torch.float64) @ about_gray


def recolor(images: Float[Tensor, "b c h w"], colors: ColorMap) -> Float[Tensor, "b c h w"]:
    """Each sample through its colour map, clamped to [0, 1]."""
    matrix, shade = (part.to(images.device) for part in colors)
    x = images.flatten(2)
    offset = (shade * x.mean(2)).sum(1)
    return torch.baddbmm(offset[:, None, None], matrix, x).clamp_(0, 1).view_as(images)


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
    # One multiply-add a tap over shifted slices: no library convolution is near it for one channel and few taps.
    radius = kernels.shape[1] // 2
    used = int((kernels[:, :radius] > 0).any(0).sum())
    if used == 0:
        return images
    taps = kernels[:, radius - used : radius + used + 1].to(images.device).T[..., None, None, None]
    x = F.pad(images, (used,) * 4, mode="reflect")
    for axis in (2, 3):
        length = images.shape[axis]
        total = x.narrow(axis, 0, length) * taps[0]
        for at in range(1, len(taps)):
            total.addcmul_(x.narrow(axis, at, length), taps[at])
        x = total
    return x


def solarize(
    images: Float[Tensor, "b c h w"], marked: Bool[Tensor, " b"], *, threshold: float = 0.5
) -> Float[Tensor, "b c h w"]:
    """The marked samples with every value at or above the threshold inverted to 1 − value."""
    if not marked.any():
        return images
    return torch.where(_each(marked, images) & (images >= threshold), 1 - images, images)


def normalise(
    images: Float[Tensor, "b c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b c h w"]:
    """(images − mean) / std, one number a channel or one for all."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def _each(values: Shaped[Tensor, " b"], images: Tensor) -> Shaped[Tensor, "b ..."]:
    """One value a sample, shaped to broadcast over that sample."""
    return values.to(images.device).view(-1, *[1] * (images.ndim - 1))
