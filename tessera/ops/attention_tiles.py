"""Attention and its gradients from the tile kernels, whatever stands between q k^T and the softmax.

In: q, k, v and the parts of `Scores`. Out: the heads' weighted values and the rows' log-sum-exp, or the gradients of q,
k and v. ops.flash_attention, ops.chunked_attention and dist.ring_attention call it.

Dims: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tessera.kernel import Kernel
from tessera.ops.attention_scores import Scores
from tessera.ops.kernels.flash_attention import flash_attention_kernel
from tessera.ops.kernels.flash_attention_backward import (
    flash_attention_backward_kernel,
    flash_attention_grad_kv_kernel,
    flash_attention_grad_q_kernel,
)
from tessera.types import Tensor

Grads = tuple[Tensor, Tensor, Tensor]


def fits_tiles(
    q_BHSD: Tensor, scores: Scores, mask: Tensor | None = None, slopes_H: Tensor | None = None,
) -> bool:
    """Whether the tile kernels do it: all but f64, windows to both sides, and gradients of masks and slopes."""
    wants_more = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (mask, slopes_H))
    return q_BHSD.dtype is not torch.float64 and not wants_more and (scores.window is None or scores.is_causal)


def variant(q_BHSD: Tensor, k_BKTD: Tensor, scores: Scores, mask: Tensor | None, slopes_H: Tensor | None) -> tuple:
    """The kernels' last arguments: mask [B, H, S, T], slopes, softcap, dropout and its seed; None for what is not."""
    (B, H, S, _), T = q_BHSD.shape, k_BKTD.shape[2]
    return (None if mask is None else mask.expand(B, H, S, T), slopes_H, scores.softcap, scores.dropout_p or None,
            0 if scores.seed is None else scores.first_seed())


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, options: tuple[Any, ...] = (),
    block_q: int = 0, block_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """(result [B, H, S, D], log-sum-exp [B, H, S]); options from `variant`, blocks of 0 are the kernel's own."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
    _scheduled(flash_attention_kernel, block_q, block_k)(
        q, k, v, out, scores.scale, scores.is_causal, lse, scores.window, sinks, *options)
    return out, lse


def tile_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None, scores: Scores,
    options: tuple[Any, ...] = (),
) -> Grads:
    """The gradients of q, k and v: one program a key head, or, with few, one a block."""
    grad_k, grad_v, how = torch.empty_like(k), torch.empty_like(v), (scores.scale, scores.is_causal, scores.window)
    if q.is_cpu and k.shape[0] * k.shape[1] >= 2 * torch.get_num_threads():
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        flash_attention_backward_kernel(
            grad, q, k, v, out, lse, grad_q, grad_k, grad_v, *how, grad_lse, *options)
        return grad_q.to(q.dtype), grad_k, grad_v
    grad_q, excess = torch.empty_like(q), torch.empty_like(lse)
    flash_attention_grad_q_kernel(grad, q, k, v, out, lse, grad_q, excess, *how, grad_lse, *options)
    flash_attention_grad_kv_kernel(grad, q, k, v, lse, excess, grad_k, grad_v, *how, *options)
    return grad_q, grad_k, grad_v


@functools.cache
def _scheduled(kernel: Kernel, block_q: int, block_k: int) -> Kernel:
    tile = {name: size for name, size in (("BM", block_q), ("BN", block_k)) if size}
    return kernel.with_schedule(tile=tile) if tile else kernel
