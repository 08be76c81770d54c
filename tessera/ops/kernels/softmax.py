"""Softmax of rows."""

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
    weights = tile.exp(x_f32 - tile.reduce_max(x_f32, axis=-1, keepdim=True))
    tile.store(out, weights / tile.reduce_sum(weights, axis=-1, keepdim=True))
