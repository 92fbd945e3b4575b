"""What methods that hide patches make of them: the error by distance from what was seen, and pictures painted anew."""

from typing import Any, NamedTuple

import numpy as np
import torch
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

    `constant` is what predicting the mean of all would cost. `painted` rows are a picture, what was seen of it, and
    what was made of the rest, where pixels are predicted.
    """

    by_distance: list[tuple[float, float, int]]  # distance, mean error, patches
    constant: float
    words: str
    painted: UInt8[np.ndarray, "p 3 h w c"] | None = None


def predicted(method: Method, x: Any, *, seed: int = 0) -> Predicted | None:
    """Of pictures [n, c, h, w], or clips [n, t, c, h, w], as a policy shows them; None where nothing is hidden."""
    draw = runtime.generator(seed, "masks")
    with torch.no_grad():
        if isinstance(method, MAE):
            return _pixels(method, x, draw)
        if isinstance(method, IJEPA):
            mask = method.mask(len(x), method.tokens.grid, draw=draw)
            return _latents(method, x, mask, method.tokens.grid)
        if isinstance(method, VJEPA):
            from twofold.methods.vjepa import SHORT

            return _latents(method, x, SHORT(len(x), method.tokens.grid, draw=draw), method.tokens.grid)
    return None


def _pixels(method: MAE, x: Float[Tensor, "n c h w"], draw: torch.Generator) -> Predicted:
    keep, hidden = random(len(x), method.tokens.cells, share=method.share, draw=draw)
    painted = method.decoder(method.tokens(x, keep), keep, hidden)
    pixels = taken(patches(method.tokens.standard(x), method.tokens.patch), hidden)
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    error = (painted - (pixels - mean) / deviation).square().mean(-1)
    few = slice(0, PAINTED)
    whole = patches(x[few], method.tokens.patch)
    centre, width = (each.flatten() for each in (method.tokens.encoder.mean, method.tokens.encoder.std))
    made = (painted * deviation + mean)[few, 0]  # in the units of the encoder's first layer
    made = (made.unflatten(-1, (-1, len(centre))) * width + centre).flatten(-2)
    seen, filled = whole.clone(), whole.clone()
    seen.scatter_(1, hidden[few, 0, :, None].expand(-1, -1, whole.shape[-1]), 0.5)
    filled.scatter_(1, hidden[few, 0, :, None].expand(-1, -1, whole.shape[-1]), made)
    rows = [_together(each, method.tokens.grid, method.tokens.patch) for each in (whole, seen, filled)]
    constant = (pixels.shape[-1] - 1) / pixels.shape[-1]
    return Predicted(
        by_distance(error, keep, hidden, method.tokens.grid),
        constant,
        "mean squared error of normalised pixels",
        np.stack(rows, 1),
    )


def _together(
    cells: Float[Tensor, "p n d"], grid: tuple[int, int], size: tuple[int, int]
) -> UInt8[np.ndarray, "p h w 3"]:
    """Pictures of their patches, as `models.tokens.patches` takes them apart."""
    p, (down, across) = len(cells), grid
    x = cells.view(p, down, across, *size, -1).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(p, down * size[0], across * size[1], -1).clamp(0, 1)
    x = x[..., :3] if x.shape[-1] >= 3 else x[..., :1].expand(*x.shape[:-1], 3)
    return (x * 255).round().byte().numpy()


def _latents(method: IJEPA | VJEPA, x: Tensor, mask: Masked, grid: tuple[int, ...]) -> Predicted:
    keep, hidden = mask
    h = normal_tokens(method.target(x))
    guess = method.predictor(method.tokens(x, keep), keep, hidden)
    error = (guess - taken(h, hidden)).square().mean(-1)
    return Predicted(
        by_distance(error, keep, hidden, grid),
        h.flatten(0, 1).var(0, correction=0).mean().item(),
        "mean squared error of normalised latents",
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
