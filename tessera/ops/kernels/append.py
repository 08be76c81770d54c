"""Writing a token's keys and values into the cache."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, int64


@kernel
def append_kernel(new_keys: Tile["B", "K", "D"], new_values: Tile["B", "K", "D"], place: Tile["ONE", int64],
                  keys: Tile["B", "K", "C", "D"], values: Tile["B", "K", "C", "D"]):
    """keys[:, :, place] = new_keys and values[:, :, place] = new_values, rounded to the cache's type.

    Args:
        new_keys, new_values: [B, K, D], of one token a row.
        place: [1], in [0, C), read when the kernel runs.
        keys, values: [B, K, C, D], written.
    """
    ctx = tile.context()
    at = place[0]
    for row in tile.grid(ctx.B):
        for head in tile.range(ctx.K):
            tile.store(keys[row, head, at], tile.load(new_keys[row, head]))
            tile.store(values[row, head, at], tile.load(new_values[row, head]))
