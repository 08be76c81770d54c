"""Attention in chunks of plain torch: memory linear in the sequence, for any mask, bias, dropout and dtype.

In: q, k, v and everything that `Scores` knows. Out: the heads' weighted values; gradients by computing each chunk
again. ops.attention and ops.flash_attention call it for what the tile kernels do not take.

Dims: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim; M, N a chunk's queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.errors import InputError
from tessera.ops.attention_scores import Scores, check_attention, weighted


def chunked_attention(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, chunk_size: int = 512, mask: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, *, window: int | None = None, sinks: Tensor | None = None,
    softcap: float | None = None, alibi: Tensor | None = None, dropout_p: float = 0.0, seed: int = 0,
) -> Tensor:
    """softmax(scale * q k^T) v by chunks of queries and keys with a running maximum (arXiv:2112.05682).

    Args:
        q_BHSD: [B, H, S, D], any float dtype.
        k_BKTD, v_BKTD: [B, K, T, D], H a multiple of K.
        chunk_size: queries, and keys, of a chunk: B * H * chunk_size^2 scores are held at a time.
        mask, is_causal, scale, window, sinks, softcap, alibi, dropout_p: as for `attention`.
        seed: of the dropout.

    Returns:
        [B, H, S, D] in q's dtype; sums in f32 (f64 for f64).

    Raises:
        ShapeError, InputError: arguments that do not fit together.
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size: {chunk_size} given; expected at least 1")
    scores = Scores(scale=q_BHSD.shape[-1]**-0.5 if scale is None else scale, is_causal=is_causal, window=window,
                    softcap=softcap, dropout_p=dropout_p, seed=seed)
    check_attention(q_BHSD, k_BKTD, v_BKTD, scores, mask, alibi, sinks)
    return in_chunks(q_BHSD, k_BKTD, v_BKTD, scores, mask, alibi, sinks, chunk_size)


@torch.compiler.disable
def in_chunks(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores: Scores, mask: Tensor | None = None,
    slopes_H: Tensor | None = None, sinks_H: Tensor | None = None, chunk: int = 512,
) -> Tensor:
    """`chunked_attention` of checked arguments."""
    if mask is not None:
        mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    out: Tensor = _Chunked.apply(scores, chunk, q_BHSD, k_BKTD, v_BKTD, mask, slopes_H, sinks_H)
    return out


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Scores, chunk: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        slopes: Tensor | None, sinks: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for rows in _chunks(q.shape[2], chunk):
            out[:, :, rows], lse[:, :, rows] = _rows(scores, chunk, rows, q, k, v, mask, slopes, sinks)
        ctx.scores, ctx.chunk = scores, chunk
        ctx.save_for_backward(q, k, v, mask, slopes, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, mask, slopes, sinks, out, lse = ctx.saved_tensors
        inputs = [q, k, v, mask, slopes]
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if need or i < 3 else None
                for i, (x, need) in enumerate(zip(inputs, ctx.needs_input_grad[2:7]))]
        delta = (grad.to(lse.dtype) * out).sum(-1)
        safe_lse = lse.masked_fill(lse == float("-inf"), 0.0)
        for rows in _chunks(q.shape[2], ctx.chunk):
            for columns in _visible(ctx.scores, rows, ctx.chunk, q.shape[2], k.shape[2]):
                _block_gradients(ctx.scores, rows, columns, inputs, sums, grad, safe_lse, delta)
        grads: list[Tensor | None] = [None if total is None else total.to(x.dtype) for total, x in zip(sums, inputs)]
        grads.append(None if sinks is None else sink_gradient(sinks, safe_lse, delta))
        return None, None, *grads


def sink_gradient(sinks_H: Tensor, lse_BHS: Tensor, delta_BHS: Tensor) -> Tensor:
    """The gradient of the sinks [H]: a sink's weight has no value, so that it only takes from the others."""
    lse_BHS = lse_BHS.masked_fill(lse_BHS == float("-inf"), 0.0)
    weights_BHS = torch.exp(sinks_H.to(lse_BHS.dtype)[:, None] - lse_BHS)
    return -(weights_BHS * delta_BHS).sum((0, 2)).to(sinks_H.dtype)


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    for start in range(0, length, chunk):
        yield slice(start, min(start + chunk, length))


