"""BatchNorm over the batch of all processes.

torch has a SyncBatchNorm for GPUs alone, and other layers than the ordinary ones in its state. Here a layer stays the
layer it is, in its class, its weights and its place, and only takes its statistics from further away for a while.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from twofold import runtime
from twofold.errors import UsageError


@contextmanager
def synchronised(module: nn.Module) -> Iterator[None]:
    """Inside, every BatchNorm of `module` that trains normalises by the batch of all processes, as one process would.

    Every process must run the same layers equally often. Rows may be uneven.
    """
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)  # which does so already
    ]
    for layer in layers:
        _behind(layer)  # refuse before anything has changed
    for layer in layers:
        vars(layer)["forward"] = MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _forward(layer: Any, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
    if not layer.training or runtime.world()[1] == 1:
        return type(layer).forward(layer, x)
    y = _normalise(layer, x)
    for further in _behind(layer):
        y = further(y)
    return y


def _behind(layer: nn.Module) -> list[nn.Module]:
    """What a BatchNorm's forward does after normalising: nothing, or timm's dropout and activation."""
    if type(layer).forward is _BatchNorm.forward:
        return []
    if type(layer).__name__ == "BatchNormAct2d":
        return [layer.drop, layer.act]  # type: ignore[list-item]
    raise UsageError(
        f"How {type(layer).__name__} normalises is not known here, so it cannot see the batch of all processes. "
        "Train in one process, or set method.sync_batchnorm = False: each process then normalises by its own rows."
    )


def _normalise(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Training-mode BatchNorm by the statistics of all processes' rows; keeps the running ones as BatchNorm does."""
    wide = x if x.dtype == torch.float64 else x.float()
    # Each process's own mean and variance are exact, and so is putting them together; E[x²] − E[x]² would not be.
    own_var, own_mean = torch.var_mean(wide, dim=[0, *range(2, x.ndim)], correction=0)
    own = wide.new_full((1,), x.numel() // x.shape[1])
    n, mean = runtime.total(torch.cat((own, own * own_mean))).split((1, len(own_mean)))
    mean = mean / n
    var = runtime.total(own * (own_var + (own_mean - mean).square())) / n
    if layer.track_running_stats:
        _track(layer, mean.detach(), (var * n / (n - 1)).detach())
    scale = torch.rsqrt(var + layer.eps) * (1 if layer.weight is None else layer.weight)
    shift = (0 if layer.bias is None else layer.bias) - mean * scale
    shape = (1, -1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)


@torch.no_grad()
def _track(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    for running, value in ((layer.running_mean, mean), (layer.running_var, var)):
        assert running is not None
        running.lerp_(value.to(running.dtype), share)
