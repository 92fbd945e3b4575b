"""Views to look at: a contact sheet of what a policy makes of pictures, and a ladder of each operation's strength."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from twofold.errors import UsageError
from twofold.views.apply import unit
from twofold.views.policy import OPERATIONS, Policy

TILE, GAP, MARGIN = 152, 8, 12  # pixels
INK, PALE, EDGE, PAPER = (28, 28, 30), (110, 110, 116), (222, 222, 226), (255, 255, 255)
FONT, LINE = 13, 16
SPELT = str.maketrans({"σ": "sigma", "×": "x", "–": "-", "−": "-"})  # Pillow's own font is of plain ASCII
STEPS = 7
CANDIDATES = 16  # noises of which a ladder shows the one that changes most


def contact_sheet(
    policies: Sequence[Policy], images: Shaped[Tensor, "b c h w"], draw: torch.Generator, *, views: int = 6
) -> Image.Image:
    """A row a picture: the original, then views of it, what was drawn for each in words beneath.

    View k is the policy's for view k; where there are more views than policies, these take turns. Of more than three
    channels the first three are shown, of two the first; 16 bits are scaled to 8.
    """
    columns: list[list[tuple[Image.Image, str]]] = [[(tile(image), "") for image in plain(policies[0], images)]]
    height, width = images.shape[2:]
    for view in range(views):
        policy = visible(policies[view % len(policies)])
        drawn = policy.parameters(len(images), height, width, draw)
        rendered = policy.render(images, drawn)
        columns.append([(tile(x), policy.describe(drawn, i) or "unchanged") for i, x in enumerate(rendered)])
    heads = ["original", *(f"view {view + 1}" for view in range(views))]
    return _grid(list(zip(*columns, strict=True)), heads, [""] * len(images))


def strength_ladder(policy: Policy, image: Shaped[Tensor, "c h w"], draw: torch.Generator) -> Image.Image:
    """A row an operation, alone, from off to as strong as is of any use, with the same noise at every step.

    Of 16 drawn noises the one that changes the picture most at full strength is shown: half of all hue jitters are
    small at any strength. Beside the name stands what the policy has. What cannot be done to pictures of so many
    channels is left out.
    """
    _, height, width = image.shape
    images = image[None].expand(CANDIDATES, *image.shape)
    bare, untouched = visible(policy).only(), plain(policy, images[:1])
    strengths = [step / (STEPS - 1) for step in range(STEPS)]
    rows, names = [], []
    for name in OPERATIONS:
        noise = draw.get_state()
        try:
            full = bare.scaled(name, 1.0)
            change = (full(images, draw) - untouched).abs().flatten(1).mean(1)
        except UsageError:  # needs other channels
            continue
        row = []
        for strength in strengths:
            draw.set_state(noise)
            step = bare.scaled(name, strength)
            drawn = step.parameters(len(images), height, width, draw)
            most = int(change.argmax())
            one = type(drawn)(*(part[most : most + 1] for part in drawn))
            row.append((tile(step.render(images[:1], one)[0]), step.describe(one, 0) or "unchanged"))
        rows.append(row)
        names.append(f"{name}\n{_setting(policy, name)}")
    return _grid(rows, [f"strength {strength:.2f}" for strength in strengths], names)


def visible(policy: Policy) -> Policy:
    """The policy without its normalisation, which is for encoders."""
    return replace(policy, mean=(), std=())


def plain(policy: Policy, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c size size"]:
    """The pictures as the policy sees them when nothing happens."""
    return visible(policy).only()(images, torch.Generator())


def tile(image: Shaped[Tensor, "c h w"], side: int = TILE) -> Image.Image:
    """A picture to look at: three channels or one of them, 8 bits, enlarged with its pixels visible if it is small."""
    shown = unit(image[None])[0][: 3 if len(image) >= 3 else 1]
    levels = (255 * shown).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(np.repeat(levels, 3, axis=2) if levels.shape[2] == 1 else levels)
    small = 2 * max(picture.size) <= side
    return picture.resize((side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _setting(policy: Policy, name: str) -> str:
    """What the policy has of an operation: "here: hue 0.2, jitter 0.8"."""
    return f"here: {str(policy.only(name)).partition(', ')[2]}" if name in policy.operations else "off here"


def _grid(rows: Sequence[Sequence[tuple[Image.Image, str]]], heads: Sequence[str], names: Sequence[str]) -> Image.Image:
    """Tiles with words: `heads` over the columns, `names` left of the rows, each tile's own beneath it."""
    font = ImageFont.load_default(FONT)
    left = max((math.ceil(font.getlength(line)) for name in names for line in _wrapped(font, name, TILE)), default=0)
    left += MARGIN + (GAP if left else 0)
    beneath = [[_wrapped(font, words, TILE) for _, words in row] for row in rows]
    heights = [TILE + 4 + LINE * max(map(len, words)) + 2 * GAP for words in beneath]
    width = left + len(heads) * (TILE + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, MARGIN + LINE + 4 + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.text((left + column * (TILE + GAP), MARGIN), head, fill=PALE, font=font)
    top = MARGIN + LINE + 4
    for row, words, name, height in zip(rows, beneath, names, heights, strict=True):
        for place, line in enumerate(_wrapped(font, name, TILE)):
            pen.text((MARGIN, top + place * LINE), line, fill=PALE if place else INK, font=font)
        for column, ((picture, _), lines) in enumerate(zip(row, words, strict=True)):
            x = left + column * (TILE + GAP)
            pen.rectangle((x - 1, top - 1, x + TILE, top + TILE), outline=EDGE)
            sheet.paste(picture, (x, top))
            for place, line in enumerate(lines):
                pen.text((x, top + TILE + 4 + place * LINE), line, fill=INK, font=font)
        top += height
    return sheet


def _wrapped(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, words: str, width: int) -> list[str]:
    """The words in lines no wider than `width` pixels; they break behind commas and at spaces."""
    lines = []
    for paragraph in words.translate(SPELT).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines if words else []
