"""The towers of CLIP and SigLIP models in open_clip's format: a configuration, safetensors, their own tokenizer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from twofold.data.sources import Kind
from twofold.errors import BundleError, TwofoldError, UsageError, unknown
from twofold.models.base import Encoder
from twofold.models.images import ImageEncoder
from twofold.models.texts import TEXT_FILES
from twofold.models.weights import quiet_transformers, refuse_hub_code, snapshot

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
HOW: dict[str, Literal["crop", "pad", "stretch"]] = {"shortest": "crop", "longest": "pad", "squash": "stretch"}
# The other half of the model is built this small, and thrown away.
NO_IMAGE = {"layers": 1, "width": 64, "head_width": 64, "image_size": 32, "patch_size": 32}
NO_TEXT = {"layers": 1, "width": 64, "heads": 1, "context_length": 4, "vocab_size": 4}
TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language"}


class ClipTextEncoder(Encoder):
    """The text tower of a CLIP model, its projection included, with the model's tokenizer."""

    kind: ClassVar[Kind] = "text"

    def __init__(self, body: nn.Module, tokenizer: Any, spec: Mapping[str, Any], *, files: Mapping[str, bytes]):
        super().__init__(spec, files)
        self.body, self.tokenizer = body, tokenizer
        self.dim: int = json.loads(files[CONFIG])["model_cfg"]["embed_dim"]

    def prepare(self, item: str, *, name: str = "") -> str:
        return item

    def batch(self, prepared: Sequence[str]) -> dict[str, Tensor]:
        """Token ids [b, length], cut and filled up to the one length that the model was trained with."""
        return {"input_ids": self.tokenizer(list(prepared))}

    def forward(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "b dim"]:
        return self.body(tokens["input_ids"])


def open_clip_encoder(name: str, kind: Literal["image", "text"]) -> ImageEncoder | ClipTextEncoder:
    """One tower of a CLIP or SigLIP model: "open_clip:/folder", "open_clip:ViT-B-32@laion2b_s34b_b79k".

    A folder holds `open_clip_config.json`, `open_clip_model.safetensors` and, unless the tokenizer is OpenAI's, the
    tokenizer's files; so does a model's repository on the hub, which is where other names lead, "owner/name" too. A
    model of which there is one set of weights needs no "@weights".
    """
    asked = name.removeprefix("open_clip:")
    folder = Path(asked).expanduser()
    if not folder.is_dir():
        folder = snapshot(_repository(asked), ("*.safetensors", "*.json", *TEXT_FILES))
    return read_open_clip(folder, kind, {"name": f"open_clip:{Path(asked).name}"}, weights=True)


def read_open_clip(
    folder: Path, kind: Kind, spec: Mapping[str, Any], *, weights: bool
) -> ImageEncoder | ClipTextEncoder:
    """A tower of the model in `folder`; without `weights`, only its shape and its tokenizer."""
    path = folder / CONFIG
    half: Literal["visual", "text"] = "visual" if kind == "image" else "text"
    try:
        config = json.loads(path.read_text("utf-8"))
        model, seen = config["model_cfg"], config.get("preprocess_cfg", {})
        if "multimodal_cfg" in model:
            raise UsageError(f"{path} is of a CoCa model; twofold reads CLIP and SigLIP.")
        files = {CONFIG: path.read_bytes()}
        if half == "text":
            files |= _text_files(folder, model["text_cfg"])
        with TemporaryDirectory() as exact, quiet_transformers():  # nothing else than what a bundle will keep
            for file, content in files.items():
                Path(exact, file).write_bytes(content)
            body = _half(model, half, Path(exact))
            encoder: ImageEncoder | ClipTextEncoder
            if half == "visual":
                encoder = _image(body, {**_image_spec(model, seen), **spec}, seen, files)
            else:
                encoder = ClipTextEncoder(body, _tokenizer(Path(exact), model["text_cfg"]), spec, files=files)
    except TwofoldError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise BundleError(f"{folder} is not a readable open_clip model ({type(error).__name__}: {error}).") from error
    if weights:
        _load(encoder.body, folder, half)
    return encoder.eval()


def _library() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UsageError("This encoder is built by open_clip: pip install 'twofold[open-clip]'.") from error
    return open_clip


