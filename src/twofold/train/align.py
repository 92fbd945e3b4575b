"""Two frozen encoders brought into one space: every item is embedded once, then two small heads learn in seconds."""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from twofold import runtime
from twofold.data.decode import OnError, Skipped
from twofold.data.loader import Batches, Choice
from twofold.data.sources import Source
from twofold.errors import DataError
from twofold.measure.embed import Embedded, embed
from twofold.methods import CLIP, Method, SigLIP
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import ImageEncoder, TextEncoder, image_encoder, text_encoder
from twofold.models.heads import Standardize, mlp
from twofold.train.loop import Run, fit
from twofold.train.optim import Optimizer

Heads = dict[str, nn.Module]
SCALE = 25.0  # where SigLIP's scale ends on small data; from the paper's 10 it is still on its way when training ends


@dataclass(frozen=True)
class Recipe:
    """How the heads learn. docs/methods/siglip.md has the measurements behind the defaults."""

    objective: Literal["siglip", "clip"] = "siglip"
    dim: int = 512  # the common space
    hidden: int = 1024  # width of the heads' hidden layer; 0 makes each head one linear map
    dropout: float = 0.5
    batch: int = 1024
    epochs: int = 60
    lr: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0


class Alignment(NamedTuple):
    """What `align` leaves: the bundle, the same bundle before training, the run, and what could not be read."""

    bundle: Bundle
    untrained: Bundle
    run: Run
    skipped: list[Skipped]


def align(
    pairs: Source,
    *,
    out: Path | str,
    image: str = "efficientnet-lite0",
    text: str = "minilm",
    recipe: Recipe = Recipe(),
    on_error: OnError = "skip",
    quiet: bool = False,
) -> Alignment:
    """Learn heads that put a picture and its texts in one place; leaves a bundle in `out`/bundle.

    Where the data name splits, only "train" is used. The encoders stay as they are: each item is embedded once, and
    found in the cache the next time. An item with several texts shows another one of them on each visit, so texts of
    one picture never are each other's negatives.
    """
    source = pairs.split("train") if pairs.splits is not None else pairs
    if source.texts is None or source.images is None:
        raise DataError(f"Alignment takes pictures with texts; {pairs.name} has only one of them.")
    source = source.take([item for item, texts in enumerate(source.texts) if texts])
    seeing, reading = image_encoder(image), text_encoder(text)
    pictures = embed(seeing, source, "image", on_error=on_error, quiet=quiet)
    texts = embed(reading, source.take(pictures.kept), "text", quiet=quiet)

    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of(recipe.seed, "weights"))
        heads: Heads = {"image": _head(pictures, recipe), "text": _head(texts, recipe)}
    untrained = _bundle(seeing, reading, heads, {"untrained": True})
    batch = min(recipe.batch, len(pictures.matrix))
    batches = Batches(
        {"image": pictures.matrix, "text": Choice(texts.matrix, texts.offsets)}, batch=batch, seed=recipe.seed
    )
    run = fit(
        _method(heads, recipe, batch),
        batches,
        steps=recipe.epochs * batches.steps_per_epoch,
        out=out,
        optimizer=Optimizer(lr=recipe.lr, weight_decay=recipe.weight_decay, warmup=batches.steps_per_epoch),
        seed=recipe.seed,
        log_every=max(1, batches.steps_per_epoch),
        record={"data": pairs.name, "items": len(pictures.kept), "image": image, "text": text, **asdict(recipe)},
        quiet=quiet,
    )
    bundle = _bundle(seeing, reading, heads, {"recipe": asdict(recipe), "data": pairs.name})
    bundle.save(Path(out) / "bundle")
    return Alignment(bundle, untrained, run, pictures.skipped)


def _head(features: Embedded, recipe: Recipe) -> nn.Sequential:
    """Standardised features, then one linear map or a hidden layer, dropout before each."""
    dim = features.matrix.shape[1]
    standard = Standardize(dim).measure(torch.from_numpy(features.matrix))
    if not recipe.hidden:
        return nn.Sequential(standard, nn.Dropout(recipe.dropout), nn.Linear(dim, recipe.dim))
    layers = mlp(dim, recipe.hidden, recipe.dim, norm="none", activation="gelu", dropout=recipe.dropout)
    return nn.Sequential(standard, nn.Dropout(recipe.dropout / 2), *layers)


def _method(heads: Heads, recipe: Recipe, batch: int) -> Method:
    if recipe.objective == "clip":
        return CLIP(heads)
    return SigLIP(heads, scale=SCALE, bias=-math.log(max(batch - 1, 1)))


def _bundle(seeing: ImageEncoder, reading: TextEncoder, heads: Heads, meta: dict) -> Bundle:
    towers = {
        "image": Tower(seeing, copy.deepcopy(heads["image"])),
        "text": Tower(reading, copy.deepcopy(heads["text"])),
    }
    return Bundle(towers, meta)
