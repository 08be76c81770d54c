"""Matrix product."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile


@kernel
def gemm_kernel(a: Tile["M", "K"], b: Tile["K", "N"], out: Tile["M", "N"]):
    """out = a @ b, accumulated in f32 (int32 for int8), rounded once.

    Args:
        a: [M, K].
        b: [K, N].
        out: [M, N].
    """
    tile.store(out, tile.mma(tile.load(a), tile.load(b)))


@kernel
def linear_kernel(x: Tile["M", "K"], weight: Tile["N", "K"], out: Tile["M", "N"]):
    """out = x @ weight.T, accumulated in f32 (int32 for int8), rounded once.

    Args:
        x: [M, K].
        weight: [N, K], a row for each output feature.
        out: [M, N].
    """
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(weight))))
