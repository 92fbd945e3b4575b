"""Encoders by name: the field's own networks, for pictures, texts, sounds, videos and ready-made vectors.

efficientnet-lite0              pictures, weights installed
timm:resnet18[@untrained]       pictures, any network of timm
open_clip:MODEL[@WEIGHTS]       pictures or texts, a tower of CLIP or SigLIP; also open_clip:/folder
minilm                          texts, weights installed
hf:owner/name                   texts or sounds, a model of transformers; also hf:/folder
bpe:small                       texts, from scratch, with a vocabulary learned from them
mel:small, mel:timm:resnet18    sounds, from scratch, on log-mel spectrograms
video:timm:…, video:run:runs/a  videos, a vision transformer of tubelets that starts as that one of pictures
frames:efficientnet-lite0       videos, any picture encoder that sees each frame by itself
vectors                         vectors as they are
local:/folder, run:runs/a       the encoder of a bundle's tower, before its head; local:/folder@speech names one
"""

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twofold.data.sources import KINDS, Column, Kind
from twofold.errors import DecodeError, UsageError, unknown
from twofold.models.base import Encoder, Inputs, device_of, fingerprint, inference, moved
from twofold.models.clips import ClipEncoder, video_encoder
from twofold.models.images import ImageEncoder, image_encoder, pixels
from twofold.models.sounds import (
    AUDIO_FILES,
    MelEncoder,
    TransformersAudio,
    audio_model,
    mel_encoder,
    read_audio_model,
)
from twofold.models.texts import TextEncoder, bpe_encoder, read_text_encoder, text_encoder
from twofold.models.weights import snapshot

__all__ = [
    "NAMES",
    "ClipEncoder",
    "Encoder",
    "ImageEncoder",
    "Inputs",
    "MelEncoder",
    "TextEncoder",
    "TransformersAudio",
    "VectorEncoder",
    "device_of",
    "encoder",
    "fingerprint",
    "fresh",
    "image_encoder",
    "inference",
    "mel_encoder",
    "moved",
    "pixels",
    "read_encoder",
    "read_text_encoder",
    "text_encoder",
    "video_encoder",
]

NAMES: dict[str, tuple[Kind, ...]] = {
    "efficientnet-lite0": ("image",),
    "timm:": ("image",),
    "open_clip:": ("image", "text"),
    "minilm": ("text",),
    "hf:": ("text", "audio"),
    "bpe:": ("text",),
    "mel:": ("audio",),
    "video:": ("video",),
    "frames:": ("video",),
    "vectors": ("vector",),
    "local:": KINDS,
    "run:": KINDS,
}
"""How a name begins, and the kinds that such an encoder can be of."""


class VectorEncoder(Encoder):
    """Vectors that something else has made, as they are."""

    kind: ClassVar[Kind] = "vector"

    def __init__(self, dim: int):
        super().__init__({"name": "vectors", "dim": dim})
        self.dim = dim
        self.register_buffer("_place", torch.empty(0), persistent=False)  # tells on which device the tower is

    def prepare(self, item: Any, *, name: str = "") -> Float[np.ndarray, "dim"]:
        name = name or (str(item) if isinstance(item, Path) else "a vector")
        try:
            vector = np.load(item, allow_pickle=False) if isinstance(item, Path) else item
            if isinstance(vector, bytes) or len(vector) == 0:
                raise DecodeError(name, "empty")
            vector = np.asarray(vector, np.float32)
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise DecodeError(name, f"not a vector ({type(error).__name__}: {error})") from error
        if vector.shape != (self.dim,):
            raise DecodeError(name, f"has shape {vector.shape}, expected ({self.dim},)")
        if not np.isfinite(vector).all():
            raise DecodeError(name, "holds values that are not finite (NaN or infinite)")
        return vector

    def batch(self, prepared: Sequence[np.ndarray]) -> Float[Tensor, "b dim"]:
        return torch.from_numpy(np.stack(prepared))

    def forward(self, x: Float[Tensor, "b dim"]) -> Float[Tensor, "b dim"]:
        return x


