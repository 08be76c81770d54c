"""Attention: causal, with shared heads, windows, sinks and biases, in chunks, and the steps of generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from ops_case import DTYPES, OpCase, leaf, make, wide
from torch import Tensor

from tessera import ops

WIDTH, PAGE = 64, 16


def cases(quick: bool, fast_bf16: bool) -> Iterator[OpCase]:
    """See `OpCase`. Attention in bf16 is compared where the processor has instructions for it."""
    for name in ("f32", "bf16") if fast_bf16 else ("f32",):
        dtype = DTYPES[name]
        for batch, heads, shared, length in [(1, 2, 1, 64)] if quick else [(4, 8, 8, 512), (1, 8, 2, 2048)]:
            sizes = f"{batch}x{heads}/{shared}x{length}x{WIDTH}"
            for operation, *made in _training(batch, heads, shared, length, dtype):
                yield make(operation, name, sizes, tuple(made))
    for name, dtype in DTYPES.items():
        batch, heads, shared, length = (2, 4, 2, 64) if quick else (8, 8, 2, 2048)
        for operation, *made in _generation(batch, heads, shared, length, dtype):
            yield make(operation, name, f"{batch}x{heads}/{shared}x{length}x{WIDTH}", tuple(made))


def _training(batch: int, heads: int, shared: int, length: int, dtype: torch.dtype) -> Iterator[tuple]:
    q = leaf(batch, heads, length, WIDTH, dtype=dtype)
    k, v = (leaf(batch, shared, length, WIDTH, dtype=dtype) for _ in range(2))
    causal = functools.partial(
        F.scaled_dot_product_attention, is_causal=True, enable_gqa=heads != shared)
    yield "attention", [q, k, v], functools.partial(ops.attention, is_causal=True), causal
    if length < 1024:
        yield "chunked_attention", [q, k, v], functools.partial(ops.chunked_attention, is_causal=True), causal
        slopes, place = ops.alibi_slopes(heads), torch.arange(length)
        bias = slopes[:, None, None] * (place[None] - place[:, None]).float()
        hidden = place[None] > place[:, None]

        def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = bias.to(q.dtype).masked_fill(hidden, -torch.inf)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        yield ("attention_alibi", [q, k, v],
               lambda q, k, v: ops.attention(q, k, v, is_causal=True, alibi=slopes), alibi)
        return
    sinks, window = leaf(heads), length // 4
    place = torch.arange(length)
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)

    def windowed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        scores = (wide(q @ k.mT) * WIDTH**-0.5).masked_fill(~seen, -torch.inf)
        scores = torch.cat([scores, sinks[:, None, None].expand(batch, heads, length, 1).to(scores.dtype)], -1)
        return scores.softmax(-1)[..., :-1].to(v.dtype) @ v

    yield ("attention_sinks", [q, k, v, sinks],
           lambda q, k, v, sinks: ops.attention(q, k, v, is_causal=True, window=window, sinks=sinks), windowed)


def _generation(batch: int, heads: int, shared: int, length: int, dtype: torch.dtype) -> Iterator[tuple]:
    """One new token a row, over keys in one piece and in pages."""
    q = torch.randn(batch, heads, 1, WIDTH).to(dtype)
    k, v = (torch.randn(batch, shared, length, WIDTH).to(dtype) for _ in range(2))
    over = functools.partial(F.scaled_dot_product_attention, enable_gqa=heads != shared)
    yield "decode_attention", [q, k, v], ops.attention, over
    pages = [x.unflatten(2, (-1, PAGE)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous() for x in (k, v)]
    table = torch.randperm(len(pages[0])).view(batch, -1).int()
    lengths = torch.full((batch,), length, dtype=torch.int32)

    def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x[table.long()].flatten(1, 2).transpose(1, 2) for x in (k, v))
        return over(q.transpose(1, 2), k, v).transpose(1, 2)

    yield "paged_attention", [q.transpose(1, 2), *pages, table, lengths], ops.paged_attention, gathered
