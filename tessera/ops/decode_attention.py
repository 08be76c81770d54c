"""Attention of one new token a row over its cached keys: the step of generation.

In: a query a head, and the cache's keys and values, read in place. Out: the heads' weighted values. ops.attention
calls it where there is one query and no gradient.

Dims: B batch, H query heads, K key/value heads, G = H / K query heads a group, T keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.kernels.decode_attention import SPAN, decode_attention_kernel
from tessera.ops.registration import Operation


def _kernel(
    q_BHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, allowed_BT: Tensor | None, place: Tensor | None,
    window: int | None, sinks_H: Tensor | None, scale: float, softcap: float | None,
) -> Tensor:
    B, H, D = q_BHD.shape
    K, T = k_BKTD.shape[1:3]
    q_BKGD = q_BHD.unflatten(1, (K, H // K))
    out_BKGD = torch.empty(B, K, H // K, D, dtype=q_BHD.dtype, device=q_BHD.device)
    parts = torch.empty(B, K, max(1, -(-T // SPAN)), H // K, D + 2, device=q_BHD.device)
    sinks_KG = None if sinks_H is None else sinks_H.view(K, H // K)
    decode_attention_kernel(
        q_BKGD, k_BKTD, v_BKTD, out_BKGD, parts, scale, allowed_BT, place, window, sinks_KG, softcap)
    return out_BKGD.view(B, H, D)


def _reference(
    q_BHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, allowed_BT: Tensor | None, place: Tensor | None,
    window: int | None, sinks_H: Tensor | None, scale: float, softcap: float | None,
) -> Tensor:
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    B, H, _ = q_BHD.shape
    K, T = k_BKTD.shape[1:3]
    at_T = torch.arange(T, device=q_BHD.device)
    last = T - 1 if place is None else place
    seen_BT = torch.ones(B, T, dtype=torch.bool, device=q_BHD.device) if allowed_BT is None else allowed_BT
    seen_BT = seen_BT & (at_T <= last) & (at_T > last - (T if window is None else window))
    values_BKTD = v_BKTD.to(wide).masked_fill((at_T > last)[:, None], 0.0)
    scores_BHT = (q_BHD.unflatten(1, (K, H // K)).to(wide) @ k_BKTD.to(wide).mT).flatten(1, 2) * scale
    if softcap is not None:
        scores_BHT = softcap * torch.tanh(scores_BHT / softcap)
    scores_BHT = scores_BHT.masked_fill(~seen_BT[:, None], float("-inf"))
    if sinks_H is not None:
        scores_BHT = torch.cat((scores_BHT, sinks_H.to(wide)[None, :, None].expand(B, H, 1)), -1)
    weights_BHT = scores_BHT.softmax(-1)[..., :T].masked_fill(~seen_BT[:, None], 0.0)
    out_BKGD = weights_BHT.unflatten(1, (K, H // K)) @ values_BKTD
    return out_BKGD.flatten(1, 2).to(q_BHD.dtype)


def _fake(q_BHD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q_BHD, memory_format=torch.contiguous_format)


# softmax(scale q k^T) v over the keys up to `place` (int64 [1], None: all T; what lies behind it may be anything), of
# those the last `window`, of those where `allowed` [B, T]; `sinks` [H] are logits without a value, `softcap` bounds
# the scores. q [B, H, D], k and v [B, K, T, D] -> [B, H, D]. A row that sees no key gives zeros.
decode_attention_op = Operation(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? allowed, Tensor? place, int? window, Tensor? sinks, "
    "float scale, float? softcap) -> Tensor", kernel=_kernel, reference=_reference, fake=_fake)
