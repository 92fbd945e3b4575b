"""LeJEPA — Provable and Scalable Self-Supervised Learning Without the Heuristics (arXiv 2511.08544, section 5.1).

All views of a picture should be where its global views are on average, and the embeddings of the batch should be a
standard normal cloud, which is tested along random directions (SIGReg). No stop-gradient, no teacher, no predictor.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn

from twofold.errors import UsageError
from twofold.methods.base import Method, Out
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import lejepa, lejepa_chance
from twofold.runtime import gather
from twofold.views import LEJEPA, Policy


class LeJEPA(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim].

    `policies` are one a view, two or more, the first `global_views` of them global; `weight` is the paper's λ and
    `directions` how many of them are drawn a step.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, ...] = (LEJEPA[0], LEJEPA[0]),
        head: Head = Head(3, 2048, 128),  # noqa: B008 — frozen
        global_views: int = 2,
        weight: float = 0.05,
        directions: int = 1024,
    ):
        super().__init__()
        if not 1 <= global_views <= len(policies) or len(policies) < 2:
            raise UsageError(
                f"LeJEPA compares two views or more, of which at least one is global; got {len(policies)} policies "
                f"and global_views={global_views}."
            )
        self.encoder, self.policies, self.global_views = encoder, policies, global_views
        self.weight, self.directions = weight, directions
        self.head = head.build(encoder.dim)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        views = [policy(batch["image"], draw) for policy in self.policies]
        # Together as far as they have one size, as in the official code: BatchNorm sees global and local views apart.
        h = torch.cat([self.encoder(torch.cat([*same])) for _, same in groupby(views, key=lambda view: view.shape[-1])])
        z = torch.stack([gather(view) for view in self.head(h).chunk(len(views))])
        directions = torch.randn(self.directions, z.shape[-1], generator=draw, device=draw.device)
        loss, prediction, sigreg = lejepa(z, directions, global_views=self.global_views, weight=self.weight)
        return Out(
            loss,
            z=h,
            chance=lejepa_chance(z.shape[1], weight=self.weight),
            parts={"prediction": prediction.detach(), "sigreg": sigreg.detach()},
        )

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
