"""Sound encoders: small networks on log-mel spectrograms, and transformers' models that bring their own front end."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold.data.audio import RATE, Sound, hear
from twofold.data.sources import Kind
from twofold.errors import BundleError, UsageError, unknown
from twofold.models.base import Encoder, inference
from twofold.models.images import image_encoder
from twofold.models.weights import quiet_transformers, refuse_hub_code, snapshot, trained

WINDOW, HOP, BANDS = 400, 160, 80  # 25 ms every 10 ms, as Whisper and most of speech recognition
SIZES = {"tiny": (128, 2), "small": (256, 4), "base": (512, 6)}  # width, layers
ALIKE = 32  # sounds that are filled up to the longest of them
SECONDS = {"transformer": 30.0, "picture": 10.0}  # the most that is heard of a sound


class LogMel(nn.Module):
    """Waveforms at 16 kHz to log-mel spectrograms: 80 bands between 0 and 8 kHz, a frame every 10 ms.

    The values of a clip are standardised over all of it, so that its loudness, which mostly tells how far away the
    microphone was, is gone. Frames beyond its end are 0.
    """

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)

    def forward(self, waves: Float[Tensor, "b n"], samples: Int[Tensor, "b"]) -> Float[Tensor, "b bands frames"]:
        spectrum = torch.stft(waves, WINDOW, HOP, window=self.window, center=False, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()  # abs().square() takes a root first
        bands = (self.filters @ power).clamp_min(1e-10).log10()
        there = (torch.arange(bands.shape[2], device=bands.device) < frames(samples)[:, None])[:, None]
        # As Whisper's: what is 80 dB below the loudest is silence, whatever was recorded there.
        loudest = bands.masked_fill(~there, -math.inf).amax((1, 2), keepdim=True)
        bands = bands.maximum(loudest - 8)
        count = there.sum((1, 2), keepdim=True) * BANDS
        bands = (bands - (bands * there).sum((1, 2), keepdim=True) / count) * there
        return bands / (bands.square().sum((1, 2), keepdim=True) / count + 1e-5).sqrt()


def frames(samples: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """How many whole windows fit into that many samples."""
    return (samples - WINDOW) // HOP + 1


def mel_filters() -> Float[Tensor, "bands bins"]:
    """Triangles that overlap by half, equally wide on the mel scale 2595 log10(1 + f / 700); each peaks at 1."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, BANDS + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    below, centre, above = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - below) / (centre - below), (above - bins) / (above - centre)
    return torch.minimum(rising, falling).clamp_min(0).float()


