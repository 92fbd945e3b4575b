"""Barlow Twins — Self-Supervised Learning via Redundancy Reduction (arXiv 2103.03230, algorithm 1).

What a dimension says of a picture should be the same for both of its views, and nothing that another dimension says
already: over the batch, the views' dimensions correlate like the identity matrix. No negatives, no second network.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold.methods.base import Method, Out
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import barlow_twins, barlow_twins_chance
from twofold.runtime import gather
from twofold.views import BYOL, Policy


class BarlowTwins(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim]."""

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = BYOL,
        head: Head = Head(3, 8192, 8192),  # noqa: B008 — frozen
        off_diagonal: float = 0.0051,
    ):
        super().__init__()
        self.encoder, self.policies, self.off_diagonal = encoder, policies, off_diagonal
        self.head = head.build(encoder.dim)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        # One view after the other, as in the official code: each has BatchNorm statistics of its own.
        h1, h2 = (self.encoder(policy(batch["image"], draw)) for policy in self.policies)
        z1, z2 = (gather(self.head(h)) for h in (h1, h2))
        loss = barlow_twins(z1, z2, off_diagonal=self.off_diagonal)
        return Out(loss, z=torch.cat((h1, h2)), chance=barlow_twins_chance(z1.shape[1]))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
