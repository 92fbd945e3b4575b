"""SimCLR — A Simple Framework for Contrastive Learning of Visual Representations (arXiv 2002.05709, section 2.1).

Two views of one picture should be nearer to each other than to any view of the other pictures in the batch. What the
views throw away is what the encoder learns not to see; a head takes the loss of that, and is dropped afterwards.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold.methods.base import Method, Out, check_positive
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import nt_xent, nt_xent_chance
from twofold.runtime import gather
from twofold.views import SIMCLR, Policy


class SimCLR(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim]."""

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = (SIMCLR, SIMCLR),
        head: Head = Head(2, 2048, 128),  # noqa: B008 — frozen
        temperature: float = 0.5,
    ):
        super().__init__()
        check_positive("temperature", temperature)
        self.encoder, self.policies, self.temperature = encoder, policies, temperature
        self.head = head.build(encoder.dim)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        h = self.encoder(torch.cat([policy(batch["image"], draw) for policy in self.policies]))
        z1, z2 = (gather(z) for z in self.head(h).chunk(2))
        return Out(nt_xent(z1, z2, temperature=self.temperature), z=h, chance=nt_xent_chance(len(z1)))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
