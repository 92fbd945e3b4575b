"""A pair method that mines its own hard negatives, anew as it learns (ANCE, arXiv 2007.00808, section 4).

Which items are hard to tell apart is all that is mined. That they meet in a batch, each with its partner, is up to
whoever makes the batches (`Batches`, `beside`): every loss then pushes them apart, and none needs to know.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from twofold.methods.base import Method, Out


class Mining(Method):
    """`method`, and for each of n items those that it should meet: `beside` [n, k], −1 for none, as there are at first.

    Every `every` steps they are replaced by `mine(method)`. They are part of the checkpoint, so that a resumed run has
    the same.
    """

    beside: Tensor
    steps: Tensor

    def __init__(
        self,
        method: Method,
        *,
        items: int,
        k: int,
        every: int,
        mine: Callable[[Method], Int64[Tensor, "n k"]],
    ):
        super().__init__()
        self.method, self.needs, self.every, self.mine = method, method.needs, every, mine
        self.sync_batchnorm = method.sync_batchnorm
        self.register_buffer("beside", torch.full((items, k), -1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def name(self) -> str:
        return self.method.name

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        return self.method(batch, draw)

    def after_step(self, progress: float) -> None:
        self.method.after_step(progress)
        self.steps += 1
        if int(self.steps) % self.every == 0:
            training = self.method.training
            with torch.no_grad():
                self.beside.copy_(self.mine(self.method.eval()))
            self.method.train(training)

    def towers(self) -> dict[str, nn.Module]:
        return self.method.towers()
