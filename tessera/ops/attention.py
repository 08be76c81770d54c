"""Attention: what the models call, and the choice of how it runs.

In: query heads of the new tokens, key and value heads of all tokens, and which keys each query sees. Out: the heads'
weighted values. nn.Attention calls `attention`; models.gpt makes the masks.

Dims: B batch, S queries (new tokens), T keys (all tokens, T - S of them cached), H query heads, K key/value heads,
D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tessera.errors import UnsupportedError
from tessera.function.decorator import function
from tessera.ops.attention_scores import AnyMask, Scores, check_scores, dropout_seed, plain_attention
from tessera.ops.attention_tiles import fits_tiles
from tessera.ops.chunked_attention import in_chunks
from tessera.ops.decode_attention import decode_attention_op
from tessera.ops.flash_attention import fits_flash, flash_attention_op
from tessera.ops.invariant import attention as invariant_attention
from tessera.ops.invariant import is_invariant
from tessera.ops.registration import wants_reference
from tessera.types import Tensor, one_float

_MANY_KEYS = 4096  # of all rows and key heads: from here on the f32 decode kernel is quicker than torch's
_MANY_SCORES = 1 << 24  # from here on attention with a softcap, ALiBi or dropout runs in chunks


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys each query sees; the forms that kernels run fastest come first.

    Args:
        causal: query s of S sees keys 0..T - S + s; `allowed` is None then.
        window: with `causal`: a query sees itself and the window - 1 keys before it.
        last: only the last this many keys are visible to the (single) query; None for all.
        allowed: bool [B or 1, 1, S, T], True where the query sees the key; None hides nothing more.
        place: int64 [1]: a decode step of one query a row, which sees the keys up to this place; it is read when
            the step runs, so that a recorded step serves all places. `last` counts from it.
        valid: bool [B, T], False for padding; with `place` only.
    """

    causal: bool = False
    window: int | None = None
    last: int | None = None
    allowed: Tensor | None = None
    place: Tensor | None = None
    valid: Tensor | None = None


def make_mask(
    n_new: int, n_total: int, *, window: int | None = None, valid_BT: Tensor | None = None,
    device: torch.device | None = None,
) -> Mask:
    """The causal mask of the last n_new of n_total tokens, with a window and padding.

    Args:
        n_new: S, queries.
        n_total: T, keys; query s stands at key T - S + s.
        window: a query sees itself and the window - 1 tokens before it, padding not counted.
        valid_BT: bool [B, T], False for padding; None when there is none.
        device: of the mask.

    Returns:
        The mask. A query at a padded place sees at least itself, so that no softmax runs over nothing.
    """
    if window is not None and window >= n_total:
        window = None
    if valid_BT is None:
        return Mask(last=window) if n_new == 1 else Mask(causal=True, window=window)
    key_T = torch.arange(n_total, device=device)
    query_S = key_T[n_total - n_new:]
    allowed = (key_T <= query_S[:, None])[None, None] & valid_BT[:, None, None, :]
    if window is not None:
        place_BT = valid_BT.long().cumsum(-1)
        allowed = allowed & (place_BT[:, None, None, :] > place_BT[:, None, -n_new:, None] - window)
    return Mask(allowed=allowed | (key_T == query_S[:, None]))


