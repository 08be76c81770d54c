"""Attention without a score matrix."""

from __future__ import annotations

import math
from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.kernel.schedule import schedule
from tessera.ops.kernels.attention_variants import keep_factors, load_mask, load_slope, vary
from tessera.ops.kernels.running_softmax import softmax_step
from tessera.types import Tile, f32

_LOG2_E = math.log2(math.e)


@schedule(mixed_dot="bf16", f32_dot="tf32x3")
@kernel
def flash_attention_kernel(q: Tile["B", "H", "S", "D"], k: Tile["B", "H_kv", "T", "D"], v: Tile["B", "H_kv", "T", "D"],
                           out: Tile["B", "H", "S", "D"], scale: float, causal: bool = False,
                           lse: Optional[Tile["B", "H", "S", f32]] = None, window: Optional[int] = None,  # noqa: UP045
                           sinks: Optional[Tile["H"]] = None,  # noqa: UP045
                           mask: Optional[Tile["B", "H", "S", "T"]] = None,  # noqa: UP045
                           slopes: Optional[Tile["H"]] = None, softcap: Optional[float] = None,  # noqa: UP045
                           dropout: Optional[float] = None, seed: int = 0):  # noqa: UP045
    """out = softmax(q k^T scale) v, by blocks of keys with a running maximum (arXiv:2205.14135).

    Heads come in groups of H / H_kv that share keys and values (arXiv:2305.13245). A query that sees no key
    gives zeros.

    Args:
        q, out: [B, H, S, D].
        k, v: [B, H_kv, T, D]; H_kv divides H.
        scale: of the scores, usually 1 / sqrt(D); > 0.
        causal: the last query sees all keys, each one before it one key less.
        lse: [B, H, S] f32, written: the logarithm of the sum that each row was divided by; -inf where it is zero.
        window: with causal: a query sees itself and the window - 1 keys before it; >= 1.
        sinks: [H], a logit a head that takes its share of the softmax and has no value.
        mask: [B, H, S, T], bool (True: seen) or float (added to the scores).
        slopes: [H], of ALiBi: slope * (key's place - query's place) is added (arXiv:2108.12409).
        softcap: scores become softcap * tanh(scores / softcap), before all that.
        dropout: weights are dropped with this probability, after the sum; drawn with seed + batch * H + head.

    On CUDA the weights are rounded to bf16 where the values are bf16.
    """
    ctx = tile.context()
    rows, columns = ctx.block_m, ctx.block_n
    is_varied = softcap is not None or slopes is not None or mask is not None
    unit = 1.0 if is_varied else scale  # what scores are multiples of until the softmax
    factor = unit * _LOG2_E
    blocks = tile.cdiv(ctx.S, rows)
    for batch, head, block in tile.grid(ctx.B, ctx.H, blocks):
        first = (blocks - 1 - block) * rows  # the last queries see most keys: the longest work first
        place = first + ctx.T - ctx.S  # where the first query of the block stands among the keys
        shared = head // (ctx.H // ctx.H_kv)
        queries = tile.load(q[batch, head, first:first + rows])
        top = tile.full((rows,), -float("inf"), f32)
        total = tile.zeros((rows,), f32)
        if sinks is not None:
            top = tile.zeros((rows,), f32) + tile.cast(tile.load(sinks[head]), f32) / unit
            total = tile.full((rows,), 1.0, f32)
        result = tile.zeros((rows, ctx.D), f32)
        begin, end = 0, ctx.T
        if causal:
            end = tile.minimum(ctx.T, place + rows)
        if window is not None:
            begin = tile.maximum(place - window + 1, 0) // columns * columns
        for start in tile.range(begin, end, columns):
            scores = tile.mma(queries, tile.transpose(tile.load(k[batch, shared, start:start + columns])))
            if is_varied:
                ages = (tile.arange(rows) + place)[:, None] - (tile.arange(columns) + start)[None, :]
                seen = load_mask(mask, batch, head, first, rows, start, columns)
                scores = vary(scores * scale, ages, softcap, load_slope(slopes, head), seen)
            # Only the blocks on the diagonal, and at the far end of the window, have keys that are hidden.
            if causal and start + columns > place + 1:
                scores = tile.apply_causal_mask(scores, place, start)
            if window is not None and start <= place + rows - 1 - window:
                ages = (tile.arange(rows) + place)[:, None] - (tile.arange(columns) + start)[None, :]
                scores = tile.where(ages < window, scores, -float("inf"))
            weights, top, total, shrink = softmax_step(scores, top, total, factor, tile.exp2)
            if dropout is not None:
                weights = weights * keep_factors(
                    dropout, seed, batch * ctx.H + head, first, rows, start, columns, ctx.T)
            result = result * shrink[:, None] + tile.mma(weights, tile.load(v[batch, shared, start:start + columns]))
        divisor = tile.where(total == 0.0, 1.0, total)
        tile.store(out[batch, head, first:first + rows], result / divisor[:, None])
        if lse is not None:
            tile.store(lse[batch, head, first:first + rows], top * unit + tile.log(total))
