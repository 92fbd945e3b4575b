"""From the tokens that were seen to those that were not: MAE's decoder, and the predictor of I-JEPA and V-JEPA."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold.errors import UsageError


@dataclass(frozen=True)
class Blocks:
    """The shape of a transformer: `Blocks(8, 512, 16)` are eight blocks, 512 wide, of sixteen heads."""

    depth: int = 6
    width: int = 384
    heads: int = 12

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.heads) < 1 or self.width % self.heads:
            raise UsageError(f"A transformer has a block or more, and heads that share its width evenly; got {self}.")


class Predictor(nn.Module):
    """Blocks over what was seen and over questions: a mask token with the position that is asked for.

    `dim` is the width of what is seen, `out` that of the answers, `grid` the patches along each axis.
    """

    places: Tensor

    def __init__(self, shape: Blocks, *, dim: int, out: int, grid: Sequence[int]):
        from timm.models.vision_transformer import Block

        super().__init__()
        self.narrow = nn.Linear(dim, shape.width)
        self.question = nn.Parameter(0.02 * torch.randn(shape.width))
        self.blocks = nn.Sequential(*(Block(shape.width, shape.heads, qkv_bias=True) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.answer = nn.Linear(shape.width, out)
        self.register_buffer("places", sincos(grid, shape.width), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # as in MAE's official code
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, seen: Float[Tensor, "b n dim"], keep: Int[Tensor, "b n"], hidden: Int[Tensor, "b k m"]
    ) -> Float[Tensor, "b k m out"]:
        """Answers for the cells `hidden`, each of the k parts asked for apart, from the tokens of the cells `keep`."""
        parts, asked = hidden.shape[1:]
        context = (self.narrow(seen) + self.places[keep]).repeat_interleave(parts, 0)
        questions = self.question + self.places[hidden.flatten(0, 1)]
        x = self.blocks(torch.cat((context, questions), 1))
        return self.answer(self.norm(x[:, -asked:])).unflatten(0, (-1, parts))


def sincos(grid: Sequence[int], dim: int) -> Float[Tensor, "n {dim}"]:
    """Positions of the cells of a grid of any number of axes, row by row: sines and cosines of each coordinate.

    Each axis has an even share of the width, half sines and half cosines, at wavelengths from 2π to 20 000π in
    geometric steps (arXiv 1706.03762, section 3.5; along each axis as in MoCo v3 and MAE). What is left over stays 0.
    """
    waves = dim // (2 * len(grid))
    if not waves:
        raise UsageError(f"Positions in {len(grid)} dimensions need a width of {2 * len(grid)} or more; got {dim}.")
    frequencies = torch.exp(-math.log(10_000) * torch.arange(waves, dtype=torch.float64) / waves)
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in axes]
    columns = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    return nn.functional.pad(columns, (0, dim - columns.shape[1])).float()
