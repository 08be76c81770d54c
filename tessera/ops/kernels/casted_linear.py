"""Products with weights in 8 bits, with bias, and with activations quantized on the way in."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import constexpr
from tessera.kernel import lang as tile
from tessera.ops.kernels.gemm import plus_bias
from tessera.ops.kernels.quantize import step_of
from tessera.types import Tile, f32, int8, int32


@kernel
def casted_linear_kernel(x: Tile["M", "K"], weight: Tile["N", "K"], scale: Tile["N"], out: Tile["M", "N"],
                         bias: Optional[Tile["N"]] = None):  # noqa: UP045
    """out = x @ weight.T * scale + bias: the weight is read as it is stored; sums in f32, rounded once.

    Args:
        x: [M, K], a float dtype.
        weight: [N, K], int8 or fp8.
        scale: [N], of each row of the weight.
        out: [M, N].
        bias: [N].
    """
    product = tile.mma(tile.load(x), tile.transpose(tile.cast(tile.load(weight), f32)))
    result = product * tile.cast(tile.load(scale), f32)
    tile.store(out, plus_bias(result, bias))


@kernel
def int8_product_kernel(x: Tile["M", "K", int8], x_scale: Tile["M", f32], weight: Tile["N", "K", int8],
                        scale: Tile["N", f32], out: Tile["M", "N"], bias: Optional[Tile["N"]] = None,  # noqa: UP045
                        in_floats: constexpr = False):
    """out = x @ weight.T * x_scale * scale + bias: products and sums of integers, which are exact.

    Args:
        x: [M, K] int8.
        x_scale: [M], of each row of x.
        weight: [N, K] int8.
        scale: [N], of each row of the weight.
        out: [M, N].
        bias: [N].
        in_floats: take the products in f32, exact for 1024 terms (1024 * 127^2 < 2^24): faster by far where a
            processor has no dot product of bytes.
    """
    if in_floats:
        ctx = tile.context()
        total = tile.zeros((ctx.M, ctx.N), int32)
        for start in tile.range(0, ctx.K, 1024):
            x_block = tile.cast(x[:, start:start + 1024], f32)
            weight_block = tile.cast(weight[:, start:start + 1024], f32)
            total = total + tile.cast(tile.mma(x_block, tile.transpose(weight_block)), int32)
    else:
        total = tile.mma(tile.load(x), tile.transpose(tile.load(weight)))
    _store_scaled(out, total, tile.load(x_scale)[:, None], scale, bias)


@kernel
def int8_rows_kernel(x: Tile["M", "K"], weight: Tile["N", "K", int8], scale: Tile["N", f32], out: Tile["M", "N"],
                     bias: Optional[Tile["N"]] = None):  # noqa: UP045
    """`quantize_kernel` and `int8_product_kernel` in one launch, for few rows: each block rounds them again.

    Args:
        x: [M, K], a float dtype.
        weight, scale, out, bias: as there.
    """
    values = tile.cast(tile.load(x), f32)
    step = step_of(values, "int8", keepdim=True)
    codes = tile.cast(tile.round(values / step), int8)
    _store_scaled(out, tile.mma(codes, tile.transpose(tile.load(weight))), step, scale, bias)


def _store_scaled(out, total, step, scale, bias):
    """out = total * step * scale + bias."""
    result = tile.cast(total, f32) * step * tile.load(scale)
    tile.store(out, plus_bias(result, bias))
