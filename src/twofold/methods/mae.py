"""MAE — Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377, section 3).

Hide three quarters of a picture's patches, encode what is left, and let a small decoder paint the rest. The encoder
never computes what is hidden, and the decoder is thrown away.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold import views
from twofold.methods.base import Method, Out
from twofold.models.base import inference
from twofold.models.images import ImageEncoder
from twofold.models.predictor import Blocks, Predictor
from twofold.models.tokens import Tokens, joined, patches
from twofold.objectives import masked_pixels, masked_pixels_chance
from twofold.runtime import gather
from twofold.views import Policy
from twofold.views.masks import random, taken


class Painted(NamedTuple):
    """Pictures with what was hidden of them in grey, and as the decoder paints it."""

    seen: Float[Tensor, "b c h w"]
    painted: Float[Tensor, "b c h w"]


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

    def paint(self, x: Float[Tensor, "b c h w"], draw: torch.Generator) -> Painted:
        """What is seen of pictures in 0..1, and what is painted in its place; hidden patches are grey in the first.

        Only what a patch looks like beside its own mean and contrast is predicted: these two are the true patch's.
        """
        keep, hidden = random(len(x), self.tokens.cells, share=self.share, draw=draw).to(x.device)
        with inference(self):
            painted = self.decoder(self.tokens(x, keep), keep, hidden).flatten(1, 2)
        tokens, at = self.tokens, hidden[:, 0, :, None].expand(-1, -1, self.pixels)
        true = patches(tokens.standard(x), tokens.patch)
        variance, mean = torch.var_mean(true.gather(1, at), -1, keepdim=True)
        whole = joined(true.scatter(1, at, painted * variance.sqrt() + mean), tokens.patch, tokens.grid)
        pixels = (whole * tokens.encoder.std + tokens.encoder.mean).clamp(0, 1)
        seen = patches(x, tokens.patch).scatter(1, at, 0.5)
        return Painted(joined(seen, tokens.patch, tokens.grid), pixels)

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.tokens.encoder}
