"""RMSNorm of rows, alone and behind a residual sum, and its gradient."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def rms_norm_kernel(x: Tile["B", "S", "D"], weight: Tile["D"], out: Tile["B", "S", "D"], eps: float = 1e-6):
    """out = x / sqrt(mean(x^2) + eps) * weight, in f32, rounded once (arXiv:1910.07467).

    Args:
        x, out: [B, S, D].
        weight: [D].
        eps: added to the mean square.
    """
    x_f32 = tile.cast(tile.load(x), f32)
    scale = tile.rsqrt(tile.reduce_mean(x_f32 * x_f32, axis=-1, keepdim=True) + eps)
    tile.store(out, x_f32 * scale * tile.load(weight))


@kernel
def add_rms_norm_kernel(x: Tile["B", "S", "D"], residual: Tile["B", "S", "D"], weight: Tile["D"],
                        out: Tile["B", "S", "D"], total: Tile["B", "S", "D"], eps: float = 1e-6):
    """total = x + residual, out = rms_norm(total): the norm reads the sum as it is stored, rounded.

    Args:
        x, residual, out, total: [B, S, D].
        weight: [D].
        eps: added to the mean square.
    """
    tile.store(total, tile.load(x) + tile.load(residual))
    x_f32 = tile.cast(tile.load(total), f32)
    scale = tile.rsqrt(tile.reduce_mean(x_f32 * x_f32, axis=-1, keepdim=True) + eps)
    tile.store(out, x_f32 * scale * tile.load(weight))


@kernel
def rms_norm_backward_kernel(
    grad: Tile["N", "D"], x: Tile["N", "D"], weight: Tile["D"], upstream: Optional[Tile["N", "D"]],  # noqa: UP045
    grad_x: Tile["N", "D"], partial: Tile["P", "D", f32], grad_weight: Tile["D"], eps: float = 1e-6,
):
    """Gradients of `rms_norm_kernel`: of x row by row, of the weight by P blocks of rows, added in their order.

    With r = 1 / sqrt(mean(x^2) + eps): grad_x = (grad weight - x mean(grad weight x) r^2) r (+ upstream) and
    grad_weight = sum over the rows of grad x r.

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
            scale = tile.rsqrt(tile.reduce_mean(row * row) + eps)
            pull = tile.reduce_mean(slope * weight_f32 * row) * scale * scale
            result = (slope * weight_f32 - row * pull) * scale
            if upstream is not None:
                result = result + tile.cast(tile.load(upstream[i]), f32)
            tile.store(grad_x[i], result)
            total = total + slope * (row * scale)
        tile.store(partial[block], total)
    for start in tile.grid(tile.cdiv(ctx.D, 256)):
        columns = partial[:, start * 256:start * 256 + 256]
        tile.store(grad_weight[start * 256:start * 256 + 256], tile.reduce_sum(tile.load(columns), axis=0))
