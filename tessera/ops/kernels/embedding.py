"""Embedding look-ups: from a table of any dtype, from a block-sparse one, and the gradient of the table."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def casted_embedding_kernel(ids: Tile["N"], table: Tile["V", "D"], out: Tile["N", "D"], scale: float = 1.0):
    """out = table[ids] * scale, in f32, rounded once.

    Args:
        ids: [N] ints in [0, V).
        table: [V, D], any float dtype or int8.
        out: [N, D].
        scale: of the whole table.
    """
    tile.store(out, tile.cast(tile.gather(table, tile.load(ids)), f32) * scale)


@kernel
def scaled_embedding_kernel(ids: Tile["N"], table: Tile["V", "D"], scale: Tile["K", f32], out: Tile["N", "D"]):
    """out = table[ids] * scale[ids], in f32, rounded once.

    Args:
        ids: [N] ints in [0, V).
        table: [V, D], any float dtype or int8.
        scale: [V], or [1] for the whole table.
        out: [N, D].
    """
    ctx = tile.context()
    for n in tile.grid(ctx.N):
        row = ids[n]
        tile.store(out[n], tile.cast(tile.load(table[row]), f32) * scale[tile.minimum(row, ctx.K - 1)])


@kernel
def embedding_backward_kernel(grad: Tile["N", "D"], ids: Tile["N"], grad_table: Tile["V", "D", f32]):
    """grad_table[ids[n]] += grad[n] for n in turn: each column's sums are one program's, in the order of the ids.

    Args:
        grad: [N, D].
        ids: [N] ints in [0, V).
        grad_table: [V, D], changed; zeros, or what has been summed before.
    """
    ctx = tile.context()
    for block in tile.grid(tile.cdiv(ctx.D, 64)):
        first, last = block * 64, block * 64 + 64
        for n in tile.range(ctx.N):
            row = ids[n]
            total = tile.load(grad_table[row, first:last]) + tile.load(grad[n, first:last])
            tile.store(grad_table[row, first:last], total)


@kernel
def sparse_embedding_kernel(
    ids: Tile["N"], blocks: Tile["M", "R", "C"], pointers: Tile["G+1"], columns: Tile["M"], scales: Tile["M", f32],
    out: Tile["N", "D"],
):
    """out[n] = row ids[n] of a block-sparse table: zeros, and its part of the blocks that are there times their scales.

    Args:
        ids: [N] ints in [0, G R).
        blocks: [M, R, C], any float dtype or int8.
        pointers: [G + 1] ints; blocks pointers[g] .. pointers[g + 1] - 1 hold rows g R .. g R + R - 1.
        columns: [M] ints, which block of C columns each is.
        scales: [M].
        out: [N, D].
    """
    ctx = tile.context()
    for n in tile.grid(ctx.N):
        group, row = ids[n] // ctx.R, ids[n] % ctx.R
        tile.store(out[n], tile.zeros((ctx.D,), f32))
        for m in tile.range(pointers[group], pointers[group + 1]):
            first = columns[m] * ctx.C
            tile.store(out[n, first:first + ctx.C], tile.cast(tile.load(blocks[m, row]), f32) * scales[m])
