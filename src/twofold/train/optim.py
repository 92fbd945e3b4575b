"""Optimisers and schedules. A schedule is a function of the step, so resuming it takes no state."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twofold.errors import UsageError


def warmup_cosine(step: int, *, steps: int, warmup: int = 0) -> float:
    """Share of the peak learning rate in `step` (0 … steps−1): linear up over `warmup` steps, then half a cosine.

    The first step after warm-up has the peak; the cosine would reach 0 at step `steps`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return cosine(1, 0, progress=(step - warmup) / max(steps - warmup, 1))


def cosine(first: float, last: float, *, progress: float) -> float:
    """From `first` at progress 0 to `last` at 1, along half a cosine."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates — arXiv 1708.03888, with momentum as SimCLR, BYOL and Barlow Twins use it.

    g ← g + weight_decay·p;  q = eta·‖p‖/‖g‖;  μ ← momentum·μ + q·g;  p ← p − lr·μ.
    A group with adapt=False (biases and norms: everything with fewer than two axes) has q = 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                if group["adapt"]:
                    g.mul_(_trust(p, g, eta=group["eta"]))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(g)
                p.add_(state["momentum"], alpha=-group["lr"])
        return loss


def _trust(p: Tensor, g: Tensor, *, eta: float) -> Tensor:
    """eta·‖p‖/‖g‖, and 1 where either norm is 0."""
    weight, gradient = p.norm(), g.norm()
    ratio = eta * weight / gradient
    return torch.where((weight > 0) & (gradient > 0), ratio, torch.ones_like(ratio))


@dataclass(frozen=True)
class Optimizer:
    """Which optimiser, how fast, for how long warmed up. `lr` is the peak; nothing is scaled behind your back.

    `factors` multiply it for parts of a method: the start of a parameter's name → a factor, the longest start wins.
    {"pair.towers.text.encoder": 0.01} lets a pretrained text encoder go a hundredth as far as what is new.
    """

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    final_weight_decay: float | None = None  # where half a cosine leads it by the last step; None keeps it
    momentum: float = 0.9  # AdamW's first beta
    warmup: int = 0  # steps
    clip: float = 0.0  # largest gradient norm; 0 clips nothing
    factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.name not in ("adamw", "lars", "sgd"):
            raise UsageError(f"There is no optimizer {self.name!r}. Known: adamw, lars, sgd.")
        if not self.lr > 0:
            raise UsageError(f"The learning rate must be above 0; got {self.lr}.")
        for name in ("weight_decay", "final_weight_decay", "warmup", "clip"):
            if not (getattr(self, name) or 0) >= 0:
                raise UsageError(f"{name} must not be negative; got {getattr(self, name)}.")
        if odd := [start for start, factor in self.factors.items() if not factor >= 0]:
            raise UsageError(f"A factor of the learning rate must not be negative; that of {odd[0]} is.")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of everything in `module` that learns; axes < 2 (biases, norms, temperatures) never decay."""
        learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        names = [name for name, _ in learning]
        if idle := [start for start in self.factors if not any(name.startswith(start) for name in names)]:
            raise UsageError(f"No parameter that learns has a name that starts with {idle[0]!r}.")
        parts: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, p in learning:
            parts.setdefault(self._factor(name), []).append(p)
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in part if (p.ndim >= 2) == decays],
                "weight_decay": self.weight_decay if decays else 0.0,
                "decays": decays,
                "factor": factor,
            }
            for factor, part in parts.items()
            for decays in (True, False)
        ]
        if self.name == "lars":
            for group in groups:
                group["adapt"] = group["decays"]
            return LARS(groups, lr=self.lr, momentum=self.momentum)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.momentum, 0.999))

    def _factor(self, name: str) -> float:
        starts = [start for start in self.factors if name.startswith(start)]
        return self.factors[max(starts, key=len)] if starts else 1.0

    def schedule(self, optimizer: torch.optim.Optimizer, step: int, *, steps: int) -> float:
        """Set what `build` made to the learning rate and weight decay of `step`; returns the rate, without factors."""
        rate = self.lr * warmup_cosine(step, steps=steps, warmup=self.warmup)
        final = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
            if group["decays"]:
                group["weight_decay"] = cosine(self.weight_decay, final, progress=step / steps)
        return rate
