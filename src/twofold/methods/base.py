"""What every method is: a module whose forward pass is the algorithm box of its paper."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import UsageError


class Out(NamedTuple):
    """What one step of a method gives.

    `loss` is what is minimised; `z` [b, d] is what is watched for collapse; `chance` is the loss of embeddings that
    know nothing (NaN where the objective has no such level); `parts` are further figures for the log.
    """

    loss: Float[Tensor, ""]
    z: Float[Tensor, "b d"]
    chance: float = float("nan")
    parts: Mapping[str, float | Tensor] = {}


class Method(nn.Module, ABC):
    """One way to train representations. Subclasses are final; share parts by composition."""

    needs: Sequence[str] = ("image",)  # the columns of a batch that forward reads
    smallest_batch = 2  # rows of a batch: what is compared with others, or with their spread, says nothing alone
    sync_batchnorm = True  # several processes: BatchNorm sees the global batch, as one process would

    @property
    def name(self) -> str:
        """What log and record call it; a method around another one goes by that one's name."""
        return type(self).__name__

    @abstractmethod
    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        """One step's loss on a batch of `needs`; whatever is random comes from `draw`."""

    @abstractmethod
    def towers(self) -> dict[str, nn.Module]:
        """Modality → the part that a bundle keeps."""

    def heads(self) -> dict[str, nn.Module]:
        """Modality → the head that the loss is taken behind, where a bundle's tower ends before it."""
        return {}

    def after_step(self, progress: float) -> None:
        """Moving averages, clamps and the like, after the optimizer's step; `progress` runs from 0 to 1."""


def check_positive(name: str, value: float) -> None:
    """A UsageError when a method is built, rather than an error of its objective in the first step."""
    if not value > 0:
        raise UsageError(f"{name} must be greater than 0; got {value}.")


def check_weight(name: str, value: float) -> None:
    """A UsageError where what weighs one part of a loss is below 0; at 0 the part is left out."""
    if not value >= 0:
        raise UsageError(f"{name} weighs a part of the loss, 0 or more; got {value}.")
