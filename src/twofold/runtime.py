"""Devices, seeds and processes: the only file that touches `torch.distributed`.

Randomness is counter-based. What happens in step t depends on (seed, t) and nothing that came before, so a run that is
killed and resumed, or spread over several processes, sees the very same views.
"""

import hashlib
import os
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


def cache_dir() -> Path:
    """Where decoded pictures and embedded vectors are kept: `$TWOFOLD_CACHE`, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TWOFOLD_CACHE") or Path(home) / "twofold")


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from the words that name a random decision: `seed_of(seed, "views", step)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `seed_of(*parts)`."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where no process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def uniform(rows: int, columns: int, draw: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Uniform noise in [0, 1) for the rows of the global batch that belong to this process.

    Every process holds the same generator state and draws the whole [W·rows, columns] table, then keeps its own rows:
    a sample's views do not depend on the number of processes.
    """
    rank, size = world()
    table = torch.rand(size * rows, columns, generator=draw, device=draw.device)
    return table[rank * rows : (rank + 1) * rows]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rank, size = world()
        ctx.rows = slice(rank * len(x), (rank + 1) * len(x))
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous())
        parts[rank] = x
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every process computes the same loss of the whole batch, so its own rows hold their full gradient already.
        # Data-parallel averaging divides by W afterwards; undo that here, and parameters that every process holds
        # (temperature, bias) come out right on their own.
        return gradient[ctx.rows] * world()[1]


def gather(x: Float[Tensor, "b d"]) -> Float[Tensor, "wb d"]:
    """The rows of every process, in rank order, differentiable.

    Compute the loss of the gathered rows on every process and average parameter gradients over processes (as
    data-parallel training does): the result is the gradient of one process holding the whole batch.
    """
    return x if world()[1] == 1 else _Gather.apply(x)
