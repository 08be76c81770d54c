"""Gradients of attention without a score matrix: weights are computed again from the rows' log-sum-exp.

With P the weights, dO the result's gradient and L that of the log-sum-exp: dV = P^T dO, dP = dO V^T,
dS = P (dP - rowsum(dO O) + L), dQ = scale dS K, dK = scale dS^T Q (arXiv:2205.14135, appendix B).
"""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.kernel.schedule import schedule
from tessera.ops.kernels.attention_variants import keep_factors, load_mask, load_slope, vary
from tessera.types import Tile, f32


def _load_rows(grad, q, out, lse, grad_lse, batch, head, first, rows):
    """What a block of queries brings: q and dO [M, D], the log-sum-exp and rowsum(dO O) - L [M]."""
    queries = tile.load(q[batch, head, first:first + rows])
    grads = tile.load(grad[batch, head, first:first + rows])
    row_lse = tile.load(lse[batch, head, first:first + rows])
    results = tile.load(out[batch, head, first:first + rows])
    excess = tile.reduce_sum(tile.cast(grads, f32) * tile.cast(results, f32), axis=-1)
    if grad_lse is not None:
        excess = excess - tile.load(grad_lse[batch, head, first:first + rows])
    return queries, grads, row_lse, excess


def _seeing(start, columns, n_queries, n_keys, rows, causal, window):
    """The queries [begin, end) that see a key of the block from `start`; begin is a multiple of `rows`."""
    begin, end = 0, n_queries
    if causal:
        begin = tile.maximum(start + n_queries - n_keys, 0) // rows * rows
    if window is not None:
        end = tile.minimum(end, start + columns + window - 1 + n_queries - n_keys)
    return begin, end


def _block(queries, grads, keys, values, row_lse, excess, scale, place, start, causal, window, variant):
    """P and scale dS of a block of queries from `place` and keys from `start`, [M, N]; variant: see `_variant`."""
    at, seen = (tile.arange(queries.shape[0]) + place)[:, None], (tile.arange(keys.shape[0]) + start)[None, :]
    scores, changes = tile.mma(queries, tile.transpose(keys)), tile.mma(grads, tile.transpose(values))
    return _weights(scores, changes, at, seen, row_lse[:, None], excess[:, None], scale, causal, window, *variant)


def _block_transposed(queries, grads, keys, values, row_lse, excess, scale, place, start, causal, window, variant):
    """`_block`'s tiles as [N, M]: as they are computed, so they are multiplied with dO and q."""
    at, seen = (tile.arange(queries.shape[0]) + place)[None, :], (tile.arange(keys.shape[0]) + start)[:, None]
    scores, changes = tile.mma(keys, tile.transpose(queries)), tile.mma(values, tile.transpose(grads))
    softcap, slope, mask, keep = variant
    if mask is not None:
        mask = tile.transpose(mask)
    if keep is not None:
        keep = tile.transpose(keep)
    return _weights(scores, changes, at, seen, row_lse[None, :], excess[None, :], scale, causal, window, softcap,
                    slope, mask, keep)


def _variant(softcap, slopes, mask, dropout, seed, batch, head, n_heads, first, rows, start, columns, n_keys):
    """(softcap, the head's slope, mask [M, N], what dropout multiplies [M, N] with) of a block, None what is not."""
    return (softcap, load_slope(slopes, head), load_mask(mask, batch, head, first, rows, start, columns),
            keep_factors(dropout, seed, batch * n_heads + head, first, rows, start, columns, n_keys))


def _weights(scores, changes, at, seen, lse, excess, scale, causal, window, softcap, slope, mask, keep):
    """P and scale dS from the products of q with k and of dO with v, queries at places `at` and keys at `seen`."""
    plain = scores * scale
    scores = vary(plain, at - seen, softcap, slope, mask)
    if causal:
        scores = tile.where(at >= seen, scores, -float("inf"))
    if window is not None:
        scores = tile.where(at - seen < window, scores, -float("inf"))
    # A row that sees no key has -inf, and -inf - -inf would be NaN; a score above its row's sum is one of rounding.
    safe_lse = tile.where(lse == -float("inf"), 0.0, lse)
    weights = tile.exp(tile.minimum(scores - safe_lse, 0.0))
    kept = weights
    if keep is not None:
        kept, changes = weights * keep, changes * keep
    slopes = weights * (changes - excess) * scale
    if softcap is not None:
        bend = tile.tanh(plain / softcap)
        slopes = slopes * (1.0 - bend * bend)
    return kept, slopes