class SoundTransformer(nn.Module):
    """Two strided convolutions over time (40 ms a token), then a pre-norm transformer; the mean of its tokens.

    The shape of Whisper's encoder, except that padding is masked instead of heard.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.dim = width
        self.stem = nn.ModuleList([nn.Conv1d(BANDS, width, 3, 2, 1), nn.Conv1d(width, width, 3, 2, 1)])
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, spectrogram: Float[Tensor, "b bands frames"], count: Int[Tensor, "b"]) -> Float[Tensor, "b dim"]:
        x = spectrogram
        for convolution in self.stem:
            x = nn.functional.gelu(convolution(x))
            count = (count + 1) // 2
            there = torch.arange(x.shape[2], device=x.device) < count[:, None]
            x = x * there[:, None]  # the next convolution sees beyond the end what it would see alone
        x = x.transpose(1, 2)
        x = self.blocks(x + positions(x.shape[1], self.dim, x), src_key_padding_mask=~there)
        return (x * there[:, :, None]).sum(1) / count[:, None]


def positions(length: int, dim: int, like: Tensor) -> Float[Tensor, "length dim"]:
    """Sines and cosines of geometrically spaced wavelengths (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(dim // 2, device=like.device) * (-math.log(10_000) / (dim // 2 - 1)))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)


class MelEncoder(Encoder):
    """A log-mel spectrogram, and a network of ours or of timm's on it; sounds are heard at 16 kHz.

    A network of timm's sees the spectrogram as a picture of one channel that is always `seconds` long.
    """

    kind: ClassVar[Kind] = "audio"

    def __init__(self, body: nn.Module, spec: Mapping[str, Any]):
        super().__init__(spec)
        self.front, self.body = LogMel(), body
        self.rate, self.seconds = RATE, float(spec["seconds"])
        self.fixed = not isinstance(body, SoundTransformer)
        if isinstance(body, SoundTransformer):
            self.dim = body.dim
        else:
            with inference(self):
                self.dim = self(self.batch([np.zeros(RATE, np.float32)])).shape[1]

    def prepare(self, item: Sound, *, name: str = "") -> np.ndarray:
        return hear(item, rate=RATE, seconds=self.seconds, name=name)

    def batch(self, prepared: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Waveforms [b, n], filled up with zeros, and how many samples of each are its own."""
        longest = round(RATE * self.seconds) if self.fixed else max(map(len, prepared))
        waves = torch.zeros(len(prepared), longest)
        for row, wave in zip(waves.numpy(), prepared, strict=True):
            row[: len(wave)] = wave
        return {"waves": waves, "samples": torch.tensor([len(wave) for wave in prepared])}

    def forward(self, x: Mapping[str, Tensor]) -> Float[Tensor, "b dim"]:
        waves, samples = x["waves"], x["samples"]
        if self.fixed:
            return self.body(self.front(waves, samples)[:, None])
        order = samples.argsort()  # sounds of like length together, so that little is padding
        parts = []
        for at in order.split(ALIKE):
            longest = int(samples[at[-1]])
            parts.append(self.body(self.front(waves[at, :longest], samples[at]), frames(samples[at])))
        return torch.cat(parts)[order.argsort()]


def mel_encoder(name: str = "mel:small", *, seconds: float | None = None) -> MelEncoder:
    """A sound encoder from scratch: "mel:tiny", "mel:small", "mel:base", or a picture network, "mel:timm:resnet18".

    `seconds` is the most that is heard of a sound, from its start: 30 by default, 10 for a picture network, which is
    always given as much.
    """
    what = name.removeprefix("mel:")
    if what in SIZES:
        return MelEncoder(SoundTransformer(*SIZES[what]), {"name": name, "seconds": seconds or SECONDS["transformer"]})
    if not what.startswith("timm:"):
        raise unknown("sound encoder", name, [*(f"mel:{size}" for size in SIZES), "mel:timm:resnet18"])
    body = image_encoder(what, channels=1, pretrained=False).body
    try:
        return MelEncoder(body, {"name": name, "seconds": seconds or SECONDS["picture"]})
    except (AssertionError, RuntimeError, ValueError) as error:  # transformers of pictures have one size
        raise UsageError(f"{name}: this network cannot see a spectrogram ({error}). Convolutional ones can.") from error


# --- transformers' own ------------------------------------------------------------------------------------------------

AUDIO_FILES = ("config.json", "preprocessor_config.json")
PROJECTED = ("clap", "clap_audio_model")  # the audio half of a contrastive model, with its projection
PATCHED = ("audio-spectrogram-transformer",)  # states are patches of a spectrogram, not moments
RAW_SECONDS = 10.0  # for models of waveforms, which have no length of their own


class TransformersAudio(Encoder):
    """A model of transformers that hears (Whisper, wav2vec 2, HuBERT, AST, CLAP), behind its own feature extractor.

    Its states are averaged over the clip's own length; a model with a projection, as CLAP's, ends in that. Clips are
    filled up to the length that the model is made for, so that what else is in the batch does not matter.
    """

    kind: ClassVar[Kind] = "audio"

    def __init__(self, body: Any, extractor: Any, spec: Mapping[str, Any], *, files: Mapping[str, bytes]):
        super().__init__(spec, files)
        self.body, self.extractor = body, extractor
        self.rate: int = extractor.sampling_rate
        self.seconds: float = spec["seconds"]
        with inference(self):
            self.dim = self(self.batch([np.zeros(self.rate, np.float32)])).shape[1]

    def prepare(self, item: Sound, *, name: str = "") -> np.ndarray:
        return hear(item, rate=self.rate, seconds=self.seconds, name=name)

    def batch(self, prepared: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What the feature extractor makes of the waveforms, and the `share` of the clip that each one fills."""
        from transformers import Wav2Vec2FeatureExtractor

        fill: dict[str, Any] = {}  # all others fill up to the length of their spectrograms
        if isinstance(self.extractor, Wav2Vec2FeatureExtractor):
            fill = {"padding": "max_length", "max_length": round(self.rate * self.seconds)}
        x = dict(self.extractor(list(prepared), sampling_rate=self.rate, return_tensors="pt", **fill))
        return {**x, "share": torch.tensor([len(wave) / (self.rate * self.seconds) for wave in prepared])}

    def forward(self, x: Mapping[str, Tensor]) -> Float[Tensor, "b dim"]:
        out = self.body(**{name: value for name, value in x.items() if name != "share"})
        if self.body.config.model_type in PROJECTED:
            return out.audio_embeds
        states = out.last_hidden_state
        if self.body.config.model_type in PATCHED:
            return states.mean(1)
        count = (x["share"] * states.shape[1]).ceil().clamp(1, states.shape[1])
        there = torch.arange(states.shape[1], device=states.device) < count[:, None]
        return (states * there[:, :, None]).sum(1) / count[:, None]


def audio_model(name: str) -> TransformersAudio:
    """A sound encoder of transformers: "hf:/folder", "hf:owner/name". Weights must be safetensors."""
    where = name.removeprefix("hf:")
    folder = Path(where).expanduser()
    found = folder if folder.is_dir() else snapshot(where, ("*.safetensors", *AUDIO_FILES))
    return read_audio_model(found, {"name": f"hf:{folder.name}"}, weights=True)


def read_audio_model(folder: Path, spec: Mapping[str, Any], *, weights: bool) -> TransformersAudio:
    """The sound encoder of a transformers folder; without `weights`, only its shape."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, ClapAudioModelWithProjection

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers():
        try:
            refuse_hub_code(folder / "config.json")
            config = AutoConfig.from_pretrained(folder, **local)
            extractor = AutoFeatureExtractor.from_pretrained(folder, **local)
            projected = config.model_type in PROJECTED
            if projected:
                config = getattr(config, "audio_config", config)
            if weights:
                kind: Any = ClapAudioModelWithProjection if projected else AutoModel
                whole = trained(kind, folder, config=config)
            else:
                whole = ClapAudioModelWithProjection(config) if projected else AutoModel.from_config(config)
            body = whole.get_encoder() if config.is_encoder_decoder else whole
            spec = {"seconds": _clip_seconds(extractor), **spec}
            files = {file: (folder / file).read_bytes() for file in AUDIO_FILES if (folder / file).is_file()}
            return TransformersAudio(body.eval(), extractor, spec, files=files)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
            raise BundleError(f"{folder} is not a readable transformers audio model: {error}") from error


def _clip_seconds(extractor: Any) -> float:
    """How much of a sound a feature extractor takes at once: Whisper's, CLAP's, AST's; 10 s of a bare waveform."""
    if hasattr(extractor, "n_samples"):
        return extractor.n_samples / extractor.sampling_rate
    if hasattr(extractor, "nb_max_samples"):
        return extractor.nb_max_samples / extractor.sampling_rate
    if hasattr(extractor, "num_mel_bins"):
        return extractor.max_length / 100  # frames of 10 ms
    return RAW_SECONDS
