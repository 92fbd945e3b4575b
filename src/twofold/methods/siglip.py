"""SigLIP — Sigmoid Loss for Language Image Pre-Training (arXiv 2303.15343, algorithm 1).

Each picture and each text of the batch is a question of its own: do these two belong together, yes or no? No softmax
ties the answers together, so the score of a pair means the same whatever else is in the batch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from twofold.methods.base import Method, Out, check_positive
from twofold.methods.pair import Pair, View
from twofold.objectives import siglip, siglip_chance


class SigLIP(Method):
    """`towers`: two modalities → modules into one space.

    `scale` and `bias` are where the learned ones start. The paper's bias of −10 fits its batches of about 22 000; for a
    batch of B the odds of a pair are 1 : B−1, which −ln(B−1) says from the first step on. A batch may hold "negatives",
    items of the second kind that none of its first kind belongs to.
    """

    needs: Sequence[str] = ("image", "text")  # or whatever the towers are named

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        *,
        views: Mapping[str, View] = {},
        scale: float = 10.0,
        bias: float = -10.0,
    ):
        super().__init__()
        check_positive("scale", scale)
        self.pair, self.needs = Pair(towers, views=views), tuple(towers)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        first, second = self.pair(batch, draw)
        others, scale = self.pair.negatives(batch, draw), self.log_scale.exp()
        loss = siglip(first, second, scale=scale, bias=self.bias, negatives=others)
        chance = siglip_chance(len(first), 0 if others is None else len(others))
        return Out(loss, z=first, chance=chance, parts={"scale": scale.detach(), "bias": self.bias.detach()})

    def towers(self) -> dict[str, nn.Module]:
        return dict(self.pair.towers)
