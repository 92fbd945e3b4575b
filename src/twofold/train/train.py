"""From data on disk to a trained bundle: what `twofold train` does."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import nn

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.loader import Batches
from twofold.data.sources import Source
from twofold.errors import DataError, unknown
from twofold.methods import METHODS, Method
from twofold.methods.pair import View
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import ImageEncoder, TextEncoder, image_encoder, text_encoder
from twofold.progress import Line
from twofold.train.loop import Run, fit
from twofold.train.optim import Optimizer
from twofold.views import PRESETS


@dataclass(frozen=True)
class Setting:
    """A training from scratch: what is encoded how, seen how, and for how long."""

    encoder: str = "timm:resnet18"
    size: int | None = None  # pixels a side of a view; the encoder's own where None
    small_stem: bool = False  # the stem for pictures of about 32 pixels
    channels: int = 3
    text: str = "minilm"  # the text encoder, for pairs
    space: int = 512  # the width of the common space, for pairs
    policy: str = "simclr"
    batch: int = 256  # over all processes
    epochs: int = 100
    limit: int | None = None  # use the first so many items
    seed: int = 0
    save_every: int = 100  # steps
    on_error: Literal["skip", "raise"] = "skip"
    devices: int = 1  # processes on this machine
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"


def train(
    name: str,
    data: Source,
    *,
    out: Path | str,
    setting: Setting = Setting(),
    optimizer: Optimizer = Optimizer(),  # noqa: B008 — frozen
    options: Mapping[str, Any] = {},
    quiet: bool = False,
) -> Run:
    """Train the method `name` on the pictures (and texts) of `data` and leave a bundle in `out`/bundle.

    Where the data name splits, only "train" is used. `options` are the method's own parameters. The same call goes on
    where an earlier one was stopped.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    if setting.policy not in PRESETS:
        raise unknown("policy", setting.policy, PRESETS)
    accelerator = runtime.device().type
    fabric = Fabric(accelerator=accelerator, devices=setting.devices, precision=setting.precision)
    fabric.launch()

    source = data.split("train") if data.splits is not None else data
    needs = METHODS[name].needs
    if "text" in needs:
        if source.texts is None:
            raise DataError(f"{name} needs texts; {data.name} has none. Point it at a manifest with captions.")
        source = source.take([item for item, texts in enumerate(source.texts) if texts])
    source = source.take(range(min(setting.limit or len(source), len(source))))

    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of(setting.seed, "weights"))
        picture = image_encoder(
            setting.encoder, size=setting.size, channels=setting.channels, small_stem=setting.small_stem
        )
        method = _method(name, picture, setting, options)
    size = picture.size
    stored = size if size <= 64 else size * 8 // 7  # crops of large pictures keep some detail to choose from
    with Line("decode", unit="images", quiet=quiet or not fabric.is_global_zero) as line:
        pixels, kept, skipped = decoded(
            source,
            stored,
            channels=setting.channels,
            on_error=setting.on_error,
            progress=line.update,
        )
    columns: dict[str, Any] = {"image": pixels}
    if "text" in needs:
        columns["text"] = source.take(kept).texts
    batches = Batches(columns, batch=setting.batch, seed=setting.seed)
    run = fit(
        method,
        batches,
        steps=setting.epochs * batches.steps_per_epoch,
        out=out,
        optimizer=optimizer,
        seed=setting.seed,
        save_every=setting.save_every,
        record={"data": data.name, "items": len(kept), **_identity(setting), "options": _plain(options)},
        fabric=fabric,
        quiet=quiet,
    )
    if fabric.is_global_zero:
        Bundle(method.towers(), meta={"method": name, "data": data.name, "skipped": len(skipped)}).save(
            Path(out) / "bundle"
        )
    return run


def _identity(setting: Setting) -> dict[str, Any]:
    """What of a setting decides the weights; how many processes and how often a checkpoint is written does not."""
    return {k: v for k, v in asdict(setting).items() if k not in ("devices", "save_every", "batch", "seed", "on_error")}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(value) if is_dataclass(value) else value for name, value in options.items()}  # type: ignore[arg-type]


def _method(name: str, picture: ImageEncoder, setting: Setting, options: Mapping[str, Any]) -> Method:
    """The method around its encoders."""
    policies = tuple(replace(policy, size=picture.size) for policy in PRESETS[setting.policy])
    if "text" not in METHODS[name].needs:
        return METHODS[name](picture, policies=policies, **options)
    text = text_encoder(setting.text)
    towers = {
        "image": Tower(picture, nn.Linear(picture.dim, setting.space)),
        "text": Tower(text, nn.Linear(text.dim, setting.space)),
    }
    return METHODS[name](towers, views={"image": policies[0], "text": _tokens(text)}, **options)


def _tokens(encoder: TextEncoder) -> View:
    def view(texts: list[str], draw: torch.Generator) -> dict[str, torch.Tensor]:
        device = next(encoder.parameters()).device
        return {name: ids.to(device) for name, ids in encoder.tokenize(texts).items()}

    return view
