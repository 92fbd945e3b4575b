"""Sums over all pairs of rows without the table of all pairs: the engine of the pair losses.

A loss that compares n rows with m others needs n·m similarities, but only their sums. Here they are multiplied out a
tile at a time, summed while the tile lies in the cache, forgotten, and multiplied out again for the gradient. Memory
grows with n + m; values and gradients are those of the whole table.

The similarity of two rows is their product, so a temperature is a factor on the rows: whoever scales them has its
gradient from autograd. Rows are taken as they are, normalised or not, in float32 or float64; autocast leaves products
that are written in place alone.

`skip` names diagonals of the table that no sum may hold: 0 is the main one (j = i), k the one k to its right.
`bound` is a number that no |similarity| exceeds. Up to `SAFE` exponentials need no maximum subtracted, and one serves
its row and its column; beyond, each row and each column is shifted by its own.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

SAFE = 40.0  # e^±40, its sums over any number of rows and their inverses are normal float32
LOG2E = math.log2(math.e)  # exponentials are powers of 2: on CPUs torch's exp2 takes a third of the time of its exp

# The numbers of a block of rows and of a block of columns, their products, and room to calculate.
Tile = tuple[int, int, Float[Tensor, "h w"], Float[Tensor, "h w"]]


def log_sum_exp(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"] | None = None,
    *,
    skip: Sequence[int] = (0,),
    bound: float = math.inf,
) -> Float[Tensor, "n"]:
    """log Σ_j exp(xᵢ·yⱼ) for each row of x; −∞, without a gradient, where a row has nothing to sum.

    Without `y` the rows of x meet each other, and half of the table is enough as the other half mirrors it; `skip`
    then names a diagonal on both sides: (0, n, −n).
    """
    return _LogSumExp.apply(x, y, skip, bound, y is None)[0]


def log_sum_exp_both_ways(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, skip: Sequence[int] = (0,), bound: float = math.inf
) -> tuple[Float[Tensor, "n"], Float[Tensor, "m"]]:
    """log Σ_j exp(xᵢ·yⱼ) for each row of x, and log Σ_i exp(xᵢ·yⱼ) for each row of y."""
    return _LogSumExp.apply(x, y, skip, bound, True)


def softplus_sum(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    bias: Float[Tensor, ""],
    skip: Sequence[int] = (0,),
    bound: float = math.inf,
) -> Float[Tensor, ""]:
    """Σ_ij log(1 + exp(xᵢ·yⱼ + bias)); here `bound` is one of |xᵢ·yⱼ + bias|."""
    return _SoftplusSum.apply(x, y, bias, skip, bound, torch.is_grad_enabled())


@torch.no_grad()
def hardest(z: Float[Tensor, "n d"], labels: Int64[Tensor, "n"]) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]]:
    """For each row the other row of its label with the least product, and the row of another label with the greatest.

    Of unit vectors these are the farthest positive and the nearest negative. −1 where there is none.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    least, greatest = z.new_full((len(z),), math.inf), z.new_full((len(z),), -math.inf)
    positive, negative = torch.full_like(labels, -1), torch.full_like(labels, -1)
    height, width = _sides(z, z)
    rows, columns = _spans(len(z), height), _spans(len(z), width)
    for r, c, products, spare in _tiles(z, z, skip=()):
        i, j = rows[r], columns[c]
        same = labels[i, None] == labels[j]
        value, at = spare.copy_(products).masked_fill_(same, -math.inf).max(1)
        negative[i] = torch.where(value > greatest[i], at + j.start, negative[i])
        greatest[i] = torch.maximum(value, greatest[i])
        products.masked_fill_(~same, math.inf)
        own = i.start - j.start
        if -len(products) < own < products.shape[1]:
            products.diagonal(own).fill_(math.inf)
        value, at = products.min(1)
        positive[i] = torch.where(value < least[i], at + j.start, positive[i])
        least[i] = torch.minimum(value, least[i])
    return positive, negative


