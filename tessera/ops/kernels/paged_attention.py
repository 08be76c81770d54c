"""Attention over keys and values that lie in pages, as a serving engine's cache keeps them."""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.kernel.signature import constexpr
from tessera.ops.kernels.decode_attention import join_spans, store_span
from tessera.ops.kernels.running_softmax import softmax_step
from tessera.types import Tile, f32, int32

SPAN_PAGES = 16  # pages a program; a fixed number, so that neither the batch nor the threads change the order of a sum


@kernel
def paged_attention_kernel(
    q: Tile["B", "H_kv", "R", "D"], k: Tile["PAGES", "PAGE", "H_kv", "D"], v: Tile["PAGES", "PAGE", "H_kv", "D"],
    table: Tile["B", "M", int32], lengths: Tile["B", int32], out: Tile["B", "H_kv", "R", "D"],
    parts: Tile["B", "H_kv", "P", "R", "D + 2", f32], n_queries: int, scale: float,
    window: Optional[int] = None, sinks: Optional[Tile["H_kv", "R"]] = None, softcap: constexpr = None,  # noqa: UP045
):
    """out = softmax(q k^T scale) v, causal; spans of pages are taken by different programs, then put together in order.

    Query i of N stands at key length - N + i. A query that sees no key gives zeros.

    Args:
        q, out: [B, H_kv, R, D], for each of the heads that share a key head the row's N queries.
        k, v: [PAGES, PAGE, H_kv, D].
        table: [B, M], the pages of each row's keys in their order.
        lengths: [B], each row's keys, the queries' own among them.
        parts: [B, H_kv, P, R, D + 2] f32 scratch, P = M / SPAN_PAGES rounded up: weighted values, sum of weights
            and largest score of every span.
        n_queries: N, which divides R.
        scale: of the scores; > 0.
        window: a query sees itself and the window - 1 keys before it; >= 1.
        sinks: [H_kv, R], each row's logit of its head, that takes its share of the softmax and has no value.
        softcap: scores become softcap * tanh(scores / softcap).
    """
    ctx = tile.context()
    factor = scale if softcap is None else 1.0
    for batch, head, part in tile.grid(ctx.B, ctx.H_kv, ctx.P):
        length = lengths[batch]
        queries = tile.cast(tile.load(q[batch, head]), f32)
        top = tile.full((ctx.R,), -float("inf"), f32)
        total = tile.zeros((ctx.R,), f32)
        result = tile.zeros((ctx.R, ctx.D), f32)
        first = part * SPAN_PAGES
        if window is not None:
            first = tile.maximum(first, tile.maximum(length - n_queries - window + 1, 0) // ctx.PAGE)
        last = tile.minimum(part * SPAN_PAGES + SPAN_PAGES, (length + ctx.PAGE - 1) // ctx.PAGE)
        for slot in tile.range(first, last):
            page = table[batch, slot]
            at = tile.arange(ctx.PAGE) + slot * ctx.PAGE
            # What lies behind the last key is not read: a weight of 0 times NaN would be NaN.
            filled = tile.minimum(length - slot * ctx.PAGE, ctx.PAGE)
            seen_keys, seen_values = k[page, 0:filled, head], v[page, 0:filled, head]
            keys = tile.cast(tile.load(seen_keys[0:ctx.PAGE]), f32)
            values = tile.cast(tile.load(seen_values[0:ctx.PAGE]), f32)
            scores = tile.mma(queries, tile.transpose(keys))
            if softcap is not None:
                scores = softcap * tile.tanh(scores * scale / softcap)
            ages = (tile.arange(ctx.R) % n_queries + (length - n_queries))[:, None] - at[None, :]
            scores = tile.where(ages >= 0, scores, -float("inf"))
            if window is not None:
                scores = tile.where(ages < window, scores, -float("inf"))
            weights, top, total, shrink = softmax_step(scores, top, total, factor, tile.exp)
            result = result * shrink[:, None] + tile.mma(weights, values)
        store_span(parts[batch, head, part], result, total, top * factor)
    for batch, head in tile.grid(ctx.B, ctx.H_kv):
        tile.store(out[batch, head], join_spans(parts[batch, head], None if sinks is None else sinks[head]))
