"""Which patches are seen and which are to be predicted: index tensors, drawn for each sample.

A mask never touches pixels. It says which cells of the grid of patches an encoder may compute (`keep`) and which are
asked for (`hidden`), row by row of the grid, so that what is hidden is never computed. As views do, the mask of a
sample comes from noise that is drawn for the batch of all processes and does not depend on their number; only the
size of blocks and the number of cells kept are common to the batch, for a tensor has one shape.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from twofold import runtime
from twofold.errors import UsageError

TRIES = 10  # places drawn for the blocks of a sample, of which the first that leave enough to see are taken


class Masked(NamedTuple):
    """Cells of a grid: what is seen, and what is predicted, in `k` parts that are predicted apart from each other.

    No cell is in both. The parts may overlap each other.
    """

    keep: Int[Tensor, "b n"]
    hidden: Int[Tensor, "b k m"]

    def to(self, device: torch.device) -> "Masked":
        return Masked(*(cells.to(device) for cells in self))


@dataclass(frozen=True)
class Rectangles:
    """`count` rectangles, each a `scale` of the grid's area, that leave `least` cells to see or more."""

    count: int = 4
    scale: tuple[float, float] = (0.15, 0.2)
    least: int = 10


def taken(x: Shaped[Tensor, "b n d"], at: Int[Tensor, "b *at"]) -> Shaped[Tensor, "b *at d"]:
    """Of each sample the tokens that `at` says."""
    flat = at.flatten(1)
    return x.gather(1, flat[..., None].expand(*flat.shape, x.shape[-1])).view(*at.shape, x.shape[-1])


def random(rows: int, cells: int, *, share: float = 0.75, draw: torch.Generator) -> Masked:
    """Hide a `share` of the cells, each as likely as any other; int(cells · (1 − share)) are kept (MAE, section 3)."""
    kept = int(cells * (1 - share))
    if not 0 < kept < cells:
        raise UsageError(f"Of {cells} patches, a mask of {share} leaves {kept}; some must be seen and some predicted.")
    order = runtime.uniform(rows, cells, draw).argsort(1)
    return Masked(order[:, :kept], order[:, None, kept:])


def block(
    rows: int,
    grid: Sequence[int],
    *,
    count: int = 1,
    scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    draw: torch.Generator,
) -> Int[Tensor, "b {count} m"]:
    """The cells of `count` rectangles a sample, of one size in a batch, each anywhere that it fits.

    `scale` is their area as a share of the grid's, `aspect` height over width, both uniform. A rectangle that would be
    higher or wider than the grid is as high or as wide as that.
    """
    size = _size(grid, scale, aspect, draw)
    return _cells(grid, size, runtime.uniform(rows, 2 * count, draw).view(rows, count, 2))


def multiblock(
    rows: int,
    grid: Sequence[int],
    blocks: Rectangles = Rectangles(),
    *,
    aspect: tuple[float, float] = (0.75, 1.5),
    context: tuple[float, float] = (0.85, 1.0),
    draw: torch.Generator,
) -> Masked:
    """I-JEPA's mask: rectangles to predict, and what of a large square around is in none of them to see.

    arXiv 2301.08243, section 3 and its official code, whose sizes are the batch's and whose places are the sample's.
    It differs from that code where the code is lopsided: here the last row and column can be reached; scale and aspect
    are drawn apart; and where a sample has more to see than the one with the least, the cells that go are drawn, not
    the lowest. Blocks that leave too few cells to see are drawn again, which ten tries may not mend.
    """
    sizes = _size(grid, blocks.scale, aspect, draw), _size(grid, context, (1, 1), draw)
    noise = runtime.uniform(rows, 2 * (TRIES * blocks.count + 1), draw).view(rows, -1, 2)
    tried = _cells(grid, sizes[0], noise[:, 1:].view(rows, TRIES, blocks.count, 2))
    around = _covered(grid, _cells(grid, sizes[1], noise[:, :1]))
    seen, hidden = _first(around & ~_covered(grid, tried.flatten(2)), tried, blocks.least)
    return Masked(_members(seen, draw), hidden)


