"""Grouped-query attention over a prompt or over cached keys.

In: query heads of the new tokens, key and value heads of all tokens, and which keys each query sees.
Out: the heads' weighted values. nn.Attention calls `attention`; models.gpt makes the masks.

Dims: B batch, S new tokens, T all tokens (T - S cached), H query heads, K key/value heads,
G = H / K query heads a group, D head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ops.decode_attention import decode_attention_op
from tessera.ops.invariant import attention as invariant_attention
from tessera.ops.invariant import is_invariant


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys each query sees; the forms that kernels run fastest come first.

    Args:
        causal: query s sees keys 0..s (S == T, nothing else hidden); `allowed` is None then.
        last: only the last this many keys are visible to the (single) query; None for all.
        allowed: bool [B or 1, 1, S, T], True where the query sees the key; None hides nothing more.
    """

    causal: bool = False
    last: int | None = None
    allowed: Tensor | None = None


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
        if n_new == 1:
            return Mask(last=window)
        if n_new == n_total and window is None:
            return Mask(causal=True)
    key_T = torch.arange(n_total, device=device)
    query_S = key_T[n_total - n_new:]
    allowed = (key_T <= query_S[:, None])[None, None]
    if valid_BT is None:
        if window is not None:
            allowed = allowed & (key_T > query_S[:, None] - window)
        return Mask(allowed=allowed)
    allowed = allowed & valid_BT[:, None, None, :]
    if window is not None:
        place_BT = valid_BT.long().cumsum(-1)
        allowed = allowed & (place_BT[:, None, None, :] > place_BT[:, None, -n_new:, None] - window)
    return Mask(allowed=allowed | (key_T == query_S[:, None]))


def attention(
    q_BSHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask, *,
    scale: float, softcap: float | None = None, flash: bool = True,
) -> Tensor:
    """softmax(scale * q k^T) v for every head (arXiv:1706.03762), groups sharing keys (arXiv:2305.13245).

    Args:
        q_BSHD: [B, S, H, D].
        k_BKTD, v_BKTD: [B, K, T, D], H a multiple of K.
        mask: which keys each query sees.
        scale: factor on the scores.
        softcap: scores become softcap * tanh(scores / softcap).
        flash: in blocks, scores never held whole (arXiv:2205.14135); a softcap takes the plain path.

    Returns:
        [B, S, H, D] in q's dtype; softmax in f32.
    """
    if mask.last is not None:
        k_BKTD, v_BKTD = k_BKTD[:, :, -mask.last:], v_BKTD[:, :, -mask.last:]
    if is_invariant():
        B, S, T = q_BSHD.shape[0], q_BSHD.shape[1], k_BKTD.shape[2]
        allowed_BST = _allowed(mask, S, T, q_BSHD.device)[:, 0].expand(B, S, T)
        plain = functools.partial(_plain, mask=mask, scale=scale, softcap=softcap)
        return invariant_attention(q_BSHD, k_BKTD, v_BKTD, allowed_BST, scale, softcap, plain)
    if not flash or softcap is not None:
        return _plain(q_BSHD, k_BKTD, v_BKTD, mask, scale, softcap)
    if q_BSHD.shape[1] == 1 and _decodes(q_BSHD, k_BKTD, mask):
        allowed_BT = None if mask.allowed is None else mask.allowed[:, 0, 0].expand(len(q_BSHD), -1)
        return decode_attention_op(q_BSHD[:, 0], k_BKTD, v_BKTD, allowed_BT, None, None, None, scale, None)[:, None]
    out_BHSD = F.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2), k_BKTD, v_BKTD, attn_mask=mask.allowed, is_causal=mask.causal,
        scale=scale, enable_gqa=q_BSHD.shape[2] != k_BKTD.shape[1])
    return out_BHSD.transpose(1, 2)


def _decodes(q_BSHD: Tensor, k_BKTD: Tensor, mask: Mask) -> bool:
    """Whether the decode kernel is the quickest way: it reads a group's keys once, and bf16 without a copy.

    Measured beside torch's on one core with AVX2: f32 1.0 to 1.9 x from 512 keys on (with few keys and no mask the
    launch counts), bf16 4 to 15 x.
    """
    return (q_BSHD.is_cpu and q_BSHD.dtype == k_BKTD.dtype and not (torch.is_grad_enabled() and q_BSHD.requires_grad)
            and (mask.allowed is not None or q_BSHD.dtype is not torch.float32 or k_BKTD.shape[2] >= 256))


def _allowed(mask: Mask, n_new: int, n_total: int, device: torch.device) -> Tensor:
    """The mask's `allowed`, made when it has none."""
    if mask.allowed is not None:
        return mask.allowed
    allowed = torch.ones(1, 1, n_new, n_total, dtype=torch.bool, device=device)
    return allowed.tril() if mask.causal else allowed


def _plain(
    q_BSHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask, scale: float, softcap: float | None,
) -> Tensor:
    """Attention one step after the other, holding all scores in f32."""
    B, S, H, D = q_BSHD.shape
    K, T = k_BKTD.shape[1:3]
    G = H // K
    q_BKRD = q_BSHD.transpose(1, 2).reshape(B, K, G * S, D)  # R = G * S rows share a key head
    scores = (q_BKRD @ k_BKTD.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.causal or mask.allowed is not None:
        allowed = _allowed(mask, S, T, scores.device)
        scores = scores.view(B, K, G, S, T).masked_fill(~allowed[:, :, None], float("-inf")).view(B, K, G * S, T)
    out_BKRD = scores.softmax(-1).to(v_BKTD.dtype) @ v_BKTD
    return out_BKRD.view(B, K * G, S, D).transpose(1, 2)