@function
def attention(
    q_BHSD: Tensor["B", "G*K", "S", "D", one_float], k_BKTD: Tensor["B", "K", "T", "D", one_float],
    v_BKTD: Tensor["B", "K", "T", "D", one_float], mask: AnyMask | Mask | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, *, window: int | None = None,
    sinks: Tensor["G*K"] | None = None, softcap: float | None = None, alibi: Tensor["G*K"] | None = None,
    seed: int | None = None, flash: bool = True,
) -> Tensor["B", "G*K", "S", "D", one_float]:
    """softmax(scale * q k^T) v for every head (arXiv:1706.03762), groups sharing keys (arXiv:2305.13245).

    Runs as a tile kernel, as torch's scaled_dot_product_attention (masks of f32 scores that are not causal; GPUs), or
    in chunks of plain torch (f64 with softcap, ALiBi and dropout over many keys, gradients of masks and slopes).

    Args:
        q_BHSD: [B, H, S, D], f32, bf16, f16 or f64.
        k_BKTD, v_BKTD: [B, K, T, D], the same dtype; H a multiple of K.
        mask: broadcastable to [B, H, S, T]: bool, True where the query sees the key, or float, added to the scores
            (after the softcap); or a Mask, which says is_causal and window too.
        dropout_p: probability that a weight is dropped; which ones depends on seed and place alone.
        is_causal: the last query sees all keys, each one before it one key less.
        scale: factor on the scores, > 0; default 1 / sqrt(D).
        window: a query sees itself and the window - 1 keys before it (keys after it too, unless causal).
        sinks: [H], a logit a head that takes its share of the softmax and has no value (arXiv:2309.17453, gpt-oss).
        softcap: scores become softcap * tanh(scores / softcap) (arXiv:2408.00118).
        alibi: [H], slopes: slope * (key's place - query's place) is added (arXiv:2108.12409).
        seed: of the dropout; None draws one.
        flash: False: one step after the other, scores in memory.

    Returns:
        [B, H, S, D] in q's dtype, softmax and sums in f32; zeros for a query that sees no key.

    Raises:
        ShapeError, InputError: arguments that do not fit together.
        UnsupportedError: the deterministic mode with dropout, ALiBi, sinks or a float mask.
    """
    is_ours = isinstance(mask, Mask)
    if isinstance(mask, Mask):
        if mask.place is not None:
            return _decode(q_BHSD, k_BKTD, v_BKTD, mask.valid, mask.place, mask.last, sinks, scale, softcap)
        if mask.last is not None:
            k_BKTD, v_BKTD = k_BKTD[:, :, -mask.last:], v_BKTD[:, :, -mask.last:]
        is_causal, window, mask = mask.causal, mask.window, mask.allowed
    scores = Scores(scale=q_BHSD.shape[-1]**-0.5 if scale is None else scale, is_causal=is_causal, window=window,
                    softcap=softcap, dropout_p=dropout_p, seed=dropout_seed(dropout_p, seed))
    if not is_ours:
        check_scores(scores, k_BKTD.shape[1])
    if is_invariant():
        return _invariant(q_BHSD, k_BKTD, v_BKTD, scores, mask, alibi, sinks)
    if not flash or (not torch.compiler.is_compiling() and wants_reference()):
        return plain_attention(q_BHSD, k_BKTD, v_BKTD, scores, mask, alibi, sinks)[0]
    return _quickest(q_BHSD, k_BKTD, v_BKTD, scores, mask, alibi, sinks)


@function
def grouped_query_attention(
    q_BHSD: Tensor["B", "G*K", "S", "D", one_float], k_BKTD: Tensor["B", "K", "T", "D", one_float],
    v_BKTD: Tensor["B", "K", "T", "D", one_float], is_causal: bool = True, scale: float | None = None,
) -> Tensor["B", "G*K", "S", "D", one_float]:
    """`attention` whose H query heads share K key heads in groups of H / K, read in place (arXiv:2305.13245)."""
    return attention(q_BHSD, k_BKTD, v_BKTD, is_causal=is_causal, scale=scale)


@function
def multi_query_attention(
    q_BHSD: Tensor["B", "H", "S", "D", one_float], k_BTD: Tensor["B", "T", "D", one_float],
    v_BTD: Tensor["B", "T", "D", one_float], is_causal: bool = True, scale: float | None = None,
) -> Tensor["B", "H", "S", "D", one_float]:
    """`attention` whose query heads all share one key head, [B, T, D] (arXiv:1911.02150)."""
    return attention(q_BHSD, k_BTD[:, None], v_BTD[:, None], is_causal=is_causal, scale=scale)