@torch.no_grad()
def nearest(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, skip: Sequence[int] = (0,)
) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "m"]]:
    """For each row of x the row of y with the greatest product, and for each row of y that of x; 0 where all skip."""
    of_x, of_y = (torch.zeros(len(rows), dtype=torch.long, device=x.device) for rows in (x, y))
    best_x, best_y = x.new_full((len(x),), -math.inf), x.new_full((len(y),), -math.inf)
    height, width = _sides(x, y)
    rows, columns = _spans(len(x), height), _spans(len(y), width)
    for r, c, products, _ in _tiles(x, y, skip):
        i, j = rows[r], columns[c]
        for best, of, dim, own, other in ((best_x, of_x, 1, i, j), (best_y, of_y, 0, j, i)):
            value, at = products.max(dim)
            of[own] = torch.where(value > best[own], at + other.start, of[own])
            best[own] = torch.maximum(value, best[own])
    return of_x, of_y


class _LogSumExp(torch.autograd.Function):
    """Sums of rows and, with `both`, of columns. Without y, x meets itself and the two are one vector."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor | None, skip: Sequence[int], bound: float, both: bool):
        ctx.skip, ctx.safe = skip, bound <= SAFE
        mirrored = y is None
        empty = 0.0 if ctx.safe else -math.inf  # safe sums are sums until they are whole, others logarithms all along
        rows = x.new_full((len(x),), empty)
        columns = None if not both else rows if y is None else x.new_full((len(y),), empty)
        height, width = _sides(x, y)
        across, down = rows.split(height), None if columns is None else columns.split(width)
        table = len(x), len(x if y is None else y)
        kept = None
        for i, j, logits, spare in _powers(x, y, skip, ctx.safe):
            _accumulate(across[i], logits, 1, ctx.safe, spare)
            if down is not None and not (mirrored and i == j):
                _accumulate(down[j], logits, 0, ctx.safe, spare)
            # A table no larger than the embeddings need not be made twice.
            if logits.shape == table and logits.numel() <= x.numel() + (0 if y is None else y.numel()):
                kept = logits
        if ctx.safe:
            rows.log2_()
            if columns is not None and not mirrored:
                columns.log2_()
        ctx.save_for_backward(x, y, rows, columns, kept)
        return rows / LOG2E, columns / LOG2E if columns is not None and not mirrored else None

    @staticmethod
    @once_differentiable
    def backward(ctx, to_rows: Tensor, to_columns):
        x, y, rows, columns, kept = ctx.saved_tensors
        if kept is None:
            tiles = _powers(x, y, ctx.skip, ctx.safe)
        else:
            tiles = iter([(0, 0, kept.clone(), torch.empty_like(kept))])
        mirrored = y is None
        if mirrored:
            y, to_columns = x, to_rows
        to_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        to_y = to_x if mirrored else torch.zeros_like(y) if ctx.needs_input_grad[1] else None
        # A term's share in its sum is 2^(logit − sum). In an empty sum, too, that is 0, if only the sum is finite.
        rows = rows.masked_fill(rows == -math.inf, 0)
        if ctx.safe:
            to_rows = to_rows * torch.exp2(-rows)
        if columns is not None:
            columns = columns.masked_fill(columns == -math.inf, 0)
            to_columns = to_columns * torch.exp2(-columns) if ctx.safe else to_columns
        height, width = _sides(x, None if mirrored else y)
        row, to_row, of_x, into_x = (_blocks(of, height) for of in (rows[:, None], to_rows[:, None], x, to_x))
        column, to_column, of_y, into_y = (_blocks(of, width) for of in (columns, to_columns, y, to_y))
        for i, j, logits, spare in tiles:
            if ctx.safe and columns is None:
                weights = logits.mul_(to_row[i])
            elif ctx.safe:
                weights = logits.mul_(torch.add(to_row[i], to_column[j], out=spare))
            else:
                weights = torch.sub(logits, row[i], out=spare).exp2_().mul_(to_row[i])
                if columns is not None:
                    weights.add_(logits.sub_(column[j]).exp2_().mul_(to_column[j]))
            if to_x is not None:
                into_x[i].addmm_(weights, of_y[j])
            if to_y is not None and not (mirrored and i == j):
                into_y[j].addmm_(weights.T, of_x[i])
        return to_x, None if mirrored else to_y, None, None, None


class _SoftplusSum(torch.autograd.Function):
    """A sum of independent terms: their derivatives need no second look, so one pass gives value and gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, bias: Tensor, skip: Sequence[int], bound: float, gradients: bool):
        to_x, to_y, to_bias = (
            torch.zeros_like(of) if gradients and needed else None
            for of, needed in zip((x, y, bias), ctx.needs_input_grad[:3], strict=True)
        )
        total, top = x.new_zeros(()), SAFE * LOG2E
        height, width = _sides(x, y)
        of_x, into_x, of_y, into_y = _blocks(x, height), _blocks(to_x, height), _blocks(y, width), _blocks(to_y, width)
        for i, j, logits, spare in _tiles(x, y, skip, factor=LOG2E):
            logits.add_(bias * LOG2E)
            if bound > SAFE:  # from here on log(1 + e^s) is s to the last bit
                total += torch.sub(logits, top, out=spare).clamp_(min=0).sum() / LOG2E
                logits.clamp_(max=top)
            powers = logits.exp2_()
            total += torch.log1p(powers, out=spare).sum()
            if gradients:
                weights = powers.div_(torch.add(powers, 1, out=spare))
                if to_x is not None:
                    into_x[i].addmm_(weights, of_y[j])
                if to_y is not None:
                    into_y[j].addmm_(weights.T, of_x[i])
                if to_bias is not None:
                    to_bias += weights.sum()
        ctx.save_for_backward(to_x, to_y, to_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, to_total: Tensor):
        return *(None if gradient is None else gradient * to_total for gradient in ctx.saved_tensors), None, None, None


