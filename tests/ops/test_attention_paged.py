"""Attention over paged keys against float64 attention over each row's keys, wherever their pages lie."""

from __future__ import annotations

import pytest
import torch

from tessera import ops
from tessera.errors import InputError, ShapeError
from tessera.ops.paged_attention import paged_attention_op
from tessera.ops.registration import implementation


def draw(lengths, n_queries, heads, kv_heads, width, page, dtype, seed):
    """Rows whose pages lie in any order in a pool full of NaN, and the same rows in one piece."""
    generator = torch.Generator().manual_seed(seed)
    n_slots = max(1, -(-max(lengths) // page))
    n_pages = len(lengths) * n_slots + 3
    order = torch.randperm(n_pages, generator=generator).int()
    k_pages, v_pages = (torch.full((n_pages, page, kv_heads, width), float("nan"), dtype=dtype) for _ in range(2))
    table = torch.full((len(lengths), n_slots), -7, dtype=torch.int32)
    rows, used = [], 0
    for b, length in enumerate(lengths):
        k, v = (torch.randn(length, kv_heads, width, generator=generator).to(dtype) for _ in range(2))
        rows.append((k, v))
        for slot in range(-(-length // page)):
            table[b, slot] = order[used]
            part = slice(slot * page, min(length, (slot + 1) * page))
            k_pages[order[used], :part.stop - part.start] = k[part]
            v_pages[order[used], :part.stop - part.start] = v[part]
            used += 1
    q = torch.randn(len(lengths), n_queries, heads, width, generator=generator).to(dtype)
    return q, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32), rows


def exact(q, rows, *, scale, window=None, sinks=None, softcap=None):
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, (k, v) in enumerate(rows):
        for i in range(q.shape[1]):
            place = len(k) - q.shape[1] + i
            seen = slice(max(0, place + 1 - (window or place + 1)), place + 1)
            for h in range(q.shape[2]):
                group = h * k.shape[1] // q.shape[2]
                scores = k[seen, group].double() @ q[b, i, h].double() * scale if place >= 0 else torch.zeros(0)
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                if sinks is not None:
                    scores = torch.cat((scores.double(), sinks[h:h + 1].double()))
                if place >= 0:
                    weights = scores.softmax(0)
                    out[b, i, h] = weights[:place + 1 - seen.start] @ v[seen, group].double()
    return out


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("lengths,n_queries,heads,kv_heads,width,page", [
    ((1,), 1, 1, 1, 8, 16), ((5, 33, 0, 130), 1, 6, 2, 16, 16), ((7, 300), 1, 9, 3, 64, 16),
    ((40, 2, 65), 4, 4, 4, 24, 8), ((19, 90), 3, 8, 1, 32, 7)])
def test_against_float64(lengths, n_queries, heads, kv_heads, width, page, dtype, choice):
    *args, rows = draw(lengths, n_queries, heads, kv_heads, width, page, dtype, sum(lengths))
    tolerance = 2e-5 if dtype is torch.float32 else 2**-7
    sinks = torch.linspace(-1, 1, heads)
    for kwargs in ({}, {"window": 9, "softcap": 2.0}, {"sinks": sinks}):
        with implementation(choice):
            actual = ops.paged_attention(*args, scale=0.3, **kwargs)
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), exact(args[0], rows, scale=0.3, **kwargs), rtol=tolerance, atol=tolerance)


def test_a_row_has_the_same_bits_in_any_batch_and_at_any_number_of_threads():
    q, k, v, table, lengths, _ = draw((500, 17, 256), 1, 6, 3, 32, 16, torch.float32, 1)
    threads = torch.get_num_threads()
    try:
        whole = ops.paged_attention(q, k, v, table, lengths)
        torch.set_num_threads(1)
        alone = [ops.paged_attention(q[i:i + 1], k, v, table[i:i + 1], lengths[i:i + 1]) for i in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, torch.cat(alone))


def test_registration():
    q, k, v, table, lengths, _ = draw((20, 9), 2, 4, 2, 8, 8, torch.float32, 2)
    args = (q, k.nan_to_num(), v.nan_to_num(), table, lengths, torch.randn(4), 0.3, 5, None)
    torch.library.opcheck(paged_attention_op.registered, args)


def test_errors():
    q, k, v, table, lengths, _ = draw((20, 9), 2, 4, 2, 8, 8, torch.float32, 2)
    with pytest.raises(ShapeError, match=r"q_BNHD has G\*K=3 .* but k_pages has K=2"):
        ops.paged_attention(q[:, :, :3], k, v, table, lengths)
    with pytest.raises(ShapeError, match=r"lengths has B=1 .* but q_BNHD has B=2"):
        ops.paged_attention(q, k, v, table, lengths[:1])
    with pytest.raises(InputError, match=r"lengths is torch.int64; expected torch.int32"):
        ops.paged_attention(q, k, v, table, lengths.long())
    with pytest.raises(InputError, match=r"lengths: 25 given; expected 0..24"):
        ops.paged_attention(q, k, v, table, torch.tensor([25, 1], dtype=torch.int32))
    table[1, 0] = 99
    with pytest.raises(InputError, match=r"block_table: page 99 given; expected 0..\d+"):
        ops.paged_attention(q, k, v, table, lengths)
