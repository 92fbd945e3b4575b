"""Contact sheets and ladders: what stands where, at any number of channels and any depth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twofold import runtime
from twofold.views import NONE, OPERATIONS, SIMCLR
from twofold.views.sheet import (
    GAP,
    MARGIN,
    STEPS,
    TILE,
    _wrapped,
    contact_sheet,
    plain,
    strength_ladder,
    tile,
)

SMALL = replace(SIMCLR, size=32)
MARGINS = 2 * MARGIN


def pictures(b: int = 3, c: int = 3, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    x = torch.rand(b, c, 8, 8, generator=runtime.generator(0))
    x = torch.nn.functional.interpolate(x, (40, 40), mode="bicubic").clamp(0, 1)
    return x if dtype.is_floating_point else (x * torch.iinfo(dtype).max).to(torch.int32).to(dtype)


def test_a_sheet_has_a_row_a_picture_and_a_column_a_view():
    sheet = contact_sheet((SMALL, SMALL), pictures(), runtime.generator(0), views=4)
    assert sheet.width == MARGINS + 5 * (TILE + GAP) - GAP
    assert sheet.height > 3 * TILE


def test_the_same_draw_gives_the_same_sheet():
    one, other = (contact_sheet((SMALL,), pictures(), runtime.generator(7), views=2) for _ in range(2))
    assert np.array_equal(np.asarray(one), np.asarray(other))


def test_the_first_tile_is_the_original_and_a_view_of_nothing_is_the_original_again():
    none = replace(NONE, size=32)
    x = pictures()
    row = np.asarray(contact_sheet((none,), x, runtime.generator(0), views=1))
    top = np.flatnonzero((row[:, MARGIN : MARGIN + TILE] < 250).any((1, 2)))
    first = np.asarray(tile(plain(none, x)[0]))
    start = next(t for t in top if np.array_equal(row[t : t + TILE, MARGIN : MARGIN + TILE], first))
    second = row[start : start + TILE, MARGIN + TILE + GAP : MARGIN + 2 * TILE + GAP]
    assert np.array_equal(second, first)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(1, torch.uint8), (2, torch.uint16), (3, torch.uint16), (13, torch.uint16), (4, torch.float32)],
)
def test_any_channels_and_depths_are_shown(channels, dtype):
    policy = SMALL.without("saturation", "hue", "gray") if channels != 3 else SMALL
    x = pictures(c=channels, dtype=dtype)
    assert contact_sheet((policy,), x, runtime.generator(0), views=2).mode == "RGB"
    assert strength_ladder(policy, x[0], runtime.generator(0)).mode == "RGB"


def test_a_tile_shows_the_first_three_channels_or_one_as_gray():
    x = torch.zeros(5, 4, 4)
    x[0] = 1
    assert np.asarray(tile(x))[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(tile(torch.full((2, 4, 4), 0.5)))[0, 0].tolist() == [128, 128, 128]
    assert np.asarray(tile(torch.full((1, 4, 4), 65535, dtype=torch.int32).to(torch.uint16)))[0, 0, 0] == 255


def test_a_ladder_starts_at_the_picture_itself_and_has_a_row_for_every_operation():
    x = pictures()[0]
    ladder = strength_ladder(SMALL, x, runtime.generator(0))
    untouched = np.asarray(tile(plain(SMALL, x[None])[0]))
    sheet = np.asarray(ladder)
    left = sheet.shape[1] - MARGIN - STEPS * (TILE + GAP) + GAP
    column = sheet[:, left : left + TILE]
    same = [t for t in range(len(column) - TILE) if np.array_equal(column[t : t + TILE], untouched)]
    assert len(same) == len(OPERATIONS)


def test_words_are_broken_to_the_width():
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    lines = _wrapped(font, "crop 31 %, flip, hue +0.12, blur σ 1.3", 80)
    assert len(lines) > 1
    assert all(font.getlength(line) <= 80 for line in lines)
    assert " ".join(lines) == "crop 31 %, flip, hue +0.12, blur sigma 1.3"
