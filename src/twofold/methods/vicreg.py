"""VICReg — Variance-Invariance-Covariance Regularization for Self-Supervised Learning (arXiv 2105.04906, section 4).

The views of a picture should have the same embedding, and two terms keep that from being one point: over the batch
every dimension must vary (variance), and no two dimensions together (covariance). Each term looks at one view alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold.methods.base import Method, Out
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import vicreg, vicreg_chance
from twofold.runtime import gather
from twofold.views import VICREG, Policy


class VICReg(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim]; the three floats are weights."""

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = (VICREG, VICREG),
        head: Head = Head(3, 8192, 8192),  # noqa: B008 — frozen
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ):
        super().__init__()
        self.encoder, self.policies = encoder, policies
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.head = head.build(encoder.dim)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        # One view after the other, as in the official code: each has BatchNorm statistics of its own.
        h1, h2 = (self.encoder(policy(batch["image"], draw)) for policy in self.policies)
        z1, z2 = (gather(self.head(h)) for h in (h1, h2))
        found = vicreg(z1, z2, invariance=self.invariance, variance=self.variance, covariance=self.covariance)
        loss, *parts = found
        return Out(
            loss,
            z=torch.cat((h1, h2)),
            chance=vicreg_chance(variance=self.variance),
            parts={name: part.detach() for name, part in zip(found._fields[1:], parts, strict=True)},
        )

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