def encoder(name: str, kind: Kind | None = None, *, column: Column | None = None) -> Encoder:
    """The encoder of a name (see the top of this file), with its trained weights where there are any.

    `kind` says which half of a model is meant where it has two, and must fit where not. `column` is what will be
    encoded: "bpe:" learns its vocabulary from it, "vectors" takes its width from it ("vectors:384" says it).
    """
    prefix = next((start for start in NAMES if name == start or (start[-1] == ":" and name.startswith(start))), None)
    if prefix is None and name.startswith("vectors:"):
        prefix = "vectors"
    if prefix is None:
        raise unknown("encoder", name, [start + "…" if start[-1] == ":" else start for start in NAMES])
    kind = kind or (NAMES[prefix][0] if len(NAMES[prefix]) == 1 else None)
    if kind is not None and kind not in NAMES[prefix]:
        raise UsageError(f"{name} is an encoder of {' or '.join(NAMES[prefix])}, not of {kind}.")
    rest = name.removeprefix(prefix)
    if prefix == "efficientnet-lite0":
        return image_encoder(name)
    if prefix == "timm:":
        return image_encoder(name.removesuffix("@untrained"), pretrained=not name.endswith("@untrained"))
    if prefix == "minilm":
        return text_encoder(name)
    if prefix == "mel:":
        return mel_encoder(name)
    if prefix in ("video:", "frames:"):
        picture = encoder(rest, "image")
        if not isinstance(picture, ImageEncoder):
            raise UsageError(f"{name}: videos are encoded by networks of timm's; {rest} is none.")
        return video_encoder(picture, tubelet=2 if prefix == "video:" else None)
    if prefix == "bpe:":
        if column is None:
            raise UsageError(f"{name} learns its vocabulary from your texts: give the column that it shall read.")
        return bpe_encoder(name, itertools.chain.from_iterable(column.cells))
    if prefix == "vectors":
        return VectorEncoder(_width(name, column))
    if prefix == "hf:":
        return audio_model(name) if (kind or _hub_kind(rest)) == "audio" else text_encoder(name)
    if prefix == "open_clip:":
        from twofold.models.openclip import open_clip_encoder

        if kind not in ("image", "text"):
            raise UsageError(f"{name} has two towers: say which, kind 'image' or 'text'.")
        return open_clip_encoder(name, kind)
    return _of_bundle(rest, kind)


def _width(name: str, column: Column | None) -> int:
    said = name.removeprefix("vectors").removeprefix(":")
    if said.isdecimal() and int(said):
        return int(said)
    for cell in column.cells if column and not said else ():
        with contextlib.suppress(OSError, ValueError, TypeError):  # this one cannot be read; another one will do
            vector = np.load(cell, mmap_mode="r") if isinstance(cell, Path) else cell
            if len(vector) and not isinstance(vector, bytes):
                return len(vector)
    raise UsageError(f"{name} does not say how wide the vectors are: write vectors:384, or give their column.")


def _hub_kind(where: str) -> Kind:
    """What a model of transformers reads: sounds, where its feature extractor names a sampling rate."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        folder = snapshot(where, AUDIO_FILES, needs=AUDIO_FILES[0])
    extractor = folder / AUDIO_FILES[1]
    return "audio" if extractor.is_file() and "sampling_rate" in json.loads(extractor.read_text("utf-8")) else "text"


def _of_bundle(where: str, kind: Kind | None) -> Encoder:
    from twofold.models.bundle import Bundle

    folder, _, modality = where.partition("@") if not Path(where).exists() else (where, "", "")
    towers = Bundle.load(Path(folder).expanduser(), device="cpu").towers
    if modality:
        if modality not in towers:
            raise unknown(f"tower of {folder}", modality, towers)
        towers = {modality: towers[modality]}
    fit = {name: tower for name, tower in towers.items() if kind in (None, tower.encoder.kind)}
    if len(fit) != 1:
        there = ", ".join(f"{name} ({tower.encoder.kind})" for name, tower in towers.items())
        what = f"towers for {kind}" if kind else "towers to choose from"
        raise UsageError(f"{folder} has {len(fit)} {what}; name one with {folder}@NAME. It has {there}.")
    return next(iter(fit.values())).encoder.requires_grad_(True)


def read_encoder(kind: Kind, spec: Mapping[str, Any], folder: Path) -> Encoder:
    """The encoder that `spec` describes, untrained; `folder` holds its `files`, if it has any."""
    name: str = spec["name"]
    if kind not in KINDS:
        raise unknown("kind of encoder", kind, KINDS)
    if kind == "vector":
        return VectorEncoder(spec["dim"])
    if name.startswith("open_clip:"):
        from twofold.models.openclip import read_open_clip

        return read_open_clip(folder, kind, spec, weights=False)
    if "sees" in spec:
        from twofold.models.causal import read_reader

        return read_reader(folder, spec)
    if name.startswith("coca:"):
        from twofold.models.captioner import read_looker, read_teller

        return read_looker(folder, spec) if kind == "image" else read_teller(folder, spec)
    if kind == "image":
        return image_encoder(**spec, pretrained=False)
    if kind == "video":
        picture = read_encoder("image", spec["picture"], folder)
        assert isinstance(picture, ImageEncoder)
        return video_encoder(picture, frames=spec["frames"], stride=spec["stride"], tubelet=spec.get("tubelet"))
    if kind == "text":
        return read_text_encoder(folder, spec, weights=False)
    return mel_encoder(**spec) if name.startswith("mel:") else read_audio_model(folder, spec, weights=False)


def fresh(encoder: Encoder) -> Encoder:
    """The same encoder before it learned anything; its weights come from torch's generator."""
    with TemporaryDirectory() as folder:
        for file, content in encoder.files.items():
            Path(folder, file).write_bytes(content)
        return read_encoder(encoder.kind, encoder.spec, Path(folder))
