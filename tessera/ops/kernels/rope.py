"""Rotary position embedding."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def rope_kernel(
    x: Tile["B", "S", "H", "2*R+E"], cos: Tile["T", "R"], sin: Tile["T", "R"], out: Tile["B", "S", "H", "2*R+E"],
    positions: Optional[Tile["C", "S"]] = None, direction: float = 1.0,  # noqa: UP045
):
    """out = (x1 cos - x2 sin, x1 sin + x2 cos, rest) of each head's parts, in f32 (arXiv:2104.09864).

    Args:
        x, out: [B, S, H, 2 R + E], one tensor or two; the first R entries of a head turn with the next R.
        cos, sin: [T, R], of each position's angles.
        positions: [B or 1, S] ints in [0, T); without them token s has position s.
        direction: of the rotation, 1 or -1.
    """
    ctx = tile.context()
    for batch, token in tile.grid(ctx.B, ctx.S):
        at = token
        if positions is not None:
            at = positions[tile.minimum(batch, ctx.C - 1), token]
        cosine, sine = tile.load(cos[at])[None, :], (tile.load(sin[at]) * direction)[None, :]
        first, second, rest = tile.split(tile.load(x[batch, token]), (ctx.R, ctx.R, ctx.E), axis=-1)
        turned = [first * cosine - second * sine, first * sine + second * cosine]
        tile.store(out[batch, token], tile.concat([*turned, tile.cast(rest, f32)], axis=-1))


@kernel
def rope_interleaved_kernel(
    x: Tile["B", "S", "H", "2*R+E"], cos: Tile["T", "R"], sin: Tile["T", "R"], out: Tile["B", "S", "H", "2*R+E"],
    positions: Optional[Tile["C", "S"]] = None, direction: float = 1.0,  # noqa: UP045
):
    """`rope_kernel` for pairs of neighbours: out = x cos + (its neighbour) (-sin, sin).

    Args:
        x, out: [B, S, H, 2 R + E], two tensors.
        the others: as of `rope_kernel`.
    """
    ctx = tile.context()
    turning = 2 * ctx.R
    for batch, token in tile.grid(ctx.B, ctx.S):
        at = token
        if positions is not None:
            at = positions[tile.minimum(batch, ctx.C - 1), token]
        place = tile.arange(turning)
        cosine = tile.gather(cos[at], place >> 1)
        sine = tile.gather(sin[at], place >> 1) * tile.where(place & 1 == 0, -direction, direction)
        for head in tile.range(ctx.H):
            row = x[batch, token, head, :turning]
            turned = tile.load(row) * cosine + tile.gather(row, place ^ 1) * sine
            tile.store(out[batch, token, head, :turning], turned)
            tile.store(out[batch, token, head, turning:], tile.load(x[batch, token, head, turning:]))
