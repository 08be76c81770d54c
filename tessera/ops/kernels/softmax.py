"""Softmax and log-softmax of rows, with their gradients.

A row of -inf gives zeros (log: -inf); where +inf is the largest, its places share the whole. `d` below is the row
less its largest, taken so that inf - inf does not arise.
"""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def softmax_kernel(x: Tile["N", "D"], out: Tile["N", "D"]):
    """out = exp(x - max(x)) / sum(exp(x - max(x))), in f32, rounded once.

    Args:
        x, out: [N, D].
    """
    x_f32 = tile.cast(tile.load(x), f32)
    top = tile.reduce_max(x_f32, axis=-1, keepdim=True)
    weights = tile.exp(tile.where(x_f32 == top, 0.0, x_f32 - top))
    share = tile.where(top == -float("inf"), 0.0, 1.0 / tile.reduce_sum(weights, axis=-1, keepdim=True))
    tile.store(out, weights * share)


@kernel
def softmax_backward_kernel(grad: Tile["N", "D"], out: Tile["N", "D"], d_x: Tile["N", "D"]):
    """d_x = (grad - sum(grad * out)) * out, of out = softmax(x).

    Args:
        grad, out, d_x: [N, D].
    """
    g, y = tile.cast(tile.load(grad), f32), tile.cast(tile.load(out), f32)
    tile.store(d_x, (g - tile.reduce_sum(g * y, axis=-1, keepdim=True)) * y)


@kernel
def log_softmax_kernel(x: Tile["N", "D"], out: Tile["N", "D"]):
    """out = d - log(sum(exp(d))), in f32, rounded once.

    Args:
        x, out: [N, D].
    """
    x_f32 = tile.cast(tile.load(x), f32)
    top = tile.reduce_max(x_f32, axis=-1, keepdim=True)
    d = tile.where(x_f32 == top, 0.0, x_f32 - top)
    spread = tile.log(tile.reduce_sum(tile.exp(d), axis=-1, keepdim=True))
    tile.store(out, d - tile.where(top == -float("inf"), float("inf"), spread))


@kernel
def log_softmax_backward_kernel(grad: Tile["N", "D"], out: Tile["N", "D"], d_x: Tile["N", "D"]):
    """d_x = grad - exp(out) * sum(grad), of out = log_softmax(x); zeros for a row of -inf.

    Args:
        grad, out, d_x: [N, D].
    """
    g, y = tile.cast(tile.load(grad), f32), tile.cast(tile.load(out), f32)
    alive = tile.reduce_max(y, axis=-1, keepdim=True) != -float("inf")
    tile.store(d_x, tile.where(alive, g - tile.exp(y) * tile.reduce_sum(g, axis=-1, keepdim=True), 0.0))
