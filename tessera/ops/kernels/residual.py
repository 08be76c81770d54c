"""The sum of two tensors."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile


@kernel
def add_kernel(x: Tile["N"], y: Tile["N"], out: Tile["N"]):
    """out = x + y, in f32, rounded once.

    Args:
        x, y, out: [N].
    """
    tile.store(out, tile.load(x) + tile.load(y))
