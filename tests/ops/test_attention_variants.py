"""attention and its variants against float64: one query at a time, whatever runs underneath."""

from __future__ import annotations

import math

import pytest
import torch

from tessera import ops
from tessera.errors import InputError, ShapeError, UnsupportedError
from tessera.ops.attention_scores import Scores, plain_attention
from tessera.ops.flash_attention import flash_attention_backward_op, flash_attention_op
from tessera.ops.registration import implementation

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
SHAPES = pytest.mark.parametrize("B,H,K,S,T,D", [
    (1, 1, 1, 1, 1, 8), (2, 4, 2, 7, 7, 16), (1, 6, 1, 33, 40, 24), (2, 2, 2, 130, 130, 64), (1, 3, 3, 70, 33, 5)])


def exact(q, k, v, *, scale=None, is_causal=False, window=None, mask=None, softcap=None, alibi=None, sinks=None):
    """softmax over the keys that each query sees, in float64, differentiable; zeros where it sees none."""
    S, T, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("bhsd,bhtd->bhst", q.double(), k) * (q.shape[-1]**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    age = (torch.arange(S) + T - S)[:, None] - torch.arange(T)
    if alibi is not None:
        scores = scores - alibi.double()[:, None, None] * age
    seen = torch.ones(S, T, dtype=torch.bool)
    seen = seen & (age >= 0) if is_causal else seen
    seen = seen & (age < window) if window is not None else seen
    if mask is not None:
        seen, scores = (seen & mask, scores) if mask.dtype == torch.bool else (seen, scores + mask.double())
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)), -1)
    # torch's softmax of a row of -inf is NaN, forward and backward
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., :T] @ v


