"""LayerNorm of rows."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def layer_norm_kernel(x: Tile["N", "D"], weight: Tile["D"], bias: Tile["D"], out: Tile["N", "D"], eps: float = 1e-5):
    """out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in f32, rounded once (arXiv:1607.06450).

    The variance is that of the centred row: the mean square less the squared mean would cancel.

    Args:
        x, out: [N, D].
        weight, bias: [D].
        eps: added to the (biased) variance.
    """
    x_f32 = tile.cast(tile.load(x), f32)
    centred = x_f32 - tile.reduce_mean(x_f32, axis=-1, keepdim=True)
    scale = tile.rsqrt(tile.reduce_mean(centred * centred, axis=-1, keepdim=True) + eps)
    tile.store(out, centred * scale * tile.load(weight) + tile.load(bias))
