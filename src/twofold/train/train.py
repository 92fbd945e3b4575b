"""From data on disk to a trained bundle: what `twofold train` does."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import Tensor, nn

from twofold import runtime
from twofold.data.cache import decoded, decoded_clips
from twofold.data.loader import Batches, Windows
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError, unknown
from twofold.methods import METHODS, CoCa, Method
from twofold.methods.pair import View
from twofold.methods.vjepa import VJEPA
from twofold.models.bundle import Bundle, Tower
from twofold.models.captioner import captioner
from twofold.models.encoders import (
    Encoder,
    ImageEncoder,
    Inputs,
    TextEncoder,
    encoder,
    image_encoder,
    moved,
    text_encoder,
)
from twofold.models.tokens import centred
from twofold.progress import Line
from twofold.train.align import linked, pair_batches
from twofold.train.hardness import SAMPLE, hardness
from twofold.train.loop import Run, fit
from twofold.train.optim import Optimizer
from twofold.views import PRESETS, Policy, policies


@dataclass(frozen=True)
class Setting:
    """A training from scratch: what is encoded how, seen how, and for how long."""

    encoder: str = "timm:resnet18"  # a network of timm's, or run:FOLDER to go on with what a run has learned
    size: int | None = None  # pixels a side of a view; the encoder's own where None
    small_stem: bool = False  # the stem for pictures of about 32 pixels
    channels: int = 3
    text: str | None = None  # the text encoder, for pairs; minilm where None, and for coca coca:small
    space: int = 512  # the width of the common space, for pairs
    policy: str | None = None  # the views: a preset's name or a file; the method's own where None
    batch: int = 256  # over all processes
    per_class: int = 0  # this many items of a class come together in a batch; 0: as it happens
    epochs: int = 100
    limit: int | None = None  # use at most so many items
    seed: int = 0
    save_every: int = 100  # steps
    on_error: Literal["skip", "raise"] = "skip"
    devices: int = 1  # processes on this machine
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    chunk: int | None = None  # rows an encoder sees at a time: a batch that memory does not hold, at a third more time
    compile: bool = False  # let torch compile the encoders, in a minute or so; on a CPU only transformers gain
    profile: bool = False  # tell where the time of the first steps goes, in profile.json too
    stop_on_collapse: bool = False  # end as soon as the log shows that all embeddings become one
    log_to: str | None = None  # tensorboard:DIR, wandb:PROJECT or mlflow:URI are told what the log is


def train(
    name: str,
    data: Source,
    *,
    out: Path | str,
    setting: Setting = Setting(),
    optimizer: Optimizer = Optimizer(),  # noqa: B008 — frozen
    options: Mapping[str, Any] = {},
    changes: Mapping[str, Any] = {},
    quiet: bool = False,
) -> Run:
    """Train the method `name` on the pictures (and texts or labels) or videos of `data`; a bundle is in `out`/bundle.

    Where the data name splits, only "train" is used; items without the text or label that a method needs are left out.
    `options` are the method's own parameters, `changes` fields of the policy. The same call goes on where an earlier
    one was stopped.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    chosen = policies_of(name, setting.policy, changes)
    fabric = _fabric(setting)
    fabric.launch()

    learned = data.split("train") if data.splits is not None else data
    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of(setting.seed, "weights"))
        picture = picture_encoder(setting, of_clips="video" in METHODS[name].needs)
        method = _method(name, picture, setting, chosen, options, learned.texts)
    if setting.per_class and "label" not in method.needs:
        raise UsageError(f"per_class={setting.per_class} is for methods that learn from labels; {name} does not here.")
    source = _usable(name, method.needs, learned, setting.limit)
    size = picture.size
    stored = size if size <= 64 else size * 8 // 7  # crops of large pictures keep some detail to choose from
    for policy in chosen:
        policy.check(setting.channels, stored, stored)
    columns: dict[str, Any] = {}
    unit = "clips" if isinstance(method, VJEPA) else "images"
    with Line("decode", unit=unit, quiet=quiet or not fabric.is_global_zero) as line:
        how: Any = {"channels": setting.channels, "on_error": setting.on_error, "progress": line.update}
        if isinstance(method, VJEPA):
            frames, offsets, kept, skipped = decoded_clips(source, source.only("video"), stored, **how)
            columns["video"] = Windows(_resident(frames, fabric.device), offsets, method.frames, method.stride)
        else:
            pixels, kept, skipped = decoded(source, stored, **how)
            columns["image"] = _resident(pixels, fabric.device)
    if "text" in method.needs:
        columns["text"] = source.take(kept).texts
    if "label" in method.needs:
        columns["label"] = source.take(kept).labels
    # A name stands for itself; what a file or a flag says must be kept to know the run again.
    named = setting.policy is None or setting.policy in PRESETS
    own_views = {} if named and not changes else {"policies": [policy.to_dict() for policy in chosen]}
    by_class = {"classes": columns["label"], "each": setting.per_class} if setting.per_class else {}
    if "text" in method.needs:
        links = linked(source.take(kept), ("image", "text"))
        told = quiet or not fabric.is_global_zero
        batches = pair_batches(columns, links, batch=setting.batch, seed=setting.seed, quiet=told)
    else:
        batches = Batches(columns, batch=setting.batch, seed=setting.seed, **by_class)
    with _compiled(method) if setting.compile else nullcontext():
        run = fit(
            method,
            batches,
            steps=setting.epochs * batches.steps_per_epoch,
            out=out,
            optimizer=optimizer,
            seed=setting.seed,
            chunk=setting.chunk,
            save_every=setting.save_every,
            probes=_probes(method, columns, setting.seed),
            record={
                "data": data.name,
                "items": len(kept),
                **_identity(setting),
                "options": _plain(options),
                **own_views,
            },
            fabric=fabric,
            profile=setting.profile,
            stop_on_collapse=setting.stop_on_collapse,
            log_to=setting.log_to,
            quiet=quiet,
        )
    if fabric.is_global_zero:
        meta = {"method": name, "data": data.name, "skipped": len(skipped)}
        Bundle(method.towers(), meta, heads=method.heads()).save(Path(out) / "bundle")
    return run


