"""Views: every operation against torchvision's or a slow reference, and the statistics of what a policy draws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms import RandomResizedCrop

from twofold import runtime
from twofold.errors import UsageError
from twofold.views import (
    BYOL,
    MOCO_V2,
    NONE,
    PRESETS,
    SIMCLR,
    SIMCLR_CIFAR,
    Policy,
    apply,
)

SMALL = replace(SIMCLR, size=32)
COLORLESS = {"saturation": 0.0, "hue": 0.0, "gray": 0.0}


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


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("radius", [1, 3, 11])
def test_blur_is_torchvisions(sigma, radius):
    x = pictures(b=2, c=4, dtype=torch.float32)
    ours = apply.blur(x, torch.full((2,), sigma), radius=radius)
    theirs = tv.gaussian_blur(x, [2 * radius + 1] * 2, [sigma] * 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


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


def test_normalise_is_torchvisions():
    x, mean, std = pictures(dtype=torch.float32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    torch.testing.assert_close(apply.normalise(x, mean, std), tv.normalize(x, mean, std))
    torch.testing.assert_close(replace(NONE, size=40, mean=mean, std=std)(x, draw()), tv.normalize(x, mean, std))


# A policy


def reference_views(policy: Policy, images: torch.Tensor, seed: int) -> torch.Tensor:
    """The same draw, one sample and one operation at a time."""
    p = policy.parameters(len(images), *images.shape[2:], draw(seed))
    views = []
    for i in range(len(images)):
        one = slice(i, i + 1)
        x = apply._crop_dense(images[one], p.boxes[one], policy.size)
        x = apply.flip(x, p.horizontal[one], p.vertical[one])
        saturation = p.saturation[one] * ~p.gray[one]
        x = apply.color(
            x, brightness=p.brightness[one], contrast=p.contrast[one], saturation=saturation, hue=p.hue[one]
        )
        x = apply.blur(x, p.sigma[one].float(), radius=max(1, policy.size // 20))
        views.append(apply.solarize(x, p.solarize[one]))
    return torch.cat(views)


@pytest.mark.parametrize(
    "policy", [*{policy for pair in PRESETS.values() for policy in pair}, replace(SIMCLR, vflip=0.5, solarize=0.5)]
)
@pytest.mark.parametrize("size", [32, 64])
def test_a_batch_is_its_samples_one_operation_at_a_time(policy, size):
    policy, x = replace(policy, size=size), pictures(b=24, h=44, w=52, dtype=torch.float32)
    torch.testing.assert_close(policy(x, draw(3)), reference_views(policy, x, 3), atol=2e-5, rtol=0)


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


def test_switching_one_operation_off_leaves_the_others_draws():
    full = SMALL.parameters(64, 32, 32, draw())
    without = replace(SMALL, flip=0.0, jitter=0.0).parameters(64, 32, 32, draw())
    for name in ("boxes", "gray", "sigma"):
        assert torch.equal(getattr(full, name), getattr(without, name))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


# Presets and refusals


def test_presets_are_the_papers():
    def jitter(p):
        return p.brightness, p.contrast, p.saturation, p.hue

    assert jitter(SIMCLR) == (0.8, 0.8, 0.8, 0.2) and SIMCLR.blur == 0.5 and SIMCLR.area == (0.08, 1.0)
    assert jitter(SIMCLR_CIFAR) == (0.4, 0.4, 0.4, 0.1) and SIMCLR_CIFAR.blur == 0.0 and SIMCLR_CIFAR.size == 32
    assert jitter(MOCO_V2) == (0.4, 0.4, 0.4, 0.1) and MOCO_V2.area == (0.2, 1.0)
    assert [jitter(p) for p in BYOL] == [(0.4, 0.4, 0.2, 0.1)] * 2
    assert [(p.blur, p.solarize) for p in BYOL] == [(1.0, 0.0), (0.1, 0.2)]
    assert all(
        (p.flip, p.jitter, p.gray) == (0.5, 0.8, 0.2) for pair in PRESETS.values() for p in pair if p is not NONE
    )


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
        {"mean": (0.5,)},
        {"mean": (0.5,), "std": (0.0,)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(UsageError, match=f"Policy.({'|'.join(wrong)})="):
        Policy(**wrong)


def test_a_crop_to_nothing_is_refused():
    with pytest.raises(UsageError, match="less than one pixel"):
        replace(SMALL, area=(1e-5, 1e-4))(pictures(), draw())


@pytest.mark.parametrize("name", ["saturation", "hue", "gray"])
def test_colour_that_needs_three_channels_is_refused_for_others_unless_off(name):
    policy = replace(SMALL, **(COLORLESS | {name: 0.2}))
    with pytest.raises(UsageError, match=rf"{name} need.* have 4.*{name}=0.0"):
        policy(pictures(c=4), draw())
    replace(policy, **COLORLESS)(pictures(c=4), draw())


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
