"""Rotary position embedding."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile


@kernel
def rope_kernel(x: Tile["S", "H", "D"], cos: Tile["S", "D/2"], sin: Tile["S", "D/2"], out: Tile["S", "H", "D"]):
    """out = (x1 cos - x2 sin, x1 sin + x2 cos) of the halves x1, x2 of each head, in f32 (arXiv:2104.09864).

    Args:
        x, out: [S, H, D]; D even.
        cos, sin: [S, D/2], of each position's angles.
    """
    tile.store(out, tile.apply_rope(x, cos, sin))
