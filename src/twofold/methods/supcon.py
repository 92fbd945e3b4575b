"""SupCon — Supervised Contrastive Learning (arXiv 2004.11362, section 3, eq. 2).

SimCLR with labels: each view should find not only the other view of its picture but all views of its class, among all
views of the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from twofold.methods.base import Method, Out, check_positive
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import sup_con, sup_con_chance
from twofold.runtime import gather
from twofold.views import SIMCLR, Policy


class SupCon(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim]; labels are 0 and above."""

    needs: Sequence[str] = ("image", "label")

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = (SIMCLR, SIMCLR),
        head: Head = Head(2, 2048, 128, norm="none"),  # noqa: B008 — frozen
        temperature: float = 0.1,
    ):
        super().__init__()
        check_positive("temperature", temperature)
        self.encoder, self.policies, self.temperature = encoder, policies, temperature
        self.head = head.build(encoder.dim)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        h = self.encoder(torch.cat([policy(batch["image"], draw) for policy in self.policies]))
        z = torch.cat([gather(z) for z in self.head(h).chunk(2)])
        labels = gather(batch["label"]).repeat(2)
        return Out(sup_con(z, labels, temperature=self.temperature), z=h, chance=sup_con_chance(len(z)))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
