"""Attention of a few new tokens a row over keys and values in pages (block tables), as a serving engine keeps them.

In: queries, the pool of pages, each row's table and length. Out: the heads' weighted values. The serving engine calls
it; no gradient.

Dims: B rows, N queries a row, H query heads, K key/value heads, G = H / K query heads a group, D head_dim, M pages
of the longest row, P places of a page.
"""

from __future__ import annotations

import torch

from tessera.errors import InputError
from tessera.function.decorator import function
from tessera.ops.kernels.paged_attention import SPAN_PAGES, paged_attention_kernel
from tessera.ops.registration import Operation, is_readable
from tessera.types import Tensor, int32, one_float


@function
def paged_attention(
    q_BNHD: Tensor["B", "N", "G*K", "D", one_float], k_pages: Tensor["n_pages", "P", "K", "D", one_float],
    v_pages: Tensor["n_pages", "P", "K", "D", one_float], block_table: Tensor["B", "M", int32],
    lengths: Tensor["B", int32], *, scale: float | None = None, window: int | None = None,
    sinks: Tensor["G*K"] | None = None, softcap: float | None = None,
) -> Tensor["B", "N", "G*K", "D", one_float]:
    """Causal attention over paged keys (arXiv:2309.06180): query i of N stands at key length - N + i.

    Args:
        q_BNHD: [B, N, H, D], the new tokens' queries; their keys are in the pages already.
        k_pages, v_pages: [n_pages, P, K, D], the pool; H a multiple of K. Places behind a row's length may hold
            anything.
        block_table: int32 [B, M], the numbers of each row's pages, in order; entries behind the length are not read.
        lengths: int32 [B], keys of each row, 0..M * P; a row of 0 gives zeros.
        scale: factor on the scores, > 0; default 1 / sqrt(D).
        window: a query sees itself and the window - 1 keys before it.
        sinks: [H], a logit a head that takes its share of the softmax and has no value.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        [B, N, H, D] in q's dtype. A row has the same bits in any batch and at any number of threads.

    Raises:
        ShapeError, InputError: arguments that do not fit together, a length or a page outside the pool.
    """
    _check_pages(k_pages, block_table, lengths)
    scale = q_BNHD.shape[-1]**-0.5 if scale is None else scale
    if not scale > 0 or (window is not None and window < 1):
        raise InputError(f"scale, window: {scale}, {window} given; expected above 0, and at least 1 or None")
    out: Tensor = paged_attention_op(
        q_BNHD, k_pages, v_pages, block_table, lengths, sinks, scale, window, softcap)
    return out


def _check_pages(k: Tensor, table: Tensor, lengths: Tensor) -> None:
    if not is_readable(lengths) or not lengths.numel():
        return
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < 0 or high > table.shape[1] * k.shape[1]:
        raise InputError(f"lengths: {low if low < 0 else high} given; expected 0..{table.shape[1] * k.shape[1]}")
    used = torch.arange(table.shape[1]) < (lengths[:, None] + k.shape[1] - 1) // k.shape[1]
    wrong = used & ((table < 0) | (table >= k.shape[0]))
    if bool(wrong.any()):
        raise InputError(f"block_table: page {int(table[wrong][0])} given; expected 0..{k.shape[0] - 1}")


def _kernel(
    q_BNHD: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, sinks_H: Tensor | None,
    scale: float, window: int | None, softcap: float | None,
) -> Tensor:
    (B, N, H, D), K = q_BNHD.shape, k_pages.shape[2]
    q_BKRD = q_BNHD.transpose(1, 2).reshape(B, K, H // K * N, D)
    out_BKRD = torch.empty(q_BKRD.shape, dtype=q_BNHD.dtype, device=q_BNHD.device)
    spans = max(1, -(-table.shape[1] // SPAN_PAGES))
    parts = torch.empty(B, K, spans, H // K * N, D + 2, device=q_BNHD.device)
    sinks_KR = None if sinks_H is None else sinks_H.repeat_interleave(N).view(K, H // K * N)
    paged_attention_kernel(
        q_BKRD, k_pages, v_pages, table, lengths, out_BKRD, parts, N, scale, window, sinks_KR, softcap)
    return out_BKRD.view(B, H, N, D).transpose(1, 2).contiguous()


def _reference(
    q_BNHD: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, sinks_H: Tensor | None,
    scale: float, window: int | None, softcap: float | None,
) -> Tensor:
    wide = torch.promote_types(q_BNHD.dtype, torch.float32)
    (B, N, H, _), (n_pages, P, K, _), M = q_BNHD.shape, k_pages.shape, table.shape[1]
    pages = table.long().clamp(0, max(n_pages - 1, 0))
    k_BHTD, v_BHTD = (x[pages].flatten(1, 2).transpose(1, 2).to(wide).repeat_interleave(H // K, 1)
                      for x in (k_pages, v_pages))
    at_T = torch.arange(M * P, device=q_BNHD.device)
    v_BHTD = v_BHTD.masked_fill((at_T >= lengths[:, None])[:, None, :, None], 0.0)
    scores_BHNT = (q_BNHD.transpose(1, 2).to(wide) @ k_BHTD.mT) * scale
    if softcap is not None:
        scores_BHNT = softcap * torch.tanh(scores_BHNT / softcap)
    ages_BNT = (lengths[:, None] - N + torch.arange(N, device=q_BNHD.device))[..., None] - at_T
    seen_BNT = (ages_BNT >= 0) & (ages_BNT < (M * P + N if window is None else window))
    scores_BHNT = scores_BHNT.masked_fill(~seen_BNT[:, None], float("-inf"))
    if sinks_H is not None:
        scores_BHNT = torch.cat((scores_BHNT, sinks_H.to(wide)[None, :, None, None].expand(B, H, N, 1)), -1)
    weights_BHNT = scores_BHNT.softmax(-1)[..., :M * P].masked_fill(~seen_BNT[:, None], 0.0)
    return (weights_BHNT @ v_BHTD).transpose(1, 2).to(q_BNHD.dtype).contiguous()


def _fake(q_BNHD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q_BNHD, memory_format=torch.contiguous_format)


paged_attention_op = Operation(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths, Tensor? sinks, "
    "float scale, int? window, float? softcap) -> Tensor", kernel=_kernel, reference=_reference, fake=_fake)
