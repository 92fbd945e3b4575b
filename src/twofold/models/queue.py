"""MoCo's dictionary: the keys of the last batches, oldest first out."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import UsageError


class Queue(nn.Module):
    """`keys` [size, dim] of length 1, at first random directions; a push overwrites the oldest of them."""

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        if size < 1:
            raise UsageError(f"A queue holds at least one key; got size {size}.")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # where the oldest key lies

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "n dim"]) -> None:
        """Put the directions of `rows` in place of the n oldest keys, going round at the end."""
        n, size = len(rows), len(self.keys)
        if n > size:
            raise UsageError(
                f"A queue of {size} cannot take the {n} keys of a batch. "
                f"Make it {n} or longer (several batches, for negatives that last), or the batch smaller."
            )
        at = (self.pointer + torch.arange(n, device=self.pointer.device)) % size
        self.keys[at] = F.normalize(rows.to(self.keys.dtype), dim=1)
        self.pointer.copy_((self.pointer + n) % size)
