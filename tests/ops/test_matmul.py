"""Products with a stated accumulator against float64: shapes, gradients, precision, registration."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

import tessera as ts
from tessera.errors import ShapeError, UnsupportedError
from tessera.ops.matmul import gemm, matmul, matmul_op
from tessera.ops.registration import implementation

SHAPES = [((5, 7), (7, 9)), ((1, 1), (1, 1)), ((2, 3, 5, 7), (7, 9)), ((2, 3, 5, 7), (3, 7, 9)),
          ((4, 1, 5, 7), (3, 7, 2)), ((5, 7), (3, 7, 2)), ((65, 130), (130, 33)), ((0, 7), (7, 9))]

module = importlib.import_module("tessera.ops.matmul")  # ops.matmul is the function


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left, right", SHAPES)
def test_product_and_gradients(left, right, dtype, choice):
    a, b = normal(1, *left).to(dtype).requires_grad_(), normal(2, *right).to(dtype).requires_grad_()
    x, y = (each.detach().double().requires_grad_() for each in (a, b))
    expected = x @ y
    with implementation(choice):
        out = matmul(a, b)
    assert out.dtype == dtype
    bound = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    slopes = normal(3, *expected.shape).to(dtype)
    out.backward(slopes)
    expected.backward(slopes.double())
    for actual, wide in ((a.grad, x.grad), (b.grad, y.grad)):
        atol = 4 * bound * max(1.0, wide.abs().max().item() if wide.numel() else 0)
        torch.testing.assert_close(actual.double(), wide, rtol=bound, atol=atol)


def test_transposed_and_vectors():
    a, b = normal(4, 9, 6).bfloat16(), normal(5, 11, 9).bfloat16()
    torch.testing.assert_close(matmul(a.T, b.T).double(), a.T.double() @ b.T.double(), rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(matmul(a.T, b[0]).double(), a.T.double() @ b[0].double(), rtol=2**-8, atol=2**-8)
    assert matmul(b[0], b[1]).shape == ()


def test_one_rounding_and_accumulators():
    """4096 terms of 1 and one of 2^-8 or so: a bf16 running sum would stop at 256."""
    a, b = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    assert matmul(a, b).item() == 4096
    wide = matmul(a, b * 1.0078125, out_dtype="f32")
    assert wide.dtype == torch.float32 and wide.item() == 4096 * 1.0078125
    x = torch.tensor([[1e8, 1.0, -1e8]])
    assert matmul(x, torch.ones(3, 1), accumulate_dtype=ts.f64).item() == 1.0
    q = torch.full((2, 3), 127, dtype=torch.int8)
    assert matmul(q, q.T).dtype == torch.int32 and matmul(q, q.T)[0, 0] == 3 * 127**2
    with ts.precision(compute=ts.bf16):
        assert matmul(normal(6, 3, 4), normal(7, 4, 5)).dtype == torch.bfloat16


def test_gemm():
    x, weight = normal(8, 2, 3, 8), normal(9, 8, 5)
    torch.testing.assert_close(gemm(x, weight), x @ weight)
    with pytest.raises(ShapeError, match=r"b has 3 axes, \[1, 8, 5\]; expected 2"):
        gemm(x, weight[None])


def test_wrong_arguments():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with pytest.raises(ShapeError, match=r"b: \[5, 4\] given for a \[3, 4\]; expected \[\.\.\., 4, N\]"):
        matmul(a, b.T)
    with pytest.raises(ShapeError, match=r"b: torch\.int8 given for a torch\.float32"):
        matmul(a, b.to(torch.int8))
    for dtype, wanted in ((torch.float32, "bf16"), (torch.bfloat16, "int32"), (torch.int8, "f32")):
        with pytest.raises(UnsupportedError, match="accumulate_dtype:"):
            matmul(a.to(dtype), b.to(dtype), accumulate_dtype=wanted)


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("a_dtype, b_dtype, dtype", [
    (torch.bfloat16, torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float32), (torch.float16, torch.float16, torch.float16)])
def test_mixed_types_and_layouts(a_dtype, b_dtype, dtype, emulated, monkeypatch):
    """Each layout in memory has its kernel; a processor with instructions for the products leaves some to torch."""
    monkeypatch.setattr(module, "_EMULATED", frozenset((torch.bfloat16, torch.float16)) if emulated else frozenset())
    for turned_a, turned_b in itertools.product((False, True), repeat=2):
        a = normal(20, *((37, 21) if turned_a else (21, 37))).to(a_dtype)
        b = normal(21, *((18, 37) if turned_b else (37, 18))).to(b_dtype)
        a, b = a.T if turned_a else a, b.T if turned_b else b
        expected = a.double() @ b.double()
        bound = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
        if not emulated and dtype is not torch.float32:
            bound *= 4  # torch rounds the wider operand first
        torch.testing.assert_close(matmul_op(a, b, dtype).double(), expected, rtol=bound, atol=6 * bound)


def test_registration():
    a, b = normal(10, 2, 3, 4).bfloat16().requires_grad_(), normal(11, 2, 4, 5).bfloat16().requires_grad_()
    for left, right, dtype in ((a, b, torch.float32), (a, b, torch.bfloat16), (a[0], b[0], torch.float32)):
        torch.library.opcheck(matmul_op.registered, (left.detach().requires_grad_(), right.detach(), dtype))
    compiled = torch.compile(lambda a, b: matmul(a, b).float().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(a, b), (a, b)), torch.autograd.grad(matmul(a, b).float().sum(), (a, b)))
    x, y = normal(12, 2, 3, 4).double().requires_grad_(), normal(13, 2, 4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: matmul_op(x, y, torch.float64), (x, y))


def test_of_two_float_types_the_wider_is_taken():
    a, b = normal(30, 5, 17).bfloat16().requires_grad_(), normal(31, 17, 3).requires_grad_()
    out = matmul(a, b, accumulate_dtype=ts.f32)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.double(), a.double() @ b.double(), atol=1e-5, rtol=1e-5)
    grad_a, grad_b = torch.autograd.grad(out.sum(), (a, b))
    assert (grad_a.dtype, grad_b.dtype) == (a.dtype, b.dtype)
    torch.testing.assert_close(grad_b.double(), a.double().sum(0)[:, None].expand(17, 3), atol=1e-5, rtol=1e-5)
