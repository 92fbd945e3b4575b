"""SimSiam — Exploring Simple Siamese Representation Learning (arXiv 2011.10566, algorithm 1).

BYOL without the second network: from one view of a picture, predict the other view's projection by the same weights.
That the projection gives no gradient is what keeps the answer from becoming a constant.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold.methods.base import Method, Out
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import negative_cosine
from twofold.runtime import gather
from twofold.views import MOCO_V2, Policy


class SimSiam(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim]."""

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = (MOCO_V2, MOCO_V2),
        head: Head = Head(3, 2048, 2048, last_norm=True),  # noqa: B008 — frozen
        predictor: Head = Head(2, 512, 2048),  # noqa: B008 — frozen
    ):
        super().__init__()
        self.encoder, self.policies = encoder, policies
        self.head = head.build(encoder.dim)
        self.predictor = predictor.build(head.width(encoder.dim))

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x1, x2 = (policy(batch["image"], draw) for policy in self.policies)
        h1, h2 = self.encoder(x1), self.encoder(x2)  # one view at a time: BatchNorm's statistics are a view's
        z1, z2 = self.head(h1), self.head(h2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        p1, p2, z1, z2 = (gather(rows) for rows in (p1, p2, z1.detach(), z2.detach()))
        loss = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
        return Out(loss, z=torch.cat((h1, h2)))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
