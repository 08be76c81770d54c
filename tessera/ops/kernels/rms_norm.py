"""RMSNorm of rows."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def rms_norm_kernel(x: Tile["N", "D"], weight: Tile["D"], out: Tile["N", "D"], eps: float = 1e-6):
    """out = x / sqrt(mean(x^2) + eps) * weight, in f32, rounded once (arXiv:1910.07467).

    Args:
        x, out: [N, D].
        weight: [D].
        eps: added to the mean square.
    """
    x_f32 = tile.cast(tile.load(x), f32)
    scale = tile.rsqrt(tile.reduce_mean(x_f32 * x_f32, axis=-1, keepdim=True) + eps)
    tile.store(out, x_f32 * scale * tile.load(weight))
