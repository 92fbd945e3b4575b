"""What short trainings are compared on: pictures held out, decoded as a training decodes them, through its encoder."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from twofold import runtime
from twofold.data.cache import Decoded, decoded
from twofold.data.sources import Source
from twofold.errors import DataError
from twofold.models.encoders import ImageEncoder, device_of, inference
from twofold.train.train import Setting
from twofold.views import Policy

HELD_OUT = 1000  # pictures at most
BATCH = 256


def held_out(source: Source) -> tuple[Source, Source]:
    """What is trained on, and what is held out: "test", else "val", else a fifth; the first has no splits any more."""
    draw = runtime.generator("held out")
    splits = set(source.splits or ())
    if "train" in splits and splits & {"test", "val"}:
        trained, held = source.split("train"), source.split("test" if "test" in splits else "val")
    else:
        order = torch.randperm(len(source), generator=draw).tolist()
        cut = len(order) // 5
        trained, held = source.take(sorted(order[cut:])), source.take(sorted(order[:cut]))
    if len(held) < 2:
        raise DataError(f"{source.name} has {len(source)} items: too few to hold some out.")
    some = torch.randperm(len(held), generator=draw).tolist()[:HELD_OUT]
    return replace(trained, splits=None), replace(held.take(sorted(some)), splits=None)


def pictures(source: Source, size: int, setting: Setting) -> Decoded:
    """As a training at `size` finds them in the cache."""
    return decoded(source, size if size <= 64 else size * 8 // 7, channels=setting.channels, on_error=setting.on_error)


def features(encoder: ImageEncoder, policy: Policy, images: Tensor, draw: torch.Generator) -> Float[Tensor, "n d"]:
    """What the encoder makes of a view of each picture."""
    device = device_of(encoder)
    with inference(encoder):
        return torch.cat([encoder(policy(part, draw).to(device)).float().cpu() for part in images.split(BATCH)])