@kernel
def flash_attention_backward_kernel(
    grad: Tile["B", "H", "S", "D"], q: Tile["B", "H", "S", "D"], k: Tile["B", "H_kv", "T", "D"],
    v: Tile["B", "H_kv", "T", "D"], out: Tile["B", "H", "S", "D"], lse: Tile["B", "H", "S", f32],
    grad_q: Tile["B", "H", "S", "D", f32], grad_k: Tile["B", "H_kv", "T", "D"], grad_v: Tile["B", "H_kv", "T", "D"],
    scale: float, causal: bool = False, window: Optional[int] = None,  # noqa: UP045
    grad_lse: Optional[Tile["B", "H", "S", f32]] = None,  # noqa: UP045
    mask: Optional[Tile["B", "H", "S", "T"]] = None,  # noqa: UP045
    slopes: Optional[Tile["H"]] = None, softcap: Optional[float] = None,  # noqa: UP045
    dropout: Optional[float] = None, seed: int = 0,  # noqa: UP045
):
    """All three gradients, five products a block: a program has a key head and the query heads that share it.

    Args:
        grad: [B, H, S, D], of the result.
        q, k, v, out, lse, scale, causal, window: as flash_attention_kernel took and gave them.
        grad_q: [B, H, S, D] f32, zeros; the sum over the keys.
        grad_k, grad_v: [B, H_kv, T, D], written.
        grad_lse: [B, H, S] f32, of the log-sum-exp; None for zero.
        mask, slopes, softcap, dropout, seed: as flash_attention_kernel took them; they get no gradient here.
    """
    ctx = tile.context()
    rows, columns, group = ctx.block_m, ctx.block_n, ctx.H // ctx.H_kv
    for batch, shared in tile.grid(ctx.B, ctx.H_kv):
        for start in tile.range(0, ctx.T, columns):
            keys = tile.load(k[batch, shared, start:start + columns])
            values = tile.load(v[batch, shared, start:start + columns])
            sum_k = tile.zeros((columns, ctx.D), f32)
            sum_v = tile.zeros((columns, ctx.D), f32)
            begin, end = _seeing(start, columns, ctx.S, ctx.T, rows, causal, window)
            for head in tile.range(shared * group, shared * group + group):
                for first in tile.range(begin, end, rows):
                    queries, grads, row_lse, excess = _load_rows(grad, q, out, lse, grad_lse, batch, head, first, rows)
                    place = first + ctx.T - ctx.S
                    variant = _variant(softcap, slopes, mask, dropout, seed, batch, head, ctx.H, first, rows, start,
                                       columns, ctx.T)
                    weights, changes = _block(
                        queries, grads, keys, values, row_lse, excess, scale, place, start, causal, window, variant)
                    sum_v = tile.mma(tile.transpose(weights), grads, sum_v)
                    sum_k = tile.mma(tile.transpose(changes), queries, sum_k)
                    before = tile.load(grad_q[batch, head, first:first + rows])
                    tile.store(grad_q[batch, head, first:first + rows], before + tile.mma(changes, keys))
            tile.store(grad_k[batch, shared, start:start + columns], sum_k)
            tile.store(grad_v[batch, shared, start:start + columns], sum_v)


