"""Video encoders: a vision transformer of tubelets, and any picture encoder that looks at each frame by itself."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.data.sources import Kind
from twofold.data.video import Clip, watch, windows
from twofold.errors import UsageError
from twofold.models.base import Encoder
from twofold.models.images import ImageEncoder, pixels
from twofold.models.tokens import ClipTokens

AT_ONCE = (
    64  # frames that a picture encoder sees together, where nothing is learned: 64 clips of 16 would take gigabytes
)


class FrameTokens(nn.Module):
    """The features of each frame of clips [b, t, c, h, w], of which a picture encoder sees one at a time."""

    def __init__(self, picture: ImageEncoder):
        super().__init__()
        self.picture, self.dim = picture, picture.dim

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t {self.dim}"]:
        frames = x.flatten(0, 1)
        together = len(frames) if self.training or torch.is_grad_enabled() else AT_ONCE
        return torch.cat([self.picture(some) for some in frames.split(together)]).unflatten(0, x.shape[:2])


class ClipEncoder(Encoder):
    """A network from clips to `tokens` [b, n, dim]; its features are their average.

    It sees `frames` frames, `stride` apart, of the middle of a clip, and all of a clip that has no more than that.
    `picture` describes the encoder of pictures that it was made from.
    """

    kind: ClassVar[Kind] = "video"

    def __init__(
        self,
        tokens: ClipTokens | FrameTokens,
        *,
        picture: Mapping[str, Any],
        frames: int = 16,
        stride: int = 4,
        files: Mapping[str, bytes] = {},
    ):
        if frames < 2 or stride < 1:
            raise UsageError(f"A clip has two frames or more, one apart or more; got {frames} and {stride}.")
        told: dict[str, Any] = {"picture": dict(picture), "frames": frames, "stride": stride}
        prefix = "frames"
        if isinstance(tokens, ClipTokens):
            prefix = "video"
            told["tubelet"] = frames // tokens.grid[0]
        super().__init__({"name": f"{prefix}:{picture['name']}", "channels": picture["channels"], **told}, files)
        self.tokens, self.dim = tokens, tokens.dim
        self.frames, self.stride = frames, stride
        self.size: int = picture["size"]
        self.channels: int = picture["channels"]
        self.how: Literal["crop", "pad", "stretch"] = picture["how"]

    def prepare(self, item: Clip, *, name: str = "") -> np.ndarray:
        seen = watch(item, self.size, how=self.how, channels=self.channels, name=name)
        return seen[windows(np.array([len(seen)]), self.frames, self.stride)[0]]

    def batch(self, prepared: Sequence[np.ndarray]) -> Float[Tensor, "b t c h w"]:
        return pixels([frame for clip in prepared for frame in clip]).unflatten(0, (len(prepared), self.frames))

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b dim"]:
        return self.tokens(x).mean(1)


def video_encoder(picture: ImageEncoder, *, frames: int = 16, stride: int = 4, tubelet: int | None = 2) -> ClipEncoder:
    """A video encoder out of a picture encoder.

    Its transformer's blocks go on with tubelets of so many frames (`ClipTokens`); where `tubelet` is None, any network
    sees each frame by itself, and what becomes of it has no order in time.
    """
    tokens = FrameTokens(picture) if tubelet is None else ClipTokens(picture, frames=frames, tubelet=tubelet)
    return ClipEncoder(tokens, picture=picture.spec, frames=frames, stride=stride, files=picture.files)
