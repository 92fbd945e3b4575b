"""MoCo — Momentum Contrast for Unsupervised Visual Representation Learning (arXiv 1911.05722, algorithm 1), and
Improved Baselines with Momentum Contrastive Learning (v2, arXiv 2003.04297), whose defaults these are.

A view's query should find the key of the other view of its picture among the keys of many earlier batches. These wait
in a queue, so that negatives cost no computation, and a slowly moving copy of the encoder keeps old keys comparable.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.errors import UsageError
from twofold.methods.base import Method, Out, check_positive
from twofold.models.ema import Ema
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.models.queue import Queue
from twofold.objectives import info_nce, info_nce_chance
from twofold.runtime import gather, share, world
from twofold.views import MOCO_V2, Policy


class MoCo(Method):
    """`encoder` maps floats [b, c, h, w] in 0..1 to features [b, encoder.dim].

    With `shuffle` and several processes, BatchNorm sees one process's rows, and those of the keys are drawn from all
    processes: a query and its key share no statistics that would give the answer away. Without, it sees the whole
    batch. One process has nothing to shuffle.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        policies: tuple[Policy, Policy] = (MOCO_V2, MOCO_V2),
        head: Head = Head(2, 2048, 128, norm="none"),  # noqa: B008 — frozen
        queue: int = 65_536,
        temperature: float = 0.2,
        momentum: float = 0.999,
        shuffle: bool = True,
    ):
        super().__init__()
        check_positive("temperature", temperature)
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum lies in [0, 1): at 1 the key encoder would never move; got {momentum}.")
        self.encoder, self.policies, self.temperature = encoder, policies, temperature
        self.momentum, self.shuffle, self.sync_batchnorm = momentum, shuffle, not shuffle
        self.head = head.build(encoder.dim)
        self.target = Ema(nn.Sequential(self.encoder, self.head))
        self.queue = Queue(queue, head.width(encoder.dim))
        self.fresh: Tensor | None = None  # this step's keys, until they enter the queue

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x_q, x_k = (policy(batch["image"], draw) for policy in self.policies)
        h = self.encoder(x_q)
        q, self.fresh = gather(self.head(h)), self.keys(x_k, draw)
        loss = info_nce(q, self.fresh, negatives=self.queue.keys, temperature=self.temperature)
        return Out(loss, z=h, chance=info_nce_chance(1 + len(self.queue.keys)))

    @torch.no_grad()
    def keys(self, x: Float[Tensor, "b c h w"], draw: torch.Generator) -> Float[Tensor, "n d"]:
        """The keys of the views of all processes, in the order of the batch."""
        if not self.shuffle or world()[1] == 1:
            return gather(self.target(x))
        everyone = gather(x)
        order = torch.randperm(len(everyone), generator=draw, device=draw.device).to(x.device)
        shuffled = gather(self.target(everyone[order[share(len(everyone))]]))
        return shuffled[order.argsort()]

    def after_step(self, progress: float) -> None:
        # The paper moves the key encoder first thing in a step, towards the weights that the step before left: the
        # same sequence, as the two start equal. The keys enter last, after the loss and its gradient: earlier, each
        # positive would be among its own negatives, and the queue that backward still needs be overwritten.
        self.target.update(nn.Sequential(self.encoder, self.head), self.momentum)
        if self.fresh is not None:
            self.queue.push(self.fresh)
            self.fresh = None

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}

    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.head}
