"""Perceptual hashes: 64 signs that two files of one picture share, whatever their size, format or compression."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def perceptual_hashes(pixels: Num[Tensor, "n c side side"]) -> Float[Tensor, "n 64"]:
    """The signs (±1) of the 64 lowest frequencies of each picture's cosine transform, against their median.

    Two hashes that differ in b places have the cosine 1 − b/32. It sees structure and hardly any colour: a red heart
    and a blue one are one print. The lowest frequency of all is the brightness, and is left out in favour of the next.
    """
    gray = pixels.float()
    if gray.shape[1] == 3:
        gray = (gray * torch.tensor(LUMA, device=gray.device)[:, None, None]).sum(1, keepdim=True)
    gray = gray.mean(1)
    side, low = gray.shape[-1], torch.arange(9, device=gray.device)
    at = (2 * torch.arange(side, device=gray.device) + 1) * math.pi / (2 * side)
    waves = (low[:, None] * at).cos()
    frequencies = (waves @ gray @ waves.T).flatten(1)
    # From low to high in zigzag, so that the 64 after the brightness are the coarsest there are.
    order = sorted(range(81), key=lambda i: (i // 9 + i % 9, i))[1:65]
    kept = frequencies[:, order]
    return torch.where(kept > kept.median(1, keepdim=True).values, 1.0, -1.0)
