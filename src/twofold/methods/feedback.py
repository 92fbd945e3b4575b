"""What people said of hits, learned beside the pairs that a model knows already.

A question's words are held against the items that were found right and wrong for it, by the sigmoid of SigLIP (arXiv
2303.15343); against the pictures of the batch, which are none of its answers; and the texts of the batch against the
items found right. Only the words' side moves: the items' vectors are those of the index, and stay so. The batch's
texts are held where they were: the items that were judged would else draw other questions to them.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from twofold.methods.base import Method, Out
from twofold.methods.siglip import SigLIP


class WithFeedback(Method):
    """`method` over batches of pairs of [`item modality`, "text"], with judged questions in every step.

    `questions` is what the words' tower takes in, `items` the vectors of judged items, and `judged` 1 where an item was
    found right, −1 where wrong, 0 where nobody said. A wrong one counts `wrong` of a right one: many are seen together.
    `keep` weighs how far the batch's texts have moved, as 1 − cosine.
    """

    questions: Tensor
    items: Tensor
    judged: Tensor

    def __init__(
        self,
        method: SigLIP,
        questions: Float[Tensor, "q e"],
        items: Float[Tensor, "m d"],
        judged: Int8[Tensor, "q m"],
        *,
        wrong: float = 0.2,
        keep: float = 1000.0,
    ):
        super().__init__()
        self.method, self.needs, self.wrong, self.keep = method, method.needs, wrong, keep
        self.known = (copy.deepcopy(method.towers()["text"]).eval().requires_grad_(False),)  # no module: not trained
        method.log_scale.requires_grad_(False)  # what a cosine means stays as it is
        method.bias.requires_grad_(False)
        self.register_buffer("questions", questions, persistent=False)
        self.register_buffer("items", F.normalize(items, dim=1), persistent=False)
        self.register_buffer("judged", judged, persistent=False)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        out = self.method(batch, draw)
        item, text = (F.normalize(tower(batch[name]), dim=1) for name, tower in self.towers().items())
        asked = self.asked()
        right = self.items[(self.judged > 0).any(0)]
        strangers = F.softplus(self._logits(asked, item)).sum() + F.softplus(self._logits(text, right)).sum()
        said = self.said(asked)
        moved = self.moved(batch["text"])
        loss = out.loss + strangers / len(item) + said + self.keep * moved
        parts = {**out.parts, "said": said.detach(), "moved": moved.detach()}
        return Out(loss, z=out.z, chance=out.chance, parts=parts)

    def asked(self) -> Float[Tensor, "q d"]:
        """Unit vectors of the questions."""
        return F.normalize(self.towers()["text"](self.questions), dim=1)

    def said(self, asked: Float[Tensor, "q d"]) -> Float[Tensor, ""]:
        """How far the answers are from what was said, a question: 0 where all of it is kept."""
        logits = self._logits(asked, self.items)
        right = (F.softplus(-logits) * (self.judged > 0)).sum()
        wrong = (F.softplus(logits) * (self.judged < 0)).sum()
        return (right + self.wrong * wrong) / len(asked)

    def moved(self, x: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        """How far texts are from where they were: the mean of 1 − cosine, 0..2; without dropout, which is noise."""
        head = self.towers()["text"]
        training = head.training
        now = head.eval()(x)
        head.train(training)
        with torch.no_grad():
            before = self.known[0].to(x.device)(x)
        return (1 - F.cosine_similarity(now, before)).mean()

    def _logits(self, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        return self.method.log_scale.exp() * (a @ b.T) + self.method.bias

    def towers(self) -> dict[str, nn.Module]:
        return self.method.towers()
