"""LayerNorm of rows, and its gradient."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.ops.kernels.rms_norm import inverse_rms
from tessera.types import Tile, f32


@kernel
def layer_norm_kernel(x: Tile["B", "S", "D"], weight: Tile["D"], bias: Tile["D"], out: Tile["B", "S", "D"],
                      eps: float = 1e-5):
    """out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in f32, rounded once (arXiv:1607.06450).

    The variance is that of the centred row: the mean square less the squared mean would cancel.

    Args:
        x, out: [B, S, D].
        weight, bias: [D].
        eps: added to the (biased) variance.
    """
    ctx = tile.context()
    for batch, token in tile.grid(ctx.B, ctx.S):
        row = tile.cast(tile.load(x[batch, token]), f32)
        centred = row - tile.reduce_mean(row)
        tile.store(out[batch, token], centred * inverse_rms(centred, eps) * tile.load(weight) + tile.load(bias))


@kernel
def layer_norm_backward_kernel(
    grad: Tile["N", "D"], x: Tile["N", "D"], weight: Tile["D"], grad_x: Tile["N", "D"], partial: Tile["P", "D", f32],
    partial_bias: Tile["P", "D", f32], grad_weight: Tile["D"], grad_bias: Tile["D"], eps: float = 1e-5,
):
    """Gradients of `layer_norm_kernel`: of x row by row, of the vectors by P blocks of rows, added in their order.

    With the normed row n and p = grad weight: grad_x = (p - mean(p) - n mean(p n)) / sqrt(var(x) + eps),
    grad_weight = sum over the rows of grad n, grad_bias = that of grad.

    Args:
        grad, x, grad_x: [N, D].
        weight, grad_weight, grad_bias: [D].
        partial, partial_bias: [P, D], overwritten.
        eps: as in the forward pass.
    """
    ctx = tile.context()
    rows = tile.cdiv(ctx.N, ctx.P)
    weight_f32 = tile.cast(tile.load(weight), f32)
    for block in tile.grid(ctx.P):
        total, total_bias = tile.zeros((ctx.D,), f32), tile.zeros((ctx.D,), f32)
        for i in tile.range(block * rows, tile.minimum((block + 1) * rows, ctx.N)):
            row, slope = tile.cast(tile.load(x[i]), f32), tile.cast(tile.load(grad[i]), f32)
            centred = row - tile.reduce_mean(row)
            scale = inverse_rms(centred, eps)
            normed, pushed = centred * scale, slope * weight_f32
            pull = normed * tile.reduce_mean(pushed * normed)
            tile.store(grad_x[i], (pushed - tile.reduce_mean(pushed) - pull) * scale)
            total = total + slope * normed
            total_bias = total_bias + slope
        tile.store(partial[block], total)
        tile.store(partial_bias[block], total_bias)
    for start in tile.grid(tile.cdiv(ctx.D, 256)):
        first, last = start * 256, start * 256 + 256
        tile.store(grad_weight[first:last], tile.reduce_sum(tile.load(partial[:, first:last]), axis=0))
        tile.store(grad_bias[first:last], tile.reduce_sum(tile.load(partial_bias[:, first:last]), axis=0))
