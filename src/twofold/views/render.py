"""From what was drawn to the views: which operations run, in which order, and how much of a batch at a time."""

import contextlib
import itertools
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from twofold.views import apply

CHANNELS = 16  # at most this many are drawn for, one by one
CACHED = 2**19  # values worked on at a time on a CPU

_blocks: deque[mmap.mmap] = deque(maxlen=4)  # memory of views that are gone


class Parameters(NamedTuple):
    """What was drawn for each view of a batch: everything random about it."""

    boxes: Int[Tensor, "b 4"]  # top, left, height, width in source pixels
    kept: Float[Tensor, " b"]  # the box's share of the picture
    turns: Int[Tensor, " b"]  # quarter turns, counterclockwise
    horizontal: Bool[Tensor, " b"]
    vertical: Bool[Tensor, " b"]
    rotation: Float[Tensor, " b"]  # degrees, counterclockwise
    shear: Float[Tensor, " b"]  # degrees
    sigma: Float[Tensor, " b"]  # 0 where a view is not blurred
    brightness: Float[Tensor, " b"]
    contrast: Float[Tensor, " b"]
    saturation: Float[Tensor, " b"]
    hue: Float[Tensor, " b"]
    gray: Bool[Tensor, " b"]
    gain: Float[Tensor, "b 16"]  # of each channel, as many as there are
    offset: Float[Tensor, "b 16"]
    dropped: Bool[Tensor, "b 16"]
    solarize: Bool[Tensor, " b"]
    bits: Int[Tensor, " b"]  # 0 where a view is not posterized
    noise: Float[Tensor, " b"]
    shot: Float[Tensor, " b"]
    seed: Int[Tensor, " b"]  # of the noise
    quality: Int[Tensor, " b"]  # 0 where a view is not compressed
    hole: Float[Tensor, "b 4"]  # top, left, height, width as shares of the view; 0 where there is none


