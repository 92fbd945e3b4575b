"""MAE — Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377, section 3).

Hide three quarters of a picture's patches, encode what is left, and let a small decoder paint the rest. The encoder
never computes what is hidden, and the decoder is thrown away.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold import views
from twofold.methods.base import Method, Out
from twofold.models.images import ImageEncoder
from twofold.models.predictor import Blocks, Predictor
from twofold.models.tokens import Tokens, patches
from twofold.objectives import masked_pixels, masked_pixels_chance
from twofold.runtime import gather
from twofold.views import Policy
from twofold.views.masks import random, taken


class MAE(Method):
    """`encoder` is a vision transformer, such as timm:vit_tiny_patch16_224/4; `share` of its patches are hidden."""

    smallest_batch = 1

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy] = (views.MAE,),
        decoder: Blocks = Blocks(8, 512, 16),  # noqa: B008 — frozen
        share: float = 0.75,
    ):
        super().__init__()
        self.tokens, self.policies, self.share = Tokens(encoder), policies, share
        down, across = self.tokens.patch
        self.pixels = down * across * encoder.channels  # numbers a patch
        self.decoder = Predictor(decoder, dim=self.tokens.dim, out=self.pixels, grid=self.tokens.grid)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x = self.policies[0](batch["image"], draw)
        keep, hidden = random(len(x), self.tokens.cells, share=self.share, draw=draw).to(x.device)
        h = self.tokens(x, keep)
        painted = self.decoder(h, keep, hidden)
        pixels = taken(patches(self.tokens.standard(x), self.tokens.patch), hidden)
        loss = gather(masked_pixels(painted, pixels)).mean()
        return Out(loss, z=h.mean(1), chance=masked_pixels_chance(self.pixels))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.tokens.encoder}
