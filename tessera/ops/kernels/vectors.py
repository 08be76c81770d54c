"""Means over what a mask shows, and vectors brought to unit length; with their gradients."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, bool_, f32, int32

_COLUMNS = 256  # of a block of the kernels that reduce another axis than the last


@kernel
def masked_mean_kernel(x: Tile["N", "R", "D"], mask: Tile["N", "R", "D", bool_], totals: Tile["N", "R", f32],
                       counts: Tile["N", "R", int32], out: Tile["N"], count: Tile["N", f32]):
    """out = the mean of x[n] where mask[n] is true, 0 where it is nowhere true; rows are added in their order.

    Args:
        x: [N, R, D]; what is masked may be anything.
        mask: [N, R, D].
        totals, counts: [N, R], overwritten.
        out: [N].
        count: [N], written: what sums are divided by.
    """
    ctx = tile.context()
    for item, row in tile.grid(ctx.N, ctx.R):
        seen = tile.load(mask[item, row])
        totals[item, row] = tile.reduce_sum(tile.where(seen, tile.cast(tile.load(x[item, row]), f32), 0.0))
        counts[item, row] = tile.reduce_sum(tile.cast(seen, int32))
    for item in tile.grid(ctx.N):
        number = tile.maximum(tile.cast(tile.reduce_sum(tile.load(counts[item])), f32), 1.0)
        out[item] = tile.reduce_sum(tile.load(totals[item])) / number
        count[item] = number


@kernel
def masked_mean_backward_kernel(grad: Tile["N"], mask: Tile["N", "R", "D", bool_], count: Tile["N", f32],
                                out: Tile["N", "R", "D"]):
    """out = grad / count where the mask is true, else 0; arguments as of `masked_mean_kernel`."""
    ctx = tile.context()
    for item, row in tile.grid(ctx.N, ctx.R):
        slope = tile.cast(grad[item], f32) / count[item]
        tile.store(out[item, row], tile.where(tile.load(mask[item, row]), slope, 0.0))


def _seen(mask, rows, item, first):
    """A block of columns of the mask, [R, 256] or [R, 1]."""
    return tile.load(rows[item])[:, None] if mask is None else tile.load(mask[item, :, first:first + _COLUMNS])


@kernel
def masked_mean_columns_kernel(x: Tile["N", "R", "C"], mask: Optional[Tile["N", "R", "C", bool_]],  # noqa: UP045
                               rows: Optional[Tile["N", "R", bool_]], out: Tile["N", "C"], count: Tile["N", "C", f32]):  # noqa: UP045
    """`masked_mean_kernel` over the middle axis.

    Args:
        x: [N, R, C].
        mask, rows: [N, R, C] or [N, R], the other None.
        out, count: [N, C].
    """
    ctx = tile.context()
    for item, block in tile.grid(ctx.N, tile.cdiv(ctx.C, _COLUMNS)):
        first = block * _COLUMNS
        seen, values = _seen(mask, rows, item, first), tile.cast(tile.load(x[item, :, first:first + _COLUMNS]), f32)
        total = tile.reduce_sum(tile.where(seen, values, 0.0), axis=0)
        number = tile.reduce_sum(tile.where(seen, tile.full(values.shape, 1.0), 0.0), axis=0)
        number = tile.maximum(number, 1.0)
        tile.store(out[item, first:first + _COLUMNS], total / number)
        tile.store(count[item, first:first + _COLUMNS], number)


@kernel
def masked_mean_columns_backward_kernel(
    grad: Tile["N", "C"], mask: Optional[Tile["N", "R", "C", bool_]], rows: Optional[Tile["N", "R", bool_]],  # noqa: UP045
    count: Tile["N", "C", f32], out: Tile["N", "R", "C"],
):
    """out = grad / count where the mask is true, else 0; arguments as of `masked_mean_columns_kernel`."""
    ctx = tile.context()
    for item, block in tile.grid(ctx.N, tile.cdiv(ctx.C, _COLUMNS)):
        first = block * _COLUMNS
        seen, slope = _seen(mask, rows, item, first), tile.cast(tile.load(grad[item, first:first + _COLUMNS]), f32)
        slope = slope / tile.load(count[item, first:first + _COLUMNS])
        tile.store(out[item, :, first:first + _COLUMNS], tile.where(seen, slope[None, :], 0.0))


def _parts(row, eps):
    """(row / its scale, that scale, the squared length over it): the squares of 1e30 would overflow."""
    scale = tile.maximum(tile.reduce_max(tile.abs(row)), eps)
    part = row / scale
    return part, scale, tile.reduce_sum(part * part)


@kernel
def l2_normalize_kernel(x: Tile["N", "D"], out: Tile["N", "D"], eps: float = 1e-12):
    """out = x / max(|x|, eps) of each row.

    Args:
        x, out: [N, D].
        eps: > 0.
    """
    for index in tile.grid(tile.context().N):
        part, _, square = _parts(tile.cast(tile.load(x[index]), f32), eps)
        # At least 1, or the vector is shorter than eps.
        tile.store(out[index], part * tile.rsqrt(tile.maximum(square, 1.0)))


@kernel
def l2_normalize_backward_kernel(grad: Tile["N", "D"], x: Tile["N", "D"], out: Tile["N", "D"], eps: float = 1e-12):
    """out = (grad - y (grad . y)) / |x| with y = x / |x|; grad / eps for vectors shorter than eps.

    Args:
        grad, x, out: [N, D].
        eps: as in the forward pass.
    """
    for index in tile.grid(tile.context().N):
        part, scale, square = _parts(tile.cast(tile.load(x[index]), f32), eps)
        inverse = tile.rsqrt(tile.maximum(square, 1.0))
        unit, slope = part * inverse, tile.cast(tile.load(grad[index]), f32)
        along = tile.where(square >= 1.0, tile.reduce_sum(slope * unit), 0.0)
        tile.store(out[index], (slope - unit * along) * (inverse / scale))
