"""Attention without a score matrix: tile kernels forward and backward, memory linear in the sequence.

In: q, k, v. Out: the heads' weighted values. ops.attention calls the operation, dist.ring_attention its kernels.

Dims: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tessera.errors import InputError, UnsupportedError
from tessera.function.decorator import function
from tessera.ops.attention_scores import AnyMask, Scores, check_scores, dropout_seed, plain_attention
from tessera.ops.attention_tiles import Grads, tile_attention, tile_gradients
from tessera.ops.chunked_attention import in_chunks, sink_gradient
from tessera.ops.decode_attention import decode_attention_op
from tessera.ops.registration import Operation
from tessera.types import Tensor, dtype_of, one_float


@function
def flash_attention(
    q_BHSD: Tensor["B", "G*K", "S", "D", one_float], k_BKND: Tensor["B", "K", "N", "D", one_float],
    v_BKND: Tensor["B", "K", "N", "D", one_float], mask: AnyMask | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, *, window: int | None = None,
    sinks: Tensor["G*K"] | None = None, softcap: float | None = None, alibi: Tensor["G*K"] | None = None,
    seed: int = 0, block_q: int | None = None, block_k: int | None = None, block_d: int | None = None,
    precision: Any = None, accumulate: Any = "f32", cache: Any = None, layer: int = 0,
) -> Tensor["B", "G*K", "S", "D", one_float]:
    """softmax(scale * q k^T) v in blocks, scores never held whole (arXiv:2205.14135).

    Runs as tile kernels, forward and backward; as `chunked_attention` for f64, windows to both sides, and the
    gradients of a mask or of slopes. Memory is linear in the sequence either way, in both directions.

    Args:
        q_BHSD: [B, H, S, D].
        k_BKND, v_BKND: [B, K, N, D], the T keys, or with a cache the new ones; H a multiple of K.
        mask, dropout_p, is_causal, scale, window, sinks, softcap, alibi, seed: as for `attention`.
        block_q, block_k: queries and keys a block; None: the kernel's schedule.
        block_d: D, since a block takes heads whole.
        precision: dtype that q, k and v are brought to first, such as "bf16"; None: as they are.
        accumulate: of sums; "f32" (or "fp32") is what there is.
        cache: a KVCache: k and v are appended to it, and all that it then holds are the keys; causal. In a function
            of `ts.graph.capture` a StepCache, which takes one token a row to a place that is read at each replay.
        layer: of the cache.

    Returns:
        [B, H, S, D] in q's dtype; zeros for a query that sees no key.

    Raises:
        ShapeError, InputError: arguments that do not fit together.
        UnsupportedError: another accumulate or block_d.
    """
    if block_d not in (None, q_BHSD.shape[-1]):
        raise UnsupportedError(f"block_d: {block_d} given; expected {q_BHSD.shape[-1]}, a block takes heads whole")
    if accumulate not in ("fp32", "f32", torch.float32):
        raise UnsupportedError(f"accumulate: {accumulate!r} given; expected 'f32'")
    dtype = q_BHSD.dtype
    if precision is not None:
        q_BHSD, k_BKND, v_BKND = (x.to(dtype_of(precision).torch) for x in (q_BHSD, k_BKND, v_BKND))
    factor = q_BHSD.shape[-1]**-0.5 if scale is None else scale
    if cache is not None:
        k_BKND, v_BKND = cache.update(layer, k_BKND, v_BKND)
        is_causal = True
        if hasattr(cache, "mask"):  # the place of its one token is read when the step runs
            seen = cache.mask(window)
            out_BHD: Tensor = decode_attention_op(
                q_BHSD[:, :, 0], k_BKND, v_BKND, seen.valid, seen.place, seen.last, sinks, factor, softcap)
            return out_BHD[:, :, None].to(dtype)
    scores = Scores(scale=factor, is_causal=is_causal, window=window,
                    softcap=softcap, dropout_p=dropout_p, seed=dropout_seed(dropout_p, seed))
    check_scores(scores, k_BKND.shape[1])
    return _in_blocks(
        q_BHSD, k_BKND, v_BKND, scores, mask, alibi, sinks, _block("block_q", block_q), _block("block_k", block_k),
        block_q or 512).to(dtype)


@function
def chunked_attention(
    q_BHSD: Tensor["B", "G*K", "S", "D", one_float], k_BKTD: Tensor["B", "K", "T", "D", one_float],
    v_BKTD: Tensor["B", "K", "T", "D", one_float], chunk_size: int = 512,
    mask: AnyMask | None = None, is_causal: bool = False, scale: float | None = None, *, window: int | None = None,
    sinks: Tensor["G*K"] | None = None, softcap: float | None = None, alibi: Tensor["G*K"] | None = None,
    dropout_p: float = 0.0, seed: int = 0,
) -> Tensor["B", "G*K", "S", "D", one_float]:
    """softmax(scale * q k^T) v by chunks of queries and keys with a running maximum (arXiv:2112.05682).

    Args:
        q_BHSD: [B, H, S, D], any float dtype.
        k_BKTD, v_BKTD: [B, K, T, D], H a multiple of K.
        chunk_size: queries, and keys, of a chunk: B * H * chunk_size^2 scores are held at a time. Where the tile
            kernels of `flash_attention` know such scores they take their own blocks, which hold less.
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
                    softcap=softcap, dropout_p=dropout_p, seed=dropout_seed(dropout_p, seed))
    check_scores(scores, k_BKTD.shape[1])
    return _in_blocks(q_BHSD, k_BKTD, v_BKTD, scores, mask, alibi, sinks, 0, 0, chunk_size)


