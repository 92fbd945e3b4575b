"""BYOL — Bootstrap Your Own Latent (arXiv 2006.07733, section 3.1).

From one view of a picture, predict what a slowly moving copy of the network makes of the other view. No negatives:
the predictor on one side, and no gradient on the other, are all that keeps the answer from becoming a constant.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold import views
from twofold.errors import UsageError
from twofold.methods.base import Method, Out
from twofold.models.ema import Ema, rising
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import cosine_regression
from twofold.runtime import gather
from twofold.views import Policy


class BYOL(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim]; `momentum` rises to 1 by a cosine."""

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = views.BYOL,
        head: Head = Head(2, 4096, 256),  # noqa: B008 — frozen
        predictor: Head = Head(2, 4096, 256),  # noqa: B008 — frozen
        momentum: float = 0.996,
    ):
        super().__init__()
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum starts in [0, 1) and rises to 1; got {momentum}.")
        self.encoder, self.policies, self.momentum = encoder, policies, momentum
        self.head = head.build(encoder.dim)
        self.predictor = predictor.build(head.width(encoder.dim))
        # The two networks start apart, as in the official code: the target has a projector of its own. Its encoder is
        # a copy all the same: weights that were trained before are not to be unlearned towards random ones, and the
        # authors saw no difference between the two starts (byol_experiment.py, _make_initial_state).
        self.target = Ema(nn.Sequential(self.encoder, head.build(encoder.dim)))

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x1, x2 = (policy(batch["image"], draw) for policy in self.policies)
        h1, h2 = self.encoder(x1), self.encoder(x2)  # one view at a time: BatchNorm's statistics are a view's
        p1, p2 = (gather(self.predictor(self.head(h))) for h in (h1, h2))
        with torch.no_grad():
            z1, z2 = (gather(self.target(x)) for x in (x1, x2))
        loss = cosine_regression(p1, z2) + cosine_regression(p2, z1)
        return Out(loss, z=torch.cat((h1, h2)))

    def after_step(self, progress: float) -> None:
        self.target.update(nn.Sequential(self.encoder, self.head), rising(self.momentum, progress))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
