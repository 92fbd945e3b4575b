"""Hard negatives in the batches of a pair method: mined once, or by the model itself, anew as it learns (ANCE, arXiv
2007.00808, section 4).

Of each item's negatives some come into its batch, where every item is held against all of them. So one that belongs to
an item of the batch stays out, and one that several items share comes once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from twofold import runtime
from twofold.errors import UsageError
from twofold.methods.base import Method, Out
from twofold.methods.clip import CLIP
from twofold.methods.siglip import SigLIP


class WithNegatives(Method):
    """`method` over batches with a column "item" [b], to which "negatives" of the second kind are added.

    `corpus` holds what the second tower takes in, one row a candidate, and `owner` the item that each belongs to.
    `negatives` are each item's rows of it, −1 for none; `each` of them are drawn on a visit. Every `every` steps they
    are replaced by `mine(method)`: the rows are part of the checkpoint, so a resumed run has the same.
    """

    negatives: Tensor
    corpus: Tensor
    owner: Tensor
    steps: Tensor

    def __init__(
        self,
        method: CLIP | SigLIP,
        corpus: Shaped[Tensor, "m ..."],
        owner: Int64[Tensor, "m"],
        negatives: Int64[Tensor, "n k"],
        *,
        each: int = 1,
        every: int = 0,
        mine: Callable[[Method], Int64[Tensor, "n k"]] | None = None,
    ):
        super().__init__()
        if not 1 <= each <= negatives.shape[1]:
            raise UsageError(f"each is how many of an item's {negatives.shape[1]} negatives are drawn; got {each}.")
        if every and mine is None:
            raise UsageError("Negatives that are refreshed need a function that mines them.")
        self.method, self.needs = method, (*method.needs, "item")
        self.each, self.every, self.mine = each, every, mine
        self.sync_batchnorm = method.sync_batchnorm
        self.register_buffer("negatives", negatives.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("corpus", corpus, persistent=False)
        self.register_buffer("owner", owner, persistent=False)

    @property
    def name(self) -> str:
        return self.method.name

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        rows = self._drawn(batch["item"], draw)
        mine = rows[runtime.share(len(rows))]
        return self.method({**batch, "negatives": self.corpus[mine]} if len(rows) else batch, draw)

    def _drawn(self, items: Int64[Tensor, "b"], draw: torch.Generator) -> Int64[Tensor, "m"]:
        """The rows that the items of all processes brought along, each once, in all processes alike."""
        own = self.negatives[items]
        noise = runtime.uniform(len(own), own.shape[1], draw).to(own.device)
        chosen = noise.masked_fill(own < 0, 2).topk(self.each, largest=False).indices
        rows = runtime.gather(own.gather(1, chosen)).unique()
        return rows[(rows >= 0) & ~torch.isin(self.owner[rows], runtime.gather(items))]

    def after_step(self, progress: float) -> None:
        self.method.after_step(progress)
        self.steps += 1
        if self.every and int(self.steps) % self.every == 0:
            assert self.mine is not None
            training = self.method.training
            with torch.no_grad():
                self.negatives.copy_(self.mine(self.method.eval()))
            self.method.train(training)

    def towers(self) -> dict[str, nn.Module]:
        return self.method.towers()
