"""A policy declares what the encoder shall not care about, and draws views that differ in just that."""

import contextlib
import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from twofold import runtime
from twofold.errors import UsageError
from twofold.views import apply

TRIES = 10  # boxes drawn a view, of which the first that fits is taken, as in torchvision
CACHED = 2**19  # values worked on at a time on a CPU
COLUMNS = 2 * TRIES + 13  # random numbers a view, the same whatever the policy


class Parameters(NamedTuple):
    """What was drawn for each view of a batch: everything random about it."""

    boxes: Int[Tensor, "b 4"]  # top, left, height, width in source pixels
    horizontal: Bool[Tensor, " b"]
    vertical: Bool[Tensor, " b"]
    brightness: Float[Tensor, " b"]
    contrast: Float[Tensor, " b"]
    saturation: Float[Tensor, " b"]
    hue: Float[Tensor, " b"]
    gray: Bool[Tensor, " b"]
    sigma: Float[Tensor, " b"]  # 0 where a view is not blurred
    solarize: Bool[Tensor, " b"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Random views of a batch of pictures; the defaults are SimCLR's for ImageNet (arXiv 2002.05709, appendix A).

    Crop, flips, colour jitter, grayscale, blur, solarize and normalise happen in this order. Derive a variant with
    `dataclasses.replace(SIMCLR, blur=0.0)`. Pictures of other than three channels need saturation, hue and gray at 0:
    they are refused otherwise, never quietly left alone. `apply.color_map` says how colour differs from torchvision's.
    """

    size: int = 224  # pixels a side of a view
    area: tuple[float, float] = (0.08, 1.0)  # of the crop, as a share of the picture's; uniform
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop; log-uniform
    flip: float = 0.5  # probability of mirroring left to right
    vflip: float = 0.0  # probability of mirroring top to bottom
    jitter: float = 0.8  # probability of the four that follow, together
    brightness: float = 0.8  # factors are uniform in [max(0, 1 − strength), 1 + strength]
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2  # turn of the colour circle, uniform in ± this; at most ½
    gray: float = 0.2  # probability of grayscale
    blur: float = 0.5  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # its σ in pixels of the view; its window is a tenth of the view
    solarize: float = 0.0  # probability of inverting all values from ½ up
    mean: tuple[float, ...] = ()  # with std: views leave as (view − mean) / std, else in [0, 1]
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("flip", "vflip", "jitter", "gray", "blur", "solarize"):
            _check(0 <= getattr(self, name) <= 1, self, name, "a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            _check(0 <= getattr(self, name) < float("inf"), self, name, "a strength of at least 0")
        _check(0 <= self.hue <= 0.5, self, "hue", "a strength in [0, 0.5]")
        _check(self.size >= 1 and int(self.size) == self.size, self, "size", "a whole number of pixels, at least 1")
        _check(self.blur == 0 or self.size >= 2, self, "size", "at least 2 pixels where views are blurred")
        for name, top in (("area", 1), ("aspect", float("inf")), ("blur_sigma", float("inf"))):
            low, high = getattr(self, name)
            limit = " ≤ 1" if top == 1 else " < inf"
            _check(
                0 < low <= high <= top and high < float("inf"), self, name, f"(low, high) with 0 < low ≤ high{limit}"
            )
        _check(len(self.mean) == len(self.std), self, "mean", "as long as std")
        _check(all(s > 0 for s in self.std), self, "std", "positive in every channel")

    def __call__(
        self, images: Shaped[Tensor, "b c h w"], draw: torch.Generator
    ) -> Float[Tensor, "b c {self.size} {self.size}"]:
        """One view of each picture (uint8, uint16 or float in [0, 1]), float32 on the pictures' device.

        The same state of `draw` gives the same views; with several processes, each passes its rows of the batch.
        """
        b, _, h, w = _shape(images)
        with runtime.part("views"):
            return self.render(images, self.parameters(b, h, w, draw))

    def parameters(self, count: int, height: int, width: int, draw: torch.Generator) -> Parameters:
        """What is random about `count` views of pictures of height × width."""
        if self.area[1] * height * width < 1:
            raise UsageError(
                f"area={self.area} of a picture of {height}×{width} pixels is less than one pixel. Raise area."
            )
        # A fixed number of columns: switching one operation off leaves what is drawn for the others as it was.
        noise = runtime.uniform(count, COLUMNS, draw).cpu().double()
        areas, aspects, rest = noise.split((TRIES, TRIES, COLUMNS - 2 * TRIES), dim=1)
        top, left, flip, vflip, jitter, *factors, hue, gray, blur, sigma, solarize = rest.unbind(1)
        jittered = jitter < self.jitter
        brightness, contrast, saturation = (
            torch.where(jittered, _between(max(0.0, 1 - strength), 1 + strength, u), 1.0)
            for strength, u in zip((self.brightness, self.contrast, self.saturation), factors, strict=True)
        )
        return Parameters(
            boxes=self._boxes(height, width, areas, aspects, top, left),
            horizontal=flip < self.flip,
            vertical=vflip < self.vflip,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=torch.where(jittered, _between(-self.hue, self.hue, hue), 0.0),
            gray=gray < self.gray,
            sigma=torch.where(blur < self.blur, _between(*self.blur_sigma, sigma), 0.0),
            solarize=solarize < self.solarize,
        )

    def _boxes(
        self, height: int, width: int, areas: Tensor, aspects: Tensor, top: Tensor, left: Tensor
    ) -> Int[Tensor, "b 4"]:
        """The first of the drawn boxes that fits; where none does, the largest central one of an allowed aspect."""
        low, high = self.aspect
        area = height * width * _between(*self.area, areas)
        aspect = _between(math.log(low), math.log(high), aspects).exp()
        w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        first = fits.int().argmax(1, keepdim=True)
        w, h = (side.gather(1, first)[:, 0] for side in (w, h))
        top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
        drawn = torch.stack((top, left, h, w), 1).long()

        h0, w0 = max(1, min(height, round(width / low))), max(1, min(width, round(height * high)))
        central = torch.tensor(((height - h0) // 2, (width - w0) // 2, h0, w0), device=drawn.device)
        return torch.where(fits.any(1, keepdim=True), drawn, central)

    @torch.no_grad()
    def render(
        self, images: Shaped[Tensor, "b c h w"], drawn: Parameters
    ) -> Float[Tensor, "b c {self.size} {self.size}"]:
        """The views that `drawn` describes: a function of its arguments alone."""
        b, c, h, w = _shape(images)
        self._check_channels(c)
        _check_range(images)
        views = _empty((b, c, self.size, self.size), images.device)
        colors = apply.color_map(
            c,
            brightness=drawn.brightness,
            contrast=drawn.contrast,
            saturation=drawn.saturation.masked_fill(drawn.gray, 0),
            hue=drawn.hue,
        )
        kernels = apply.gaussian(drawn.sigma.float(), radius=max(1, self.size // 20))

        @torch.no_grad()  # in here as well: threads do not inherit it, nor autocast
        def some(rows: slice) -> None:
            with torch.autocast(images.device.type, enabled=False):
                x = apply.resized_crop(images[rows], drawn.boxes[rows], self.size)
                x = apply.flip(x, drawn.horizontal[rows], drawn.vertical[rows])
                if self.jitter or self.gray:
                    x = apply.recolor(x, apply.ColorMap(*(part[rows] for part in colors)))
                blurred = drawn.sigma[rows].nonzero()[:, 0]
                if len(blurred) == len(x):
                    x = apply.convolve(x, kernels[rows])
                elif len(blurred):
                    x[blurred] = apply.convolve(x[blurred], kernels[rows][blurred])
                x = apply.solarize(x, drawn.solarize[rows])
                torch.clamp(x, 0, 1, out=views[rows])  # a sum of weights may be 1 + 1e-7

        # On a CPU a few views at a time, so that they stay in its cache from one operation to the next.
        values = b * c * max(h * w, self.size**2)
        count = min(b, math.ceil(values / CACHED)) if images.device.type == "cpu" else 1
        step = math.ceil(b / max(1, count))
        _in_threads(some, [slice(at, at + step) for at in range(0, b, step or 1)])
        return apply.normalise(views, self.mean, self.std) if self.mean else views

    def _check_channels(self, channels: int) -> None:
        colors = {"gray": self.gray, "saturation": self.jitter * self.saturation, "hue": self.jitter * self.hue}
        needed = [name for name, strength in colors.items() if strength]
        if channels != 3 and needed:
            raise UsageError(
                f"{', '.join(needed)} need pictures of 3 channels; these have {channels}. "
                f"Switch them off: replace(policy, {', '.join(f'{name}=0.0' for name in needed)})."
            )
        if len(self.mean) not in (0, 1, channels):
            raise UsageError(
                f"mean and std have {len(self.mean)} numbers and the pictures {channels} channels. "
                "Give one a channel, or one for all."
            )


def _in_threads(work: Callable[[slice], None], parts: list[slice]) -> None:
    # One thread a part and core: splitting each of the many small operations over the cores instead makes them wait for
    # one another after every one, and on a busy machine that is all they do.
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2:
        for part in parts:
            work(part)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # setting it in one thread also sets where later threads start


def _empty(shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "b c h w"]:
    # glibc maps every block of more than 32 MB anew, and its page faults cost as much as half a view: 0.30 ms each at
    # 224 pixels, 0.09 ms in huge pages.
    count = math.prod(shape)
    if device.type != "cpu" or 4 * count <= 2**25 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, device=device)
    block = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.float32).view(shape)


def _between(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u


def _check(holds: bool, policy: Policy, name: str, expected: str) -> None:
    if not holds:
        raise UsageError(f"Policy({name}={getattr(policy, name)!r}): {name} must be {expected}.")


def _shape(images: Tensor) -> torch.Size:
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise UsageError(f"A policy takes pictures [b, c, h, w]; these are {list(images.shape)}.")
    return images.shape


def _check_range(images: Tensor) -> None:
    if images.dtype.is_floating_point and len(images):
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # nor where they are NaN
            raise UsageError(
                f"Float pictures lie in [0, 1]; these in [{low:.3g}, {high:.3g}]. Divide by their largest possible "
                "value, or pass them as uint8 or uint16."
            )