def _powers(x: Tensor, y: Tensor | None, skip: Sequence[int], safe: bool) -> Iterator[Tile]:
    """The tiles as logits to base 2 or, if they are `safe`, as powers of 2 already."""
    for tile in _tiles(x, y, skip, factor=LOG2E):
        if safe:
            tile[2].exp2_()
        yield tile


def _accumulate(total: Float[Tensor, "k"], logits: Tensor, dim: int, safe: bool, spare: Tensor) -> None:
    """Adds to the sums along `dim` of 2^logits: to log2 of them or, if `safe`, to themselves, and powers they are."""
    if safe:
        total.add_(logits.sum(dim))
        return
    top = logits.amax(dim, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # −∞ − −∞ would not be a number
    found = torch.sub(logits, top, out=spare).exp2_().sum(dim).log2_().add_(top.squeeze(dim))
    torch.logaddexp2(total, found, out=total)


def _tiles(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None, skip: Sequence[int], factor: float = 1.0
) -> Iterator[Tile]:
    """Each block of rows with each of columns: products times `factor` (−∞ on the diagonals `skip`), and as much room.

    Without y only the tiles on and above the main diagonal. Both tensors are overwritten by the next tile.
    """
    mirrored, (height, width) = y is None, _sides(x, y)
    y = x if y is None else y
    if not len(x) or not len(y):
        return
    space = x.new_empty(2, height * width)

    @cache  # of at most four shapes
    def room(h: int, w: int) -> tuple[Tensor, Tensor]:
        tile, spare = space[:, : h * w].view(2, h, w)
        return tile, spare

    down = [columns.T for columns in y.split(width)]
    for i, rows in enumerate(x.split(height)):
        for j in range(i if mirrored else 0, len(down)):
            tile, spare = room(len(rows), down[j].shape[1])
            tile.addmm_(rows, down[j], beta=0, alpha=factor)
            for diagonal in skip:
                shift = diagonal + i * height - j * width
                if -len(rows) < shift < tile.shape[1]:
                    tile.diagonal(shift).fill_(-math.inf)
            yield i, j, tile, spare


def _blocks(x: Tensor | None, side: int) -> Sequence[Tensor]:
    """The rows of x, if there is one, a tile's side at a time. Made once: a view costs as much as a small operation."""
    return () if x is None else x.split(side)


def _spans(n: int, side: int) -> list[slice]:
    return [slice(top, min(top + side, n)) for top in range(0, n, side)]


def _sides(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None) -> tuple[int, int]:
    """Height and width of the fewest tiles of about equal size: square if x meets itself, otherwise upright."""
    largest = _side(x.device)
    if y is None:
        return (_even(len(x), largest),) * 2
    return _even(len(x), 2 * largest), _even(len(y), -(-largest // 2))


def _even(n: int, largest: int) -> int:
    return -(-n // -(-n // largest)) if n else 1


def _side(device: torch.device) -> int:
    """A tile of 1024² floats is 4 MiB, about what a CPU's cores have of cache; a GPU wants work for all its cores."""
    return 1024 if device.type == "cpu" else 8192
