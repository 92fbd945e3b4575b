"""CoCa — Contrastive Captioners are Image-Text Foundation Models (arXiv 2205.01917, section 3.2).

A picture's embedding should be that of its text among all texts of the batch, as in CLIP, and the second half of the
same decoder, which sees the picture, should say the text word by word. One pass of both towers serves both losses.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twofold.errors import UsageError
from twofold.methods.base import Method, Out, check_positive
from twofold.methods.pair import View
from twofold.models.captioner import Looker, Teller
from twofold.objectives import clip, clip_chance, next_token
from twofold.runtime import average, gather


class CoCa(Method):
    """`towers`: "image" → a looker and "text" → a teller; `contrast` and `caption` weigh the two losses.

    Texts come as their tokens, {"input_ids", "attention_mask"}; `views` makes them of strings and augments pictures.
    """

    needs = ("image", "text")

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        *,
        views: Mapping[str, View] = {},
        temperature: float = 0.07,
        max_scale: float = 100.0,
        contrast: float = 1.0,
        caption: float = 2.0,
    ):
        super().__init__()
        check_positive("temperature", temperature)
        check_positive("max_scale", max_scale)
        if min(contrast, caption) < 0 or not contrast + caption:
            raise UsageError(f"contrast and caption weigh two losses, one above 0; got {contrast} and {caption}.")
        looker, teller = towers["image"], towers["text"]
        if not isinstance(looker, Looker) or not isinstance(teller, Teller):
            raise UsageError("CoCa's towers are those of models.captioner.captioner.")
        self.looker, self.teller, self.views = looker, teller, dict(views)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_log_scale, self.contrast, self.caption = math.log(max_scale), contrast, caption

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x, tokens = (self.views[name](batch[name], draw) if name in self.views else batch[name] for name in self.needs)
        picture, shown = self.looker.both(x)
        words, text = self.teller.read(tokens)

        picture, text = gather(picture), gather(text)
        contrast = clip(picture, text, scale=self.log_scale.exp())

        said = tokens["attention_mask"][:, 1:] > 0
        logits = self.teller.tell(words, shown)[:, :-1]
        caption = average(next_token(logits[said], tokens["input_ids"][:, 1:][said]))

        loss = self.contrast * contrast + self.caption * caption
        parts = {"contrast": contrast.detach(), "caption": caption.detach(), "scale": self.log_scale.exp().detach()}
        chance = self.contrast * clip_chance(len(picture)) + self.caption * math.log(logits.shape[2])
        return Out(loss, z=picture, chance=chance, parts=parts)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.log_scale.clamp_(0, self.max_log_scale)

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.looker, "text": self.teller}
