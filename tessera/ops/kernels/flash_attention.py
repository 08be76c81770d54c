"""Attention without a score matrix."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def flash_attention_kernel(q: Tile["B", "H", "S", "D"], k: Tile["B", "H_kv", "T", "D"], v: Tile["B", "H_kv", "T", "D"],
                           out: Tile["B", "H", "S", "D"], scale: float, causal: bool = False):
    """out = softmax(q k^T scale) v, by blocks of keys with a running maximum (arXiv:2205.14135).

    Heads come in groups of H / H_kv that share keys and values (arXiv:2305.13245).

    Args:
        q, out: [B, H, S, D].
        k, v: [B, H_kv, T, D]; H_kv divides H.
        scale: of the scores, usually 1 / sqrt(D).
        causal: the last query sees all keys, each one before it one key less.
    """
    ctx = tile.context()
    rows, columns = ctx.block_m, ctx.block_n
    for batch, head, block in tile.grid(ctx.B, ctx.H, tile.cdiv(ctx.S, rows)):
        first = block * rows
        shared = head // (ctx.H // ctx.H_kv)
        queries = tile.load(q[batch, head, first:first + rows])
        top = tile.full((rows,), -float("inf"), f32)
        total = tile.zeros((rows,), f32)
        result = tile.zeros((rows, ctx.D), f32)
        for start in tile.range(0, ctx.T, columns):
            if causal and start > first + rows - 1 + ctx.T - ctx.S:
                break
            keys = tile.load(k[batch, shared, start:start + columns])
            scores = tile.mma(queries, tile.transpose(keys)) * scale
            if causal:
                scores = tile.apply_causal_mask(scores, first + ctx.T - ctx.S, start)
            new_top = tile.maximum(top, tile.reduce_max(scores, axis=-1))
            weights = tile.exp(scores - new_top[:, None])
            shrink = tile.exp(top - new_top)
            total = total * shrink + tile.reduce_sum(weights, axis=-1)
            result = result * shrink[:, None] + tile.mma(weights, tile.load(v[batch, shared, start:start + columns]))
            top = new_top
        tile.store(out[batch, head, first:first + rows], result / total[:, None])
