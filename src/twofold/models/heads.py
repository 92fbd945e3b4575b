"""What sits on an encoder: small stacks of layers, described as JSON so that a bundle can build them again."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import UsageError, unknown


class Standardize(nn.Module):
    """(x − mean) / std, with the statistics of the training features; the identity until `measure` has seen them."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def measure(self, features: Float[Tensor, "n dim"]) -> "Standardize":
        """Take mean and deviation from `features`; a column that never varies is only centred."""
        std, mean = torch.std_mean(features.float(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0))
        return self

    def forward(self, x: Float[Tensor, "b dim"]) -> Float[Tensor, "b dim"]:
        return (x - self.mean) / self.std


Norm = Literal["batch", "layer", "none"]


def mlp(
    dim: int,
    hidden: int,
    out: int,
    *,
    layers: int = 2,
    norm: Norm = "batch",
    last_norm: bool = False,
    activation: Literal["relu", "gelu"] = "relu",
    dropout: float = 0.0,
) -> nn.Sequential:
    """`layers` linear maps dim → hidden → … → out, between them a norm, the activation and dropout.

    The default is SimCLR's projection head (arXiv 2002.05709, section 4.2). One layer is a plain linear map, whatever
    `hidden` says; none is the identity. `last_norm` puts a norm without scale and shift behind the last map. A map
    that a norm follows has no bias: the norm would take it away again.
    """
    if not layers:
        return nn.Sequential(nn.Identity())
    widths = [dim, *[hidden] * (layers - 1)]
    stack: list[nn.Module] = []
    for before, after in pairwise(widths):
        stack.append(nn.Linear(before, after, bias=norm == "none"))
        stack += _norm(after, norm, affine=True)
        stack.append(nn.ReLU() if activation == "relu" else nn.GELU())
        if dropout:
            stack.append(nn.Dropout(dropout))
    ends_in_norm = last_norm and norm != "none"
    last = nn.Linear(widths[-1], out, bias=not ends_in_norm)
    return nn.Sequential(*stack, last, *(_norm(out, norm, affine=False) if ends_in_norm else ()))


def _norm(dim: int, kind: Norm, *, affine: bool) -> list[nn.Module]:
    if kind == "none":
        return []
    return [nn.BatchNorm1d(dim, affine=affine) if kind == "batch" else nn.LayerNorm(dim, elementwise_affine=affine)]


@dataclass(frozen=True)
class Head:
    """The shape of a projection or prediction head: `Head(3, 8192, 8192)` are three maps, two hidden layers of 8192.

    0 layers leave the features as they are, 1 is a linear map.
    """

    layers: int = 2
    hidden: int = 2048
    dim: int = 128  # what it gives
    norm: Norm = "batch"
    last_norm: bool = False  # a norm without scale and shift behind the last map

    def __post_init__(self) -> None:
        if self.layers < 0 or self.hidden < 1 or self.dim < 1:
            raise UsageError(f"A head has 0 layers or more, each at least one wide; got {self}.")
        if self.norm not in get_args(Norm):
            raise unknown("norm", self.norm, get_args(Norm))

    def build(self, dim: int) -> nn.Sequential:
        """The head for features of width `dim`, freshly initialised."""
        return mlp(dim, self.hidden, self.dim, layers=self.layers, norm=self.norm, last_norm=self.last_norm)

    def width(self, dim: int) -> int:
        """How wide its output is for features of width `dim`."""
        return self.dim if self.layers else dim


# The layers a head may have, and the attributes that are their constructor's arguments.
LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Identity": (nn.Identity, ()),
    "ReLU": (nn.ReLU, ()),
    "GELU": (nn.GELU, ()),
    "Dropout": (nn.Dropout, ("p",)),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "BatchNorm1d": (nn.BatchNorm1d, ("num_features", "eps", "momentum", "affine")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "Standardize": (Standardize, ("dim",)),
}


def describe(head: nn.Module) -> dict[str, Any]:
    """What `build` needs to make `head` again, as JSON, without its weights."""
    kind = type(head).__name__
    if type(head) is nn.Sequential:
        return {"layer": kind, "layers": [describe(layer) for layer in head]}
    if kind not in LAYERS or type(head) is not LAYERS[kind][0]:
        raise TypeError(f"A head is made of {', '.join(LAYERS)} and Sequential; {kind} is none of them.")
    arguments = {name: getattr(head, name) for name in LAYERS[kind][1]}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return {"layer": kind, **arguments}


def build(description: dict[str, Any]) -> nn.Module:
    """The head that `describe` described, with fresh weights."""
    arguments = dict(description)
    kind = arguments.pop("layer")
    if kind == "Sequential":
        return nn.Sequential(*map(build, arguments["layers"]))
    return LAYERS[kind][0](**arguments)