def tubes(
    rows: int,
    grid: Sequence[int],
    *,
    blocks: int = 8,
    scale: tuple[float, float] = (0.15, 0.15),
    aspect: tuple[float, float] = (0.75, 1.5),
    draw: torch.Generator,
) -> Masked:
    """V-JEPA's mask of a clip: what `blocks` rectangles cover together is hidden at all times, the rest is seen.

    arXiv 2404.08471, section 3.2: 8 blocks of .15 for short range, 2 of .7 for long. `grid` is (time, height, width).
    """
    time, *space = grid
    size = _size(space, scale, aspect, draw)
    noise = runtime.uniform(rows, 2 * TRIES * blocks, draw).view(rows, TRIES, blocks, 2)
    tried = _cells(space, size, noise)
    # On a small grid all tries of a sample may cover it. Rectangles that lie on each other leave more.
    tried = torch.cat((tried, tried[:, :1, :1].expand_as(tried[:, :1])), 1)
    seen, blocks_of = _first(~_covered(space, tried.flatten(2)), tried, 1)
    hidden = _members(_covered(space, blocks_of.flatten(1)), draw)
    through = torch.arange(time, device=hidden.device)[:, None] * (space[0] * space[1])
    keep, hidden = ((columns[:, None] + through).flatten(1) for columns in (_members(seen, draw), hidden))
    return Masked(keep, hidden[:, None])


def ahead(rows: int, grid: Sequence[int], *, share: float = 0.5, draw: torch.Generator) -> Masked:
    """The last `share` of a clip's time is hidden whole, and all that was before it is seen.

    Of V-JEPA's causal masks (arXiv 2404.08471, section 4.4; `max_temporal_keep` in its code) what is left where no
    tubes are cut. `grid` is (time, height, width); int(time · (1 − share)) of its moments are seen, one at least.
    Nothing is drawn.
    """
    time, *space = grid
    if not 0 < share < 1 or time < 2:
        raise UsageError(
            f"What is yet to come is a share of two tubelets of time or more, between 0 and 1; "
            f"got {share} of {time}. Take more frames."
        )
    cells = torch.arange(math.prod(grid), device=draw.device).expand(rows, -1)
    seen = max(1, int(time * (1 - share))) * math.prod(space)
    return Masked(cells[:, :seen], cells[:, None, seen:])


def _size(
    grid: Sequence[int], scale: tuple[float, float], aspect: tuple[float, float], draw: torch.Generator
) -> tuple[int, int]:
    """Height and width of a batch's rectangles, at least one cell: the same in every process."""
    height, width = grid
    share, ratio = torch.rand(2, generator=draw, device=draw.device).tolist()
    area = height * width * (scale[0] + share * (scale[1] - scale[0]))
    ratio = aspect[0] + ratio * (aspect[1] - aspect[0])
    sides = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return min(max(sides[0], 1), height), min(max(sides[1], 1), width)


def _cells(grid: Sequence[int], size: tuple[int, int], noise: Float[Tensor, "*b 2"]) -> Int[Tensor, "*b m"]:
    """The cells of a rectangle wherever uniform noise puts it."""
    (height, width), (h, w) = grid, size
    down, right = (noise * noise.new_tensor((height - h + 1, width - w + 1))).long().unbind(-1)
    within = torch.arange(h, device=noise.device)[:, None] * width + torch.arange(w, device=noise.device)
    return (down * width + right)[..., None] + within.flatten()


def _covered(grid: Sequence[int], cells: Int[Tensor, "*b m"]) -> Bool[Tensor, "*b cells"]:
    """Which cells of the grid are named."""
    found = torch.zeros(*cells.shape[:-1], grid[0] * grid[1], dtype=torch.bool, device=cells.device)
    return found.scatter_(-1, cells, True)


def _first(
    seen: Bool[Tensor, "b tries cells"], tried: Int[Tensor, "b tries k m"], least: int
) -> tuple[Bool[Tensor, "b cells"], Int[Tensor, "b k m"]]:
    """Of each sample the first try that leaves `least` cells to see; the one that leaves most, where none does."""
    left = seen.sum(2).clamp(max=least)
    pick = left.argmax(1)  # the first of equals
    rows = torch.arange(len(seen), device=seen.device)
    return seen[rows, pick], tried[rows, pick]


def _members(cells: Bool[Tensor, "b cells"], draw: torch.Generator) -> Int[Tensor, "b n"]:
    """So many of each sample's cells, in order, as the sample with the fewest has; which, the generator says."""
    fewest = min(runtime.counts(int(cells.sum(1).min())))  # over the processes
    if not fewest:
        raise UsageError("Blocks of this size and number cover the whole grid of patches. Take fewer, or smaller ones.")
    noise = runtime.uniform(len(cells), cells.shape[1], draw)
    return torch.where(cells, noise, 2.0).argsort(1)[:, :fewest].sort(1).values
