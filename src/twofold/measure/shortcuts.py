"""Shortcuts: what tells a view's partner among strangers without a look at what the picture shows.

A contrastive loss is content with any of these, and an encoder learns the cheapest first. SimCLR crops *and* jitters
colour because the crops of one picture share their colour histogram (arXiv 2002.05709, section 3.1, figure 6). Each
feature here is simple, has no parameters, and is compared by distance alone: a network may do better.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from twofold.measure.metrics import Interval, first_ranks, recall_at_k
from twofold.views import Policy

Feature = Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b d"]]
LEVELS = 6  # of each channel in the histogram of colours


def color_histogram(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Roots of the shares of 6³ colours (of one to three channels), so that distance is Hellinger's."""
    level = (x[:, :3] * LEVELS).long().clamp_(0, LEVELS - 1).flatten(2)
    place = torch.tensor([LEVELS**k for k in range(level.shape[1])])
    bins = LEVELS ** level.shape[1]
    color = (level * place[:, None]).sum(1)
    shares = torch.zeros(len(x), bins).scatter_add_(1, color, torch.ones(color.shape)) / color.shape[1]
    return shares.sqrt()


def mean_color(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
    """The mean of each channel."""
    return x.mean((2, 3))


def thumbnail(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """The lowest frequencies: a thumbnail of 4×4 pixels, without its mean."""
    small = F.adaptive_avg_pool2d(x, 4)
    return (small - small.mean((2, 3), keepdim=True)).flatten(1)


def border(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """What lies along the edge: the outer ring of 8×8 cells, each a mean."""
    ring = torch.ones(8, 8, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return F.adaptive_avg_pool2d(x, 8)[:, :, ring].flatten(1)


def jpeg_traces(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 64"]:
    """How much of each of the 64 frequencies is left in blocks of 8×8: what quantisation took is missing from all."""
    at = torch.arange(8)
    basis = torch.cos(torch.pi / 8 * (at + 0.5) * at[:, None])
    blocks = F.unfold(x.mean(1, keepdim=True), 8, stride=8).unflatten(1, (8, 8))  # [b, 8, 8, n]
    energy = torch.einsum("ui,vj,bijn->buvn", basis, basis, blocks).abs().mean(3)
    return (energy + 1e-4).log().flatten(1)


SHORTCUTS: dict[str, Feature] = {
    "colour histogram": color_histogram,
    "mean colour": mean_color,
    "thumbnail": thumbnail,
    "border": border,
    "JPEG traces": jpeg_traces,
}


def shortcuts(
    policies: Sequence[Policy], images: Shaped[Tensor, "n c h w"], draw: torch.Generator, *, among: int = 256
) -> Mapping[str, Interval]:
    """How often each feature alone finds a view's partner among `among` pictures' second views, 0..1; chance 1/among.

    The views are those of the first two policies (of the only one, twice). All pictures are asked for, in groups of
    `among`; the last group, if smaller, is filled up with pictures of the first.
    """
    pair = [policies[0], policies[min(1, len(policies) - 1)]]
    ranks: dict[str, list[Tensor]] = {name: [] for name in SHORTCUTS}
    among = min(among, len(images))
    for start in range(0, len(images), among):
        rows = torch.arange(start, start + among) % len(images)
        asked = min(among, len(images) - start)
        first, second = (policy(images[rows], draw) for policy in pair)
        for name, feature in SHORTCUTS.items():
            a, b = feature(first)[:asked], feature(second)
            scale = b.std(0, correction=0).mean().clamp_min(1e-6)  # ties are counted on a scale of one
            ranks[name].append(first_ranks(-torch.cdist(a / scale, b / scale), [[i] for i in range(asked)]))
    return {name: recall_at_k(np.concatenate(found), 1) for name, found in ranks.items()}
