"""Embedding look-up from a table of any dtype."""

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
