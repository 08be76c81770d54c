"""The elementwise middle of a gated MLP."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile


@kernel
def swiglu_kernel(gate: Tile["N", "F"], up: Tile["N", "F"], out: Tile["N", "F"]):
    """out = silu(gate) * up, in f32, rounded once (arXiv:2002.05202).

    Args:
        gate, up, out: [N, F].
    """
    tile.store(out, tile.silu(tile.load(gate)) * tile.load(up))
