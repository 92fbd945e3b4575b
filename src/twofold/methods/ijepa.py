"""I-JEPA — Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (arXiv 2301.08243).

From the patches of a large block, predict what a slowly moving copy of the encoder, which sees the whole picture, makes
of four smaller blocks (section 3). What cannot be predicted, noise and texture, the copy need not say.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from twofold import views
from twofold.errors import UsageError
from twofold.methods.base import Method, Out
from twofold.models.ema import Ema
from twofold.models.images import ImageEncoder
from twofold.models.predictor import Blocks, Predictor
from twofold.models.tokens import Tokens
from twofold.objectives import latent_regression, token_variance
from twofold.runtime import gather
from twofold.views import Policy
from twofold.views.masks import multiblock, taken


class IJEPA(Method):
    """`encoder` is a vision transformer, such as timm:vit_tiny_patch16_224/4; `momentum` rises to 1 in a line.

    `blocks` rectangles of a `scale` of the grid's area are predicted from what they leave of a square of the scale
    `context`: `least` patches or more, wherever ten tries find so many.
    """

    smallest_batch = 1

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy] = (views.IJEPA,),
        predictor: Blocks = Blocks(6, 384, 12),  # noqa: B008 — frozen
        blocks: int = 4,
        scale: tuple[float, float] = (0.15, 0.2),
        context: tuple[float, float] = (0.85, 1.0),
        least: int = 10,
        momentum: float = 0.996,
    ):
        super().__init__()
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum starts in [0, 1) and rises to 1; got {momentum}.")
        self.tokens, self.policies, self.momentum = Tokens(encoder), policies, momentum
        self.mask = partial(multiblock, blocks=blocks, scale=scale, context=context, least=least)
        self.predictor = Predictor(predictor, dim=self.tokens.dim, out=self.tokens.dim, grid=self.tokens.grid)
        self.target = Ema(self.tokens)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x = self.policies[0](batch["image"], draw)
        keep, hidden = self.mask(len(x), self.tokens.grid, draw=draw).to(x.device)
        predicted = self.predictor(self.tokens(x, keep), keep, hidden)
        with torch.no_grad():
            h = self.target(x)
        loss = gather(latent_regression(predicted, taken(h, hidden))).mean()
        return Out(loss, z=h.mean(1), parts={"target_variance": token_variance(h)})

    def after_step(self, progress: float) -> None:
        self.target.update(self.tokens, self.momentum + (1 - self.momentum) * progress)

    def towers(self) -> dict[str, nn.Module]:
        target: Any = self.target.copy  # what the paper evaluates, and what `z` watches
        return {"image": target.encoder}
