"""Attention of one new token a row over cached keys."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.kernel.schedule import schedule
from tessera.kernel.signature import constexpr
from tessera.ops.kernels.running_softmax import softmax_step
from tessera.types import Tile, bool_, f32, int64

SPAN = 256  # keys a program; a fixed number, so that neither the batch nor the threads change the order of a sum


@schedule(tile={"BN": 128})
@kernel
def decode_attention_kernel(
    q: Tile["B", "H_kv", "G", "D"], k: Tile["B", "H_kv", "T", "D"], v: Tile["B", "H_kv", "T", "D"],
    out: Tile["B", "H_kv", "G", "D"], parts: Tile["B", "H_kv", "P", "G", "D + 2", f32], scale: float,
    allowed: Optional[Tile["B", "T", bool_]] = None, place: Optional[Tile["ONE", int64]] = None,  # noqa: UP045
    window: Optional[int] = None, sinks: Optional[Tile["H_kv", "G"]] = None,  # noqa: UP045
    softcap: constexpr = None,
):
    """out = softmax(q k^T scale) v; spans of keys are taken by different programs, then put together in order.

    The G queries that share a key head are one program's, so that every key is read once. A query that sees no key
    gives zeros.

    Args:
        q, out: [B, H_kv, G, D].
        k, v: [B, H_kv, T, D].
        parts: [B, H_kv, P, G, D + 2] f32 scratch, P = T / SPAN rounded up: for every span its weighted values, the
            sum of its weights and its largest score.
        scale: of the scores; > 0.
        allowed: [B, T], False for keys that no query of the row sees.
        place: [1], of the last key that is seen; what lies behind it may be anything. None: T - 1.
        window: only this many keys, up to `place`, are seen; >= 1.
        sinks: [H_kv, G], a logit a head that takes its share of the softmax and has no value.
        softcap: scores become softcap * tanh(scores / softcap).
    """
    ctx = tile.context()
    factor = scale if softcap is None else 1.0
    last = ctx.T - 1
    if place is not None:
        last = place[0]
    for batch, head, part in tile.grid(ctx.B, ctx.H_kv, ctx.P):
        queries = tile.cast(tile.load(q[batch, head]), f32)
        # What lies behind the last key is not read: a weight of 0 times NaN would be NaN.
        seen_keys, seen_values = k[batch, head, 0:last + 1], v[batch, head, 0:last + 1]
        top = tile.full((ctx.G,), -float("inf"), f32)
        total = tile.zeros((ctx.G,), f32)
        result = tile.zeros((ctx.G, ctx.D), f32)
        first = part * SPAN
        if window is not None:
            first = tile.maximum(first, tile.maximum(last - window + 1, 0) // ctx.block_n * ctx.block_n)
        for start in tile.range(first, tile.minimum(part * SPAN + SPAN, last + 1), ctx.block_n):
            keys = tile.cast(tile.load(seen_keys[start:start + ctx.block_n]), f32)
            scores = tile.mma(queries, tile.transpose(keys))
            if softcap is not None:
                scores = softcap * tile.tanh(scores * scale / softcap)
            if allowed is not None:
                scores = tile.where(allowed[batch, start:start + ctx.block_n][None, :], scores, -float("inf"))
            if window is not None:
                at = tile.arange(ctx.block_n) + start
                scores = tile.where((at > last - window)[None, :], scores, -float("inf"))
            weights, top, total, shrink = softmax_step(scores, top, total, factor, tile.exp)
            values = tile.cast(tile.load(seen_values[start:start + ctx.block_n]), f32)
            result = result * shrink[:, None] + tile.mma(weights, values)
        store_span(parts[batch, head, part], result, total, top * factor)
    for batch, head in tile.grid(ctx.B, ctx.H_kv):
        tile.store(out[batch, head], join_spans(parts[batch, head], None if sinks is None else sinks[head]))


def store_span(part, values, total, top):
    """One span of keys, [G, D + 2]: weighted values, sum of weights and largest score of each query."""
    width = part.shape[1] - 2
    tile.store(part[:, 0:width], values)
    tile.store(part[:, width], total)
    tile.store(part[:, width + 1], top)


def join_spans(parts, sinks):
    """The attention [G, D] of queries whose spans of keys are done, [P, G, D + 2]: weighted values, sum of weights and
    largest score of each span, put together in their order; `sinks` [G] are logits without a value, or None."""
    if sinks is not None:
        sinks = tile.cast(tile.load(sinks), f32)
    width = parts.shape[2] - 2
    tops = tile.load(parts[:, :, width + 1])
    best = tile.reduce_max(tops, axis=0)
    if sinks is not None:
        best = tile.maximum(best, sinks)
    best = tile.where(best == -float("inf"), 0.0, best)
    shares = tile.exp(tops - best[None, :])
    divisor = tile.reduce_sum(shares * tile.load(parts[:, :, width]), axis=0)
    if sinks is not None:
        divisor = divisor + tile.exp(sinks - best)
    mixed = tile.reduce_sum(tile.load(parts[:, :, 0:width]) * shares[:, :, None], axis=0)
    return mixed / tile.where(divisor == 0.0, 1.0, divisor)[:, None]