@torch.no_grad()
def render(
    images: Shaped[Tensor, "b c h w"], drawn: Parameters, *, size: int, radius: int
) -> Float[Tensor, "b c {size} {size}"]:
    """The views that `drawn` describes, blurred in windows of 2·radius + 1: a function of its arguments alone.

    One resampling crops, mirrors and turns; blur, one colour map, solarize, posterize, noise, JPEG and cutout follow.
    """
    b, c, h, w = images.shape
    views = _empty((b, c, size, size), images.device)
    with one_thread() as threads:
        some = _prepared(images, drawn, views, radius)
        if images.device.type != "cpu":
            some(slice(b))
        else:
            # A few views at a time, so that they stay in the cache from one operation to the next.
            _in_threads(some, _parts(b, max(1, CACHED // (c * max(h * w, size**2))), threads), threads)
    return views


def _prepared(images: Tensor, drawn: Parameters, views: Tensor, radius: int) -> Callable[[slice], None]:
    """What makes some of the views, whichever one asks it for."""
    (_, c, _, _), size = images.shape, views.shape[-1]
    oblique = bool(drawn.rotation.any() or drawn.shear.any())
    how = apply.pose(drawn.turns, drawn.horizontal, drawn.vertical)
    kernels = apply.gaussian(drawn.sigma.float(), radius=radius) if drawn.sigma.any() else None
    colors = _colors(drawn, c)
    later = _later(drawn)

    @torch.no_grad()  # in here as well: threads do not inherit it, nor autocast
    def some(rows: slice) -> None:
        with torch.autocast(images.device.type, enabled=False):
            x, boxes, view = images[rows], drawn.boxes[rows], views[rows]
            laid = apply.Pose(*(part[rows] for part in how))
            kernel = None if kernels is None else kernels[rows]
            if oblique:
                x = apply.affine_crop(x, boxes, size, rotation=drawn.rotation[rows], shear=drawn.shear[rows], how=laid)
                x = x if kernel is None else apply.convolve(x, kernel)
            else:
                x = apply.resized_crop(x, boxes, size, how=laid, kernels=kernel)
            if colors is None:
                torch.clamp(x, 0, 1, out=view)  # a sum of weights may be 1 + 1e-7
            else:
                apply.recolor(x, apply.ColorMap(*(part[rows] for part in colors)), out=view)
            if later:
                x = view
                for operation in later:
                    x = operation(x, rows)
                view.copy_(x)

    return some


def _later(drawn: Parameters) -> list[Callable[[Tensor, slice], Tensor]]:
    """What happens to views after their colours, as far as it happens to any."""
    steps: list[tuple[bool | Tensor, Callable[[Tensor, slice], Tensor]]] = [
        (drawn.solarize.any(), lambda x, rows: apply.solarize(x, drawn.solarize[rows])),
        (drawn.bits.any(), lambda x, rows: apply.posterize(x, drawn.bits[rows])),
        (
            drawn.noise.any() or drawn.shot.any(),
            lambda x, rows: apply.noise(x, sigma=drawn.noise[rows], shot=drawn.shot[rows], seed=drawn.seed[rows]),
        ),
        (drawn.quality.any(), lambda x, rows: apply.jpeg(x, drawn.quality[rows])),
        (drawn.hole.any(), lambda x, rows: apply.cutout(x, drawn.hole[rows])),
    ]
    return [step for happens, step in steps if happens]


def _colors(drawn: Parameters, channels: int) -> apply.ColorMap | None:
    """The colour map of each view, None where all are the identity."""
    dropped = drawn.dropped[:, :channels]
    # One channel is always kept: any, which is to say, one that depends on nothing else that was drawn of the view.
    spared = torch.arange(channels) == (drawn.seed % channels)[:, None]
    dropped = dropped & ~(dropped.all(1, keepdim=True) & spared)
    colors = apply.color_map(
        channels,
        brightness=drawn.brightness,
        contrast=drawn.contrast,
        saturation=drawn.saturation.masked_fill(drawn.gray, 0),
        hue=drawn.hue,
        gain=drawn.gain[:, :channels].masked_fill(dropped, 0),
        offset=drawn.offset[:, :channels].masked_fill(dropped, 0),
    )
    same = (colors.matrix == torch.eye(channels)).all() and not colors.pull.any() and not colors.offset.any()
    return None if same else colors


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Inside, PyTorch's operations run on the thread that calls them; gives the number of threads outside.

    Splitting each of many small operations over the cores makes them wait for one another after every one, and on a
    busy machine that is all they do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)  # setting it in one thread also sets where later threads start


def _parts(count: int, most: int, threads: int) -> list[slice]:
    """`count` rows in parts of one size, at most `most`, and as many for each thread."""
    parts = min(count, math.ceil(count / most / threads) * threads)
    ends = [count * part // max(1, parts) for part in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _in_threads(work: Callable[[slice], None], parts: list[slice], threads: int) -> None:
    if threads == 1 or len(parts) < 2:
        for part in parts:
            work(part)
    else:
        list(_pool(threads, os.getpid()).map(work, parts))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept, for starting threads takes as long as several views; but not across a fork, which leaves them behind."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def _empty(shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "b c h w"]:
    # glibc maps every block of more than 32 MB anew, and its page faults cost as much as half a view: 0.30 ms each at
    # 224 pixels, 0.09 ms in huge pages, nothing where earlier views lay that nobody holds any more.
    size = 4 * math.prod(shape)
    if device.type != "cpu" or size <= 2**25 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, device=device)
    block = _left(size)
    if block is None:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    lease = memoryview(block)  # held by the tensor and by all that share its memory, and by nothing else
    weakref.finalize(lease, _blocks.append, block).atexit = False
    return torch.frombuffer(lease, dtype=torch.float32).view(shape)


def _left(size: int) -> mmap.mmap | None:
    with contextlib.suppress(IndexError):  # another thread was quicker
        for _ in range(len(_blocks)):
            if len(block := _blocks.popleft()) == size:
                return block
            _blocks.append(block)
    return None
