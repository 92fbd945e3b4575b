"""Devices, seeds and processes: the only file that touches `torch.distributed`.

Randomness is counter-based. What happens in step t depends on (seed, t) and nothing that came before, so a run that is
killed and resumed, or spread over several processes, sees the very same views.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def device() -> torch.device:
    """The best device here: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, for as long as the process lives; nothing on other systems.

    By default it gives tensors of megabytes back to the system at once and has them zeroed, page by page, when the next
    step asks anew: a quarter of the time of a small convolutional network's step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            ctypes.CDLL("libc.so.6").mallopt(option, value)


def give_memory_back() -> None:
    """Give the system what was freed and kept: before the peak of something is measured."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def cache_dir() -> Path:
    """Where decoded pictures and embedded vectors are kept: `$TWOFOLD_CACHE`, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TWOFOLD_CACHE") or Path(home) / "twofold")


def environment() -> dict[str, str | int]:
    """Where this runs: machine, device, threads, and the versions of what decides a result."""
    there = device()
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(there) if there.type == "cuda" else there.type,
        "processes": world()[1],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("twofold", "torch", "timm", "transformers", "numpy")},
    }


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from the words that name a random decision: `seed_of(seed, "views", step)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `seed_of(*parts)`."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


_clocks: list[Callable[[str], AbstractContextManager[None]]] = []  # none, or the one that measures


def part(name: str) -> AbstractContextManager[None]:
    """What happens inside is the part `name` of a step, to whoever measures where its time goes; else nothing."""
    return _clocks[-1](name) if _clocks else nullcontext()


@contextmanager
def measured_by(clock: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, `clock(name)` is what every `part(name)` is run in."""
    _clocks.append(clock)
    try:
        yield
    finally:
        _clocks.pop()


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where no process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(rows: int) -> slice:
    """Which of the `rows` of a global batch are this process's: contiguous, as even as can be, in rank order."""
    rank, size = world()
    return slice(rows * rank // size, rows * (rank + 1) // size)


def counts(rows: int) -> list[int]:
    """How many rows each process holds, of which this one holds `rows`. Every process must ask."""
    size = world()[1]
    if size == 1:
        return [rows]
    where = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    held = torch.empty(size, dtype=torch.long, device=where)
    with part("communicate"):
        dist.all_gather_into_tensor(held, torch.tensor([rows], device=where))
    return held.tolist()


def uniform(rows: int, columns: int, draw: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Uniform noise in [0, 1) for the rows of the global batch that belong to this process.

    Every process holds the same generator state and draws the whole table of the global batch, then keeps its own
    rows: a sample's views do not depend on the number of processes.
    """
    held, rank = counts(rows), world()[0]
    table = torch.rand(sum(held), columns, generator=draw, device=draw.device)
    return table.split(held)[rank]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        held, (rank, size) = counts(len(x)), world()
        ctx.rows = slice(sum(held[:rank]), sum(held[: rank + 1]))
        longest = max(held)
        mine = x.new_zeros(longest, *x.shape[1:])  # parts of one size is what every backend can gather
        mine[: len(x)] = x
        parts = [torch.empty_like(mine) for _ in range(size)]
        with part("communicate"):
            dist.all_gather(parts, mine)
        return torch.cat([their[:rows] for their, rows in zip(parts, held, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every process computes the same loss of the whole batch, so its own rows hold their full gradient already.
        # Data-parallel averaging divides by W afterwards; undo that here, and parameters that every process holds
        # (temperature, bias) come out right on their own.
        return gradient[ctx.rows] * world()[1]


def gather(x: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
    """The rows of every process, in rank order, differentiable; processes may hold different numbers of rows.

    Compute the loss of the gathered rows on every process and average parameter gradients over processes (as
    data-parallel training does): the result is the gradient of one process holding the whole batch.
    """
    return x if world()[1] == 1 else _Gather.apply(x)


def average(x: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """The mean over all processes, of which each may hold another number of values; 0 where none holds any.

    For losses that need no row of another process: two numbers are gathered, and gradients are as `gather` says.
    """
    shares = gather(torch.stack([x.sum(), x.new_tensor(len(x))])[None])
    return shares[:, 0].sum() / shares[:, 1].sum().clamp_min(1)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # What a process adds to the sum reaches the loss through the rows of every process.
        return _sum(gradient)


def _sum(x: Tensor) -> Tensor:
    result = x.clone()
    with part("communicate"):
        dist.all_reduce(result)
    return result


def total(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The sum of x over all processes, differentiable: what a statistic of the global batch is made of.

    For what lies before `gather` (a normalisation inside an encoder). After it, every process has all rows anyway.
    """
    return x if world()[1] == 1 else _Total.apply(x)