def _quickest(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores: Scores, mask: Tensor | None, slopes_H: Tensor | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """The way that was measured to be the quickest for such arguments."""
    S, T = q_BHSD.shape[2], k_BKTD.shape[2]
    is_plain = scores.softcap is None and slopes_H is None and not scores.dropout_p
    if S == 1 and _decodes(q_BHSD, k_BKTD, v_BKTD, scores, mask, slopes_H, sinks_H):
        # One causal query sees all keys; its window is the last keys.
        allowed_BT = None if mask is None else mask.expand(len(q_BHSD), 1, 1, T)[:, 0, 0]
        return _decode(q_BHSD, k_BKTD, v_BKTD, allowed_BT, None, scores.window, sinks_H, scores.scale, scores.softcap)
    if fits_flash(scores, mask, slopes_H) and ((q_BHSD.is_cpu and S > 1) or sinks_H is not None):
        return flash_attention_op(
            q_BHSD, k_BKTD, v_BKTD, sinks_H, scores.scale, scores.is_causal, scores.window, 0, 0)[0]
    if _fits_blocks(q_BHSD, scores, mask, slopes_H, is_plain and sinks_H is None):
        return in_chunks(q_BHSD, k_BKTD, v_BKTD, scores, mask, slopes_H, sinks_H)
    if is_plain and sinks_H is None:
        dtype, whole = q_BHSD.dtype, scores.is_causal and scores.window is None and mask is None and S == T
        if q_BHSD.is_cpu and dtype.itemsize == 2 and torch.is_grad_enabled() and q_BHSD.requires_grad:
            # torch's backward in 16 bits takes 6 times as long where the processor has no instructions for them.
            q_BHSD, k_BKTD, v_BKTD = q_BHSD.float(), k_BKTD.float(), v_BKTD.float()
        return F.scaled_dot_product_attention(
            q_BHSD, k_BKTD, v_BKTD, attn_mask=None if whole else _joined(scores, mask, S, T, q_BHSD),
            is_causal=whole, scale=scores.scale, enable_gqa=q_BHSD.shape[1] != k_BKTD.shape[1]).to(dtype)
    if q_BHSD[..., 0].numel() * T < _MANY_SCORES and not scores.dropout_p:
        return plain_attention(q_BHSD, k_BKTD, v_BKTD, scores, mask, slopes_H, sinks_H)[0]
    return in_chunks(q_BHSD, k_BKTD, v_BKTD, scores, mask, slopes_H, sinks_H)


def _fits_blocks(
    q_BHSD: Tensor, scores: Scores, mask: Tensor | None, slopes_H: Tensor | None, is_plain: bool,
) -> bool:
    """Whether blocks by the tile kernels are the quickest way to what they know.

    Measured beside torch's with a mask, forward and backward in f32: with ALiBi 3.2 x, with a mask over causal scores
    1.7 x, which halve the work; with a mask alone 0.9 x.
    """
    is_halved = scores.is_causal or q_BHSD.dtype is not torch.float32
    return (q_BHSD.is_cpu and q_BHSD.shape[2] > 1 and fits_tiles(q_BHSD, scores, mask, slopes_H)
            and (is_halved or not is_plain))


def _decodes(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores: Scores, mask: Tensor | None, slopes_H: Tensor | None,
    sinks_H: Tensor | None,
) -> bool:
    """Whether the decode kernel is the quickest way: it reads a group's keys once, and bf16 without a copy.

    Measured beside torch's on one core with AVX2: f32 1.1 to 1.9 x where heads share many keys (else the launch
    counts), bf16 4 to 15 x.
    """
    fits = (slopes_H is None and not scores.dropout_p and (scores.window is None or scores.is_causal)
            and (mask is None or (mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == 1)))
    has_gradient = torch.is_grad_enabled() and (
        q_BHSD.requires_grad or k_BKTD.requires_grad or v_BKTD.requires_grad)
    is_shared_much = q_BHSD.shape[1] > k_BKTD.shape[1] and k_BKTD[..., 0].numel() >= _MANY_KEYS
    pays = (mask is not None or q_BHSD.dtype is not torch.float32 or is_shared_much
            or scores.softcap is not None or sinks_H is not None)
    return fits and pays and not has_gradient and q_BHSD.is_cpu and q_BHSD.dtype is not torch.float64


def _decode(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, allowed_BT: Tensor | None, place: Tensor | None,
    window: int | None, sinks_H: Tensor | None, scale: float | None, softcap: float | None,
) -> Tensor:
    scale = q_BHSD.shape[-1]**-0.5 if scale is None else scale
    return decode_attention_op(
        q_BHSD[:, :, 0], k_BKTD, v_BKTD, allowed_BT, place, window, sinks_H, scale, softcap)[:, :, None]


def _joined(scores: Scores, mask: Tensor | None, n_queries: int, n_keys: int, like: Tensor) -> Tensor | None:
    """One mask that says what the causal mask, the window and `mask` say."""
    mask, seen = None if mask is None else torch.atleast_2d(mask), scores.seen(n_queries, n_keys, like.device)
    if mask is None or seen is None:
        return seen if mask is None else mask if mask.dtype is torch.bool else mask.to(like.dtype)
    return mask & seen if mask.dtype is torch.bool else mask.to(like.dtype).masked_fill(~seen, float("-inf"))


def _invariant(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores: Scores, mask: Tensor | None, slopes_H: Tensor | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """The deterministic mode's attention; its gradient is the plain expression's."""
    given = {"dropout": scores.dropout_p, "alibi": slopes_H is not None, "sinks": sinks_H is not None,
             "a mask that is not bool [B or 1, 1, S, T]":
                 mask is not None and (mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1] != 1)}
    if any(given.values()):
        names = ", ".join(name for name, is_given in given.items() if is_given)
        raise UnsupportedError(f"attention: {names} given in the deterministic mode, which has no kernel for it")
    (B, _, S, _), T = q_BHSD.shape, k_BKTD.shape[2]
    allowed = _joined(scores, mask, S, T, q_BHSD)
    allowed_BST = q_BHSD.new_ones(B, S, T, dtype=torch.bool) if allowed is None else \
        allowed.expand(B, 1, S, T)[:, 0]

    def plain(q_BSHD: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q_BSHD.transpose(1, 2), k, v, scores, mask)[0].transpose(1, 2)

    return invariant_attention(
        q_BHSD.transpose(1, 2), k_BKTD, v_BKTD, allowed_BST, scores.scale, scores.softcap, plain).transpose(1, 2)
