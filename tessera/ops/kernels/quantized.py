"""Linear layers with 8- and 4-bit weights, dequantized in registers on their way into the product.

In: activations [M, K] of any float type, and weights as plain tensors: `quants` [N, K], and a scale for each row, or
for each group of GROUP weights along K, perhaps with a minimum. `from_blocks` makes them from the blocks of a GGUF
file. int4 tensors are packed: uint8 [N, K/2], the even k in the low nibble, two's complement. Sums are f32 chains with
k ascending, in the `product` kernels, which round the activations to 8 bits as well, chains of groups: a row of the
result has the same bits in any batch. On CUDA, weights that meet bf16 activations are multiplied as sums of two bf16
numbers, 16 of their bits: all that a 4-bit weight times an f16 scale has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera import kernel
from tessera.errors import InputError
from tessera.kernel import lang as tile
from tessera.kernel.schedule import schedule
from tessera.ops.kernels.gemm import plus_bias
from tessera.types import Tile, f32, int4, int8

GROUP = 32  # weights along K that share a scale
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


@kernel
def int8_linear_kernel(x: Tile["M", "K"], quants: Tile["N", "K", int8], scale: Tile["N"], out: Tile["M", "N"]):
    """out = (x @ quants.T) * scale, in f32, rounded once.

    Args:
        x: [M, K].
        quants: [N, K] int8.
        scale: [N], a factor for each output feature.
        out: [M, N].
    """
    total = tile.mma(tile.cast(tile.load(x), f32), tile.transpose(tile.cast(tile.load(quants), f32)))
    tile.store(out, total * tile.broadcast(tile.cast(tile.load(scale), f32), axis=0))


@schedule(mixed_dot="bf16x2")
@kernel
def int8_group_linear_kernel(
    x: Tile["M", "K"], quants: Tile["N", "K", int8], scale: Tile["N", "K/32"], out: Tile["M", "N"],
    bias: Tile["N"] | None = None,
):
    """out = x @ (quants * scale).T + bias, in f32, rounded once: the weights of GGUF's Q8_0.

    Args:
        x: [M, K].
        quants: [N, K] int8.
        scale: [N, K/32], a factor for each group.
        out: [M, N].
        bias: [N].
    """
    total = tile.mma(tile.cast(tile.load(x), f32), tile.transpose(_dequantized(quants, scale, None)))
    tile.store(out, plus_bias(total, bias))


@schedule(mixed_dot="bf16x2")
@kernel
def int4_linear_kernel(
    x: Tile["M", "K"], quants: Tile["N", "K", int4], scale: Tile["N", "K/32"],
    minimum: Tile["N", "K/32"] | None, out: Tile["M", "N"], bias: Tile["N"] | None = None,
):
    """out = x @ (quants * scale + minimum).T + bias, in f32, rounded once: the weights of GGUF's Q4_0 and Q4_1.

    Args:
        x: [M, K].
        quants: [N, K] int4: packed, from -8 to 7.
        scale: [N, K/32], a factor for each group.
        minimum: [N, K/32], added to each weight of a group, or None.
        out: [M, N].
        bias: [N].
    """
    total = tile.mma(tile.cast(tile.load(x), f32), tile.transpose(_dequantized(quants, scale, minimum)))
    tile.store(out, plus_bias(total, bias))


@kernel
def int8_group_product_kernel(
    x: Tile["M", "K"], quants: Tile["N", "K", int8], scale: Tile["N", "K/32"], out: Tile["M", "N"],
    bias: Tile["N"] | None = None,
):
    """`int8_group_linear_kernel` with x rounded to int8 as well, a scale for each group: products of integers.

    Args: as there.
    """
    total = _group_product(x, quants, scale, None)
    tile.store(out, plus_bias(total, bias))


@kernel
def int4_product_kernel(
    x: Tile["M", "K"], quants: Tile["N", "K", int4], scale: Tile["N", "K/32"],
    minimum: Tile["N", "K/32"] | None, out: Tile["M", "N"], bias: Tile["N"] | None = None,
):
    """`int4_linear_kernel` with x rounded to int8 as well, a scale for each group: products of integers.

    Args: as there.
    """
    total = _group_product(x, quants, scale, minimum)
    tile.store(out, plus_bias(total, bias))


def _group_product(x, quants, scale, minimum):
    """The tile [M, N]: for each group the integers' product, exact, times both scales; groups added in order.

    The codes of x are round(x / step) with step = max|x| / 127 of a row's group.
    """
    rows, depth = x.shape
    columns, groups = quants.shape[0], depth // 32
    values = tile.reshape(tile.cast(tile.load(x), f32), (rows, groups, 32))
    step = tile.maximum(tile.reduce_max(tile.abs(values), axis=-1), 1e-30) / 127.0
    codes = tile.cast(tile.round(values * (1.0 / step)[:, :, None]), int8)
    weight = tile.reshape(tile.load(quants), (columns, groups, 32))
    # Groups come first: the sum over them adds products of [M, 32] with [32, N].
    product = tile.mma(tile.transpose(codes, (1, 0, 2)), tile.transpose(weight, (1, 2, 0)))
    total = tile.cast(product, f32) * _rows_of_groups(step) * _columns_of_groups(scale)
    if minimum is not None:
        sums = tile.reduce_sum(tile.cast(codes, f32), axis=-1) * step
        total = tile.fma(_rows_of_groups(sums), _columns_of_groups(minimum), total)
    return tile.reduce_sum(total, axis=0)


def _rows_of_groups(tile_MG):
    """[M, G] -> [G, M, 1]."""
    return tile.transpose(tile_MG)[:, :, None]


def _columns_of_groups(view_NG):
    """[N, G] -> [G, 1, N], f32."""
    return tile.transpose(tile.cast(tile.load(view_NG), f32))[:, None, :]


@kernel
def int8_group_embedding_kernel(
    ids: Tile["N"], quants: Tile["V", "D", int8], scale: Tile["V", "D/32"], out: Tile["N", "D"],
):
    """out = (quants * scale)[ids], in f32, rounded once.

    Args:
        ids: [N] ints in [0, V).
        quants: [V, D] int8.
        scale: [V, D/32], a factor for each group of a row.
        out: [N, D].
    """
    for i in tile.grid(tile.context().N):
        row = ids[i]
        tile.store(out[i], _dequantized_row(quants[row], scale[row], None))


@kernel
def int4_embedding_kernel(
    ids: Tile["N"], quants: Tile["V", "D", int4], scale: Tile["V", "D/32"], minimum: Tile["V", "D/32"] | None,
    out: Tile["N", "D"],
):
    """out = (quants * scale + minimum)[ids], in f32, rounded once.

    Args:
        ids: [N] ints in [0, V).
        quants: [V, D] int4: packed, from -8 to 7.
        scale: [V, D/32], a factor for each group of a row.
        minimum: [V, D/32], added to each element of a group, or None.
        out: [N, D].
    """
    for i in tile.grid(tile.context().N):
        row = ids[i]
        tile.store(out[i], _dequantized_row(quants[row], scale[row], None if minimum is None else minimum[row]))


def _dequantized_row(quants, scale, minimum):
    """The tile [D] of one row's f32 weights."""
    (depth,) = quants.shape
    groups = tile.reshape(tile.cast(tile.load(quants), f32), (depth // 32, 32))
    weight = groups * tile.cast(tile.load(scale)[:, None], f32)
    if minimum is not None:
        weight = weight + tile.cast(tile.load(minimum)[:, None], f32)
    return tile.reshape(weight, (depth,))


def _dequantized(quants, scale, minimum):
    """The tile [N, K] of f32 weights."""
    rows, depth = quants.shape
    groups = tile.reshape(tile.cast(tile.load(quants), f32), (rows, depth // 32, 32))
    weight = groups * tile.cast(tile.load(scale)[:, :, None], f32)
    if minimum is not None:
        weight = weight + tile.cast(tile.load(minimum)[:, :, None], f32)
    return tile.reshape(weight, (rows, depth))


def pack_int4(quants: Tensor) -> Tensor:
    """Numbers from -8 to 7, [..., K] with an even K, as an int4 tensor: uint8 [..., K/2].

    Raises:
        InputError: K is odd.
    """
    if quants.shape[-1] % 2:
        raise InputError(f"quants: a last dim of {quants.shape[-1]} given; two int4 share a byte, expected an even one")
    nibbles = quants.to(torch.uint8) & 15
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def from_blocks(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The blocks of a GGUF tensor as (quants, scale, minimum) for the kernels of this module; no weight is rounded.

    Args:
        blocks: uint8 [N, K/32 * bytes of a block], rows as they lie in the file.
        kind: Q8_0, Q4_0 or Q4_1.

    Returns:
        quants int8 [N, K] (Q8_0) or packed int4 [N, K]; scale [N, K/32]; minimum [N, K/32] for Q4_1. Scales are f16,
        for Q4_1 f32.

    Raises:
        InputError: another kind, or rows that are not whole blocks.
    """
    if kind not in _BLOCK_BYTES:
        raise InputError(f"kind: {kind!r} given; expected one of {', '.join(_BLOCK_BYTES)}")
    size = _BLOCK_BYTES[kind]
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % size:
        raise InputError(f"blocks: {blocks.dtype} {tuple(blocks.shape)} given; expected uint8 [N, groups * {size}]")
    rows = blocks.shape[0]
    groups = blocks.reshape(rows, -1, size)
    head = size - (GROUP if kind == "Q8_0" else GROUP // 2)
    halves = groups[..., :head].contiguous().view(torch.float16)
    data = groups[..., head:]
    if kind == "Q8_0":
        return data.contiguous().view(torch.int8).reshape(rows, -1), halves[..., 0].contiguous(), None
    quants = pack_int4((torch.cat([data & 15, data >> 4], -1) ^ 8).reshape(rows, -1))
    if kind == "Q4_0":
        return quants, halves[..., 0].contiguous(), None
    scale = halves[..., 0].float()
    return quants, scale, halves[..., 1].float() + 8 * scale
