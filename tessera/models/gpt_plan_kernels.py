"""What a model that is cut over ranks computes beside its operations, as tile kernels: recorded steps have only those.

In: tensors of one rank. Out: filled tensors. Called by models.gpt_plan while a step is recorded.
"""

from __future__ import annotations

from tessera.kernel import lang as tile
from tessera.kernel.launch import kernel
from tessera.types import Tile, f32


@kernel
def part_of_embedding_kernel(ids: Tile["N"], table: Tile["V", "D"], out: Tile["N", "D"], start: int):  # type: ignore
    """out = the rows of ids that this rank has, zeros for the others.

    Args:
        ids: [N] ints.
        table: [V, D], rows start .. start + V - 1 of the whole.
        out: [N, D].
    """
    ctx = tile.context()
    for n in tile.grid(ctx.N):
        row = ids[n] - start
        is_here = (row >= 0) & (row < ctx.V)
        values = tile.cast(tile.load(table[tile.where(is_here, row, 0)]), f32)
        tile.store(out[n], tile.where(is_here, values, 0.0))


@kernel
def padded_kernel(x: Tile["B", "V"], out: Tile["B", "W"]):  # type: ignore
    """out[:, :V] = x; what is behind stays."""
    ctx = tile.context()
    for b in tile.grid(ctx.B):
        tile.store(out[b, :ctx.V], tile.load(x[b]))


@kernel
def side_by_side_kernel(parts: Tile["R", "B", "W"], out: Tile["B", "V"], n_larger: int):  # type: ignore
    """The ranks' columns of each row, one behind the other: W of the first n_larger ranks, W - 1 of the others.

    Args:
        parts: [R, B, W].
        out: [B, V], V = R W - max(R - n_larger, 0).
    """
    ctx = tile.context()
    for b in tile.grid(ctx.B):
        for r in tile.range(ctx.R):  # in order: what is too much of one part is overwritten by the next
            start = r * ctx.W - tile.maximum(r - n_larger, 0)
            tile.store(out[b, start:start + ctx.W], tile.load(parts[r, b]))
