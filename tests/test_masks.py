"""Masks say which patches are seen and which are predicted, and keep their word about numbers, places and shares."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from processes import together
from twofold import runtime
from twofold.errors import UsageError
from twofold.views.masks import Masked, Rectangles, block, multiblock, random, taken, tubes

GRID, ROWS = (8, 8), 64
MASKS = {
    "random": lambda rows, draw: random(rows, 64, share=0.75, draw=draw),
    "multiblock": lambda rows, draw: multiblock(rows, GRID, draw=draw),
    "multiblock, wide": lambda rows, draw: multiblock(rows, (5, 13), Rectangles(3, least=4), draw=draw),
    "tubes": lambda rows, draw: tubes(rows, (3, *GRID), draw=draw),
    "tubes, long": lambda rows, draw: tubes(rows, (3, *GRID), blocks=2, scale=(0.2, 0.4), draw=draw),
}
CELLS = {"multiblock, wide": 65, "tubes": 192, "tubes, long": 192}
every_mask = pytest.mark.parametrize("name", MASKS)


def draws(name: str, batches: int = 20, rows: int = ROWS) -> list[Masked]:
    return [MASKS[name](rows, runtime.generator(step)) for step in range(batches)]


def rectangle(cells: list[int], width: int) -> tuple[int, int]:
    """Height and width of a block; fails where the cells are no full rectangle."""
    rows, columns = sorted({cell // width for cell in cells}), sorted({cell % width for cell in cells})
    h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert len(set(cells)) == len(cells) == h * w
    return h, w


@every_mask
def test_nothing_is_seen_and_predicted_nor_named_twice(name):
    for keep, hidden in draws(name, 5):
        for seen, parts in zip(keep.tolist(), hidden.tolist(), strict=True):
            assert len(set(seen)) == len(seen)
            assert all(0 <= cell < CELLS.get(name, 64) for part in (seen, *parts) for cell in part)
            for part in parts:
                assert len(set(part)) == len(part)
                assert not set(part) & set(seen)


@every_mask
def test_every_cell_is_seen_at_times_and_hidden_at_times_the_last_row_and_column_too(name):
    cells = set(range(CELLS.get(name, 64)))
    assert {cell for keep, _ in draws(name) for cell in keep.flatten().tolist()} == cells
    assert {cell for _, hidden in draws(name) for cell in hidden.flatten().tolist()} == cells


@every_mask
def test_samples_differ_and_the_generator_alone_decides(name):
    first, again = (MASKS[name](ROWS, runtime.generator(3)) for _ in range(2))
    other = MASKS[name](ROWS, runtime.generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.keep.shape != other.keep.shape or not torch.equal(first.keep, other.keep)
    assert len({tuple(sorted(seen)) for seen in first.keep.tolist()}) > ROWS / 2


def processes_mask(folder: Path) -> None:
    rank, _ = runtime.world()
    for name in MASKS:
        mine = MASKS[name](len(range(11)[runtime.share(11)]), runtime.generator(5))
        torch.save(tuple(mine), folder / f"{name} {rank}.pt")


def test_masks_do_not_depend_on_the_number_of_processes(tmp_path):
    together(processes_mask, tmp_path)
    for name in MASKS:
        halves = [torch.load(tmp_path / f"{name} {rank}.pt") for rank in range(2)]
        for one, *both in zip(MASKS[name](11, runtime.generator(5)), *halves, strict=True):
            assert torch.equal(one, torch.cat(both))  # 5 rows and 6, cut to what the poorest of all 11 sees


@pytest.mark.parametrize(("cells", "share", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (10, 0.75, 2), (16, 0.5, 8)])
def test_random_keeps_the_whole_number_below_the_share(cells, share, kept):
    keep, hidden = random(5, cells, share=share, draw=runtime.generator(0))
    assert keep.shape == (5, kept)
    assert hidden.shape == (5, 1, cells - kept)


def test_random_keeps_each_cell_equally_often():
    seen = torch.stack([keep for keep, _ in draws("random", 50)]).flatten().bincount(minlength=64) / (50 * ROWS)
    assert (seen - 0.25).abs().max() < 6 * math.sqrt(0.25 * 0.75 / (50 * ROWS))


def test_blocks_have_one_size_in_a_batch_and_the_scale_and_aspect_that_were_asked_for():
    grid, scale, aspect = (60, 40), (0.15, 0.2), (0.75, 1.5)
    areas, ratios = [], []
    for step in range(400):
        cells = block(3, grid, count=2, scale=scale, aspect=aspect, draw=runtime.generator(step))
        sizes = {rectangle(part, grid[1]) for sample in cells.tolist() for part in sample}
        ((h, w),) = sizes
        areas.append(h * w / 2400)
        ratios.append(h / w)
    # Uniform: mean in the middle, deviation range/√12, up to rounding sides to whole cells.
    for values, (low, high), rounding in ((areas, scale, 0.005), (ratios, aspect, 0.03)):
        values = torch.tensor(values)
        assert low - 2 * rounding <= values.min() and values.max() <= high + 2 * rounding
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 400) + rounding / 4
        assert abs(values.std() - (high - low) / math.sqrt(12)) < 0.1 * (high - low)
    assert abs(torch.corrcoef(torch.tensor([areas, ratios]))[0, 1]) < 0.2  # drawn apart


def test_a_block_lies_anywhere_equally_often():
    corners = torch.cat([block(200, (6, 6), scale=(0.25, 0.25), aspect=(1, 1), draw=runtime.generator(s))[:, 0, 0]
                         for s in range(10)])  # fmt: skip
    share = corners.bincount(minlength=36).view(6, 6)[:4, :4] / len(corners)  # 3×3 cells: 4 · 4 places
    assert share.sum() == 1
    assert (share - 1 / 16).abs().max() < 5 * math.sqrt(1 / 16 / len(corners))


def test_a_block_larger_than_the_grid_is_the_grid():
    cells = block(2, (3, 5), scale=(1, 1), aspect=(4, 4), draw=runtime.generator(0))
    assert {rectangle(part, 5) for sample in cells.tolist() for part in sample} == {(3, 2)}
    assert block(2, (3, 5), scale=(1, 1), aspect=(0.6, 0.6), draw=runtime.generator(0)).shape == (2, 1, 15)


def test_multiblock_predicts_four_rectangles_and_leaves_enough_to_see():
    counts = set()
    for keep, hidden in draws("multiblock"):
        assert hidden.shape[1] == 4
        assert 10 <= keep.shape[1] <= 64 - hidden.shape[2]
        assert len({rectangle(part, 8) for sample in hidden.tolist() for part in sample}) == 1
        counts.add(keep.shape[1])
    assert len(counts) > 1
    more = multiblock(ROWS, GRID, Rectangles(least=24), draw=runtime.generator(0))
    assert more.keep.shape[1] >= 20  # ten tries find nearly as many


def test_the_context_of_multiblock_lies_in_one_square():
    for step in range(20):
        keep, _ = multiblock(ROWS, GRID, Rectangles(1), context=(0.3, 0.3), draw=runtime.generator(step))
        for seen in keep.tolist():  # √(.3 · 64) ≈ 4.4, so 4 × 4
            for coordinate in ([cell // 8 for cell in seen], [cell % 8 for cell in seen]):
                assert max(coordinate) - min(coordinate) < 4


def test_what_goes_where_a_sample_sees_more_than_another_is_drawn_from_everywhere():
    rows = torch.cat([keep // 8 for keep, _ in draws("multiblock", 50)], 1).flatten().bincount(minlength=8)
    assert abs(rows[:4].sum() / rows.sum() - 0.5) < 0.03  # the official code cuts the lowest rows off


@pytest.mark.parametrize("name", ["tubes", "tubes, long"])
def test_tubes_hide_the_same_places_at_all_times(name):
    for keep, hidden in draws(name, 5):
        assert hidden.shape[1] == 1
        for cells in (keep, hidden[:, 0]):
            at = [cells[(cells // 64 == time)].view(len(cells), -1) % 64 for time in range(3)]
            assert torch.equal(at[0], at[1]) and torch.equal(at[0], at[2])


def test_tubes_leave_something_to_see_on_a_small_grid():
    """Two rectangles of three quarters cover a grid of 4 × 4 every other time: in some batch, all tries of a sample."""
    for seed in range(40):
        found = tubes(64, (2, 4, 4), blocks=2, scale=(0.75, 0.75), aspect=(4 / 3, 4 / 3), draw=runtime.generator(seed))
        assert found.keep.shape[1] >= 2


def test_tubes_hide_the_share_of_the_paper():
    """Eight blocks of .15 hide two thirds, and two of .7 four fifths, of 14 × 14 patches (section 3.2)."""
    for blocks, scale, low, high in ((8, 0.15, 0.6, 0.68), (2, 0.7, 0.78, 0.85)):
        keeps = [
            tubes(1, (1, 14, 14), blocks=blocks, scale=(scale, scale), draw=runtime.generator(s)) for s in range(99)
        ]
        hidden = torch.tensor([1 - mask.keep.shape[1] / 196 for mask in keeps])
        assert low < hidden.mean() < high


def test_a_mask_that_leaves_nothing_is_an_error_that_says_so():
    draw = runtime.generator(0)
    with pytest.raises(UsageError, match="Of 3 patches"):
        random(2, 3, draw=draw)
    with pytest.raises(UsageError, match="whole grid"):
        multiblock(2, (2, 2), Rectangles(scale=(1, 1)), aspect=(1, 1), draw=draw)
    with pytest.raises(UsageError, match="whole grid"):
        tubes(2, (2, 2, 2), scale=(1, 1), aspect=(1, 1), draw=draw)


def test_taken_gives_the_tokens_at_the_places_of_each_sample():
    x: Tensor = torch.arange(24.0).view(2, 4, 3)
    at = torch.tensor([[[0, 3]], [[2, 2]]])
    assert torch.equal(taken(x, at), torch.stack([x[0, [0, 3]], x[1, [2, 2]]])[:, None])
