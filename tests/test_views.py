"""Views: every operation against torchvision's or a slow reference, and the statistics of what a policy draws."""

import io
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from twofold import runtime
from twofold.errors import DataError, UsageError
from twofold.methods import METHODS
from twofold.train.train import policies_of
from twofold.views import (
    BYOL,
    DINO,
    IJEPA,
    MOCO_V2,
    NONE,
    OPERATIONS,
    PRESETS,
    REASONS,
    SIMCLR,
    SIMCLR_CIFAR,
    Policy,
    apply,
    policies,
)

PAGE = Path(__file__).parents[1] / "docs" / "views.md"
SMALL = replace(SIMCLR, size=32)
COLORLESS = {"saturation": 0.0, "hue": 0.0, "gray": 0.0}
FULL = Policy(  # everything that any number of channels can have
    size=32,
    **COLORLESS,
    vflip=0.5,
    turns=0.7,
    gain=0.3,
    offset=0.1,
    channel_drop=0.2,
    solarize=0.3,
    posterize=0.3,
    noise=(0.0, 0.1),
    poisson=(0.0, 0.1),
    jpeg=0.5,
    cutout=0.5,
)


def draw(seed: int = 0) -> torch.Generator:
    return runtime.generator(seed)


def pictures(b: int = 8, c: int = 3, h: int = 40, w: int = 40, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Smooth random pictures with some noise, as pictures are."""
    x = torch.nn.functional.interpolate(torch.rand(b, c, 6, 6, generator=draw()), (h, w), mode="bicubic")
    x = (0.9 * x + 0.1 * torch.rand(b, c, h, w, generator=draw(1))).clamp(0, 1)
    if dtype.is_floating_point:
        return x.to(dtype)
    return (x * apply.MAXIMUM[dtype]).round().to(torch.int32).to(dtype)


def random_boxes(b: int, h: int, w: int) -> torch.Tensor:
    return Policy(aspect=(0.3, 3.0)).parameters(b, h, w, draw()).boxes


# Each operation against torchvision's


def reference_crop(images, boxes, size):
    return torch.cat(
        [
            tv.resized_crop(x[None], *box, [size, size], antialias=True)
            for x, box in zip(images, boxes.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("size", [12, 32, 90])
@pytest.mark.parametrize(("h", "w"), [(40, 40), (31, 48), (70, 110)])
@pytest.mark.parametrize("crop", [apply.resized_crop, apply._crop_dense])
def test_resized_crop_is_torchvisions_antialiased_one(crop, h, w, size):
    x, boxes = pictures(c=2, h=h, w=w, dtype=torch.float32), random_boxes(8, h, w)
    torch.testing.assert_close(crop(x, boxes, size), reference_crop(x, boxes, size), atol=1e-5, rtol=0)


def test_crop_of_one_pixel_is_that_pixel_everywhere():
    x = pictures(b=1, dtype=torch.float32)
    view = apply.resized_crop(x, torch.tensor([[7, 9, 1, 1]]), 16)
    torch.testing.assert_close(view, x[:, :, 7:8, 9:10].expand(1, 3, 16, 16))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("size", [50, 64, 100])
def test_crop_in_bytes_is_torchvisions_in_bytes_and_near_the_exact_one(channels, size):
    x, boxes = pictures(c=channels, h=64, w=80), random_boxes(8, 64, 80)
    views = apply.resized_crop(x, boxes, size)
    assert (255 * views - reference_crop(x, boxes, size)).abs().max() <= 1.001  # both kernels round
    assert (views - apply._crop_dense(x, boxes, size)).abs().max() < 1.1 / 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [32, 64])
def test_full_crop_of_the_same_size_returns_every_level(dtype, size):
    x = pictures(c=5, h=size, w=size, dtype=dtype)
    whole = torch.tensor([[0, 0, size, size]]).expand(8, 4)
    expected = x.to(torch.float64) / apply.MAXIMUM.get(dtype, 1)
    torch.testing.assert_close(apply.resized_crop(x, whole, size).double(), expected, atol=1e-6, rtol=0)


def test_crop_of_uint16_keeps_what_8_bits_cannot():
    x = torch.tensor([0, 1, 2, 3], dtype=torch.uint16).view(1, 1, 2, 2).repeat(1, 1, 32, 32)
    views = replace(NONE, size=64)(x, draw())
    assert (views * 65535).round().unique().tolist() == [0, 1, 2, 3]


def test_crop_does_not_care_about_memory_layout():
    x, boxes = pictures(h=64, w=64), random_boxes(8, 64, 64)
    last = x.contiguous(memory_format=torch.channels_last)
    for size in (32, 64):
        assert torch.equal(apply.resized_crop(x, boxes, size), apply.resized_crop(last, boxes, size))


def test_flip_mirrors_the_marked_samples_only():
    x = pictures(b=4, dtype=torch.float32)
    flipped = apply.flip(x, torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False]))
    expected = [tv.horizontal_flip(tv.vertical_flip(x[0])), tv.vertical_flip(x[1]), tv.horizontal_flip(x[2]), x[3]]
    assert torch.equal(flipped, torch.stack(expected))
    assert torch.equal(apply.flip(x, torch.ones(4) > 0, torch.zeros(4) > 0), tv.horizontal_flip(x))


def poses(b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turns and flips, all sixteen combinations as far as b goes."""
    i = torch.arange(b)
    return i % 4, i // 4 % 2 == 1, i // 8 % 2 == 1


def reference_lay(x, turns, horizontal, vertical):
    x = torch.rot90(x, int(turns), (1, 2))
    x = tv.horizontal_flip(x) if horizontal else x
    return tv.vertical_flip(x) if vertical else x


def test_a_pose_is_quarter_turns_and_then_flips():
    x, how = pictures(b=16, dtype=torch.float32), poses(16)
    expected = torch.stack([reference_lay(*one) for one in zip(x, *how, strict=True)])
    assert torch.equal(apply.lay(x, apply.pose(*how)), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 4, 16])
@pytest.mark.parametrize("size", [24, 56])  # by matrices, and sample by sample
def test_a_crop_laid_and_blurred_at_once_is_one_after_the_other(size, channels, dtype):
    x, boxes, how = pictures(b=16, c=channels, h=50, w=44, dtype=dtype), random_boxes(16, 50, 44), poses(16)
    kernels = apply.gaussian(torch.linspace(0, 2, 16), radius=5)
    at_once = apply.resized_crop(x, boxes, size, how=apply.pose(*how), kernels=kernels)
    crops = reference_crop(apply.unit(x), boxes, size)
    laid = [reference_lay(*one) for one in zip(crops, *how, strict=True)]
    expected = torch.stack([reference_convolve(*one) for one in zip(laid, kernels, strict=True)])
    rounded = 1.1 / 255 if dtype == torch.uint8 and max(size, 50) > apply.DENSE else 1e-5
    torch.testing.assert_close(at_once, expected, atol=rounded, rtol=0)


