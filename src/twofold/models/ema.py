"""A second network that follows the first: MoCo's key encoder, BYOL's target."""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import nn


class Ema(nn.Module):
    """A frozen copy of a module that follows it as an exponential moving average.

    Only parameters are averaged. BatchNorm's running statistics stay the copy's own: in training mode, in which the
    copy is used, it normalises by its own batch, and what it has seen there belongs to its own weights.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.copy = deepcopy(module).requires_grad_(False)
        self._followed = list(module.parameters())  # a plain list: they are not this module's own

    def forward(self, x: Any) -> Any:
        return self.copy(x)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float) -> None:
        """Each parameter ← momentum · its own value + (1 − momentum) · that of `module`."""
        self._followed = list(module.parameters())
        torch._foreach_lerp_([*self.copy.parameters()], [*self._followed], 1 - momentum)

    @torch.no_grad()
    def gap(self) -> float:
        """How far the copy lags behind what it follows, 0..: the distance of their weights over the latter's length."""
        followed: list[torch.Tensor] = [*self._followed]
        apart = torch._foreach_norm(list(torch._foreach_sub([*self.copy.parameters()], followed)))
        length = torch._foreach_norm(followed)
        return (torch.stack(apart).norm() / torch.stack(length).norm().clamp_min(1e-12)).item()


def rising(base: float, progress: float) -> float:
    """A momentum that rises from `base` to 1 by half a cosine as `progress` does from 0 to 1 (BYOL, section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2
