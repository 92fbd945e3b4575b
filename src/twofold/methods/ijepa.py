"""I-JEPA — Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (arXiv 2301.08243).

From the patches of a large block, predict what a slowly moving copy of the encoder, which sees the whole picture, makes
of four smaller blocks (section 3). What cannot be predicted, noise and texture, the copy need not say. By choice
patches are hidden at random, as in MAE (arXiv 2111.06377), and their pixels are predicted beside their tokens, as in
BootMAE (arXiv 2207.07116): targets that no copy can forget.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold import views
from twofold.errors import UsageError
from twofold.methods.base import Method, Out, check_weight
from twofold.models.ema import Ema
from twofold.models.images import ImageEncoder
from twofold.models.predictor import Blocks, Predictor
from twofold.models.tokens import Tokens, patches
from twofold.objectives import latent_regression, masked_pixels, token_variance
from twofold.runtime import gather
from twofold.views import Policy
from twofold.views.masks import Masked, Rectangles, multiblock, random, taken


class IJEPA(Method):
    """`encoder` is a vision transformer, such as timm:vit_tiny_patch16_224/4; `momentum` rises to 1 in a line.

    `blocks` are predicted from what they leave of a large square. A `share` above 0 hides so much of the patches at
    random instead. `pixels` weighs the error of what is hidden in pixels.
    """

    smallest_batch = 1

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy] = (views.IJEPA,),
        predictor: Blocks = Blocks(6, 384, 12),  # noqa: B008 — frozen
        blocks: Rectangles = Rectangles(),  # noqa: B008 — frozen
        momentum: float = 0.996,
        share: float = 0.0,
        pixels: float = 0.0,
    ):
        super().__init__()
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum starts in [0, 1) and rises to 1; got {momentum}.")
        check_weight("pixels", pixels)
        self.tokens, self.policies, self.momentum = Tokens(encoder), policies, momentum
        self.pixels, self.share, self.blocks = pixels, share, blocks
        painted = math.prod(self.tokens.patch) * encoder.channels if pixels else 0  # beside a token, in one answer
        self.predictor = Predictor(predictor, dim=self.tokens.dim, out=self.tokens.dim + painted, grid=self.tokens.grid)
        self.target = Ema(self.tokens)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x = self.policies[0](batch["image"], draw)
        keep, hidden = self.mask(len(x), draw).to(x.device)
        answers = self.predictor(self.tokens(x, keep), keep, hidden)
        with torch.no_grad():
            h = self.target(x)
        loss = latent_regression(answers[..., : self.tokens.dim], taken(h, hidden))
        parts = {"target_variance": token_variance(h)}
        if self.pixels:
            true = taken(patches(self.tokens.standard(x), self.tokens.patch), hidden)
            error = masked_pixels(answers[..., self.tokens.dim :], true)
            loss, parts["pixels"] = loss + self.pixels * error, error.detach().mean()
        return Out(gather(loss).mean(), z=h.mean(1), parts=parts)

    def mask(self, rows: int, draw: torch.Generator) -> Masked:
        """Which patches of `rows` pictures are seen, and which are asked for."""
        if self.share:
            return random(rows, self.tokens.cells, share=self.share, draw=draw)
        return multiblock(rows, self.tokens.grid, self.blocks, draw=draw)

    def after_step(self, progress: float) -> None:
        self.target.update(self.tokens, self.momentum + (1 - self.momentum) * progress)

    def towers(self) -> dict[str, nn.Module]:
        target: Any = self.target.copy  # what the paper evaluates, and what `z` watches
        return {"image": target.encoder}
