"""MoCo v3 — An Empirical Study of Training Self-Supervised Vision Transformers (arXiv 2104.02057, algorithm 1).

MoCo without the queue: large batches hold enough negatives. Each view's prediction should find the other view's key
among those of the batch, and the keys come from a copy of the encoder that moves ever more slowly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold.errors import UsageError
from twofold.methods.base import Method, Out, check_positive
from twofold.models.ema import Ema, rising
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import info_nce, info_nce_chance
from twofold.runtime import gather
from twofold.views import MOCO_V3, Policy


class MoCoV3(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim]; `momentum` rises to 1 by a cosine.

    The defaults are the official ones for ResNets; docs/methods/mocov3.md has those for transformers.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = MOCO_V3,
        head: Head = Head(2, 4096, 256, last_norm=True),  # noqa: B008 — frozen
        predictor: Head = Head(2, 4096, 256),  # noqa: B008 — frozen
        temperature: float = 1.0,
        momentum: float = 0.99,
    ):
        super().__init__()
        check_positive("temperature", temperature)
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum starts in [0, 1) and rises to 1; got {momentum}.")
        self.encoder, self.policies = encoder, policies
        self.temperature, self.momentum = temperature, momentum
        self.head = head.build(encoder.dim)
        self.predictor = predictor.build(head.width(encoder.dim))
        self.target = Ema(nn.Sequential(self.encoder, self.head))

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x1, x2 = (policy(batch["image"], draw) for policy in self.policies)
        h1, h2 = self.encoder(x1), self.encoder(x2)  # one view at a time: BatchNorm's statistics are a view's
        q1, q2 = (gather(self.predictor(self.head(h))) for h in (h1, h2))
        with torch.no_grad():
            k1, k2 = (gather(self.target(x)) for x in (x1, x2))
        T = self.temperature
        loss = 2 * T * (info_nce(q1, k2, temperature=T) + info_nce(q2, k1, temperature=T))
        return Out(loss, z=torch.cat((h1, h2)), chance=4 * T * info_nce_chance(len(q1)))

    def after_step(self, progress: float) -> None:
        # Algorithm 1 moves the copy at the head of a step: the same sequence, as both start equal.
        self.target.update(nn.Sequential(self.encoder, self.head), rising(self.momentum, progress))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