def _in_blocks(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores: Scores, mask: Tensor | None, slopes_H: Tensor | None,
    sinks_H: Tensor | None, block_q: int, block_k: int, chunk: int,
) -> Tensor:
    """By the plain tile kernels where nothing else is asked for."""
    if fits_flash(scores, mask, slopes_H) and q_BHSD.dtype is not torch.float64:
        out: Tensor = flash_attention_op(
            q_BHSD, k_BKTD, v_BKTD, sinks_H, scores.scale, scores.is_causal, scores.window, block_q, block_k)[0]
        return out
    return in_chunks(q_BHSD, k_BKTD, v_BKTD, scores, mask, slopes_H, sinks_H, chunk)


def fits_flash(scores: Scores, mask: Tensor | None, slopes_H: Tensor | None) -> bool:
    """Whether `flash_attention_op` takes such scores: nothing but causal ones, with a window or sinks."""
    return (mask is None and slopes_H is None and scores.softcap is None and not scores.dropout_p
            and (scores.window is None or scores.is_causal))


def _block(name: str, size: int | None) -> int:
    if size is not None and not 1 <= size <= 1024:
        raise InputError(f"{name}: {size} given; expected 1..1024, or None")
    return size or 0


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, causal: bool, window: int | None,
    block_q: int, block_k: int,
) -> tuple[Tensor, Tensor]:
    scores = Scores(scale=scale, is_causal=causal, window=window)
    return tile_attention(q, k, v, sinks, scores, (), block_q, block_k)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, causal: bool, window: int | None, *_: int,
) -> tuple[Tensor, Tensor]:
    return plain_attention(q, k, v, Scores(scale=scale, is_causal=causal, window=window), sinks_H=sinks)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None, scale: float,
    causal: bool, window: int | None,
) -> Grads:
    """The gradients of q, k and v from the tile kernels."""
    return tile_gradients(grad, q, k, v, out, lse, grad_lse, Scores(scale=scale, is_causal=causal, window=window))


def _backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None, scale: float,
    causal: bool, window: int | None,
) -> Grads:
    """The formulas of kernels/flash_attention_backward.py, scores in memory."""
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    scores = Scores(scale=scale, is_causal=causal, window=window)
    safe_lse = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(scores.block(q, k, None, None, T - S, 0) - safe_lse[..., None])
    grad_wide, rows = grad.to(weights.dtype), (B, K, H // K * S)
    slopes = (grad_wide.reshape(*rows, D) @ v.to(weights.dtype).mT).view(weights.shape)
    delta = (grad_wide * out).sum(-1) - (0 if grad_lse is None else grad_lse)
    slopes = (weights * (slopes - delta[..., None]) * scale).reshape(*rows, T)
    grad_q = (slopes @ k.to(slopes.dtype)).view(B, H, S, D)
    grad_k = slopes.mT @ q.to(slopes.dtype).reshape(*rows, D)
    grad_v = weights.reshape(*rows, T).mT @ grad_wide.reshape(*rows, D)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


flash_attention_backward_op = Operation(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? grad_lse, "
    "float scale, bool causal, int? window) -> (Tensor, Tensor, Tensor)",
    kernel=_gradients, reference=_backward_reference,
    fake=lambda grad, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))


def _save(inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    return (*inputs[:7], *output)


def _backward(saved: Sequence[Any], grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, sinks, scale, causal, window, out, lse = saved
    grads = flash_attention_backward_op.registered(grad, q, k, v, out, lse, grad_lse, scale, causal, window)
    grad_sinks = None
    if sinks is not None:
        delta = (grad.to(lse.dtype) * out).sum(-1) - grad_lse
        grad_sinks = sink_gradient(sinks, lse, delta)
    return (*grads, grad_sinks, *(None,) * 5)


# (q, k, v, sinks, scale, causal, window, block_q, block_k) -> (result, log-sum-exp [B, H, S]); blocks of 0 are the
# kernel's own.
flash_attention_op = Operation(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, bool causal, int? window, "
    "int block_q, int block_k) -> (Tensor, Tensor)",
    kernel=_kernel, reference=_reference, fake=_fake, save=_save, backward=_backward)
