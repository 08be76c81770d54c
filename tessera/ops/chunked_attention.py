"""Attention for any mask, bias, dropout and dtype, with memory linear in the sequence.

In: q, k, v and everything that `Scores` knows. Out: the heads' weighted values. The tile kernels do it; f64, windows to
both sides, and the gradients of masks and slopes are taken in chunks of plain torch, each computed again for its
gradients. ops.attention and ops.flash_attention call it.

Dims: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim; M, N a chunk's queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.ops.attention_scores import Scores, ages, plain_attention, weighted
from tessera.ops.attention_tiles import fits_tiles, tile_attention, tile_gradients, variant
from tessera.ops.registration import Operation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # chunks are plain torch: any will do


def in_chunks(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores: Scores, mask: Tensor | None = None,
    slopes_H: Tensor | None = None, sinks_H: Tensor | None = None, chunk: int = 512,
) -> Tensor:
    """Attention of checked arguments: [B, H, S, D] in q's dtype; sums in f32 (f64 for f64).

    Args:
        chunk: queries, and keys, of a chunk: B * H * chunk^2 scores are held at a time.
    """
    if mask is not None:
        mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    out: Tensor = _chunked_op(
        q_BHSD, k_BKTD, v_BKTD, mask, slopes_H, sinks_H, scores.seed, scores.scale, scores.is_causal, scores.window,
        scores.softcap, scores.dropout_p, chunk)[0]
    return out


def _scores(
    seed: Tensor | None, scale: float, causal: bool, window: int | None, softcap: float | None, dropout_p: float,
) -> Scores:
    return Scores(scale=scale, is_causal=causal, window=window, softcap=softcap, dropout_p=dropout_p, seed=seed)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:
    scores, chunk = _scores(*options[:-1]), options[-1]
    if fits_tiles(q, scores):
        return tile_attention(q, k, v, sinks, scores, variant(q, k, scores, mask, slopes))
    out, lse = _fake(q)
    for rows in _chunks(q.shape[2], chunk):
        out[:, :, rows], lse[:, :, rows] = _rows(scores, chunk, rows, q, k, v, mask, slopes, sinks)
    return out, lse


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:
    return plain_attention(q, k, v, _scores(*options[:-1]), mask, slopes, sinks)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, out: Tensor,
    lse: Tensor, grad_lse: Tensor, wants_mask: bool, wants_slopes: bool, *options: Any,
) -> tuple[Tensor, ...]:
    """Those of q, k, v, mask and slopes; empty where they are not wanted."""
    scores, chunk = _scores(*options[:-1]), options[-1]
    if fits_tiles(q, scores) and not (wants_mask or wants_slopes):
        return *tile_gradients(grad, q, k, v, out, lse, grad_lse, scores, variant(q, k, scores, mask, slopes)), \
            q.new_empty(0), q.new_empty(0)
    delta = _delta(grad, out, lse, grad_lse)
    inputs: list[Tensor | None] = [q, k, v, mask, slopes]
    wanted = (True, True, True, wants_mask, wants_slopes)
    sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if x is not None and want else None
            for x, want in zip(inputs, wanted)]
    safe_lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for rows in _chunks(q.shape[2], chunk):
        for columns in _visible(scores, rows, chunk, q.shape[2], k.shape[2]):
            _block_gradients(scores, rows, columns, inputs, sums, grad, safe_lse, delta)
    return tuple(q.new_empty(0) if total is None or x is None else total.to(x.dtype)
                 for total, x in zip(sums, inputs))


def _reference_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, out: Tensor,
    lse: Tensor, grad_lse: Tensor, wants_mask: bool, wants_slopes: bool, *options: Any,
) -> tuple[Tensor, ...]:
    """The same from the scores held whole, themselves differentiable."""
    delta = _delta(grad, out, lse, grad_lse)
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    scores, given = _scores(*options[:-1]), [q, k, mask, slopes]
    wanted = (True, True, wants_mask, wants_slopes)
    with torch.enable_grad():
        leaves = [x if x is None or not want or x.requires_grad else x.detach().requires_grad_()
                  for x, want in zip(given, wanted)]
        s = scores.block(leaves[0], leaves[1], leaves[2], leaves[3], T - S, 0)  # type: ignore[arg-type]
    weights = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    keep = scores.keep(weights.shape, 0, 0, T, weights) if scores.dropout_p else 1.0
    wide, rows = grad.to(weights.dtype), (B, K, H // K * S)
    slope = weighted(wide, v.mT) * keep - delta[..., None]
    found = iter(torch.autograd.grad(
        s, [x for x, want in zip(leaves, wanted) if x is not None and want], weights * slope,
        create_graph=torch.is_grad_enabled()))
    grad_q, grad_k, *rest = (next(found) if want else q.new_empty(0) for want in wanted)
    grad_v = (weights * keep).reshape(*rows, T).mT @ wide.reshape(*rows, D)
    return grad_q, grad_k, grad_v.to(v.dtype), *rest


def _fake_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, out: Tensor,
    lse: Tensor, grad_lse: Tensor, wants_mask: bool, wants_slopes: bool, *options: Any,
) -> tuple[Tensor, ...]:
    wanted = (True, True, True, wants_mask, wants_slopes)
    return tuple(torch.empty_like(x) if x is not None and want else q.new_empty(0)
                 for x, want in zip((q, k, v, mask, slopes), wanted))


def _save(inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    wants = [x is not None and x.requires_grad for x in inputs[3:5]]
    return (*inputs[:6], *output, *wants, *inputs[6:])


def _backward(saved: Sequence[Any], grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *inputs, sinks, out, lse, wants_mask, wants_slopes = saved[:10]
    grads = _gradients_op(grad, *inputs, out, lse, grad_lse, wants_mask, wants_slopes, *saved[10:])
    grad_sinks = None if sinks is None else sink_gradient(sinks, lse, _delta(grad, out, lse, grad_lse))
    return (*grads[:3], grads[3] if wants_mask else None, grads[4] if wants_slopes else None, grad_sinks,
            *(None,) * 7)


def _delta(grad: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor) -> Tensor:
    """What all of a row's changes lose alike, [B, H, S]: grad . out, less the gradient of the log-sum-exp."""
    return (grad.to(lse.dtype) * out).sum(-1) - grad_lse


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
    scores: Scores, rows: slice, columns: slice, inputs: Sequence[Any], sums: Sequence[Any], grad: Tensor, lse: Tensor,
    delta: Tensor,
) -> None:
    """Add what a chunk gives to the gradients, written out."""
    q, k, v, mask, slopes = inputs
    n_keys, place = k.shape[2], rows.start + k.shape[2] - q.shape[2]
    q, k, v, mask = q[:, :, rows], k[:, :, columns], v[:, :, columns], _cut(mask, rows, columns)
    products = scores.products(q, k)
    weights = torch.exp(scores.biased(products, mask, slopes, place, columns.start) - lse[:, :, rows, None])
    kept, grad = weights, grad[:, :, rows].to(weights.dtype)
    slope = weighted(grad, v.mT)
    if scores.dropout_p:
        keep = scores.keep(weights.shape, rows.start, columns.start, n_keys, weights)
        kept, slope = weights * keep, slope * keep
    slope = weights * (slope - delta[:, :, rows, None])
    if sums[3] is not None and mask is not None:
        target: Any = _cut(sums[3], rows, columns)
        target += slope.sum_to_size(mask.shape)
    if sums[4] is not None:
        sums[4].sub_((slope * ages(slope, place, columns.start)).sum((0, 2, 3)))
    if scores.softcap is not None:
        slope = slope * (1 - (products / scores.softcap).square())
    sums[0][:, :, rows] += weighted(slope, k) * scores.scale
    sums[1][:, :, columns] += _by_keys(slope, q, k.shape[1]) * scores.scale
    sums[2][:, :, columns] += _by_keys(kept, grad, k.shape[1])


def _by_keys(weights_BHMN: Tensor, rows_BHMD: Tensor, n_key_heads: int) -> Tensor:
    """weights^T @ rows, summed over the query heads that share a key head, [B, K, N, D]."""
    B, H, M, N = weights_BHMN.shape
    shape = (B, n_key_heads, H // n_key_heads * M)
    return weights_BHMN.reshape(*shape, N).mT @ rows_BHMD.to(weights_BHMN.dtype).reshape(*shape, rows_BHMD.shape[-1])


_OPTIONS = "Tensor? seed, float scale, bool causal, int? window, float? softcap, float dropout_p, int chunk"
_gradients_op = Operation(
    "chunked_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor out, "
    f"Tensor lse, Tensor grad_lse, bool wants_mask, bool wants_slopes, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    kernel=_gradients, reference=_reference_gradients, fake=_fake_gradients, dtypes=_DTYPES)
_chunked_op = Operation(
    f"chunked_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor? sinks, {_OPTIONS}) -> "
    "(Tensor, Tensor)", kernel=_forward, reference=_reference, fake=_fake, save=_save, backward=_backward,
    dtypes=_DTYPES)
