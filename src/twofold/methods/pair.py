"""The part that CLIP and SigLIP share: two towers, one for each kind of data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold import runtime
from twofold.errors import UsageError

View = Callable[[Any, torch.Generator], Any]


class Pair(nn.Module):
    """Two towers into one space, in the order of `towers`.

    `views` says how a modality's column is shown to its tower: {"image": policy} augments pictures; a modality that is
    not named goes in as it is (cached features, token ids).
    """

    def __init__(self, towers: Mapping[str, nn.Module], *, views: Mapping[str, View]):
        super().__init__()
        if len(towers) != 2:
            raise UsageError(f"A pair has two towers; got {len(towers)}: {', '.join(towers) or 'none'}.")
        if stray := set(views) - set(towers):
            raise UsageError(f"Views for {', '.join(sorted(stray))}, but the towers are {', '.join(towers)}.")
        self.towers = nn.ModuleDict(towers)
        self.views = dict(views)

    def forward(
        self, batch: Mapping[str, Any], draw: torch.Generator
    ) -> tuple[Float[Tensor, "wb d"], Float[Tensor, "wb d"]]:
        """The embeddings of both sides, over all processes, not normalised."""
        first, second = (self._embedded(name, batch[name], draw) for name in self.towers)
        return first, second

    def negatives(self, batch: Mapping[str, Any], draw: torch.Generator) -> Float[Tensor, "wm d"] | None:
        """The embeddings of `batch["negatives"]`, further items of the second kind, over all processes; None without.

        Every item of the first side is held against every one of them: none may belong to an item of the batch.
        """
        return self._embedded([*self.towers][1], batch["negatives"], draw) if "negatives" in batch else None

    def _embedded(self, name: str, x: Any, draw: torch.Generator) -> Float[Tensor, "wb d"]:
        return runtime.gather(self.towers[name](self.views[name](x, draw) if name in self.views else x))
