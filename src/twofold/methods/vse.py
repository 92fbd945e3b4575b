"""VSE++ — Improving Visual-Semantic Embeddings with Hard Negatives (arXiv 1707.05612, section 3.1).

A picture should be nearer to its text than to any other text of the batch, by a margin, and a text to its picture. Only
the nearest of the others counts, in each direction: the sum over all of them is ruled by many that are easy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twofold.methods.base import Method, Out, check_positive
from twofold.methods.pair import Pair, View
from twofold.objectives import triplet_chance, triplet_margin
from twofold.objectives.tiled import nearest


class VSE(Method):
    """`towers`: two modalities → modules into one space. `margin` is one of cosines, as in the paper."""

    needs: Sequence[str] = ("image", "text")  # or whatever the towers are named

    def __init__(self, towers: Mapping[str, nn.Module], *, views: Mapping[str, View] = {}, margin: float = 0.2):
        super().__init__()
        check_positive("margin", margin)
        self.pair, self.needs, self.margin = Pair(towers, views=views), tuple(towers), margin

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        first, second = self.pair(batch, draw)
        margin = 2 * self.margin  # a squared distance of unit vectors is twice what their cosine lacks
        other_second, other_first = nearest(_unit(first), _unit(second))
        loss = (
            triplet_margin(first, second, second[other_second], margin=margin)
            + triplet_margin(second, first, first[other_first], margin=margin)
        ) / 2
        return Out(loss, z=first, chance=triplet_chance(margin))

    def towers(self) -> dict[str, nn.Module]:
        return dict(self.pair.towers)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.detach().float(), dim=1)
