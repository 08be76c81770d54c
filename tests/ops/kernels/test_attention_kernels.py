"""The kernels of attention on every backend against the plain expressions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.ops.attention_scores import Scores, plain_attention
from tessera.ops.attention_tiles import variant
from tessera.ops.decode_attention import decode_attention_op
from tessera.ops.flash_attention import flash_attention_backward_op
from tessera.ops.kernels import flash_attention_backward as backward
from tessera.ops.kernels.attention_dropout import attention_dropout_kernel
from tessera.ops.kernels.decode_attention import SPAN, decode_attention_kernel
from tessera.ops.kernels.flash_attention import flash_attention_kernel
from tessera.ops.kernels.paged_attention import SPAN_PAGES, paged_attention_kernel
from tessera.ops.paged_attention import paged_attention_op
from tests.kernel.backends import BACKENDS, launch

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def check(actual: Tensor, expected: Tensor) -> None:
    tolerance = (3e-5 if actual.dtype == torch.float32 else 2**-7) * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("S, T, D, causal, window", [(1, 1, 16, False, None), (7, 33, 16, True, None),
                                                     (70, 66, 8, True, 20)])
def test_flash_attention_and_its_gradients(backend, dtype, S, T, D, causal, window):
    q, k, v, grad = (normal(i, 1, n, m, D, dtype=dtype) for i, (n, m) in enumerate(((4, S), (2, T), (2, T), (4, S))))
    out, lse, grad_lse, sinks = nans(1, 4, S, D, dtype=dtype), nans(1, 4, S), normal(9, 1, 4, S), normal(8, 4)
    launch(flash_attention_kernel, backend, q, k, v, out, 0.3, causal, lse, window, sinks)
    wide = [x.double() for x in (q, k, v)]
    expected, expected_lse = plain_attention(
        *wide, Scores(scale=0.3, is_causal=causal, window=window), sinks_H=sinks.double())
    check(out, expected)
    check(lse, expected_lse)
    shared = (grad, q, k, v, out, lse)
    grads = flash_attention_backward_op.reference(
        *(x.double() for x in shared), grad_lse.double(), 0.3, causal, window)
    whole = torch.zeros(q.shape), nans(*k.shape, dtype=dtype), nans(*v.shape, dtype=dtype)
    launch(backward.flash_attention_backward_kernel, backend, *shared, *whole, 0.3, causal, window, grad_lse)
    parts = nans(*q.shape, dtype=dtype), nans(*k.shape, dtype=dtype), nans(*v.shape, dtype=dtype)
    excess = nans(1, 4, S)
    launch(backward.flash_attention_grad_q_kernel, backend, *shared, parts[0], excess, 0.3, causal, window, grad_lse)
    launch(backward.flash_attention_grad_kv_kernel, backend, grad, q, k, v, lse, excess, *parts[1:], 0.3, causal,
           window)
    for found in (whole, parts):
        for actual, one in zip(found, grads):
            check(actual, one)


@pytest.mark.parametrize("causal, dtype", [(True, torch.float32), (False, torch.bfloat16)], ids=["f32", "bf16"])
def test_masks_slopes_softcap_and_dropout(backend, causal, dtype):
    (q, grad), (k, v) = normal(1, 2, 2, 4, 7, 16, dtype=dtype), normal(2, 2, 2, 2, 33, 16, dtype=dtype)
    mask = normal(3, 2, 1, 1, 33) > -1 if causal else normal(3, 4, 7, 33)
    slopes = normal(4, 4).abs() if causal else None
    scores = Scores(scale=0.3, is_causal=causal, softcap=None if causal else 2.0, dropout_p=0.2, seed=torch.tensor(5))
    whole_mask, *others = variant(q, k, scores, mask, slopes)
    options = whole_mask.contiguous(), *others  # what Triton's interpreter is given is written back
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = plain_attention(*wide, scores, mask, slopes)
    grads = torch.autograd.grad(expected, wide, grad.double())
    out, lse, excess = torch.full_like(q, torch.nan), nans(2, 4, 7), nans(2, 4, 7)
    launch(flash_attention_kernel, backend, q, k, v, out, 0.3, causal, lse, None, None, *options)
    check(out, expected)
    check(lse, expected_lse)
    whole, parts = ([x.new_full(x.shape, torch.nan) for x in (q, k, v)] for _ in range(2))
    whole[0] = torch.zeros(q.shape)
    how = (0.3, causal, None)
    launch(backward.flash_attention_backward_kernel, backend, grad, q, k, v, out, lse, *whole, *how, None, *options)
    launch(backward.flash_attention_grad_q_kernel, backend, grad, q, k, v, out, lse, parts[0], excess, *how, None,
           *options)
    launch(backward.flash_attention_grad_kv_kernel, backend, grad, q, k, v, lse, excess, *parts[1:], *how, *options)
    for found in (whole, parts):
        for actual, one in zip(found, grads):
            check(actual.to(dtype), one)


@DTYPES
@pytest.mark.parametrize("K, G, T, D", [(1, 1, 1, 16), (2, 3, 33, 16), (1, 2, SPAN + 40, 8)])
def test_decode_attention(backend, dtype, K, G, T, D):
    q, k, v = normal(1, 2, K, G, D, dtype=dtype), normal(2, 2, K, T, D, dtype=dtype), normal(3, 2, K, T, D, dtype=dtype)
    allowed, sinks, place = normal(4, 2, T) > -1, normal(5, K * G), torch.tensor([T - 1 - T // 5])
    for options in ((None, None, None, None, None), (allowed, place, 20, sinks, None), (None, None, None, None, 2.0)):
        out, parts = nans(2, K, G, D, dtype=dtype), torch.zeros(2, K, -(-T // SPAN), G, D + 2)
        mask, at, window, sink, softcap = options
        launch(decode_attention_kernel, backend, q, k, v, out, parts, 0.3, mask, at, window,
               None if sink is None else sink.view(K, G), softcap)
        expected = decode_attention_op.reference(
            q.double().flatten(1, 2), k.double(), v.double(), mask, at, window, sink, 0.3, softcap)
        check(out.flatten(1, 2), expected)


@DTYPES
def test_paged_attention(backend, dtype):
    page, K, G, N, D = 4, 2, 2, 2, 16
    slots = SPAN_PAGES + 2
    table = torch.randperm(2 * slots, generator=torch.Generator().manual_seed(1)).int().view(2, slots)
    lengths = torch.tensor([page * slots - 3, 5], dtype=torch.int32)
    k, v = (normal(seed, 2 * slots, page, K, D, dtype=dtype) for seed in (2, 3))
    q, sinks = normal(4, 2, N, K * G, D, dtype=dtype), normal(5, K * G)
    rows = q.transpose(1, 2).reshape(2, K, G * N, D)
    for window, sink, softcap in ((None, None, None), (9, sinks, 2.0)):
        out, parts = nans(*rows.shape, dtype=dtype), torch.zeros(2, K, 2, G * N, D + 2)
        launch(paged_attention_kernel, backend, rows, k, v, table, lengths, out, parts, N, 0.3, window,
               None if sink is None else sink.repeat_interleave(N).view(K, G * N), softcap)
        expected = paged_attention_op.reference(
            q.double(), k.double(), v.double(), table, lengths, sink, 0.3, window, softcap)
        check(out.view(2, K * G, N, D).transpose(1, 2), expected)


def test_dropout(backend):
    """A block of the whole is the block of the whole's pattern, the same on every backend."""
    whole, part, cpu = nans(3, 9, 20), nans(3, 4, 6), nans(3, 9, 20)
    launch(attention_dropout_kernel, backend, whole, 0.25, 7, 0, 0, 20)
    launch(attention_dropout_kernel, backend, part, 0.25, 7, 5, 11, 20)
    attention_dropout_kernel(cpu, 0.25, 7, 0, 0, 20)
    assert torch.equal(part, whole[:, 5:, 11:17]) and torch.equal(whole, cpu)
    assert set(whole.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert abs((whole == 0).double().mean().item() - 0.25) < 0.05