def _repository(asked: str) -> str:
    """Where on the hub a model of open_clip's list lies; an "owner/name" is that itself."""
    model, _, tag = asked.partition("@")
    if "/" in model:
        return model
    library = _library()
    if model not in library.list_models():
        raise unknown("open_clip model", model, library.list_models())
    tags = library.list_pretrained_tags_by_model(model)
    if not tag and len(tags) != 1:
        choices = ", ".join(f"open_clip:{model}@{one}" for one in tags) or "none; give a folder"
        raise UsageError(f"open_clip:{model} does not say which weights. There are: {choices}.")
    if tag and tag not in tags:
        raise unknown(f"set of weights of {model}", tag, tags)
    repository = library.get_pretrained_cfg(model, tag or tags[0]).get("hf_hub", "").strip("/")
    if not repository:
        raise UsageError(f"The weights {tag or tags[0]} of {model} are not on the hub. Convert them, give a folder.")
    return "/".join(repository.split("/")[:2])


def _image_spec(model: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    size = model["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        raise UsageError(f"This model sees pictures of {size}; twofold brings them to a square.")
    return {"size": size, "channels": 3, "how": HOW[seen.get("resize_mode") or "shortest"]}


def _image(
    body: nn.Module, spec: Mapping[str, Any], seen: Mapping[str, Any], files: Mapping[str, bytes]
) -> ImageEncoder:
    library = _library()
    mean, std = seen.get("mean", library.OPENAI_DATASET_MEAN), seen.get("std", library.OPENAI_DATASET_STD)
    return ImageEncoder(body, spec, mean=mean, std=std, files=files)


def _half(model: Mapping[str, Any], half: Literal["visual", "text"], folder: Path) -> nn.Module:
    """The untrained image or text tower that a configuration describes; nothing is fetched for it."""
    import timm

    see = {**model["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    read = {**model["text_cfg"], "hf_model_pretrained": False, "output_tokens": False}
    if half == "visual":
        read = dict(NO_TEXT)
        named = see.get("timm_model_name")
        if named and (":" in named or not timm.is_model(named)):  # timm would look for it on the network
            raise ValueError(f"timm has no model {named!r}")
    else:
        see = dict(NO_IMAGE)
        if read.get("hf_model_name"):
            _refuse_own_code(folder / "config.json")
            read["hf_model_name"] = str(folder)
    whole = _library().CustomTextCLIP(
        model["embed_dim"], vision_cfg=see, text_cfg=read, quick_gelu=model.get("quick_gelu", False)
    )
    return getattr(whole, half)


def _text_files(folder: Path, text: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the tokenizer, and the configuration of a text tower of transformers, from where the model names."""

    def taken(where: Path, names: Sequence[str]) -> dict[str, bytes]:
        return {name: (where / name).read_bytes() for name in names if (where / name).is_file()}

    files: dict[str, bytes] = {}
    if tokenizer := text.get("hf_tokenizer_name"):  # else OpenAI's, a part of open_clip
        names = [name for name in TEXT_FILES if name != "config.json"]  # that may be timm's, of the image tower
        files |= taken(folder, names) or taken(snapshot(tokenizer, names, needs="token*"), names)
    if tower := text.get("hf_model_name"):
        own = (folder / "config.json").is_file() and "model_type" in json.loads((folder / "config.json").read_text())
        files |= taken(folder if own else snapshot(tower, ["config.json"], needs="config.json"), ["config.json"])
    return files


def _refuse_own_code(path: Path) -> None:
    """ValueError for code that comes with a model: open_clip would let transformers ask at the terminal to run it."""
    refuse_hub_code(path)
    if "auto_map" in json.loads(path.read_text("utf-8")):
        raise ValueError(f"{path.name} asks to run code of its own")


def _tokenizer(folder: Path, text: Mapping[str, Any]) -> Any:
    if (folder / "tokenizer_config.json").is_file():
        _refuse_own_code(folder / "tokenizer_config.json")
    if strange := (text.get("tokenizer_kwargs") or {}).keys() - TOKENIZER_OPTIONS:
        raise ValueError(f"its tokenizer asks for {', '.join(sorted(strange))}")  # trust_remote_code, for instance
    return _library().get_tokenizer(f"local-dir:{folder}")


def _load(body: nn.Module, folder: Path, half: str) -> None:
    from open_clip.model import convert_to_custom_text_state_dict

    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    try:
        weights = convert_to_custom_text_state_dict(load_file(path))
        own = {name.removeprefix(f"{half}."): value for name, value in weights.items() if name.startswith(f"{half}.")}
        body.load_state_dict(own)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing. Only safetensors are read: they cannot run code.") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path} does not hold this model's weights ({error}).") from error
