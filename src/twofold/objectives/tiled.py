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

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

SAFE = 40.0  # e^±40, its sums over any number of rows and their inverses are normal float32
LOG2E = math.log2(math.e)  # exponentials are powers of 2: on CPUs torch's exp2 takes a third of the time of its exp

Tile = tuple[slice, slice, Float[Tensor, "h w"], Float[Tensor, "h w"]]  # rows, columns, products, room to calculate


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
    for i, j, products, spare in _tiles(z, z, skip=()):
        same = labels[i, None] == labels[j]
        value, at = spare.copy_(products).masked_fill_(same, -math.inf).max(1)
        negative[i] = torch.where(value > greatest[i], at + j.start, negative[i])
        greatest[i] = torch.maximum(value, greatest[i])
        products.masked_fill_(~same, math.inf)
        if i == j:
            products.fill_diagonal_(math.inf)
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
    for i, j, products, _ in _tiles(x, y, skip):
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
        rows = x.new_full((len(x),), -math.inf)
        columns = None if not both else rows if y is None else x.new_full((len(y),), -math.inf)
        table = len(x), len(x if y is None else y)
        kept = None
        for i, j, logits, spare in _powers(x, y, skip, ctx.safe):
            rows[i] = torch.logaddexp2(rows[i], _log_sum(logits, 1, ctx.safe, spare))
            if columns is not None and not (y is None and i == j):
                columns[j] = torch.logaddexp2(columns[j], _log_sum(logits, 0, ctx.safe, spare))
            # A table no larger than the embeddings need not be made twice.
            if logits.shape == table and logits.numel() <= x.numel() + (0 if y is None else y.numel()):
                kept = logits
        ctx.save_for_backward(x, y, rows, columns, kept)
        return rows / LOG2E, columns / LOG2E if columns is not None and y is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx, to_rows: Tensor, to_columns):
        x, y, rows, columns, kept = ctx.saved_tensors
        if kept is None:
            tiles = _powers(x, y, ctx.skip, ctx.safe)
        else:
            tiles = iter([(slice(0, kept.shape[0]), slice(0, kept.shape[1]), kept.clone(), torch.empty_like(kept))])
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
        for i, j, logits, spare in tiles:
            if ctx.safe and columns is None:
                weights = logits.mul_(to_rows[i, None])
            elif ctx.safe:
                weights = logits.mul_(torch.add(to_rows[i, None], to_columns[j], out=spare))
            else:
                weights = torch.sub(logits, rows[i, None], out=spare).exp2_().mul_(to_rows[i, None])
                if columns is not None:
                    weights.add_(logits.sub_(columns[j]).exp2_().mul_(to_columns[j]))
            if to_x is not None:
                to_x[i].addmm_(weights, y[j])
            if to_y is not None and not (mirrored and i == j):
                to_y[j].addmm_(weights.T, x[i])
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
                    to_x[i].addmm_(weights, y[j])
                if to_y is not None:
                    to_y[j].addmm_(weights.T, x[i])
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


def _log_sum(logits: Tensor, dim: int, safe: bool, spare: Tensor) -> Tensor:
    """log2 of the sum along `dim` of 2^logits, or of what is 2^logits already if `safe`."""
    if safe:
        return logits.sum(dim).log2_()
    top = logits.amax(dim, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # −∞ − −∞ would not be a number
    return torch.sub(logits, top, out=spare).exp2_().sum(dim).log2_().add_(top.squeeze(dim))


def _tiles(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None, skip: Sequence[int], factor: float = 1.0
) -> Iterator[Tile]:
    """Rows i, columns j, their products times `factor` (−∞ on the diagonals `skip`), and as much room to calculate.

    Without y only the tiles on and above the main diagonal. Both tensors are overwritten by the next tile.
    """
    mirrored, y = y is None, x if y is None else y
    n, m = len(x), len(y)
    height, width = _even(n, x.device), _even(m, x.device)
    tile, spare = x.new_empty(height * width), x.new_empty(height * width)
    for top in range(0, n, height):
        i = slice(top, min(top + height, n))
        rows = x[i] * factor
        for left in range(top if mirrored else 0, m, width):
            j = slice(left, min(left + width, m))
            h, w = i.stop - i.start, j.stop - j.start
            products = torch.mm(rows, y[j].T, out=tile[: h * w].view(h, w))
            for diagonal in skip:
                shift = diagonal + top - left
                if -h < shift < w:
                    products.diagonal(shift).fill_(-math.inf)
            yield i, j, products, spare[: h * w].view(h, w)


def _even(n: int, device: torch.device) -> int:
    """The side of the fewest tiles of about equal size that cover n rows."""
    largest = _side(device)
    return -(-n // -(-n // largest)) if n else 1


def _side(device: torch.device) -> int:
    """A tile of 512² floats is 1 MiB, the size of a CPU core's cache; a GPU wants work for all its cores."""
    return 512 if device.type == "cpu" else 8192
