"""Triplet — FaceNet: A Unified Embedding for Face Recognition and Clustering (arXiv 1503.03832, section 3).

A picture should be nearer to another one of its class than to any of another class, by a margin. Most triplets are so
already and teach nothing; which of the others to learn from is what mining decides (arXiv 1703.07737, 1706.07567).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from twofold.errors import unknown
from twofold.methods.base import Method, Out, check_positive
from twofold.mining import batch_hard, distance_weighted, semi_hard
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import triplet_batch_all, triplet_chance, triplet_margin
from twofold.runtime import gather
from twofold.views import SIMCLR, Policy

Mining = Literal["batch-all", "batch-hard", "semi-hard", "distance-weighted"]


class Triplet(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim].

    With `labels` (0 and above, one a picture) all views of a class are each other's positives; without, the two views
    of a picture are.
    """

    needs: Sequence[str] = ("image", "label")  # without `labels` the picture is enough

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = (SIMCLR, SIMCLR),
        head: Head = Head(1, dim=128),  # noqa: B008 — frozen
        margin: float = 0.2,
        mining: Mining = "semi-hard",
        labels: bool = True,
    ):
        super().__init__()
        check_positive("margin", margin)
        if mining not in get_args(Mining):
            raise unknown("mining", mining, get_args(Mining))
        self.encoder, self.policies, self.margin, self.mining = encoder, policies, margin, mining
        self.needs = ("image", "label") if labels else ("image",)
        self.head = head.build(encoder.dim)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        h = self.encoder(torch.cat([policy(batch["image"], draw) for policy in self.policies]))
        z1, z2 = (gather(z) for z in self.head(h).chunk(2))
        labels = gather(batch["label"]) if "label" in self.needs else torch.arange(len(z1), device=h.device)
        loss = self._loss(torch.cat((z1, z2)), labels.repeat(2), draw)
        return Out(loss, z=h, chance=triplet_chance(self.margin))

    def _loss(self, z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], draw: torch.Generator) -> Float[Tensor, ""]:
        if self.mining == "batch-all":
            return triplet_batch_all(z, labels, margin=self.margin)
        if self.mining == "distance-weighted":
            mined = distance_weighted(z, labels, draw)
        else:
            mined = (batch_hard if self.mining == "batch-hard" else semi_hard)(z, labels)
        return triplet_margin(*(z[rows] for rows in mined), margin=self.margin)

    def towers(self) -> dict[str, torch.nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, torch.nn.Module]:
        return {"image": self.head}