def _probes(method: Method, columns: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """How hard the negatives are, for methods that compare views of pictures behind a head."""
    policies = getattr(method, "policies", ())
    if "image" not in columns or not policies or "image" not in method.heads():
        return {}
    pictures = columns["image"][:SAMPLE]
    sample = pictures.cpu() if isinstance(pictures, Tensor) else torch.tensor(np.asarray(pictures))
    return {"hardness": hardness(sample, policies, temperature=getattr(method, "temperature", 0.2), seed=seed)}


def picture_encoder(setting: Setting, *, of_clips: bool) -> ImageEncoder:
    """The encoder of pictures to start from: untrained, or that of a run or bundle (run:runs/a) to go on with."""
    if not setting.encoder.startswith(("run:", "local:")):
        fresh = image_encoder(
            setting.encoder, size=setting.size, channels=setting.channels, small_stem=setting.small_stem
        )
        return centred(fresh) if of_clips and hasattr(fresh.body, "pos_embed") else fresh
    picture: Any = encoder(setting.encoder, "image")
    if (setting.size or picture.size, setting.channels) != (picture.size, picture.channels):
        raise UsageError(
            f"{setting.encoder} sees {picture.channels} channels of {picture.size} pixels a side: leave --size out, "
            f"and say --channels {picture.channels}."
        )
    return picture


def _usable(name: str, needs: Sequence[str], source: Source, limit: int | None) -> Source:
    """The items, `limit` at most, that have what a method needs."""
    if "text" in needs:
        if source.texts is None:
            raise DataError(f"{name} needs texts; {source.name} has none. Point it at a manifest with captions.")
        source = source.take([item for item, texts in enumerate(source.texts) if texts])
    if "label" in needs:
        if source.labels is None or (source.labels < 0).all():
            raise DataError(
                f"{name} learns from labels; {source.name} has none. Point it at a folder with one subfolder a class, "
                "or a manifest with a `label` column. Without labels there are simclr, and triplet with --no-labels."
            )
        source = source.take(np.flatnonzero(source.labels >= 0))
    source = source.sample(limit)
    if "label" in needs and len(set(source.labels if source.labels is not None else ())) < 2:
        raise DataError(
            f"{name} learns to tell classes apart; the {len(source)} labelled items that it was given of {source.name} "
            "are all of one."
        )
    return source


class _Autocast(MixedPrecision):
    """Mixed precision of what is computed. Fabric's would round the batch as well: float pictures to eight bits."""

    def convert_input(self, data: Any) -> Any:
        return data


def _fabric(setting: Setting) -> Fabric:
    kind = runtime.device().type
    mixed: list[Any] = [] if setting.precision == "32-true" else [_Autocast(setting.precision, kind)]
    return Fabric(accelerator=kind, devices=setting.devices, plugins=mixed)


def _resident(pixels: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """The pictures on the GPU, where they fit into half of its free memory: a batch then costs no copy."""
    if device.type != "cuda" or pixels.dtype != np.uint8 or pixels.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return pixels
    return torch.tensor(pixels, device=device)


@contextmanager
def _compiled(method: Method) -> Iterator[None]:
    """Inside, the networks of the method's encoders are compiled; afterwards they are what they were."""
    networks = [part for part in method.modules() if isinstance(part, ImageEncoder | TextEncoder)]
    for network in networks:
        # By itself torch compiles for one shape, then for all once it meets a second: resumed, it would meet others.
        network.body.compile(dynamic=isinstance(network, TextEncoder))
    try:
        yield
    finally:
        for network in networks:
            network.body._compiled_call_impl = None


def _identity(setting: Setting) -> dict[str, Any]:
    """What of a setting decides the weights; how many processes and how often a checkpoint is written does not."""
    aside = (
        "devices",
        "save_every",
        "on_error",
        "profile",
        "stop_on_collapse",
        "log_to",
        "batch",
        "seed",
        "chunk",
    )  # `fit` has the last
    return {name: value for name, value in asdict(setting).items() if name not in aside}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(value) if is_dataclass(value) else value for name, value in options.items()}  # type: ignore[arg-type]


def policies_of(name: str, policy: str | None, changes: Mapping[str, Any]) -> tuple[Policy, ...]:
    """The policy asked for, one a view, else the method's own; SimCLR's for pairs."""
    of_pictures = "text" not in METHODS[name].needs
    parameter = inspect.signature(METHODS[name]).parameters.get("policies")
    own = parameter.default if of_pictures and parameter else policies("simclr")
    chosen = own if policy is None else policies(policy)
    chosen = chosen * len(own) if len(chosen) == 1 else chosen  # one policy is every view's
    if of_pictures and parameter and get_args(parameter.annotation)[-1] is not ... and len(chosen) != len(own):
        raise UsageError(
            f"{name} {f'compares {len(own)} views' if len(own) > 1 else 'looks at one view'}; the policy {policy!r} "
            f"has {len(chosen)}. Take one of {len(own)}, or a method of any number, such as lejepa."
        )
    return tuple(replace(one, **changes) for one in chosen)


def _method(
    name: str,
    picture: ImageEncoder,
    setting: Setting,
    chosen: Sequence[Policy],
    options: Mapping[str, Any],
    texts: Sequence[Sequence[str]] | None,
) -> Method:
    """The method around its encoders."""
    largest = max(policy.size for policy in chosen)  # small local views stay in proportion
    views = tuple(replace(policy, size=round(policy.size * picture.size / largest)) for policy in chosen)
    if "text" not in METHODS[name].needs:
        return METHODS[name](picture, policies=views, **options)
    if METHODS[name] is CoCa:
        pair = captioner(setting.text or "coca:small", picture, (text for own in texts or () for text in own))
        return METHODS[name](pair, views={"image": views[0], "text": _tokens(pair["text"])}, **options)
    text = text_encoder(setting.text or "minilm")
    towers = {
        "image": Tower(picture, nn.Linear(picture.dim, setting.space)),
        "text": Tower(text, nn.Linear(text.dim, setting.space)),
    }
    return METHODS[name](towers, views={"image": views[0], "text": _tokens(text)}, **options)


def _tokens(encoder: Encoder) -> View:
    def view(texts: list[str], draw: torch.Generator) -> Inputs:
        device = next(encoder.parameters()).device
        with runtime.part("views"):
            return moved(encoder.batch(texts), device)

    return view
