"""RMSNorm of rows, alone and behind a residual sum, and its gradient."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


def inverse_rms(row, eps):
    """1 / sqrt(mean(row^2) + eps) of one row; where the squares leave the range of f32, of the row over its largest."""
    total = tile.reduce_mean(row * row) + eps
    scale = tile.rsqrt(total)
    if tile.logical_or(total > 1e37, total < 1e-30):
        top = tile.maximum(tile.reduce_max(tile.abs(row)), 1e-37)
        part, share = row / top, tile.sqrt(eps) / top
        scale = tile.rsqrt(tile.reduce_mean(part * part) + share * share) / top
    return scale


@kernel
def rms_norm_kernel(x: Tile["B", "S", "D"], weight: Tile["D"], out: Tile["B", "S", "D"], eps: float = 1e-6):
    """out = x / sqrt(mean(x^2) + eps) * weight, in f32, rounded once (arXiv:1910.07467).

    Args:
        x, out: [B, S, D].
        weight: [D].
        eps: added to the mean square.
    """
    ctx = tile.context()
    for batch, token in tile.grid(ctx.B, ctx.S):
        row = tile.cast(tile.load(x[batch, token]), f32)
        tile.store(out[batch, token], row * inverse_rms(row, eps) * tile.load(weight))


@kernel
def add_rms_norm_kernel(x: Tile["B", "S", "D"], residual: Tile["B", "S", "D"], weight: Tile["D"],
                        out: Tile["B", "S", "D"], total: Tile["B", "S", "D"], eps: float = 1e-6):
    """total = x + residual, out = rms_norm(total): the norm reads the sum as it is stored, rounded.

    Args:
        x, residual, out, total: [B, S, D].
        weight: [D].
        eps: added to the mean square.
    """
    ctx = tile.context()
    for batch, token in tile.grid(ctx.B, ctx.S):
        tile.store(total[batch, token], tile.load(x[batch, token]) + tile.load(residual[batch, token]))
        row = tile.cast(tile.load(total[batch, token]), f32)
        tile.store(out[batch, token], row * inverse_rms(row, eps) * tile.load(weight))


@kernel
def rms_norm_backward_kernel(
    grad: Tile["N", "D"], x: Tile["N", "D"], weight: Tile["D"], upstream: Optional[Tile["N", "D"]],  # noqa: UP045
    grad_x: Tile["N", "D"], partial: Tile["P", "D", f32], grad_weight: Tile["D"], eps: float = 1e-6,
):
    """Gradients of `rms_norm_kernel`: of x row by row, of the weight by P blocks of rows, added in their order.

    With r = 1 / sqrt(mean(x^2) + eps) and n = x r: grad_x = (grad weight - n mean(grad weight n)) r (+ upstream) and
    grad_weight = sum over the rows of grad n.

    Args:
        grad, x, grad_x: [N, D].
        weight, grad_weight: [D].
        upstream: [N, D], added to grad_x: the gradient that comes to x by another way.
        partial: [P, D], overwritten.
        eps: as in the forward pass.
    """
    ctx = tile.context()
    rows = tile.cdiv(ctx.N, ctx.P)
    weight_f32 = tile.cast(tile.load(weight), f32)
    for block in tile.grid(ctx.P):
        total = tile.zeros((ctx.D,), f32)
        for i in tile.range(block * rows, tile.minimum((block + 1) * rows, ctx.N)):
            row, slope = tile.cast(tile.load(x[i]), f32), tile.cast(tile.load(grad[i]), f32)
            scale = inverse_rms(row, eps)
            normed, pushed = row * scale, slope * weight_f32
            result = (pushed - normed * tile.reduce_mean(pushed * normed)) * scale
            if upstream is not None:
                result = result + tile.cast(tile.load(upstream[i]), f32)
            tile.store(grad_x[i], result)
            total = total + slope * normed
        tile.store(partial[block], total)
    for start in tile.grid(tile.cdiv(ctx.D, 256)):
        columns = partial[:, start * 256:start * 256 + 256]
        tile.store(grad_weight[start * 256:start * 256 + 256], tile.reduce_sum(tile.load(columns), axis=0))
