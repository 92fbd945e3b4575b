"""CLIP — Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020, figure 3).

Of all the texts in the batch, the picture should pick its own, and of all the pictures the text its own. Nothing in
it is about pictures or texts: any two kinds of data that come in pairs will do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from twofold.errors import UsageError
from twofold.methods.base import Method, Out, check_positive
from twofold.methods.pair import Pair, View
from twofold.objectives import clip, clip_chance


class CLIP(Method):
    """`towers`: two modalities → modules into one space. `temperature` is where the learned one starts.

    A batch may hold "negatives", items of the second kind that none of its first kind belongs to. `debias` is the share
    of all such candidates, the batch's own included, that are right all the same (arXiv 2007.00224).
    """

    needs: Sequence[str] = ("image", "text")  # or whatever the towers are named

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        *,
        views: Mapping[str, View] = {},
        temperature: float = 0.07,
        max_scale: float = 100.0,
        debias: float = 0.0,
    ):
        super().__init__()
        check_positive("temperature", temperature)
        check_positive("max_scale", max_scale)
        if not 0 <= debias < 1:
            raise UsageError(f"debias, the share of rivals that are right, lies in [0, 1); got {debias}.")
        self.pair, self.needs = Pair(towers, views=views), tuple(towers)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_log_scale, self.debias = math.log(max_scale), debias

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        first, second = self.pair(batch, draw)
        others, scale = self.pair.negatives(batch, draw), self.log_scale.exp()
        loss = clip(first, second, scale=scale, negatives=others, debias=self.debias)
        chance = clip_chance(len(first), 0 if others is None else len(others))
        return Out(loss, z=first, chance=chance, parts={"scale": scale.detach()})

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.log_scale.clamp_(0, self.max_log_scale)

    def towers(self) -> dict[str, nn.Module]:
        return dict(self.pair.towers)
