"""Vision transformers as what they are between pixels and features: a token a patch, computed only where asked for."""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold.errors import UsageError
from twofold.models.images import ImageEncoder
from twofold.models.predictor import sincos
from twofold.views.masks import taken


class Tokens(nn.Module):
    """The tokens of a picture encoder that is a vision transformer of timm's.

    `grid` are the patches down and across, `patch` the pixels along each of them, `dim` a token's width.
    """

    encoder: ImageEncoder

    def __init__(self, encoder: ImageEncoder):
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        body: Any = encoder.body
        if not isinstance(body, VisionTransformer) or body.pos_embed is None or body.attn_pool is not None:
            raise UsageError(
                "What is masked are the patches of a plain vision transformer, such as timm:vit_tiny_patch16_224/4 "
                f"(in patches of 4 pixels); {encoder.spec.get('name', type(body).__name__)} is none."
            )
        self.encoder = encoder
        self.grid: tuple[int, int] = body.patch_embed.grid_size
        self.patch: tuple[int, int] = body.patch_embed.patch_size
        self.dim: int = body.embed_dim
        self.depth = len(body.blocks)

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    def standard(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels as the encoder's first layer sees them."""
        return (x - self.encoder.mean) / self.encoder.std

    def forward(
        self, x: Float[Tensor, "b c h w"], keep: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n {self.dim}"]:
        """The last tokens of the patches `keep`, of all where None; no block computes or attends to any other.

        Positions are added before patches are taken. A class token or registers go along, and are left out in the end.
        """
        body: Any = self.encoder.body
        before = body.num_prefix_tokens
        x = body._pos_embed(body.patch_embed(self.standard(x)))
        if keep is not None:
            x = torch.cat((x[:, :before], taken(x[:, before:], keep)), 1)
        x = body.norm(body.blocks(body.norm_pre(x)))
        return body.fc_norm(x)[:, before:]

    def layers(self, x: Float[Tensor, "b c h w"], after: Sequence[int]) -> list[Float[Tensor, "b n {self.dim}"]]:
        """The tokens of all patches after each of the blocks `after` (from 0), normalised as the last ones are."""
        body: Any = self.encoder.body
        found = body.forward_intermediates(
            self.standard(x), indices=list(after), norm=True, output_fmt="NLC", intermediates_only=True
        )
        return [body.fc_norm(tokens) for tokens in found]


class ClipTokens(nn.Module):
    """The tokens of clips [b, t, c, h, w], by the blocks of a vision transformer that knew single pictures.

    A token is a tubelet: `tubelet` frames of a patch. What embeds patches embeds them as it did the average of the
    frames, and positions are the picture's with those of time added, so that a trained picture encoder is a start.
    """

    mean: Tensor
    std: Tensor
    places: Tensor

    def __init__(self, encoder: ImageEncoder, *, frames: int = 16, tubelet: int = 2):
        super().__init__()
        picture = Tokens(encoder)
        body: Any = deepcopy(encoder.body)
        if body.num_prefix_tokens or not isinstance(body.norm_pre, nn.Identity):
            raise UsageError(
                "Clips are for a vision transformer of patches alone, such as timm:vit_tiny_patch16_224/8; "
                f"{encoder.spec['name']} has a class token or a norm before its blocks."
            )
        if tubelet < 1 or frames < tubelet or frames % tubelet:
            raise UsageError(f"A clip is divided into tubelets evenly; got {frames} frames and tubelets of {tubelet}.")
        self.grid = (frames // tubelet, *picture.grid)
        self.cells, self.dim = math.prod(self.grid), picture.dim
        flat: nn.Conv2d = body.patch_embed.proj
        self.embed = nn.Linear(tubelet * flat.weight[0].numel(), self.dim)
        with torch.no_grad():
            self.embed.weight.copy_(flat.weight.flatten(1).repeat(1, tubelet) / tubelet)
            self.embed.bias.copy_(torch.zeros_like(self.embed.bias) if flat.bias is None else flat.bias)
        self.blocks, self.norm = body.blocks, nn.Sequential(body.norm, body.fc_norm)
        self.register_buffer("mean", encoder.mean.clone())
        self.register_buffer("std", encoder.std.clone())
        time = sincos(self.grid[:1], self.dim)[:, None]
        time -= time.mean(0)  # of few frames most waves are all but constant
        self.register_buffer("places", (body.pos_embed.detach() + time).flatten(0, 1))

    def standard(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        """Pixels as the first layer sees them."""
        return (x - self.mean) / self.std

    def forward(
        self, x: Float[Tensor, "b t c h w"], keep: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n {self.dim}"]:
        """The last tokens of the tubelets `keep`, of all where None; no block computes or attends to any other."""
        tokens = self.embed(tubelets(self.standard(x), self.grid)) + self.places
        return self.norm(self.blocks(tokens if keep is None else taken(tokens, keep)))


def centred(encoder: ImageEncoder) -> ImageEncoder:
    """An untrained transformer, its fixed positions without what they have in common; the very encoder is returned.

    On a grid of few patches most waves are all but constant: four fifths of a position's norm are the same everywhere,
    and so would be every token of a clip. What learns to follow such targets learns that they are all the same.
    """
    places: Any = encoder.body.pos_embed
    places.sub_(places.mean(1, keepdim=True))
    return encoder


def patches(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b n p"]:
    """The pixels of each patch, row by row of the grid: p = rows · columns · channels, in this order."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // size[0], size[0], w // size[1], size[1])
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, size[0] * size[1] * c)


def joined(p: Float[Tensor, "b n p"], size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """The pictures that `patches` of this size took apart."""
    p = p.view(len(p), *grid, *size, -1)
    return p.permute(0, 5, 1, 3, 2, 4).reshape(len(p), -1, grid[0] * size[0], grid[1] * size[1])


def tubelets(x: Float[Tensor, "b t c h w"], grid: tuple[int, int, int]) -> Float[Tensor, "b n p"]:
    """The pixels of each tubelet, grid cell by grid cell: p = frames · channels · rows · columns, in this order."""
    b, t, c, h, w = x.shape
    time, down, across = grid
    x = x.view(b, time, t // time, c, down, h // down, across, w // across)
    return x.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(b, time * down * across, -1)