def reference_affine(x, box, size, rotation, shear, turns, horizontal, vertical):
    """Point by point: where a sample of the view lies in the picture, and its four neighbours there."""
    (c, h, w), (top, left, height, width) = x.shape, box
    k = math.ceil(max(height, width) / size)
    angle, lean = math.radians(rotation), math.tan(math.radians(shear))
    view = np.zeros((c, size, size))
    for i, j in np.ndindex(k * size, k * size):
        u, v = (j + 0.5) / (k * size) - 0.5, (i + 0.5) / (k * size) - 0.5
        u, v = (-u if horizontal else u), (-v if vertical else v)
        for _ in range(turns):  # a point of a picture turned counterclockwise lies a quarter turn clockwise of it
            u, v = -v, u
        u, v = u * width, v * height
        u = u + lean * v
        px = left + width / 2 + u * math.cos(angle) - v * math.sin(angle) - 0.5
        py = top + height / 2 + u * math.sin(angle) + v * math.cos(angle) - 0.5
        for y, x_ in np.ndindex(2, 2):
            row, column = math.floor(py) + y, math.floor(px) + x_
            weight = (1 - abs(py - row)) * (1 - abs(px - column))
            view[:, i // k, j // k] += weight * x[:, mirrored(row, h), mirrored(column, w)] / k**2
    return view


def mirrored(at: int, length: int) -> int:
    """The pixel that stands where the picture, mirrored at its edges again and again, has position `at`."""
    at %= 2 * length
    return at if at < length else 2 * length - 1 - at


@pytest.mark.parametrize("size", [9, 20])  # 9: two and more source pixels a result pixel
def test_affine_crop_is_what_it_is_point_by_point(size):
    b = 8
    x, boxes, how = pictures(b=b, c=2, h=22, w=26, dtype=torch.float32), random_boxes(b, 22, 26), poses(16)
    how = tuple(part[8 - b // 2 : 8 + b // 2] for part in how)
    rotation, shear = torch.linspace(-170, 120, b), torch.linspace(-25, 30, b)
    ours = apply.affine_crop(x, boxes, size, rotation=rotation, shear=shear, how=apply.pose(*how))
    parts = (part.tolist() for part in (boxes, rotation, shear, *how))
    values = zip(x.double().numpy(), *parts, strict=True)
    for view, (one, box, angle, lean, *laid) in zip(ours, values, strict=True):
        expected = reference_affine(one, box, size, angle, lean, *laid)
        # A point on the seam between a pixel and its mirror image may round to either side of it.
        np.testing.assert_allclose(view.numpy(), expected, atol=2e-4)


def test_rotation_is_torchvisions_where_it_stays_in_the_picture():
    x = pictures(b=4, h=48, w=48, dtype=torch.float32)
    whole, angles = torch.tensor([[0, 0, 48, 48]]).expand(4, 4), torch.tensor([-90.0, -20.0, 10.0, 45.0])
    ours = apply.affine_crop(x, whole, 48, rotation=angles, shear=torch.zeros(4))
    for view, y, angle in zip(ours, x, angles.tolist(), strict=True):
        theirs = tv.rotate(y, angle, interpolation=tv.InterpolationMode.BILINEAR)
        torch.testing.assert_close(view[:, 10:-10, 10:-10], theirs[:, 10:-10, 10:-10], atol=1e-4, rtol=0)


def test_an_affine_crop_without_rotation_is_the_crop():
    x, boxes = pictures(b=8, h=60, w=60, dtype=torch.float32), random_boxes(8, 60, 60)
    straight = apply.affine_crop(x, boxes, 64, rotation=torch.zeros(8), shear=torch.zeros(8))
    inner = (..., slice(6, -6), slice(6, -6))  # at its edge, the plain crop does not see what lies beyond
    torch.testing.assert_close(straight[inner], apply.resized_crop(x, boxes, 64)[inner], atol=1e-4, rtol=0)


def neutral(b: int, **factors: torch.Tensor) -> dict[str, torch.Tensor]:
    same = {name: torch.ones(b) for name in ("brightness", "contrast", "saturation")}
    return same | {"hue": torch.zeros(b)} | factors


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_factor_is_torchvisions(name):
    x = 0.3 + 0.3 * pictures(dtype=torch.float32)  # room on both sides: a clamp never intervenes
    factors = torch.linspace(0.2, 1.5, 8)
    ours = apply.color(x, **neutral(8, **{name: factors}))
    theirs = torch.stack([getattr(tv, f"adjust_{name}")(y, f.item()) for y, f in zip(x, factors, strict=True)])
    assert theirs.min() > 0 and theirs.max() < 1
    assert (ours - theirs).abs().max() < 0.1 / 255  # .299 against .2989


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_brightness_and_contrast_apply_to_any_channel_count(channels):
    x = 0.3 + 0.3 * pictures(c=channels, dtype=torch.float32)
    b, k = torch.linspace(0.5, 1.4, 8).view(8, 1, 1, 1), torch.linspace(1.2, 0.4, 8).view(8, 1, 1, 1)
    ours = apply.color(x, **neutral(8, brightness=b.flatten(), contrast=k.flatten()))
    torch.testing.assert_close(ours, b * (k * x + (1 - k) * x.mean((1, 2, 3), keepdim=True)), atol=1e-6, rtol=0)


def test_any_order_of_the_four_colour_operations_is_the_composed_map():
    x = 0.4 + 0.2 * pictures(dtype=torch.float32)
    factors = neutral(8) | {
        "brightness": torch.linspace(0.7, 1.2, 8),
        "contrast": torch.linspace(1.3, 0.5, 8),
        "saturation": torch.linspace(0.4, 1.3, 8),
        "hue": torch.linspace(-0.2, 0.2, 8),
    }
    at_once = apply.color(x, **factors)
    for order in (list(factors), list(factors)[::-1], ["hue", "contrast", "brightness", "saturation"]):
        y = x
        for name in order:
            y = apply.color(y, **neutral(8, **{name: factors[name]}))
        torch.testing.assert_close(y, at_once, atol=2e-6, rtol=0)


def test_hue_turns_the_colour_hexagon_at_constant_luma():
    """In float64 and polar coordinates: α = R − (G + B)/2 and β = √3/2 (G − B) turn, Y stays."""
    x = 0.4 + 0.2 * torch.rand(8, 3, 4, 4, generator=draw())
    turns = torch.linspace(-0.5, 0.5, 8)
    ours = apply.color(x, **neutral(8, hue=turns))
    to_polar = np.array([apply.LUMA, [1, -0.5, -0.5], [0, math.sqrt(0.75), -math.sqrt(0.75)]])
    for before, after, turn in zip(x, ours, turns.tolist(), strict=True):
        y, alpha, beta = to_polar @ before.flatten(1).double().numpy()
        chroma = (alpha + 1j * beta) * np.exp(2j * math.pi * turn)
        expected = np.linalg.solve(to_polar, np.stack((y, chroma.real, chroma.imag)))
        np.testing.assert_allclose(after.flatten(1).numpy(), expected, atol=2e-6)


def test_hue_turns_the_way_hsv_does():
    """Red goes to green, green to blue, blue to red; and a picture comes nearer to HSV's than it was."""
    colors = 0.4 + 0.2 * torch.eye(3).view(3, 3, 1, 1)
    thirds = apply.color(colors, **neutral(3, hue=torch.full((3,), 1 / 3)))
    assert thirds.flatten(1).argmax(1).tolist() == [1, 2, 0]

    x = 0.25 + 0.5 * pictures(dtype=torch.float32)
    for turn in (-0.2, -0.1, 0.05, 0.1, 0.2):
        hsv = torch.stack([tv.adjust_hue(y, turn) for y in x])
        ours = apply.color(x, **neutral(8, hue=torch.full((8,), turn)))
        assert (ours - hsv).abs().mean() < min(0.05, (hsv - x).abs().mean())


def test_grayscale_is_luma_in_every_channel():
    x = pictures(b=2, dtype=torch.float32)
    gray = apply.grayscale(x, torch.tensor([True, False]))
    luma = (x[0].double() * torch.tensor(apply.LUMA, dtype=torch.float64)[:, None, None]).sum(0)
    torch.testing.assert_close(gray[0].double(), luma.expand(3, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(gray[0], tv.rgb_to_grayscale(x[0], num_output_channels=3), atol=1e-4, rtol=0)
    torch.testing.assert_close(gray[1], x[1], atol=1e-6, rtol=0)


def reference_convolve(x, kernel):
    """One multiply-add a tap, one axis at a time."""
    radius = len(kernel) // 2
    padded = torch.nn.functional.pad(x[None].double(), (radius,) * 4, mode="reflect")[0]
    rows = sum(k * padded[:, at : at + x.shape[1]] for at, k in enumerate(kernel.double()))
    return sum(k * rows[:, :, at : at + x.shape[2]] for at, k in enumerate(kernel.double())).float()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("radius", [1, 3, 11])
@pytest.mark.parametrize(("h", "w"), [(40, 40), (64, 50), (33, 81)])  # as matrices, and in blocks
def test_blur_is_torchvisions(h, w, sigma, radius):
    x = pictures(b=2, c=4, h=h, w=w, dtype=torch.float32)
    ours = apply.blur(x, torch.full((2,), sigma), radius=radius)
    theirs = tv.gaussian_blur(x, [2 * radius + 1] * 2, [sigma] * 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("h", "w"), [(17, 30), (49, 49), (64, 112), (70, 53)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_convolution_by_matrices_and_in_blocks_is_tap_by_tap(channels, h, w):
    x = pictures(b=6, c=channels, h=h, w=w, dtype=torch.float32)
    kernels = apply.gaussian(torch.tensor([0.0, 0.1, 0.4, 0.9, 1.7, 3.0]), radius=8)
    expected = torch.stack([reference_convolve(y, kernel) for y, kernel in zip(x, kernels, strict=True)])
    torch.testing.assert_close(apply.convolve(x, kernels), expected, atol=1e-6, rtol=0)
    by_matrices = apply._sandwich(apply.reflected(kernels, h), x, apply.reflected(kernels, w))
    torch.testing.assert_close(by_matrices, expected, atol=1e-6, rtol=0)


def test_blur_takes_a_sigma_a_sample_and_0_is_none():
    x = pictures(b=3, dtype=torch.float32)
    blurred = apply.blur(x, torch.tensor([0.0, 1.0, 2.0]), radius=5)
    assert torch.equal(blurred[0], x[0])
    for y, z, sigma in zip(x[1:], blurred[1:], (1.0, 2.0), strict=True):
        torch.testing.assert_close(z, tv.gaussian_blur(y, [11, 11], [sigma, sigma]), atol=1e-4, rtol=0)


def test_solarize_inverts_from_the_threshold_up():
    x = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 2, 2).repeat(2, 3, 1, 1)
    y = apply.solarize(x, torch.tensor([True, False]))
    assert y[0, 0].flatten().tolist() == [0.0, 0.25, 0.5, 0.0]
    assert torch.equal(y[0], tv.solarize(x[0], 0.5)) and torch.equal(y[1], x[1])


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_gain_and_offset_are_each_channels_own(channels):
    x = 0.3 + 0.3 * pictures(c=channels, dtype=torch.float32)
    gain, offset = (
        low + (high - low) * torch.rand(8, channels, generator=draw()) for low, high in ((0.7, 1.4), (-0.1, 0.1))
    )
    factors = neutral(8, brightness=torch.linspace(0.8, 1.2, 8), contrast=torch.linspace(1.2, 0.6, 8))
    ours = apply.recolor(x, apply.color_map(channels, **factors, gain=gain, offset=offset))
    expected = apply.color(x, **factors) * gain[:, :, None, None] + offset[:, :, None, None]
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_posterize_is_torchvisions(bits):
    x = pictures(b=2, c=4, dtype=torch.float32)
    x[0, 0, 0, 0] = 1.0
    ours = apply.posterize(x, torch.tensor([bits, 0]))
    torch.testing.assert_close(ours[0], tv.posterize(x[0], bits))
    assert torch.equal(ours[1], x[1])


def reference_gaussians(seed: int, count: int) -> list[float]:
    def scrambled(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    pairs = math.ceil(count / 2)
    bits = [scrambled((scrambled(place) + seed) % 2**32) for place in range(pairs)]
    radius = [math.sqrt(-2 * math.log((x % 65536 + 0.5) / 65536)) for x in bits]
    angle = [2 * math.pi * (x >> 16) / 65536 for x in bits]
    both = ([r * f(a) for r, a in zip(radius, angle, strict=True)] for f in (math.cos, math.sin))
    return [value for half in both for value in half][:count]


def test_noise_is_a_function_of_seed_and_place():
    seeds = torch.tensor([0, 1, 12345, 2**31 - 1])
    ours = apply.gaussians(seeds, 51, torch.device("cpu"))
    torch.testing.assert_close(
        ours, torch.tensor([reference_gaussians(s, 51) for s in seeds.tolist()]), atol=1e-4, rtol=0
    )


def test_noise_is_normal_and_independent_between_places_and_seeds():
    n = 40_000
    z = apply.gaussians(torch.tensor([7, 8, 2**30]), n, torch.device("cpu"))
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    for one in z:
        assert largest_gap(one, quantiles) < 1.95 * math.sqrt(2 / n)
    others = torch.stack((*z, z[0].roll(1), z[0].roll(n // 2), z[0] ** 2, z[1].roll(1) ** 2))
    assert others.corrcoef().fill_diagonal_(0)[:5].abs().max() < 4.5 / math.sqrt(n)


def test_noise_has_the_variance_of_its_two_sources():
    x = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1).expand(3, 1, 200, 200)
    sigma, shot = torch.tensor([0.0, 0.02, 0.05]), torch.tensor([0.05, 0.0, 0.05])
    noisy = apply.noise(x, sigma=sigma, shot=shot, seed=torch.tensor([1, 2, 3]))
    deviation = (noisy - x).flatten(1).std(1)
    torch.testing.assert_close(deviation, (sigma**2 + shot**2 * x[:, 0, 0, 0]).sqrt(), rtol=0.02, atol=0)
    assert (noisy - x).flatten(1).mean(1).abs().max() < 0.001


def test_shot_noise_is_nearly_poissons():
    photons, value = 200, 0.3
    x = torch.full((1, 1, 200, 200), value)
    ours = apply.noise(x, sigma=torch.zeros(1), shot=torch.tensor([photons**-0.5]), seed=torch.tensor([5]))
    counts = torch.poisson(torch.full((40_000,), photons * value), generator=draw()) / photons
    assert largest_gap(ours.flatten(), counts + (torch.rand(40_000, generator=draw()) - 0.5) / photons) < 0.025


def reference_jpeg(x, quality):
    """Block by block and coefficient by coefficient, in float64."""
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    (c, h, w), color = x.shape, len(x) == 3
    x = 255 * x.astype(float)
    ycc = np.array(apply.YCC)
    x = np.einsum("ij,jhw->ihw", ycc, x) if color else x
    x = np.pad(x, ((0, 0), (0, -h % 8), (0, -w % 8)), mode="edge")
    basis = np.array(
        [[(0.5 if u else 0.125**0.5) * math.cos((2 * i + 1) * u * math.pi / 16) for i in range(8)] for u in range(8)]
    )
    for channel in range(c):
        chroma = color and channel > 0
        table = np.clip(np.floor((np.array(apply.QUANTA[int(chroma)]) * percent + 50) / 100), 1, 255)
        level = 0 if chroma else 128
        for top, left in np.ndindex(x.shape[1] // 8, x.shape[2] // 8):
            block = x[channel, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
            block[:] = basis.T @ (np.round(basis @ (block - level) @ basis.T / table) * table) @ basis + level
    x = x[:, :h, :w]
    return np.clip((np.einsum("ij,jhw->ihw", np.linalg.inv(ycc), x) if color else x) / 255, 0, 1)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_jpeg_is_what_it_is_block_by_block(channels):
    x = pictures(b=4, c=channels, h=21, w=32, dtype=torch.float32)
    ours = apply.jpeg(x, torch.tensor([0, 5, 50, 95]))
    assert torch.equal(ours[0], x[0])
    for view, one, quality in zip(ours[1:], x[1:], (5, 50, 95), strict=True):
        different = (view.numpy() - reference_jpeg(one.numpy(), quality)).__abs__() > 1e-4
        assert different.mean() < 0.02  # a coefficient on the edge between two levels takes its block along


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_is_libjpegs(quality):
    x = pictures(b=1, h=64, w=64)
    ours = apply.jpeg(apply.unit(x), torch.tensor([quality]))[0]
    file = io.BytesIO()
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling=0)
    theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    before = apply.unit(x)[0]
    loss = (before - theirs).abs().mean()
    assert abs((before - ours).abs().mean() / loss - 1) < 0.03
    assert (ours - theirs).abs().mean() < (loss / 8 if quality < 90 else loss / 2)  # theirs rounds YCC to levels first


def test_cutout_fills_a_hole_with_the_mean_colour():
    x = pictures(b=3, c=2, h=20, w=20, dtype=torch.float32)
    y = apply.cutout(x, torch.tensor([[0.1, 0.5, 0.3, 0.25], [0.0] * 4, [0.0, 0.0, 1.0, 1.0]]))
    expected = x[0].clone()
    expected[:, 2:8, 10:15] = x[0].mean((1, 2))[:, None, None]
    torch.testing.assert_close(y[0], expected)
    assert torch.equal(y[1], x[1])
    torch.testing.assert_close(y[2], x[2].mean((1, 2), keepdim=True).expand(2, 20, 20))


def test_normalise_is_torchvisions():
    x, mean, std = pictures(dtype=torch.float32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    torch.testing.assert_close(apply.normalise(x, mean, std), tv.normalize(x, mean, std))
    torch.testing.assert_close(replace(NONE, size=40, mean=mean, std=std)(x, draw()), tv.normalize(x, mean, std))


# A policy


def reference_views(policy: Policy, images: torch.Tensor, seed: int) -> torch.Tensor:
    """The same draw, one sample and one operation at a time, in plain steps."""
    p, c = policy.parameters(len(images), *images.shape[2:], draw(seed)), images.shape[1]
    views = []
    for i, image in enumerate(apply.unit(images)):
        one = slice(i, i + 1)
        if policy.rotation or policy.shear:
            x = apply.affine_crop(image[None], p.boxes[one], policy.size, rotation=p.rotation[one], shear=p.shear[one])[
                0
            ]
        else:
            x = tv.resized_crop(image, *p.boxes[i].tolist(), [policy.size] * 2, antialias=True)
        x = reference_lay(x, p.turns[i], p.horizontal[i], p.vertical[i])
        kernel = apply.gaussian(p.sigma[one].float(), radius=max(1, policy.size // 20))[0]
        x = reference_convolve(x, kernel) if p.sigma[i] else x
        x = reference_color(x, *(part[i].item() for part in (p.brightness, p.contrast, p.saturation, p.hue, p.gray)))
        dropped = p.dropped[i, :c].tolist()
        if all(dropped):
            dropped[int(p.seed[i]) % c] = False
        for channel, gone in enumerate(dropped):
            x[channel] = 0 if gone else p.gain[i, channel] * x[channel] + p.offset[i, channel]
        x = x.clamp(0, 1)
        x = tv.solarize(x, 0.5) if p.solarize[i] else x
        x = tv.posterize(x, policy.posterize_bits) if p.bits[i] else x
        z = apply.gaussians(p.seed[one], x.numel(), x.device).view_as(x)
        x = (x + (p.noise[i] ** 2 + p.shot[i] ** 2 * x).sqrt().float() * z).clamp(0, 1)
        x = torch.from_numpy(reference_jpeg(x.numpy(), p.quality[i].item())).float() if p.quality[i] else x
        views.append(apply.cutout(x[None], p.hole[one]))
    return torch.cat(views)


def reference_color(x, brightness, contrast, saturation, hue, gray):
    """Its formula as it stands in `color_map`, for a picture."""
    if len(x) == 3:
        luma = (x * torch.tensor(apply.LUMA)[:, None, None]).sum(0)
        turned = apply.color_map(3, **neutral(1, hue=torch.tensor([hue]))).matrix[0]
        chroma = torch.einsum("ij,jhw->ihw", turned, x - luma)
        x = luma + saturation * (not gray) * chroma
    mean = luma.mean() if len(x) == 3 else x.mean()
    return brightness * (contrast * x + (1 - contrast) * mean)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [32, 64])
def test_a_batch_is_its_samples_one_operation_at_a_time(name, size):
    x = pictures(b=12, h=44, w=52, dtype=torch.float32)
    for policy in dict.fromkeys(PRESETS[name]):
        policy = replace(policy, size=size, jpeg=0.0)
        torch.testing.assert_close(policy(x, draw(3)), reference_views(policy, x, 3), atol=5e-5, rtol=0)


@pytest.mark.parametrize("channels", range(1, 17))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("size", [16, 52])
def test_every_operation_at_once_for_any_channel_count_and_depth(size, dtype, channels):
    policy, x = replace(FULL, size=size), pictures(b=6, c=channels, h=30, w=34, dtype=dtype)
    views, expected = policy(x, draw(3)), reference_views(policy, x, 3)
    # Where a step of posterize or of a JPEG's coefficients is met, the last bit decides between two levels.
    rounded = 1.5 / 255 if dtype == torch.uint8 and max(size, 34) > apply.DENSE else 1e-4
    assert ((views - expected).abs() > rounded).float().mean() < 0.12
    exact = policy.without("posterize", "jpeg", "solarize")
    torch.testing.assert_close(exact(x, draw(3)), reference_views(exact, x, 3), atol=2 * rounded, rtol=0)


@pytest.mark.parametrize("channels", range(1, 17))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_any_channel_count_and_depth_gives_floats_between_0_and_1(channels, dtype):
    policy = SMALL if channels == 3 else replace(SMALL, **COLORLESS)
    views = policy(pictures(c=channels, dtype=dtype), draw())
    assert views.shape == (8, channels, 32, 32) and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1
    assert views.std() > 0.05


def test_more_than_32_mb_of_views_are_views_as_well():
    policy, x = replace(SIMCLR, size=512), pictures(b=11, h=16, w=16)
    views = policy(x, draw())
    assert views.nbytes > 2**25 and torch.equal(views[:2], policy.render(x[:2], parameters_of(policy, x, slice(2))))
    views[0] = 0.0  # ordinary, writable memory


def parameters_of(policy, images, rows):
    drawn = policy.parameters(len(images), *images.shape[2:], draw())
    return type(drawn)(*(part[rows] for part in drawn))


def test_the_same_generator_state_gives_the_same_views_and_the_next_state_others():
    x, generator = pictures(), draw(5)
    first, second = SMALL(x, generator), SMALL(x, generator)
    assert torch.equal(first, SMALL(x, draw(5))) and not torch.equal(first, second)


def test_views_do_not_touch_the_global_generator():
    state = torch.get_rng_state()
    SMALL(pictures(), draw())
    assert torch.equal(state, torch.get_rng_state())


def test_views_of_a_batch_do_not_depend_on_the_number_of_processes(monkeypatch):
    x = pictures(b=8)
    whole = SMALL(x, draw(2))
    monkeypatch.setattr(runtime, "counts", lambda rows: [rows] * 4)
    for rank in range(4):
        monkeypatch.setattr(runtime, "world", lambda rank=rank: (rank, 4))
        rows = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(SMALL(x[rows], draw(2)), whole[rows], atol=1e-6, rtol=0)


DRAWN = {  # what an operation alone decides
    "crop": ("boxes", "kept"),
    "flip": ("horizontal",),
    "vflip": ("vertical",),
    "blur": ("sigma",),
    "channel_drop": ("dropped",),
    "posterize": ("bits",),
    "poisson": ("shot",),
    "jpeg": ("quality",),
    "cutout": ("hole",),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_switching_one_operation_off_leaves_the_others_draws(name):
    everything = replace(FULL, saturation=0.5, hue=0.1, gray=0.2, rotation=20.0, shear=5.0)
    assert everything.operations == tuple(OPERATIONS)
    full, without = (p.parameters(64, 32, 32, draw()) for p in (everything, everything.without(name)))
    changed = [part for part in full._fields if not torch.equal(getattr(full, part), getattr(without, part))]
    assert changed == list(DRAWN.get(name, (name,)))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_memory_of_views_is_used_again_only_when_nobody_holds_them():
    x, policy = pictures(b=1).expand(60, -1, -1, -1), replace(NONE, size=224, flip=0.5)  # 36 MB: past malloc's limit
    first = policy(x, draw(0))
    kept, row, address = first.clone(), first[7].numpy(), first.data_ptr()
    assert not torch.equal(policy(x, draw(1)), first) and torch.equal(first, kept)
    del first
    assert policy(x, draw(1)).data_ptr() != address and np.array_equal(row, kept[7].numpy())
    del row
    assert address in {views.data_ptr() for views in [policy(x, draw(seed)) for seed in range(3)]}


def test_views_do_not_depend_on_the_number_of_threads_and_leave_it_as_it_was(threads):
    policy, x = replace(SIMCLR, size=96), pictures(b=40, h=96, w=96)
    views = []
    for count in (1, 2, 3):
        threads(count)
        views.append(policy(x, draw()))
        assert torch.get_num_threads() == count
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], views[2])
    with pytest.raises(UsageError):
        policy(x.int(), draw())
    assert torch.get_num_threads() == 3


def test_views_carry_no_gradient_in_any_thread():
    x = pictures(b=40, h=96, w=96, dtype=torch.float32).requires_grad_()
    assert not replace(SIMCLR, size=96)(x, draw()).requires_grad


def test_views_under_autocast_are_the_same():
    x = pictures(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = SMALL(x, draw())
    assert torch.equal(views, SMALL(x, draw()))


def test_none_is_the_central_square_resized():
    x = pictures(h=40, w=60, dtype=torch.float32)
    expected = tv.resize(tv.center_crop(x, [40, 40]), [32, 32], antialias=True)
    torch.testing.assert_close(replace(NONE, size=32)(x, draw()), expected, atol=1e-5, rtol=0)


def test_an_empty_batch_gives_an_empty_batch():
    assert SMALL(torch.empty(0, 3, 40, 40, dtype=torch.uint8), draw()).shape == (0, 3, 32, 32)


# What is drawn


def largest_gap(a, b) -> float:
    """Kolmogorov and Smirnov's distance between two samples."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    at = np.concatenate((a, b))
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


@pytest.mark.parametrize(("h", "w"), [(32, 32), (50, 80), (20, 300)])  # the last one often falls back
def test_boxes_are_distributed_as_torchvisions(h, w):
    n = 4000
    ours = SIMCLR.parameters(n, h, w, draw()).boxes.numpy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = torch.empty(1, h, w)
        theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for column in range(4):  # a distance of 1.95·√(2/n) = 0.044 is met by chance once in a thousand times
        assert largest_gap(ours[:, column], theirs[:, column]) < 0.044
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= h).all() and (ours[:, 1] + ours[:, 3] <= w).all()


def test_area_is_uniform_and_aspect_log_uniform_where_every_box_fits():
    n = 20_000
    boxes = replace(SIMCLR, area=(0.1, 0.4)).parameters(n, 1000, 1000, draw()).boxes.double()
    area, aspect = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    even = (np.arange(n) + 0.5) / n
    assert largest_gap(area, 0.1 + 0.3 * even) < 0.014
    assert largest_gap(aspect.log(), math.log(4 / 3) * (2 * even - 1)) < 0.014


def test_where_no_box_fits_the_largest_central_one_of_an_allowed_aspect_is_taken():
    boxes = replace(SIMCLR, area=(1.0, 1.0)).parameters(5, 30, 400, draw()).boxes
    assert boxes.tolist() == [[0, 180, 30, 40]] * 5


def test_probabilities_are_met_and_choices_are_independent():
    n = 20_000
    p = Policy(flip=0.3, vflip=0.7, jitter=0.6, gray=0.25, blur=0.4, solarize=0.1).parameters(n, 64, 64, draw())
    chosen = {
        0.3: p.horizontal,
        0.7: p.vertical,
        0.6: p.brightness != 1,
        0.25: p.gray,
        0.4: p.sigma > 0,
        0.1: p.solarize,
    }
    for probability, marked in chosen.items():
        assert abs(marked.double().mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / n)
    jittered = p.brightness != 1
    columns = [*chosen.values(), *p.boxes.T, *(f * jittered for f in (p.brightness, p.contrast, p.saturation, p.hue))]
    correlation = torch.stack([c.double() for c in columns])[:, jittered].corrcoef().fill_diagonal_(0).nan_to_num()
    correlation[6:10, 6:10] = 0  # sides and corners of one box do depend on each other
    assert correlation.abs().max() < 4.5 / math.sqrt(0.6 * n)


def test_factors_are_uniform_about_1_and_jitter_is_all_or_nothing():
    n = 20_000
    p = Policy(brightness=0.4, contrast=1.5, saturation=0.8, hue=0.2, jitter=0.5, blur=1.0).parameters(n, 9, 9, draw())
    on = p.brightness != 1
    assert ((p.contrast != 1) == on).all() and ((p.saturation != 1) == on).all() and ((p.hue != 0) == on).all()
    even = (np.arange(n) + 0.5) / n
    for values, low, high in (
        (p.brightness[on], 0.6, 1.4),
        (p.contrast[on], 0.0, 2.5),
        (p.saturation[on], 0.2, 1.8),
        (p.hue[on], -0.2, 0.2),
        (p.sigma, 0.1, 2.0),
    ):
        assert largest_gap(values, low + (high - low) * even) < 0.02


def test_what_new_operations_draw_has_their_distributions():
    n = 20_000
    policy = replace(
        FULL, turns=0.6, rotation=30.0, shear=10.0, gain=0.4, offset=0.2, channel_drop=0.3, noise=(0.02, 0.1)
    )
    p = replace(policy, poisson=(0.0, 0.2), jpeg=0.5, jpeg_quality=(30, 34), cutout_area=(0.1, 0.3)).parameters(
        n, 64, 64, draw()
    )
    even = (np.arange(n) + 0.5) / n
    for values, low, high in (
        (p.rotation, -30, 30),
        (p.shear, -10, 10),
        (p.gain[:, 0], 0.6, 1.4),
        (p.gain[:, 15], 0.6, 1.4),
        (p.offset[:, 7], -0.2, 0.2),
        (p.noise, 0.02, 0.1),
        (p.shot, 0.0, 0.2),
    ):
        assert largest_gap(values, low + (high - low) * even) < 0.014
    parts = p.turns.bincount() / n
    torch.testing.assert_close(parts, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.014, rtol=0)
    parts = p.quality.bincount(minlength=35)[[0, 30, 31, 32, 33, 34]] / n
    torch.testing.assert_close(parts, torch.tensor([0.5, *[0.1] * 5]), atol=0.014, rtol=0)
    assert abs(p.dropped.double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (16 * n))
    top, left, height, width = p.hole[p.hole.any(1)].T
    m = len(top)
    assert abs(m / n - 0.5) < 0.014
    assert largest_gap(height * width, 0.1 + 0.2 * even[:: n // m]) < 0.03
    assert largest_gap((width / height).log2(), -1 + 2 * even[:: n // m]) < 0.03
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= 1 and (left + width).max() <= 1


def test_draws_of_samples_views_and_columns_are_independent():
    n = 20_000
    noise = draw()
    first, second = (replace(FULL, rotation=90.0).parameters(n, 64, 64, noise) for _ in range(2))
    columns = [
        c.double() for p in (first, second) for c in (*p.gain.T, *p.offset.T, p.rotation, p.noise, p.seed, p.turns)
    ]
    table = torch.stack((*columns, *(column.roll(1) for column in columns)))
    assert table.corrcoef().fill_diagonal_(0).abs().max() < 5.5 / math.sqrt(n)  # of ten thousand pairs


def test_one_channel_is_always_kept_and_each_is_at_times():
    x = torch.full((64, 3, 4, 4), 0.5)
    policy = replace(NONE, size=4, channel_drop=1.0)
    lit = policy(x, draw()).amax((2, 3)) > 0
    assert (lit.sum(1) == 1).all() and lit.any(0).all()
    assert (policy(x[:, :1], draw()) == 0.5).all()


# A policy as a value


def test_operations_are_those_that_are_on():
    assert NONE.operations == ()
    assert IJEPA.operations == ("crop",)
    assert SIMCLR.operations == ("crop", "flip", "blur", "brightness", "contrast", "saturation", "hue", "gray")
    assert "hue" not in replace(SIMCLR, jitter=0.0).operations


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_and_without_leave_that_operation_and_the_others(name):
    everything = replace(FULL, saturation=0.5, hue=0.1, gray=0.2, rotation=20.0, shear=5.0)
    assert everything.only(name).operations == (name,)
    assert everything.without(name).operations == tuple(other for other in OPERATIONS if other != name)
    assert everything.only(name).without(name) == everything.only()
    x = pictures(b=2)
    torch.testing.assert_close(everything.only()(x, draw(1)), everything.only()(x, draw(2)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_strength_goes_from_off_to_what_does_the_most(name):
    x, bare = pictures(b=16), SMALL.only()
    changes = []
    for strength in (0.0, 0.1, 0.5, 1.0):
        policy = bare.scaled(name, strength)
        assert policy.operations == ((name,) if strength else ())
        changes.append((policy(x, draw()) - bare(x, draw())).abs().mean().item())
    assert changes[0] == 0 and changes == sorted(changes) and changes[-1] > 0.005
    assert SMALL.scaled("hue", 0.5) == replace(SMALL, hue=0.25)  # and jitter stays as it was


def test_a_policy_prints_what_is_on_and_what_another_has_otherwise():
    assert str(IJEPA) == "size 224, area 0.3–1, aspect 0.75–1.33"
    assert str(SIMCLR.only("hue", "blur")) == "size 224, blur 0.5, blur_sigma 0.1–2, jitter 0.8, hue 0.2"
    assert SIMCLR.diff(replace(SIMCLR, hue=0.1, area=(0.2, 1.0))) == "area 0.08–1 → 0.2–1, hue 0.2 → 0.1"
    assert SIMCLR.diff(SIMCLR) == ""


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_policy_comes_back_from_its_file(tmp_path, suffix):
    for policy in (FULL, replace(SIMCLR, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)), NONE):
        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
        policy.save(tmp_path / f"policy{suffix}")
        assert Policy.load(tmp_path / f"policy{suffix}") == policy
        assert policies(str(tmp_path / f"policy{suffix}")) == (policy,)


def test_a_file_may_hold_a_policy_a_view_and_only_what_is_not_simclrs(tmp_path):
    pair = tmp_path / "pair.toml"
    pair.write_text("[[view]]\nblur = 1.0\n\n[[view]]\nblur = 0\narea = [0.2, 1]\n")
    assert policies(str(pair)) == (replace(SIMCLR, blur=1.0), replace(SIMCLR, blur=0.0, area=(0.2, 1.0)))
    with pytest.raises(DataError, match="2 policies"):
        Policy.load(pair)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.toml", "brightnes = 0.1", UsageError, "'brightnes'.*Did you mean 'brightness'"),
        ("a.toml", "hue = 0.7", UsageError, "hue must be"),
        ("a.toml", "hue = 'much'", UsageError, "numbers"),
        ("a.toml", "area = 0.5", UsageError, "area must be"),
        ("a.toml", "hue = ", DataError, "a.toml is no TOML"),
        ("a.json", "[1]", DataError, "holds no policy"),
        ("a.yaml", "", UsageError, ".toml or .json"),
        ("missing.json", None, DataError, "missing.json: No such file"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(tmp_path, name, text, error, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        Policy.load(tmp_path / name)


def test_unknown_names_are_refused_with_the_nearest():
    for call in (SIMCLR.only, SIMCLR.without, lambda name: SIMCLR.scaled(name, 0.5)):
        with pytest.raises(UsageError, match=r"operation 'hve'.*Did you mean 'hue'"):
            call("hve")
    with pytest.raises(UsageError, match=r"policy 'satelite'.*Did you mean 'satellite'"):
        policies("satelite")
    with pytest.raises(UsageError, match=r"from 0 \(off\) to 1"):
        SIMCLR.scaled("hue", 1.5)


def test_a_view_says_what_was_drawn_for_it():
    x = pictures(b=64)
    policy = replace(FULL, saturation=0.5, hue=0.1, gray=0.2)
    drawn = policy.parameters(64, *x.shape[2:], draw())
    for i in range(64):
        words = policy.describe(drawn, i)
        assert f"crop {100 * drawn.kept[i].item():.0f} %" in words
        assert ("vflip" in words) == bool(drawn.vertical[i]) and ("gray" in words) == bool(drawn.gray[i])
        assert ("hue" in words) == bool(drawn.hue[i]) and ("jpeg" in words) == bool(drawn.quality[i])
    assert NONE.describe(NONE.parameters(1, 40, 40, draw()), 0) == ""


# Presets and refusals


def test_presets_are_the_papers():
    def jitter(p):
        return p.brightness, p.contrast, p.saturation, p.hue

    assert jitter(SIMCLR) == (0.8, 0.8, 0.8, 0.2) and SIMCLR.blur == 0.5 and SIMCLR.area == (0.08, 1.0)
    assert jitter(SIMCLR_CIFAR) == (0.4, 0.4, 0.4, 0.1) and SIMCLR_CIFAR.blur == 0.0 and SIMCLR_CIFAR.size == 32
    assert jitter(MOCO_V2) == (0.4, 0.4, 0.4, 0.1) and MOCO_V2.area == (0.2, 1.0)
    assert [jitter(p) for p in BYOL] == [(0.4, 0.4, 0.2, 0.1)] * 2
    assert [(p.blur, p.solarize) for p in BYOL] == [(1.0, 0.0), (0.1, 0.2)]
    assert [p.size for p in DINO] == [224] * 2 + [96] * 8
    kinds = list(PRESETS)[: list(PRESETS).index("simclr")]
    papers = [name for name in PRESETS if name not in (*kinds, "mae", "ijepa")]
    for p in (p for name in papers for p in PRESETS[name]):
        assert (p.flip, p.jitter, p.gray) == (0.5, 0.8, 0.2)


@pytest.mark.parametrize(  # the table of solo-learn's CIFAR-10 recipes: jitter, blur, solarize
    ("name", "strengths", "blur", "solarize"),
    [
        ("solo-simclr", (0.8, 0.8, 0.8, 0.2), (0.5, 0.5), (0.0, 0.0)),
        ("solo-moco-v2", (0.4, 0.4, 0.4, 0.1), (0.5, 0.5), (0.0, 0.0)),
        ("solo-byol", (0.4, 0.4, 0.2, 0.1), (0.0, 0.0), (0.0, 0.2)),
        ("solo-barlow", (0.4, 0.4, 0.2, 0.1), (0.0, 0.0), (0.0, 0.2)),
    ],
)
def test_presets_are_solo_learns(name, strengths, blur, solarize):
    pair = PRESETS[name]
    assert all((p.size, p.area) == (32, (0.08, 1.0)) for p in pair)
    assert all((p.brightness, p.contrast, p.saturation, p.hue) == strengths for p in pair)
    assert tuple(p.blur for p in pair) == blur and tuple(p.solarize for p in pair) == solarize


def test_every_preset_has_its_reasons_in_two_sentences():
    assert PRESETS.keys() == REASONS.keys()
    for reasons in REASONS.values():
        assert reasons.count(". ") == 1 and reasons.endswith(".")


def test_every_preset_operation_and_field_is_on_the_page():
    page = " ".join(PAGE.read_text().split())
    for name, reasons in REASONS.items():
        assert f"`{name}`" in page and reasons in page
    for name in (*OPERATIONS, *(field.name for field in fields(Policy))):
        assert f"`{name}" in page, name


@pytest.mark.parametrize("channels", [1, 13])
def test_presets_for_other_than_colour_pictures_take_them(channels):
    for name in ("multispectral", "xray", "none", "mae", "ijepa"):
        for policy in PRESETS[name]:
            assert policy(pictures(b=2, c=channels, dtype=torch.uint16), draw()).shape == (2, channels, 224, 224)


def test_a_method_of_two_views_takes_one_policy_for_both_and_refuses_ten():
    assert policies_of("simclr", "mae", {}) == PRESETS["mae"] * 2
    assert policies_of("byol", None, {}) == BYOL
    assert policies_of("lejepa", "dino", {}) == DINO
    for name in METHODS.keys() - {"lejepa", "mae", "ijepa", "clip", "siglip"}:
        if METHODS[name].needs == ("image",):
            with pytest.raises(UsageError, match=f"{name} compares 2 views; the policy 'dino' has 10"):
                policies_of(name, "dino", {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 1},  # nothing to reflect for the blur
        {"area": (0.0, 0.0)},
        {"area": (-0.1, 1.0)},
        {"area": (0.5, 0.2)},
        {"area": (0.5, 1.2)},
        {"area": (0.5, math.nan)},
        {"aspect": (2.0, 1.0)},
        {"aspect": (0.0, 1.0)},
        {"aspect": (1.0, math.inf)},
        {"flip": 1.5},
        {"vflip": -0.1},
        {"jitter": math.nan},
        {"gray": 2.0},
        {"blur": -1.0},
        {"solarize": 1.01},
        {"brightness": -0.1},
        {"contrast": math.inf},
        {"hue": 0.6},
        {"blur_sigma": (2.0, 0.1)},
        {"blur_sigma": (0.0, 0.1)},
        {"turns": 1.1},
        {"rotation": 181.0},
        {"shear": -1.0},
        {"gain": -0.1},
        {"offset": 1.5},
        {"channel_drop": math.nan},
        {"posterize": -0.1},
        {"posterize_bits": 0},
        {"noise": (0.2, 0.1)},
        {"poisson": (-0.1, 0.1)},
        {"jpeg_quality": (0, 50)},
        {"jpeg_quality": (50.5, 60)},
        {"cutout_area": (0.1, 1.1)},
        {"cutout": 2.0},
        {"mean": (0.5,)},
        {"mean": (0.5,), "std": (0.0,)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(UsageError, match=f"Policy.({'|'.join(wrong)})="):
        Policy(**wrong)


def test_a_crop_to_nothing_is_refused():
    tiny = replace(SMALL, area=(1e-5, 1e-4))
    for refused in (lambda: tiny(pictures(), draw()), lambda: tiny.check(3, 40, 40)):
        with pytest.raises(UsageError, match="less than one pixel"):
            refused()
    tiny.check(3, 1000, 1000)


@pytest.mark.parametrize("name", ["saturation", "hue", "gray"])
def test_colour_that_needs_three_channels_is_refused_for_others_unless_off(name):
    policy = replace(SMALL, **(COLORLESS | {name: 0.2}))
    for refused in (lambda: policy(pictures(c=4), draw()), lambda: policy.check(4, 40, 40)):
        with pytest.raises(UsageError, match=rf"{name} need.* have 4.*{name}=0.0.*--policy.{name} 0"):
            refused()
    replace(policy, **COLORLESS)(pictures(c=4), draw())


def test_operations_on_single_channels_are_refused_for_more_than_are_drawn_for():
    with pytest.raises(UsageError, match=r"gain draw.* 16 at most.* have 17.*without\('gain'\)"):
        replace(NONE, gain=0.1)(pictures(c=17), draw())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"\[b, c, h, w\]"),
        (torch.zeros(2, 3, 0, 8), r"\[b, c, h, w\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "torch.int64"),
        (torch.full((2, 3, 8, 8), 255.0), r"\[0, 1\].*uint8"),
        (torch.full((2, 3, 8, 8), math.nan), r"\[0, 1\]"),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(images, message):
    with pytest.raises(UsageError, match=message):
        SMALL(images, draw())


def test_means_of_another_channel_count_are_refused():
    with pytest.raises(UsageError, match="2 numbers and the pictures 3 channels"):
        replace(SMALL, mean=(0.5, 0.5), std=(0.5, 0.5))(pictures(), draw())
