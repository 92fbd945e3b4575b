"""Interleaved autoregression — AIM (arXiv 2401.08541) on pictures, among texts as in Kosmos-1 (arXiv 2302.14045).

Pictures and texts of a document are one sequence, of which the next piece is predicted from all before it: the next
word, and by choice the pixels of the next patch. What says much about what follows is what the model comes to see.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold.data.documents import PATCH
from twofold.errors import UsageError
from twofold.methods.base import Method, Out, check_weight
from twofold.models.causal import Reader, follows, pooled
from twofold.models.tokens import patches
from twofold.objectives import masked_pixels, next_token, next_token_chance
from twofold.runtime import average


class Interleaved(Method):
    """`reader` reads rows of packed documents; `pixels` weighs the next patch's error beside the next word's.

    A batch has "tokens" and "document" [b, t] as `data.documents.packed` lays them, and in "image" a tensor a row: its
    pictures [m, c, h, w], or what the reader's eye, when it is frozen, has made of them before, [m, cells, d].
    """

    needs = ("image", "tokens", "document")
    smallest_batch = 1

    def __init__(self, reader: Reader, *, pixels: float = 0.0):
        super().__init__()
        check_weight("pixels", pixels)
        if pixels and reader.eye.patch is None:
            raise UsageError(
                "Features of an encoder that has seen the whole picture give the next patch away. "
                'For pixels > 0 the reader must see "patches".'
            )
        self.reader, self.pixels = reader, pixels
        if pixels and reader.eye.patch:
            down, across = reader.eye.patch
            self.paint = nn.Linear(reader.dim, down * across * reader.eye.encoder.channels)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        tokens, document = batch["tokens"], batch["document"]
        pictures = torch.cat(list(batch["image"]))
        read = self.reader.read(tokens, document, pictures)
        ahead = tokens[:, 1:]
        inside = follows(document)
        words, painted = inside & (ahead != PATCH), inside & (ahead == PATCH)

        loss = text = average(next_token(read.logits[:, :-1][words], ahead[words]))
        parts = {"text": text.detach(), "perplexity": text.detach().exp()}
        if self.pixels and self.reader.eye.patch:
            true = patches(self.reader.eye.standard(pictures), self.reader.eye.patch).flatten(0, 1)
            error = average(masked_pixels(self.paint(read.states[:, :-1][painted]), true))
            loss, parts["pixels"] = text + self.pixels * error, error.detach()
        chance = next_token_chance(read.logits.shape[2]) if not self.pixels else float("nan")
        return Out(loss, z=pooled(read.states, document), chance=chance, parts=parts)

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.reader}
