"""How hard the negatives are while a training goes on: the same few pictures, looked at with each checkpoint."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from twofold import runtime
from twofold.measure.negatives import Microscope, of_views
from twofold.methods.base import Method
from twofold.models.encoders import device_of
from twofold.views import Policy

SAMPLE = 128  # pictures, and so 254 negatives an anchor
BATCH = 64


def hardness(
    pictures: Shaped[Tensor, "n c h w"], policies: Sequence[Policy], *, temperature: float, seed: int = 0
) -> Callable[[Method], Mapping[str, float]]:
    """A probe for `fit`: two views of each picture, always the same, behind the head where the method compares them.

    `positive` is the median cosine of two views of a picture, `hardest` the mean cosine of an anchor and the hardest
    hundredth of its negatives, `sharing` how many of its negatives share the gradient, as a part of them. The views are
    drawn now: drawing takes all processes, and only the first one looks.
    """
    draw = runtime.generator(seed, "hardness")
    views = [policies[k % len(policies)](pictures, draw).half() for k in range(2)]

    def probe(method: Method) -> Mapping[str, float]:
        tower, head = method.towers()["image"], method.heads()["image"]
        device = device_of(tower)
        z = [torch.cat([head(tower(x.to(device).float())) for x in view.split(BATCH)]) for view in views]
        return hardness_of(of_views(*z, temperature=temperature))

    return probe


def hardness_of(seen: Microscope) -> dict[str, float]:
    """What the log holds of it."""
    return {"positive": seen.agreement, "hardest": seen.hardness, "sharing": seen.now.effective / seen.negatives}
