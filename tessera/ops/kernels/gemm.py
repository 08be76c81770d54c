"""Matrix product."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def gemm_kernel(a: Tile["M", "K"], b: Tile["K", "N"], out: Tile["M", "N"]):
    """out = a @ b, accumulated in f32 (int32 for int8), rounded once.

    Args:
        a: [M, K].
        b: [K, N].
        out: [M, N].
    """
    tile.store(out, tile.mma(tile.load(a), tile.load(b)))


def plus_bias(total, bias):
    """total [M, N] + bias [N] in f32; the total alone where there is no bias."""
    if bias is None:
        return total
    return total + tile.cast(tile.load(bias), f32)


@kernel
def linear_kernel(x: Tile["M", "K"], weight: Tile["N", "K"], out: Tile["M", "N"],
                  bias: Optional[Tile["N"]] = None):  # noqa: UP045
    """out = x @ weight.T + bias, accumulated in f32 (int32 for int8), rounded once.

    Args:
        x: [M, K].
        weight: [N, K], a row for each output feature.
        out: [M, N].
        bias: [N].
    """
    result = tile.mma(tile.load(x), tile.transpose(tile.load(weight)))
    if bias is not None:
        result = result + tile.load(bias)
    tile.store(out, result)


@kernel
def gemm_add_kernel(a: Tile["M", "K"], b: Tile["K", "N"], out: Tile["M", "N"]):
    """out += a @ b; the product is accumulated in f32 before it is added.

    Args:
        a: [M, K].
        b: [K, N].
        out: [M, N], read and written.
    """
    tile.store(out, tile.load(out) + tile.mma(tile.load(a), tile.load(b)))


@kernel
def gemm_transposed_kernel(a: Tile["K", "M"], b: Tile["K", "N"], out: Tile["M", "N"]):
    """out = a.T @ b, accumulated in f32, rounded once: the gradient of a linear map's weight.

    Args:
        a: [K, M].
        b: [K, N].
        out: [M, N].
    """
    tile.store(out, tile.mma(tile.transpose(tile.load(a)), tile.load(b)))


@kernel
def gemm_transposed_add_kernel(a: Tile["K", "M"], b: Tile["K", "N"], out: Tile["M", "N"]):
    """out += a.T @ b; the product is accumulated in f32, on top of what is there.

    Args:
        a: [K, M].
        b: [K, N].
        out: [M, N] f32, read and written.
    """
    tile.store(out, tile.mma(tile.transpose(tile.load(a)), tile.load(b), tile.load(out)))


@kernel
def batched_gemm_kernel(a: Tile["B", "M", "K"], b: Tile["B", "K", "N"], out: Tile["B", "M", "N"]):
    """out[i] = a[i] @ b[i] for each i of the batch, accumulated in f32, rounded once.

    Args:
        a: [B, M, K].
        b: [B, K, N].
        out: [B, M, N].
    """
    ctx = tile.context()
    for batch in tile.grid(ctx.B):
        tile.store(out[batch], tile.mma(tile.load(a[batch]), tile.load(b[batch])))
