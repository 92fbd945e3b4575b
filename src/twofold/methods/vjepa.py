"""V-JEPA — Revisiting Feature Prediction for Learning Visual Representations from Video (arXiv 2404.08471, section 3).

Hide tubes of a clip, places that stay hidden throughout, and predict what a slowly moving copy of the encoder, which
sees the whole clip, makes of them. Since nothing beside a tube shows what moves inside it, motion must be understood.
By choice the pixels of the tubes are predicted too, as in VideoMAE (arXiv 2203.12602), beside the copy's tokens as in
BootMAE (arXiv 2207.07116): targets that no copy can forget. By choice too, what comes later is hidden instead of tubes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from twofold import runtime, views
from twofold.errors import UsageError
from twofold.methods.base import Method, Out, check_weight
from twofold.models.clips import ClipEncoder
from twofold.models.ema import Ema
from twofold.models.images import ImageEncoder
from twofold.models.predictor import Blocks, Predictor
from twofold.models.tokens import ClipTokens, tubelets
from twofold.objectives import latent_regression, masked_pixels, token_variance
from twofold.runtime import gather
from twofold.views import Policy
from twofold.views.masks import ahead, taken, tubes

SHORT = partial(tubes, blocks=8, scale=(0.15, 0.15))  # section 3.2: the clip is encoded once behind each of the masks
LONG = partial(tubes, blocks=2, scale=(0.7, 0.7))


class VJEPA(Method):
    """`encoder` is a vision transformer of pictures, whose blocks clips of `frames` [b, t, c, h, w] start from.

    These are `stride` apart in the video, and all of a clip are seen alike. `momentum` rises to 1 in a line, `pixels`
    weighs the error of what is hidden in pixels. With `future`, that share of a clip's time is predicted from all that
    was before it, and no tubes are.
    """

    needs = ("video",)
    smallest_batch = 1

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy] = (views.IJEPA,),
        predictor: Blocks = Blocks(12, 384, 12),  # noqa: B008 — frozen
        frames: int = 16,
        stride: int = 4,
        momentum: float = 0.998,
        pixels: float = 0.0,
        future: float = 0.0,
    ):
        super().__init__()
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum starts in [0, 1) and rises to 1; got {momentum}.")
        if not 0 <= future < 1:
            raise UsageError(f"future is the share of a clip that is predicted, in [0, 1); 0 cuts tubes. Got {future}.")
        check_weight("pixels", pixels)
        self.tokens = ClipTokens(encoder, frames=frames)
        self.picture, self.frames, self.stride = encoder.spec, frames, stride
        self.policies, self.momentum, self.pixels = policies, momentum, pixels
        self.masks = (partial(ahead, share=future),) if future else (SHORT, LONG)
        painted = self.tokens.embed.in_features if pixels else 0  # beside a token, in one answer
        self.predictor = Predictor(predictor, dim=self.tokens.dim, out=self.tokens.dim + painted, grid=self.tokens.grid)
        self.target = Ema(self.tokens)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x = alike(self.policies[0], batch["video"], draw)
        with torch.no_grad():
            h = self.target(x)
        losses, errors = [], []
        for mask in self.masks:
            keep, hidden = mask(len(x), self.tokens.grid, draw=draw).to(x.device)
            answers = self.predictor(self.tokens(x, keep), keep, hidden)
            losses.append(latent_regression(answers[..., : self.tokens.dim], taken(h, hidden), beta=0.0))
            if self.pixels:
                true = taken(tubelets(self.tokens.standard(x), self.tokens.grid), hidden)
                errors.append(masked_pixels(answers[..., self.tokens.dim :], true))
        loss, parts = torch.stack(losses).mean(0), {"target_variance": token_variance(h)}
        if self.pixels:
            error = torch.stack(errors).mean(0)
            loss, parts["pixels"] = loss + self.pixels * error, error.detach().mean()
        return Out(gather(loss).mean(), z=h.mean(1), parts=parts)

    def after_step(self, progress: float) -> None:
        self.target.update(self.tokens, self.momentum + (1 - self.momentum) * progress)

    def towers(self) -> dict[str, nn.Module]:
        target: Any = self.target.copy  # what the paper evaluates, and what `z` watches
        return {"video": ClipEncoder(target, picture=self.picture, frames=self.frames, stride=self.stride)}


def alike(policy: Policy, clips: Shaped[Tensor, "b t c h w"], draw: torch.Generator) -> Float[Tensor, "b t c s s"]:
    """A view of each clip: what is drawn is drawn once, for all of its frames."""
    count, frames, _, height, width = clips.shape
    with runtime.part("views"):
        drawn = policy.parameters(count, height, width, draw)
        drawn = type(drawn)(*(column.repeat_interleave(frames, 0) for column in drawn))
        return policy.render(clips.flatten(0, 1), drawn).unflatten(0, (count, frames))