def _visible(scores: Scores, rows: slice, chunk: int, n_queries: int, n_keys: int) -> Iterator[slice]:
    """The chunks of keys of which the queries may see one."""
    behind = n_keys - n_queries
    for columns in _chunks(n_keys, chunk):
        is_late = scores.is_causal and columns.start > rows.stop - 1 + behind
        is_old = scores.window is not None and columns.stop - 1 <= rows.start + behind - scores.window
        if not is_late and not is_old:
            yield columns


def _cut(mask: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """The mask of a chunk; a dim of size 1 serves all."""
    if mask is None:
        return None
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[..., columns]


def _rows(
    scores: Scores, chunk: int, rows: slice, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    slopes: Tensor | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A chunk of queries against all keys: (result, log-sum-exp)."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    q = q[:, :, rows].to(torch.promote_types(q.dtype, torch.float32))
    if sinks is None:
        top, total = torch.full_like(q[..., 0], float("-inf")), torch.zeros_like(q[..., 0])
    else:
        top = sinks.to(q.dtype)[:, None].expand(q.shape[:3])
        total = torch.ones_like(top)
    result = torch.zeros_like(q)
    for columns in _visible(scores, rows, chunk, n_queries, n_keys):
        s = scores.block(q, k[:, :, columns], _cut(mask, rows, columns), slopes,
                         rows.start + n_keys - n_queries, columns.start)
        new_top = torch.maximum(top, s.amax(-1))
        safe_top = new_top.masked_fill(new_top == float("-inf"), 0.0)
        weights = torch.exp(s - safe_top[..., None])
        shrink = torch.exp(top - safe_top)
        total = total * shrink + weights.sum(-1)
        if scores.dropout_p:
            weights = weights * scores.keep(weights.shape, rows.start, columns.start, n_keys, weights)
        result = result * shrink[..., None] + weighted(weights, v[:, :, columns])
        top = new_top
    return result / total.masked_fill(total == 0.0, 1.0)[..., None], top + torch.log(total)


def _block_gradients(
    scores: Scores, rows: slice, columns: slice, inputs: list[Tensor | None], sums: list[Tensor | None], grad: Tensor,
    lse: Tensor, delta: Tensor,
) -> None:
    """Add what a chunk gives to the gradients; torch differentiates the chunk's scores."""
    q, k, v, mask, slopes = inputs
    assert q is not None and k is not None and v is not None
    n_keys = k.shape[2]
    leaves = [q[:, :, rows], k[:, :, columns], None, _cut(mask, rows, columns), slopes]
    targets = [_cut(sums[0], rows, slice(None)), _cut(sums[1], columns, slice(None)), None,
               _cut(sums[3], rows, columns), sums[4]]
    with torch.enable_grad():
        leaves = [leaf if leaf is None else leaf.detach().requires_grad_(target is not None)
                  for leaf, target in zip(leaves, targets)]
        assert leaves[0] is not None and leaves[1] is not None
        s = scores.block(leaves[0], leaves[1], leaves[3], leaves[4], rows.start + n_keys - q.shape[2], columns.start)
    weights = torch.exp(s.detach() - lse[:, :, rows, None])
    kept, g = weights, grad[:, :, rows].to(weights.dtype)
    slope = weighted(g, v[:, :, columns].mT)
    if scores.dropout_p:
        keep = scores.keep(weights.shape, rows.start, columns.start, n_keys, weights)
        kept, slope = weights * keep, slope * keep
    wanted = [(leaf, target) for leaf, target in zip(leaves, targets)
              if leaf is not None and target is not None]
    found = torch.autograd.grad(s, [leaf for leaf, _ in wanted], weights * (slope - delta[:, :, rows, None]))
    for (_, target), part in zip(wanted, found):
        target += part
    B, H, M, N = kept.shape
    K = v.shape[1]
    assert sums[2] is not None
    sums[2][:, :, columns] += kept.reshape(B, K, H // K * M, N).mT @ g.reshape(B, K, H // K * M, v.shape[-1])
