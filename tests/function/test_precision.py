"""precision: products and sums are taken in the stated types, by comparison with the same arithmetic written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tessera as ts
from tessera import Tensor
from tessera.errors import InputError, UnsupportedError
from tessera.function.precision import active_precision


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_f64(product, *operands: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """The product of operands rounded to the compute type, exact, then rounded."""
    return product(*(x.to(compute).double() for x in operands)).to(compute)


X, W, B = randn(3, 5, 16), randn(16, 7, seed=1), randn(7, seed=2)
PRODUCTS = {
    "operator": (lambda x, w: x @ w, X, W),
    "matmul": (torch.matmul, X, W),
    "method": (lambda x, w: x.matmul(w), X, W),
    "mm": (torch.mm, X[0], W),
    "bmm": (torch.bmm, X, randn(3, 16, 2)),
    "linear": (F.linear, X, W.t(), B),
    "einsum": (lambda x, w: torch.einsum("bsd,df->bsf", x, w), X, W),
    "addmm": (torch.addmm, B, X[0], W),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), X, W),
    "attention": (F.scaled_dot_product_attention, X, X, X),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("compute", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("accumulate", ["f32", "f64"])
def test_products(name, compute, accumulate) -> None:
    product, *operands = PRODUCTS[name]
    with ts.precision(compute=compute, accumulate=accumulate):
        got = product(*operands)
    compute = ts.types.dtype_of(compute).torch
    assert got.dtype is compute
    exact = in_f64(product, *operands, compute=compute)
    if accumulate == "f64":  # rounded once, at the end
        assert torch.equal(got, exact)
    else:
        error = (got.double() - exact.double()).abs().max()
        assert error <= torch.finfo(compute).eps * exact.double().abs().max() * (4 if name == "attention" else 2)


def test_module_products_and_gradients() -> None:
    layer = torch.nn.Linear(16, 7)
    with ts.precision(compute=ts.f32, accumulate=ts.f64):
        out = layer(X)
    reference = F.linear(X.double(), layer.weight.double(), layer.bias.double())
    assert torch.equal(out, reference.float())
    got = torch.autograd.grad(out.square().sum(), layer.weight)[0]
    want = torch.autograd.grad(reference.square().sum(), layer.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_operations_with_kernels_follow(rows, grad) -> None:
    x, w = randn(rows, 64), randn(9, 64, seed=3)
    with torch.set_grad_enabled(grad):
        with ts.precision(compute="bf16"):
            products = ts.ops.linear(x, w), ts.ops.matmul(x, w.t()), ts.nn.Linear(64, 9)(x)
        with ts.precision(compute="f32", accumulate="f64"):
            exact = ts.ops.linear(x, w), ts.ops.matmul(x, w.t())
    assert all(y.dtype is torch.bfloat16 for y in products)
    want = in_f64(F.linear, x, w, compute=torch.bfloat16)
    for y in products[:2]:
        torch.testing.assert_close(y, want, rtol=0.01, atol=0.1)
    assert all(torch.equal(y, in_f64(F.linear, x, w, compute=torch.float32)) for y in exact)


@pytest.mark.parametrize("reduction", [
    lambda x: x.sum(-1), lambda x: torch.mean(x, 0), lambda x: x.cumsum(-1), lambda x: x.var(-1),
    lambda x: torch.linalg.vector_norm(x, dim=-1), lambda x: torch.logsumexp(x, -1)])
def test_sums(reduction) -> None:
    x = torch.cat([torch.tensor([1e8]), torch.ones(999), torch.tensor([-1e8])]).expand(2, -1)
    with ts.precision(compute="f32", accumulate="f64"):
        got = reduction(x)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, reduction(x.double()).float(), rtol=0, atol=0)


def test_a_stated_dtype_and_integers_and_elementwise_keep_their_types() -> None:
    with ts.precision(compute="bf16"):
        assert X.sum(dtype=torch.float64).dtype is torch.float64
        assert torch.arange(5).sum() == 10 and torch.arange(5).sum().dtype is torch.int64
        assert (X * 2).dtype is torch.float32
        with pytest.raises(UnsupportedError, match="matmul: out= cannot be given"):
            torch.matmul(X, W, out=torch.empty(3, 5, 7))


def test_innermost_holds_and_everything_closes() -> None:
    assert active_precision() is None
    outer = ts.precision(compute="bf16 @accum(f64)")
    with outer as types:
        assert (types.compute, types.accumulate) == (torch.bfloat16, torch.float64)
        with ts.precision(compute=torch.float16):
            assert (X @ W).dtype is torch.float16 and active_precision().compute is torch.float16
        with pytest.raises(ZeroDivisionError), ts.precision(compute=torch.float16):
            _ = 1 / 0
        assert active_precision() is types
        with outer:
            assert (X @ W).dtype is torch.bfloat16
    assert active_precision() is None and (X @ W).dtype is torch.float32


def test_decorator_checks_shapes_recurses_and_compiles() -> None:
    @ts.precision(compute=ts.bf16)
    def power(x: Tensor["N", "N"], n: int) -> Tensor["N", "N", ts.bf16]:
        return x @ x if n == 1 else power(x.float() @ x.float(), n - 1)

    x = randn(4, 4)
    assert power(x, 3).dtype is torch.bfloat16 and active_precision() is None
    with pytest.raises(ts.ShapeError, match="N=5"):
        power(randn(4, 5), 1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: power(x, 1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), power(x, 1))
    torch._dynamo.reset()


@pytest.mark.parametrize("options, problem", [
    ({"compute": ts.int8}, "compute: int8 given; expected f16, bf16, f32 or f64"),
    ({"compute": ts.fp8}, "compute: fp8_e4m3 given"),
    ({"compute": ts.f32, "accumulate": ts.bf16}, "accumulate: bf16 given with compute=f32; expected f32 or f64"),
    ({"compute": ts.f64, "accumulate": ts.f32}, "expected f64"),
    ({"compute": ts.bf16, "accumulate": ts.int32}, "accumulate: int32 given"),
    ({"compute": "bf17"}, "dtype: 'bf17'"),
])
def test_types_that_cannot_be(options, problem) -> None:
    with pytest.raises(InputError) as caught:
        ts.precision(**options)
    assert problem in str(caught.value)


def test_stable_mean_of_squares_sqrt_and_divide() -> None:
    x = randn(2, 3, 8) * 1e30
    with ts.precision(compute=ts.f32, accumulate=ts.f64):
        mean = ts.stable.mean_of_squares(x, dim=-1, keepdim=True)
        root = ts.stable.sqrt(mean)
        normed = ts.stable.divide(x, root)
    assert (mean.dtype, root.dtype, normed.dtype) == (torch.float64, torch.float32, torch.float32)
    torch.testing.assert_close(mean, x.double().square().mean(-1, keepdim=True))
    torch.testing.assert_close(normed, F.rms_norm(x.double(), (8,), eps=0.0).float())


def test_stable_gradients_at_zero() -> None:
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    root = ts.stable.sqrt(x)
    assert root.tolist() == [0.0, 2.0]
    assert torch.autograd.grad(root.sum(), x)[0].tolist() == [0.0, 0.25]
    y = torch.tensor([0.0, 2.0], requires_grad=True)
    quotient = ts.stable.divide(x, y)
    assert quotient.tolist() == [0.0, 2.0]
    grads = torch.autograd.grad(quotient.sum(), [x, y])
    assert [g.tolist() for g in grads] == [[0.0, 0.5], [0.0, -1.0]]
    assert ts.stable.sqrt(torch.tensor(-1.0)).isnan()
