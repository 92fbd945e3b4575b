"""The two towers of a contrastive captioner: pictures that answer questions, and a decoder that reads, then looks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.data.decode import Raw
from twofold.data.sources import Kind
from twofold.errors import BundleError, UsageError, unknown
from twofold.models.base import Encoder, device_of, inference
from twofold.models.causal import Eye, Likelihood
from twofold.models.images import ImageEncoder, image_encoder
from twofold.models.texts import SIZES, learn_bpe
from twofold.objectives import next_token

LENGTH = 64  # tokens of a text that are read, its start and its end included (arXiv 2205.01917, section 4.1)
QUERIES = 256  # that the captioner asks a picture (section 3.2)
PAD, EDGE = 0, 1  # the tokenizer's: what fills a row, and what stands before and behind a text
TOKENIZER = "tokenizer.json"


class Pooler(nn.Module):
    """Attentional pooling: learned questions, each answered by what it attends to among tokens [b, n, dim]."""

    def __init__(self, dim: int, width: int, queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) / width**0.5)
        self.attend = nn.MultiheadAttention(width, width // 64 or 1, kdim=dim, vdim=dim, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Float[Tensor, "b n dim"]) -> Float[Tensor, "b q width"]:
        asked = self.queries.expand(len(tokens), -1, -1)
        return self.norm(self.attend(asked, tokens, tokens, need_weights=False)[0])


class Looker(Encoder):
    """Pictures as `width` numbers, by one question that any network of timm's is asked; `shown` answers many others."""

    kind: ClassVar[Kind] = "image"

    def __init__(self, picture: ImageEncoder, *, width: int, queries: int = QUERIES):
        told = {"name": f"coca:{picture.spec['name']}", "picture": picture.spec, "width": width, "queries": queries}
        super().__init__(told, picture.files)
        self.eye = Eye(picture, "features")
        self.contrast, self.describe = Pooler(self.eye.dim, width, 1), Pooler(self.eye.dim, width, queries)
        self.dim = width

    def prepare(self, item: Raw, *, name: str = "") -> np.ndarray:
        return self.eye.encoder.prepare(item, name=name)

    def batch(self, prepared: Sequence[np.ndarray]) -> Float[Tensor, "b c h w"]:
        return self.eye.encoder.batch(prepared)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim"]:
        return self.contrast(self.eye(x))[:, 0]

    def both(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b dim"], Float[Tensor, "b q dim"]]:
        """A picture's embedding, and what a captioner is shown of it; the network runs once."""
        tokens = self.eye(x)
        return self.contrast(tokens)[:, 0], self.describe(tokens)

    def shown(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b q dim"]:
        return self.describe(self.eye(x))


class Teller(Encoder):
    """A causal decoder whose first half reads a text by itself, and whose second half also sees a picture.

    As an encoder it is one of texts: what the first half makes of a token behind the text that has no word. No word
    sees that token, and it sees no padding.
    """

    kind: ClassVar[Kind] = "text"

    def __init__(self, tokenizer: Any, *, width: int, layers: int):
        from tokenizers import Tokenizer

        content = tokenizer.to_str().encode()
        super().__init__({"name": "coca:text", "width": width, "layers": layers}, {TOKENIZER: content})
        self.tokenizer: Any = Tokenizer.from_str(content.decode())
        self.dim, heads = width, width // 64 or 1
        shape: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.words = nn.Embedding(self.tokenizer.get_vocab_size(), width)
        self.places = nn.Parameter(0.01 * torch.randn(LENGTH, width))
        self.last = nn.Parameter(0.01 * torch.randn(width))  # the token without a word
        self.reading = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, **shape) for _ in range(layers)
        )
        self.telling = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, **shape) for _ in range(layers)
        )
        self.norms = nn.ModuleDict({half: nn.LayerNorm(width) for half in ("read", "told")})
        nn.init.normal_(self.words.weight, std=0.02)

    def prepare(self, item: str, *, name: str = "") -> str:
        return item

    def batch(self, prepared: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask [b, n], between two edges, padded to the longest text and cut at `LENGTH`."""
        rows = [[EDGE, *self.encode(text)[: LENGTH - 2], EDGE] for text in prepared]
        width = max(map(len, rows), default=2)
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.long).view(-1, width)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).view(-1, width)
        return {"input_ids": ids, "attention_mask": mask}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def read(self, tokens: Mapping[str, Tensor]) -> tuple[Float[Tensor, "b n dim"], Float[Tensor, "b dim"]]:
        """What the first half makes of each word, and of the whole text."""
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        x = self.words(ids) + self.places[: ids.shape[1]]
        x = torch.cat((x, self.last.expand(len(x), 1, -1)), 1)
        hidden = nn.functional.pad(mask == 0, (0, 1))
        for layer in self.reading:
            x = layer(x, src_mask=_ahead(x), src_key_padding_mask=hidden)
        return x[:, :-1], self.norms["read"](x[:, -1])

    def forward(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "b dim"]:
        return self.read(tokens)[1]

    def tell(self, words: Float[Tensor, "b n dim"], shown: Float[Tensor, "b q dim"]) -> Float[Tensor, "b n v"]:
        """Logits of the token behind each, from the words up to it and from the picture."""
        x = words
        for layer in self.telling:
            x = layer(x, shown, tgt_mask=_ahead(x))
        return self.norms["told"](x) @ self.words.weight.T


class Speaker(nn.Module):
    """A looker and a teller as one reader of pictures: what `measure.likelihood` captions and scores with."""

    def __init__(self, looker: Looker, teller: Teller):
        super().__init__()
        self.looker, self.teller = looker, teller
        self.prepare, self.batch = looker.prepare, looker.batch

    def eye(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b q dim"]:
        return self.looker.shown(x)

    def caption(
        self, pictures: Float[Tensor, "m c h w"], *, prompt: str = "", beams: int = 1, most: int = 40
    ) -> list[str]:
        """What is said of each picture behind `prompt`: the likeliest word each time, `most` of them or to the end."""
        if beams != 1:
            raise UsageError(f"A contrastive captioner says the likeliest word each time; leave out beams={beams}.")
        asked = [EDGE, *self.teller.encode(prompt)]
        if most < 1 or len(asked) >= LENGTH:
            raise UsageError(f"A caption takes a token at least, and a prompt {LENGTH - 1} at most; got most={most}.")
        with inference(self):
            shown = self.looker.shown(pictures)
            said = torch.tensor(asked, device=shown.device).expand(len(shown), -1)
            for _ in range(min(most, LENGTH - len(asked))):
                words, _ = self.teller.read({"input_ids": said, "attention_mask": torch.ones_like(said)})
                following = self.teller.tell(words, shown)[:, -1].argmax(1)
                ended = (said[:, len(asked) :] == EDGE).any(1)
                said = torch.cat((said, torch.where(ended, EDGE, following)[:, None]), 1)
                if (ended | (following == EDGE)).all():
                    break
        return [text.strip() for text in self.teller.tokenizer.decode_batch(said[:, 1:].tolist())]

    def likelihood(self, texts: Sequence[str], shown: Float[Tensor, "n q dim"]) -> Likelihood:
        """How likely each text is behind what is shown of its picture."""
        tokens = {name: part.to(device_of(self)) for name, part in self.teller.batch(texts).items()}
        with inference(self):
            logits = self.teller.tell(self.teller.read(tokens)[0], shown)
            ids, asked = tokens["input_ids"][:, 1:], tokens["attention_mask"][:, 1:] > 0
            nats = torch.zeros(asked.shape, device=logits.device)
            nats[asked] = -next_token(logits[:, :-1][asked], ids[asked])
        return Likelihood(nats.sum(1), asked.sum(1))


def captioner(name: str, picture: ImageEncoder, texts: Iterable[str]) -> dict[str, Encoder]:
    """The two towers from scratch, "coca:tiny", "coca:small" or "coca:base", with a vocabulary learned from `texts`.

    Half of the decoder's layers read, half of them tell. Weights come from torch's generator.
    """
    size = name.removeprefix("coca:")
    if size not in SIZES:
        raise unknown("captioner from scratch", name, [f"coca:{size}" for size in SIZES])
    width, layers = SIZES[size]
    cells = Eye(picture, "features").cells
    return {
        "image": Looker(picture, width=width, queries=min(QUERIES, cells)),
        "text": Teller(learn_bpe(texts), width=width, layers=max(1, layers // 2)),
    }


def read_looker(folder: Path, spec: Mapping[str, Any]) -> Looker:
    """The looker that `spec` describes, untrained."""
    return Looker(image_encoder(**spec["picture"], pretrained=False), width=spec["width"], queries=spec["queries"])


def read_teller(folder: Path, spec: Mapping[str, Any]) -> Teller:
    """The teller that `spec` describes, untrained; `folder` holds its tokenizer."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text("utf-8"))
    except Exception as error:  # tokenizers raises plain ones
        raise BundleError(f"{folder / TOKENIZER} is not a readable tokenizer: {error}") from error
    return Teller(tokenizer, width=spec["width"], layers=spec["layers"])


def _ahead(x: Float[Tensor, "b n d"]) -> Tensor:
    """Which tokens each may not see: those behind it."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
