"""What methods that hide patches make of them: the error by distance from what was seen, and pictures painted anew."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from twofold import runtime
from twofold.methods import IJEPA, MAE, VJEPA, Method
from twofold.models.tokens import patches
from twofold.objectives.predictive import normal_tokens
from twofold.views.masks import Masked, random, taken

PAINTED = 6  # pictures


class Predicted(NamedTuple):
    """The error of hidden patches by their distance from the nearest that was seen, in patches, and what it is of.

    `constant` is what predicting the mean of all would cost. `painted` rows are a picture, what was seen of it, and,
    where pixels are predicted, what was made of the rest; of a clip a frame of each tubelet, side by side.
    """

    by_distance: list[tuple[float, float, int]]  # distance, mean error, patches
    constant: float
    words: str
    painted: UInt8[np.ndarray, "p k h w 3"] | None


def predicted(method: Method, x: Any, *, seed: int = 0) -> Predicted | None:
    """Of pictures [n, c, h, w], or clips [n, t, c, h, w], as a policy shows them; None where nothing is hidden."""
    draw = runtime.generator(seed, "masks")
    with torch.no_grad():
        if isinstance(method, MAE):
            return _pixels(method, x, draw)
        if isinstance(method, IJEPA):
            return _latents(method, x, method.mask(len(x), draw), method.tokens.grid)
        if isinstance(method, VJEPA):
            mask = method.masks[0](len(x), method.tokens.grid, draw=draw)
            return _latents(method, x, mask, method.tokens.grid)
    return None


def _pixels(method: MAE, x: Float[Tensor, "n c h w"], draw: torch.Generator) -> Predicted:
    keep, hidden = random(len(x), method.tokens.cells, share=method.share, draw=draw)
    painted = method.decoder(method.tokens(x, keep), keep, hidden)
    pixels = taken(patches(method.tokens.standard(x), method.tokens.patch), hidden)
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)
    error = (painted - (pixels - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
    few = x[:PAINTED]
    rows = [as_rgb(each) for each in (few, *method.paint(few, draw))]
    constant = (pixels.shape[-1] - 1) / pixels.shape[-1]
    return Predicted(
        by_distance(error, keep, hidden, method.tokens.grid),
        constant,
        "mean squared error of normalised pixels",
        np.stack(rows, 1),
    )


def as_rgb(x: Float[Tensor, "p c h w"]) -> UInt8[np.ndarray, "p h w 3"]:
    """Floats in 0..1 as pictures to show; of more than three channels the first three."""
    rgb = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return (rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _latents(method: IJEPA | VJEPA, x: Tensor, mask: Masked, grid: tuple[int, ...]) -> Predicted:
    keep, hidden = mask
    h = normal_tokens(method.target(x))
    guess = method.predictor(method.tokens(x, keep), keep, hidden)[..., : h.shape[-1]]
    error = (guess - taken(h, hidden)).square().mean(-1)
    few = x[:PAINTED]
    there = torch.zeros(len(few), math.prod(grid)).scatter_(1, keep[:PAINTED], 1.0).unflatten(1, grid)
    if few.ndim == 5:
        few, there = (torch.cat([*each.unbind(1)], -1) for each in (few[:, :: few.shape[1] // grid[0]], there))
    there = F.interpolate(there[:, None], few.shape[-2:], mode="nearest")
    return Predicted(
        by_distance(error, keep, hidden, grid),
        h.flatten(0, 1).var(0, correction=0).mean().item(),
        "mean squared error of normalised latents",
        np.stack([as_rgb(few), as_rgb(torch.where(there > 0, few, 0.5))], 1),
    )


def by_distance(
    error: Float[Tensor, "b k m"], keep: Int[Tensor, "b n"], hidden: Int[Tensor, "b k m"], grid: tuple[int, ...]
) -> list[tuple[float, float, int]]:
    """Mean errors of hidden cells by the distance of their centres from the nearest seen one, in cells, rounded to one
    half; with how many cells each is of."""
    axes = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], 1).float()
    away = torch.cdist(places[hidden.flatten(1)], places[keep]).amin(2)
    step = (2 * away).round().flatten().long()
    values = error.flatten(1).flatten().float()
    totals = torch.zeros(int(step.max()) + 1).index_add_(0, step, values)
    counts = torch.bincount(step)
    return [(at / 2, float(totals[at] / counts[at]), int(counts[at])) for at in counts.nonzero().flatten().tolist()]