def draw(B, H, K, S, T, D, dtype, seed):
    """q, k, v and a gradient; k and q are views that no loop may take for contiguous."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, H, D, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(B, K, T, 2 * D, generator=generator).to(dtype)[..., :D]
    v, grad = (torch.randn(B, n, m, D, generator=generator).to(dtype) for n, m in ((K, T), (H, S)))
    return q, k, v, grad


def check(function, tensors, grad, **kwargs):
    """Values and gradients of function(*tensors) against `exact`; tensors are q, k, v and others by name."""
    names, given = ("q", "k", "v", *tensors[3]), [*tensors[:3], *tensors[3].values()]
    leaves = [x.detach().requires_grad_() for x in given]
    wide = [x.detach().double().requires_grad_() for x in given]
    actual = function(*leaves[:3], **dict(zip(names[3:], leaves[3:])), **kwargs)
    expected = exact(*wide[:3], **dict(zip(names[3:], wide[3:])), **kwargs)
    tolerance = 3e-5 if given[0].dtype == torch.float32 else 2**-5
    assert actual.dtype == given[0].dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    for name, one, other in zip(names, torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(
            expected, wide, grad.double())):
        bound = tolerance * max(1.0, other.abs().max().item())
        assert one.isfinite().all() and (one.double() - other).abs().max() <= bound, name


@DTYPES
@SHAPES
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"is_causal": True, "window": 5, "scale": 0.3}], ids=str)
def test_flash_attention(B, H, K, S, T, D, kwargs, dtype):
    q, k, v, grad = draw(B, H, K, S, T, D, dtype, 10 * S + D)
    check(ops.flash_attention, (q, k, v, {}), grad, **kwargs)
    check(ops.flash_attention, (q, k, v, {"sinks": torch.linspace(-1, 2, H)}), grad, **kwargs)


@pytest.mark.parametrize("n_threads", [1, 8])
def test_flash_backward_with_one_program_a_head_or_one_a_block(n_threads):
    q, k, v, grad = draw(2, 4, 2, 70, 70, 16, torch.float32, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        check(ops.flash_attention, (q, k, v, {}), grad, is_causal=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("function", [ops.chunked_attention, ops.flash_attention, ops.attention])
@pytest.mark.parametrize("kwargs", [
    {"softcap": 2.0, "is_causal": True}, {"window": 9}, {"is_causal": True, "window": 4, "softcap": 1.5}], ids=str)
@DTYPES
def test_biases_and_caps(function, kwargs, dtype):
    q, k, v, grad = draw(2, 6, 2, 33, 40, 8, dtype, 3)
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(6, 1, 40, generator=generator)
    others = {"mask": bias, "alibi": torch.rand(6, generator=generator), "sinks": torch.randn(6, generator=generator)}
    check(function, (q, k, v, others), grad, **kwargs)


@pytest.mark.parametrize("chunk_size", [1, 7, 512])
@SHAPES
def test_chunked_attention(B, H, K, S, T, D, chunk_size):
    if chunk_size < 10 and S > 10:
        S, T = S // 8, T // 8
    q, k, v, grad = draw(B, H, K, S, T, D, torch.float32, S + D)
    mask = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(S)) > 0.4
    check(lambda *args, **kwargs: ops.chunked_attention(*args, chunk_size=chunk_size, **kwargs), (q, k, v, {}), grad,
          mask=mask, is_causal=True)


@pytest.mark.parametrize("shape", [(17,), (13, 17), (1, 13, 1), (3, 1, 1, 17), (3, 4, 13, 17)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks(shape, kind, is_causal):
    q, k, v, grad = draw(3, 4, 2, 13, 17, 8, torch.float32, 8)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    mask = mask > 0 if kind is torch.bool else mask
    for function in (ops.attention, ops.flash_attention, ops.chunked_attention):
        check(function, (q, k, v, {}), grad, mask=mask, is_causal=is_causal)


def test_documented_names():
    q, k, v, grad = draw(2, 4, 2, 33, 33, 16, torch.float32, 9)
    check(ops.grouped_query_attention, (q, k, v, {}), grad, is_causal=True)
    one = k[:, 0], v[:, 0]
    torch.testing.assert_close(ops.multi_query_attention(q, *one), ops.attention(q, k[:, :1], v[:, :1], is_causal=True))
    with pytest.raises(ShapeError, match=r"k_BTD has 4 axes, .*; expected 3"):
        ops.multi_query_attention(q, k, v)
    out = ops.flash_attention(q, k, v, block_q=32, block_k=128, block_d=16, precision="bf16", accumulate="fp32")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact(q, k, v), rtol=0.02, atol=0.02)


def test_flash_attention_with_a_cache():
    from tessera.nn import KVCache

    q, k, v, _ = draw(2, 4, 2, 12, 12, 16, torch.float32, 2)
    cache = KVCache(2, 64, 1, 2, 16, dtype="f32")
    parts = [ops.flash_attention(q[:, :, part], k[:, :, part], v[:, :, part], cache=cache)
             for part in (slice(0, 7), slice(7, 8), slice(8, 12))]
    torch.testing.assert_close(torch.cat(parts, 2).double(), exact(q, k, v, is_causal=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [ops.attention, ops.flash_attention, ops.chunked_attention])
@DTYPES
def test_queries_that_see_nothing(function, dtype):
    """Zero output, zero gradient and no NaN, for rows hidden by a mask and by more queries than keys."""
    q, k, v, grad = draw(2, 4, 2, 20, 9, 8, dtype, 6)
    mask = torch.rand(2, 1, 20, 9, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[0, :, 15] = False
    for kwargs in ({"is_causal": True}, {"mask": mask}, {"mask": mask, "softcap": 3.0}):
        check(function, (q, k, v, {}), grad, **kwargs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, **kwargs)
        out.backward(grad)
        row = (0, slice(None), 15) if "mask" in kwargs else (slice(None), slice(None), slice(11))
        assert not out[row].any() and not leaves[0].grad[row].any()
    hidden = function(q, k, v, mask=torch.full((9,), -math.inf))
    assert not hidden.any()


@pytest.mark.parametrize("function", [ops.attention, ops.flash_attention, ops.chunked_attention])
def test_extreme_values(function):
    q, k, v, _ = draw(1, 2, 2, 9, 9, 8, torch.float32, 12)
    k[:, :, 3] *= 1e30
    v[:, :, 5] *= 1e30
    for kwargs in ({"is_causal": True}, {"softcap": 5.0}):
        out = function(q, k, v, **kwargs)
        expected = exact(q, k, v, **kwargs)
        assert out.isfinite().all()
        assert ((out.double() - expected).abs() <= 1e-4 * expected.abs().amax(-1, keepdim=True) + 1e-4).all()


@pytest.mark.parametrize("B,S,T", [(0, 5, 5), (2, 0, 4), (2, 3, 0)])
def test_empty(B, S, T):
    for function in (ops.attention, ops.flash_attention, ops.chunked_attention):
        q = torch.randn(B, 4, S, 8, requires_grad=True)
        out = function(q, torch.randn(B, 2, T, 8), torch.randn(B, 2, T, 8), is_causal=True)
        assert out.shape == q.shape and not out.any()
        out.sum().backward()
        assert not q.grad.any()


def test_dropout_depends_on_place_and_seed_alone():
    q, k, v, _ = draw(2, 4, 2, 40, 40, 8, torch.float32, 5)
    ones = torch.ones_like(v)
    for function in (ops.attention, ops.flash_attention, ops.chunked_attention):
        first, again, other = (function(q, k, v, dropout_p=0.5, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
    parts = [ops.chunked_attention(q, k, v, size, dropout_p=0.5, seed=1) for size in (7, 40)]
    torch.testing.assert_close(*parts)
    torch.testing.assert_close(parts[0], ops.attention(q, k, v, dropout_p=0.5, seed=1, flash=False))
    mean = torch.stack([ops.chunked_attention(q, k, ones, dropout_p=0.25, seed=s) for s in range(20)]).mean()
    assert abs(mean.item() - 1) < 0.01
    assert not torch.equal(ops.attention(q, k, v, dropout_p=0.5), ops.attention(q, k, v, dropout_p=0.5))


def test_dropout_gradients():
    q, k, v = (x.double()[:1, :2, :6].requires_grad_() for x in draw(1, 2, 2, 6, 6, 4, torch.float32, 7)[:3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.chunked_attention(q, k, v, 4, dropout_p=0.4, seed=3, is_causal=True), (q, k, v))


@pytest.mark.parametrize("flash", [True, False])
def test_compiled_dropout_is_one_graph(flash):
    """The seed is drawn in the graph: other weights at each call, the same after manual_seed as without compiling."""
    q, k, v, grad = draw(1, 2, 1, 7, 9, 4, torch.float32, 3)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(q, k, v):
        return ops.attention(q, k, v, dropout_p=0.4, softcap=3.0, is_causal=True, flash=flash)

    torch._dynamo.reset()
    compiled, found = torch.compile(run, backend="aot_eager", fullgraph=True), []
    for function in (compiled, run):
        torch.manual_seed(5)
        out = function(*leaves)
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(compiled(*leaves), compiled(*leaves))
    torch._dynamo.reset()


def test_second_derivatives_of_chunks():
    q, k, v = (x.double()[:1, :, :3].requires_grad_() for x in draw(1, 2, 1, 3, 3, 2, torch.float32, 7)[:3])
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q, k, v, mask, slopes: ops.chunked_attention(
        q, k, v, 2, mask, softcap=2.0, alibi=slopes, dropout_p=0.4, seed=3), (q, k, v, mask, slopes), fast_mode=True)


def test_gradcheck_of_the_references():
    q, k, v = (x.double().requires_grad_() for x in draw(2, 4, 2, 3, 5, 4, torch.float32, 1)[:3])
    sinks = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = Scores(scale=0.4, is_causal=True, window=3, softcap=2.0)
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: plain_attention(q, k, v, scores, sinks_H=sinks), (q, k, v, sinks), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda *args: flash_attention_op.registered(*args, 0.4, True, 3, 0, 0), (q, k, v, sinks), fast_mode=True)


def test_registration():
    q, k, v, grad = draw(2, 4, 2, 9, 9, 8, torch.float32, 4)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(flash_attention_op.registered, (q, k, v, torch.randn(4), 0.3, True, 4, 0, 0))
    out, lse = flash_attention_op(q, k, v, None, 0.3, True, None, 0, 0)
    torch.library.opcheck(flash_attention_backward_op.registered, tuple(
        x.detach() if isinstance(x, torch.Tensor) else x for x in (grad, q, k, v, out, lse, None, 0.3, True, None)))


def test_compiled_whole_with_its_gradient():
    q, k, v, grad = draw(2, 4, 2, 33, 33, 8, torch.float32, 4)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(lambda *args: ops.attention(*args, is_causal=True) + 1, fullgraph=True,
                             backend="aot_eager")
    out = compiled(*leaves)
    out.backward(grad)
    check(ops.attention, (q, k, v, {}), grad, is_causal=True)
    expected = [x.detach().requires_grad_() for x in (q, k, v)]
    (ops.attention(*expected, is_causal=True) + 1).backward(grad)
    for one, other in zip(leaves, expected):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_plain_expression_is_one_flag_away():
    q, k, v, grad = draw(2, 4, 2, 33, 33, 8, torch.float32, 4)
    with implementation("reference"):
        check(ops.attention, (q, k, v, {}), grad, is_causal=True)
        check(ops.flash_attention, (q, k, v, {}), grad, is_causal=True)
    check(lambda *args, **kwargs: ops.attention(*args, flash=False, **kwargs), (q, k, v, {}), grad, is_causal=True)


def test_errors():
    q, k, v, _ = draw(2, 4, 2, 6, 6, 8, torch.float32, 4)
    with pytest.raises(ShapeError, match=r"q_BHSD has G\*K=3 .* but k_BKTD has K=2"):
        ops.attention(q[:, :3], k, v)
    with pytest.raises(InputError, match="expected one dtype"):
        ops.attention(q.bfloat16(), k, v)
    with pytest.raises(ShapeError, match=r"mask has S=5 .* but q_BHSD has S=6 .*; 1 would fit as well"):
        ops.attention(q, k, v, torch.ones(5, 6))
    with pytest.raises(ShapeError, match=r"sinks has G\*K=3 .* so G\*K is 4"):
        ops.flash_attention(q, k, v, sinks=torch.ones(3))
    with pytest.raises(InputError, match=r"dropout_p: 1.0 given"):
        ops.attention(q, k, v, dropout_p=1.0)
    with pytest.raises(InputError, match=r"scale: 0.0 given"):
        ops.attention(q, k, v, scale=0.0)
    with pytest.raises(InputError, match="window: 0 given"):
        ops.attention(q, k, v, window=0)
    with pytest.raises(InputError, match="chunk_size: 0 given"):
        ops.chunked_attention(q, k, v, 0)
    with pytest.raises(UnsupportedError, match="block_d: 4 given; expected 8"):
        ops.flash_attention(q, k, v, block_d=4)
    with pytest.raises(UnsupportedError, match="accumulate: 'bf16' given"):
        ops.flash_attention(q, k, v, accumulate="bf16")
    with ops.invariant.invariant(), pytest.raises(UnsupportedError, match="sinks given in the deterministic mode"):
        ops.attention(q, k, v, sinks=torch.ones(4))
