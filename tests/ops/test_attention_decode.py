"""Attention of a decode step against float64: kernel, reference and what ops.attention chooses."""

from __future__ import annotations

import pytest
import torch

from tessera import ops
from tessera.ops.decode_attention import decode_attention_op
from tessera.ops.registration import implementation

SHAPES = [(1, 9, 3, 1, 64), (2, 4, 4, 7, 8), (3, 6, 1, 33, 16), (2, 9, 3, 130, 64), (1, 8, 2, 700, 24),
          (1, 2, 2, 513, 5)]


def exact(q, k, v, allowed, sinks, scale, softcap):
    """One query at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        seen = torch.arange(k.shape[2]) if allowed is None else allowed[b].nonzero()[:, 0]
        for h in range(q.shape[1]):
            group = h * k.shape[1] // q.shape[1]
            scores = k[b, group, seen].double() @ q[b, h].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[h:h + 1].double()))
            if len(scores):
                out[b, h] = scores.softmax(0)[:len(seen)] @ v[b, group, seen].double()
    return out


def draw(shape, dtype, seed):
    """A step over a cache with room for more tokens, whose heads are strided as the cache's are."""
    B, H, K, T, D = shape
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(B, K, T + 5, D, generator=generator).to(dtype)[:, :, :T] for _ in range(2))
    q = (2 * torch.randn(B, H, 1, D, generator=generator)).to(dtype)[:, :, 0]
    return q, k, v, torch.rand(B, T, generator=generator) > 0.3, torch.randn(H, generator=generator)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, choice):
    q, k, v, allowed, sinks = draw(shape, dtype, sum(shape))
    tolerance = 2e-5 if dtype is torch.float32 else 2**-7
    for mask, sink, softcap in ((None, None, None), (allowed, None, None), (allowed, sinks, 3.0)):
        with implementation(choice):
            actual = decode_attention_op(q, k, v, mask, None, None, sink, 0.3, softcap)
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), exact(q, k, v, mask, sink, 0.3, softcap), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_rows_that_see_nothing_and_extreme_values(choice):
    q, k, v, allowed, sinks = draw((3, 4, 2, 300, 16), torch.float32, 5)
    allowed[0], allowed[1, 1:] = False, False
    k[2, :, 7] *= 1e30
    k[2, :, 8:] *= 1e18
    k[2, :, 150] *= 1e30
    for sink in (None, sinks):
        with implementation(choice):
            out = decode_attention_op(q, k, v, allowed, None, None, sink, 0.3, None)
        assert out.isfinite().all() and not out[0].any()
        torch.testing.assert_close(out.double(), exact(q, k, v, allowed, sink, 0.3, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("place,window", [(0, None), (40, None), (299, 300), (299, 7), (140, 30), (3, 9), (260, 1)])
def test_a_place_read_at_run_time(place, window, dtype, choice):
    """Storage with room behind the last token, which holds anything."""
    q, k, v, allowed, sinks = draw((2, 6, 2, 300, 16), dtype, place)
    k[:, :, place + 1:], v[:, :, place + 1:] = float("nan"), float("inf")
    seen = torch.arange(300) <= place
    if window is not None:
        seen = seen & (torch.arange(300) > place - window)
    allowed[:, place] = True
    for mask, sink in ((None, None), (allowed, sinks)):
        with implementation(choice):
            actual = decode_attention_op(q, k, v, mask, torch.tensor([place]), window, sink, 0.3, None)
        expected = exact(q, k, v, seen.expand(2, -1) if mask is None else seen & mask, sink, 0.3, None)
        tolerance = 2e-5 if dtype is torch.float32 else 2**-7
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_row_has_the_same_bits_in_any_batch_and_at_any_number_of_threads():
    q, k, v, allowed, _ = draw((5, 6, 3, 1100, 32), torch.float32, 11)
    threads = torch.get_num_threads()
    try:
        whole = decode_attention_op(q, k, v, allowed, None, None, None, 0.2, None)
        torch.set_num_threads(1)
        alone = [decode_attention_op(
            q[i:i + 1], k[i:i + 1], v[i:i + 1], allowed[i:i + 1], None, None, None, 0.2, None) for i in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, torch.cat(alone))


def test_registration():
    q, k, v, allowed, sinks = draw((2, 4, 2, 9, 8), torch.float32, 3)
    torch.library.opcheck(decode_attention_op.registered, (q, k, v, allowed, torch.tensor([5]), 3, sinks, 0.3, None))
    torch.library.opcheck(decode_attention_op.registered, (q, k, v, None, None, None, None, 0.3, 2.0))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_ops_attention_decodes_with_it(monkeypatch, dtype, window):
    q, k, v, _, _ = draw((2, 6, 2, 400, 16), dtype, 7)
    valid = torch.arange(400) >= torch.tensor([[0], [30]])
    calls = []
    monkeypatch.setattr(decode_attention_op, "kernel", lambda *args, run=decode_attention_op.kernel: (
        calls.append(1), run(*args))[1])
    for padding in (None, valid):
        mask = ops.make_mask(1, 400, window=window, valid_BT=padding)
        allowed = torch.ones(2, 400, dtype=torch.bool) if padding is None else valid.clone()
        if window is not None:
            allowed[:, :-window] = False
        with torch.no_grad():
            out = ops.attention(q[:, :, None], k, v, mask, scale=0.25)
        expected = exact(q, k, v, allowed, None, 0.25, None)[:, :, None]
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=2e-5 if dtype is torch.float32 else 2e-2)
    assert len(calls) == (2 if dtype is torch.bfloat16 else 1)  # torch's is quicker for few f32 keys, none hidden
