"""A causal language model that reads pictures between its words: a patch is a token that has no word."""

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from twofold.data.decode import Raw
from twofold.data.documents import PATCH
from twofold.data.sources import Kind
from twofold.errors import BundleError, UsageError, unknown
from twofold.models.base import Encoder, device_of, inference
from twofold.models.images import ImageEncoder, image_encoder
from twofold.models.texts import SIZES, TEXT_FILES, learn_bpe
from twofold.models.tokens import Tokens
from twofold.models.weights import quiet_transformers, refuse_hub_code, snapshot, trained
from twofold.objectives import next_token

Sees = Literal["features", "patches"]
LENGTH = 2048  # tokens that a model from scratch has places for


class Eye(nn.Module):
    """A picture as `cells` tokens of width `dim`, patch by patch of its `grid`.

    What `sees` "features" is an encoder that has looked at the whole picture, any of timm's; with "patches", what a
    vision transformer makes of each patch and its place alone, its blocks left out.
    """

    def __init__(self, encoder: ImageEncoder, sees: Sees):
        super().__init__()
        self.encoder = deepcopy(encoder)
        body: Any = self.encoder.body
        if sees == "patches":
            self.patch: tuple[int, int] | None = Tokens(encoder).patch  # pixels along each of its sides
            body.blocks, body.norm = nn.Sequential(), nn.Identity()
        else:
            self.patch = None
        self.frozen = False
        with inference(self):
            seen = self(torch.zeros(1, encoder.channels, encoder.size, encoder.size))
        self.cells, self.dim = seen.shape[1:]

    def freeze(self) -> "Eye":
        """Training leaves the encoder as it is: its weights and its statistics."""
        self.frozen = True
        self.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Eye":
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def standard(self, x: Shaped[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        """Pixels, whole numbers of full scale or floats from 0 to 1, as the encoder's first layer sees them."""
        x = x if x.is_floating_point() else x.float() / torch.iinfo(x.dtype).max
        return (x - self.encoder.mean) / self.encoder.std

    def forward(self, x: Shaped[Tensor, "m c h w"]) -> Float[Tensor, "m {self.cells} {self.dim}"]:
        body: Any = self.encoder.body
        h = body.forward_features(self.standard(x))
        if h.ndim == 3:
            return h[:, getattr(body, "num_prefix_tokens", 0) :]
        return h.flatten(1, 2) if getattr(body, "output_fmt", "NCHW") == "NHWC" else h.flatten(2).transpose(1, 2)


class Read(NamedTuple):
    """What a model makes of each token, and what it expects behind it."""

    states: Float[Tensor, "b t d"]
    logits: Float[Tensor, "b t v"]


class Likelihood(NamedTuple):
    """How likely a text is: the logarithm of its probability, in nats, over so many tokens (its end is one)."""

    nats: Float[Tensor, "n"]
    tokens: Int[Tensor, "n"]


class Reader(Encoder):
    """A causal language model of transformers' and an `Eye`, whose patches are mapped to where words lie.

    As an encoder it is one of pictures: the average of the states that it is in at their patches.
    """

    kind: ClassVar[Kind] = "image"

    def __init__(
        self,
        language: Any,
        tokenizer: Any,
        picture: ImageEncoder,
        spec: Mapping[str, Any],
        *,
        files: Mapping[str, bytes],
    ):
        super().__init__(spec, files)
        if tokenizer.eos_token_id is None:
            raise UsageError(f"The tokenizer of {spec['name']} has no token for the end of a text (eos_token).")
        self.language, self.tokenizer = language, tokenizer
        self.end: int = tokenizer.eos_token_id
        self.start: int = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.eye = Eye(picture, spec["sees"])
        self.dim: int = language.config.hidden_size
        words = language.get_input_embeddings().weight
        patch_to_word = nn.Linear(self.eye.dim, words.shape[1])
        with torch.no_grad():  # a patch starts as loud as a word
            patch_to_word.weight.normal_(std=float(words.std()) / self.eye.dim**0.5)
            patch_to_word.bias.zero_()
        self.project = nn.Sequential(nn.LayerNorm(self.eye.dim), patch_to_word)
        self._check_apart()

    # -- Reading -----------------------------------------------------------------------------------------------------

    def read(
        self, tokens: Int[Tensor, "b t"], document: Int[Tensor, "b t"], pictures: Shaped[Tensor, "m *shape"]
    ) -> Read:
        """Rows of packed documents (`data.documents.Packed`), each read as if it stood alone.

        `pictures` are those of all rows in order: pixels [m, c, h, w], or what the eye made of them, [m, cells, d].
        """
        places = tokens == PATCH
        if int(places.sum()) != len(pictures) * self.eye.cells:
            raise ValueError(
                f"{len(pictures)} pictures of {self.eye.cells} patches meet {int(places.sum())} places for patches."
            )
        longest = getattr(self.language.config, "max_position_embeddings", None) or tokens.shape[1]
        if tokens.shape[1] > longest:
            raise UsageError(f"{self.spec['name']} reads {longest} tokens at most; got rows of {tokens.shape[1]}.")
        x = self.language.get_input_embeddings()(tokens.clamp_min(0))
        patches = self.project(pictures if pictures.ndim == 3 else self.eye(pictures))
        x = x.masked_scatter(places[..., None], patches.to(x.dtype))
        out = self.language(
            inputs_embeds=x,
            attention_mask=visible(document)[:, None],
            position_ids=positions(document),
            use_cache=False,
            output_hidden_states=True,
        )
        return Read(out.hidden_states[-1], out.logits)

    def _check_apart(self) -> None:
        """UsageError for models whose layers mix what a mask keeps apart: recurrences, or positions of their own."""
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(len(self.language.get_input_embeddings().weight), (3, 6), generator=draw)
        tokens[1, 3:], tokens[2, :3] = tokens[0, 3:], tokens[0, 3:]  # another document before it; itself at the start
        document = torch.tensor([[1, 1, 1, 2, 2, 2]]).expand(3, -1)
        with inference(self.language):
            states = self.read(tokens, document, torch.zeros(0, self.eye.cells, self.eye.dim)).states
        behind, other, alone = states[0, 3:], states[1, 3:], states[2, :3]
        room = 1e-4 * float(behind.abs().max())
        if max(float((behind - other).abs().max()), float((behind - alone).abs().max())) > room:
            raise UsageError(
                f"{self.spec['name']} does not keep documents in a row apart: its layers are no plain attention with "
                "positions that are given. Llama, Qwen, SmolLM, Mistral or GPT-2 do."
            )

    # -- Pictures, as an encoder -------------------------------------------------------------------------------------

    def prepare(self, item: Raw, *, name: str = "") -> np.ndarray:
        return self.eye.encoder.prepare(item, name=name)

    def batch(self, prepared: Sequence[np.ndarray]) -> Float[Tensor, "b c h w"]:
        return self.eye.encoder.batch(prepared)

    def forward(self, x: Shaped[Tensor, "b *shape"]) -> Float[Tensor, "b dim"]:
        tokens = torch.full((len(x), 1 + self.eye.cells), PATCH, device=x.device)
        tokens[:, 0] = self.start
        return self.read(tokens, torch.ones_like(tokens), x).states[:, 1:].mean(1)

    # -- Words -------------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts, without start and end."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []

    def caption(
        self, pictures: Shaped[Tensor, "m *shape"], *, prompt: str = "", beams: int = 1, most: int = 40
    ) -> list[str]:
        """What the model says behind each picture and `prompt`, in `most` tokens or until it ends.

        The likeliest word each time, or with `beams` the likeliest text that so many beginnings at a time lead to.
        """
        if beams < 1 or most < 1:
            raise UsageError(f"A caption takes one beam and one token at least; got beams={beams}, most={most}.")
        asked = torch.tensor(self.encode([prompt])[0] if prompt else [], dtype=torch.long)
        with inference(self):
            patches = self.project(pictures if pictures.ndim == 3 else self.eye(pictures))
            words = self.language.get_input_embeddings()
            before, behind = (
                words(ids.to(patches.device)).to(patches.dtype).expand(len(patches), -1, -1)
                for ids in (torch.tensor([self.start]), asked)
            )
            x = torch.cat((before, patches, behind), 1)
            said = self.language.generate(
                inputs_embeds=x,
                attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
                max_new_tokens=most,
                num_beams=beams,
                do_sample=False,
                bos_token_id=self.start,
                eos_token_id=self.end,
                pad_token_id=self.end,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def likelihood(self, texts: Sequence[str], pictures: Shaped[Tensor, "n *shape"] | None = None) -> Likelihood:
        """How likely each text is behind its picture; behind nothing, where there are none."""
        cells = 0 if pictures is None else self.eye.cells
        rows = [[self.start, *[PATCH] * cells, *ids, self.end] for ids in self.encode(texts)]
        width = max(map(len, rows), default=1)
        where = device_of(self)
        tokens = torch.tensor([row + [self.end] * (width - len(row)) for row in rows], device=where)
        document = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=where)
        with inference(self):
            none = torch.zeros(0, self.eye.cells, self.eye.dim, device=where)
            logits = self.read(tokens, document, none if pictures is None else pictures).logits
            asked = follows(document) & (tokens[:, 1:] != PATCH)
            nats = torch.zeros(asked.shape, device=where)
            nats[asked] = -next_token(logits[:, :-1][asked], tokens[:, 1:][asked])
        return Likelihood(nats.sum(1), asked.sum(1))


def visible(document: Int[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    """Which tokens each token sees: those of its own document, up to itself. Padding is a document of its own."""
    return (document[:, :, None] == document[:, None]).tril()


def follows(document: Int[Tensor, "b t"]) -> Bool[Tensor, "b s"]:
    """For each token but the first, whether the one before it is of the same document: what can be predicted."""
    return (document[:, 1:] == document[:, :-1]) & (document[:, 1:] > 0)


def positions(document: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The place of each token in its document, from 0."""
    place = torch.arange(document.shape[1], device=document.device).expand_as(document)
    begins = nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
    return place - torch.where(begins, place, 0).cummax(1).values


def pooled(states: Float[Tensor, "b t d"], document: Int[Tensor, "b t"]) -> Float[Tensor, "n d"]:
    """The average state of each document, row by row."""
    rows = torch.arange(len(document), device=document.device)[:, None]
    _, owner = (rows * (document.max() + 1) + document)[document > 0].unique(return_inverse=True)
    return _averages(states[document > 0], owner)


def _averages(x: Float[Tensor, "m d"], owner: Int[Tensor, "m"]) -> Float[Tensor, "n d"]:
    sums = x.new_zeros(int(owner.max()) + 1, x.shape[1]).index_add(0, owner, x)
    return sums / owner.bincount()[:, None]


# -- By name -----------------------------------------------------------------------------------------------------------

CAUSAL_FILES = (*TEXT_FILES, "generation_config.json")


def reader(
    language: str = "llama:small",
    picture: ImageEncoder | str = "efficientnet-lite0",
    *,
    sees: Sees = "features",
    size: int | None = None,
    texts: Iterable[str] = (),
) -> Reader:
    """A reader of pictures and texts by the names of its language model and of its picture encoder.

    `size` is the side of its pictures in pixels, where not the encoder's own: a patch of 32 pixels makes 25 of 160.

    "llama:tiny", "llama:small" and "llama:base" start from scratch, with a vocabulary learned from `texts`, and weights
    from torch's generator. "hf:owner/name" and "hf:/folder" are causal models of transformers (safetensors, and no code
    of the author's); "local:/folder" takes the language model of a reader that a bundle holds.
    """
    from twofold.models.encoders import encoder

    if sees not in get_args(Sees):
        raise unknown("way to see", sees, get_args(Sees))
    chosen: Encoder
    if isinstance(picture, ImageEncoder):
        chosen = picture
    elif size is None:
        chosen = encoder(picture, "image")
    else:
        bare = picture.removesuffix("@untrained")
        chosen = image_encoder(bare, size=size, pretrained=bare == picture and "/" not in bare)
    if not isinstance(chosen, ImageEncoder):
        raise UsageError(
            f"{picture} has no patches to read; networks of timm's have, such as timm:vit_tiny_patch16_224."
        )
    model, tokenizer, files = _language(language, texts)
    return Reader(model, tokenizer, chosen, _spec(language, sees, chosen), files=files)


def _spec(language: str, sees: Sees, picture: ImageEncoder) -> dict[str, Any]:
    where, _, name = language.partition(":")
    return {"name": f"{where}:{Path(name).name}", "sees": sees, "picture": picture.spec}


def read_reader(folder: Path, spec: Mapping[str, Any]) -> Reader:
    """The reader that `spec` describes, untrained; `folder` holds its `files`."""
    model, tokenizer, files = _open(folder, weights=False)
    return Reader(model, tokenizer, image_encoder(**spec["picture"], pretrained=False), spec, files=files)


def _language(name: str, texts: Iterable[str]) -> tuple[Any, Any, dict[str, bytes]]:
    where, _, rest = name.partition(":")
    if where == "hf":
        folder = Path(rest).expanduser()
        return _open(
            folder if folder.is_dir() else snapshot(rest, ("*.safetensors", "*.json", *TEXT_FILES)), weights=True
        )
    if where == "local":
        from twofold.models.bundle import Bundle

        found = [tower.encoder for tower in Bundle.load(rest, device="cpu").towers.values()]
        readers = [one for one in found if isinstance(one, Reader)]
        if not readers:
            raise UsageError(f"{rest} holds no reader of pictures and texts, whose language model could be taken.")
        return readers[0].language.requires_grad_(True), readers[0].tokenizer, readers[0].files
    if where != "llama" or rest not in SIZES:
        raise unknown("language model", name, [*(f"llama:{size}" for size in SIZES), "hf:…", "local:…"])
    width, layers = SIZES[rest]
    tokenizer = learn_bpe(texts)
    described = {
        "config.json": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "intermediate_size": 4 * width,
            "max_position_embeddings": LENGTH,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,  # one token stands between documents, whichever side of it
            "eos_token_id": 1,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "[PAD]",
            "bos_token": "[CLS]",
            "eos_token": "[CLS]",
            "model_max_length": LENGTH,
        },
    }
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file, content in described.items():
            (folder / file).write_text(json.dumps(content), "utf-8")
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        return _open(folder, weights=False)


def _open(folder: Path, *, weights: bool) -> tuple[Any, Any, dict[str, bytes]]:
    """Language model, tokenizer and small files of a transformers folder; without `weights`, only the shape."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    attention: Any = {"attn_implementation": "sdpa"}  # what takes a mask of True and False, whatever the precision
    with quiet_transformers():
        try:
            refuse_hub_code(folder / "config.json")
            config = AutoConfig.from_pretrained(folder, **local)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            if weights:
                model = trained(AutoModelForCausalLM, folder, **attention)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **attention)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise BundleError(f"{folder} is not a readable causal language model of transformers: {error}") from error
    return model.eval(), tokenizer, {f: (folder / f).read_bytes() for f in CAUSAL_FILES if (folder / f).is_file()}
