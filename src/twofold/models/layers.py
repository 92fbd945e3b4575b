"""A picture encoder that ends at one of its layers."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import UsageError
from twofold.models.images import ImageEncoder


class UpTo(nn.Module):
    """The network `body` of timm's as far as its layer `number`, 1 the first; the layer's maps or tokens, averaged."""

    def __init__(self, body: Any, number: int):
        super().__init__()
        self.body, self.number = body, number

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        (maps,) = self.body.forward_intermediates(
            x, indices=[self.number - 1], intermediates_only=True, output_fmt="NCHW", norm=False
        )
        return maps.mean((2, 3))


def layer_of(encoder: ImageEncoder, number: int) -> ImageEncoder:
    """The encoder as far as layer `number`: 1 is a ResNet's stem or a transformer's first block.

    It shares the encoder's weights, and its features are averages over places. UsageError where there is no such layer.
    """
    body: Any = encoder.body
    if not hasattr(body, "forward_intermediates"):
        raise UsageError(f"{encoder.spec['name']} does not tell its layers apart; take --at encoder.")
    depth = _depth(body)
    if not 1 <= number <= depth:
        raise UsageError(f"{encoder.spec['name']} has the layers 1 to {depth}; there is no layer:{number}.")
    mean, std = (values.flatten().tolist() for values in (encoder.mean, encoder.std))
    upto = UpTo(body, number)
    return ImageEncoder(upto, {**encoder.spec, "layer": number}, mean=mean, std=std, files=encoder.files)


def _depth(body: Any) -> int:
    if hasattr(body, "blocks") and hasattr(body, "patch_embed"):
        return len(body.blocks)
    return len(body.feature_info)
