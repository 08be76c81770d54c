"""Which attention weights dropout keeps: a function of their place alone."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def attention_dropout_kernel(
    keep: Tile["R", "M", "N", f32], p: float, seed: int, place: int, start: int, length: int,
):
    """keep = 0 with probability p, else 1 / (1 - p), for a block of each row's weights.

    Args:
        keep: [R, M, N], R of batch and heads: weights of queries `place`.. against keys `start`...
        p: in [0, 1).
        seed: row r draws with seed + r.
        place, start, length: the first query, the first key, the number of keys of the whole.
    """
    ctx = tile.context()
    for row, query in tile.grid(ctx.R, ctx.M):
        draws = tile.rand(seed + row, (place + query) * length + start + tile.arange(ctx.N))
        tile.store(keep[row, query], tile.where(draws >= p, 1.0 / (1.0 - p), 0.0))