@schedule(mixed_dot="bf16", f32_dot="tf32x3")
@kernel
def flash_attention_grad_q_kernel(
    grad: Tile["B", "H", "S", "D"], q: Tile["B", "H", "S", "D"], k: Tile["B", "H_kv", "T", "D"],
    v: Tile["B", "H_kv", "T", "D"], out: Tile["B", "H", "S", "D"], lse: Tile["B", "H", "S", f32],
    grad_q: Tile["B", "H", "S", "D"], excess: Tile["B", "H", "S", f32], scale: float, causal: bool = False,
    window: Optional[int] = None, grad_lse: Optional[Tile["B", "H", "S", f32]] = None,  # noqa: UP045
    mask: Optional[Tile["B", "H", "S", "T"]] = None,  # noqa: UP045
    slopes: Optional[Tile["H"]] = None, softcap: Optional[float] = None,  # noqa: UP045
    dropout: Optional[float] = None, seed: int = 0,  # noqa: UP045
):
    """The gradient of q alone, a program a block of queries: for more processors than there are key heads.

    Args: as for flash_attention_backward_kernel; grad_q is written, in any float type, and
        excess: [B, H, S] f32, written: rowsum(dO O) - L, for flash_attention_grad_kv_kernel.
    """
    ctx = tile.context()
    rows, columns = ctx.block_m, ctx.block_n
    for batch, head, block in tile.grid(ctx.B, ctx.H, tile.cdiv(ctx.S, rows)):
        first = block * rows
        place = first + ctx.T - ctx.S
        shared = head // (ctx.H // ctx.H_kv)
        queries, grads, row_lse, row_excess = _load_rows(grad, q, out, lse, grad_lse, batch, head, first, rows)
        tile.store(excess[batch, head, first:first + rows], row_excess)
        total = tile.zeros((rows, ctx.D), f32)
        begin, end = 0, ctx.T
        if window is not None:
            begin = tile.maximum(place - window + 1, 0) // columns * columns
        if causal:
            end = tile.minimum(end, place + rows)
        for start in tile.range(begin, end, columns):
            keys = tile.load(k[batch, shared, start:start + columns])
            values = tile.load(v[batch, shared, start:start + columns])
            variant = _variant(
                softcap, slopes, mask, dropout, seed, batch, head, ctx.H, first, rows, start, columns, ctx.T)
            _, changes = _block(
                queries, grads, keys, values, row_lse, row_excess, scale, place, start, causal, window, variant)
            total = tile.mma(changes, keys, total)
        tile.store(grad_q[batch, head, first:first + rows], total)


@schedule(mixed_dot="bf16", f32_dot="tf32x3")
@kernel
def flash_attention_grad_kv_kernel(
    grad: Tile["B", "H", "S", "D"], q: Tile["B", "H", "S", "D"], k: Tile["B", "H_kv", "T", "D"],
    v: Tile["B", "H_kv", "T", "D"], lse: Tile["B", "H", "S", f32], excess: Tile["B", "H", "S", f32],
    grad_k: Tile["B", "H_kv", "T", "D"], grad_v: Tile["B", "H_kv", "T", "D"], scale: float, causal: bool = False,
    window: Optional[int] = None,  # noqa: UP045
    mask: Optional[Tile["B", "H", "S", "T"]] = None,  # noqa: UP045
    slopes: Optional[Tile["H"]] = None, softcap: Optional[float] = None,  # noqa: UP045
    dropout: Optional[float] = None, seed: int = 0,  # noqa: UP045
):
    """The gradients of k and v alone, a program a block of keys: for more processors than there are key heads.

    Args: as for flash_attention_backward_kernel, and
        excess: [B, H, S] f32, as flash_attention_grad_q_kernel wrote it.
    """
    ctx = tile.context()
    # Keys are what a program keeps, queries what it walks over, in short steps: two sums already fill its registers.
    columns, rows, group = ctx.block_m, ctx.block_n // 2, ctx.H // ctx.H_kv
    for batch, shared, block in tile.grid(ctx.B, ctx.H_kv, tile.cdiv(ctx.T, columns)):
        start = block * columns
        keys = tile.load(k[batch, shared, start:start + columns])
        values = tile.load(v[batch, shared, start:start + columns])
        sum_k = tile.zeros((columns, ctx.D), f32)
        sum_v = tile.zeros((columns, ctx.D), f32)
        begin, end = _seeing(start, columns, ctx.S, ctx.T, rows, causal, window)
        for head in tile.range(shared * group, shared * group + group):
            for first in tile.range(begin, end, rows):
                queries = tile.load(q[batch, head, first:first + rows])
                grads = tile.load(grad[batch, head, first:first + rows])
                row_lse = tile.load(lse[batch, head, first:first + rows])
                row_excess = tile.load(excess[batch, head, first:first + rows])
                variant = _variant(
                    softcap, slopes, mask, dropout, seed, batch, head, ctx.H, first, rows, start, columns, ctx.T)
                weights, changes = _block_transposed(
                    queries, grads, keys, values, row_lse, row_excess, scale, first + ctx.T - ctx.S, start, causal,
                    window, variant)
                sum_v = tile.mma(weights, grads, sum_v)
                sum_k = tile.mma(changes, queries, sum_k)
        tile.store(grad_k[batch, shared, start:start + columns], sum_k)
        tile.store(grad_v[batch, shared, start:start + columns], sum_v)
