"""Linear maps with 8-bit weights and fp8 products against float64; rounding, gradients, registration."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

import tessera as ts
from tessera.errors import InputError, ShapeError
from tessera.ops import quantized_linear as module
from tessera.ops.quantize import context, dequantize_rows, quantize_rows
from tessera.ops.quantized_linear import casted_linear, int8_linear, mul_fp8, quantized_matmul, saturate, swish_fp8
from tessera.ops.registration import implementation

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)]
STORAGE = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("shape, d_out, has_bias", [((1, 1), 1, True), ((2, 5, 33), 7, False), ((70, 100), 65, True)])
def test_casted_linear(shape, d_out, has_bias, dtype, bound, storage, choice):
    x, weight, scale = normal(1, *shape).to(dtype), *quantize_rows(normal(2, d_out, shape[-1]), storage)
    bias = normal(3, d_out).requires_grad_() if has_bias else None
    wide = x.double().requires_grad_()
    wide_bias = bias.detach().double().requires_grad_() if has_bias else None
    expected = torch.nn.functional.linear(wide, dequantize_rows(weight, scale, torch.float64), wide_bias)
    x.requires_grad_()
    with implementation(choice):
        out = casted_linear(x, weight, scale, bias)
    limit = expected.abs().max().item() + 1
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound * limit)
    slopes = normal(4, *out.shape).to(dtype)
    out.backward(slopes)
    expected.backward(slopes.double())
    largest = wide.grad.abs().max().item()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=4 * bound, atol=4 * bound * largest)
    if has_bias:
        torch.testing.assert_close(bias.grad.double(), wide_bias.grad, rtol=bound, atol=8 * bound)


@pytest.mark.parametrize("has_bytes", [False, True])
@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("shape, d_out", [((1, 1), 1), ((2, 5, 33), 7), ((9, 2100), 5)])
def test_int8_linear(shape, d_out, dtype, bound, has_bytes):
    """Integer sums are exact, whichever way they are taken; rows of zeros; more terms than f32 sums exactly."""
    x = normal(5, *shape).to(dtype)
    x.view(-1, shape[-1])[0] = 0
    weight, scale = quantize_rows(normal(6, d_out, shape[-1]), torch.int8)
    bias = normal(7, d_out)
    rounded, x_scale = quantize_rows(x.double(), torch.int8)
    integers = rounded.long() @ weight.long().T
    expected = integers.double() * x_scale.double()[..., None] * scale.double() + bias.double()
    with mock.patch.object(module, "_has_byte_products", return_value=has_bytes):
        out = int8_linear(x, weight, scale, bias)
    limit = 1e-6 if dtype is torch.float32 else bound
    torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)
    with implementation("reference"):
        torch.testing.assert_close(int8_linear(x, weight, scale, bias).double(), expected, rtol=bound, atol=bound * 4)


def test_int8_linear_passes_gradients_straight_through():
    x = normal(8, 4, 30).requires_grad_()
    weight, scale = quantize_rows(normal(9, 6, 30), torch.int8)
    slopes = normal(10, 4, 6)
    expected = slopes @ dequantize_rows(weight, scale, torch.float32)
    for choice in ("auto", "reference"):
        with implementation(choice):
            (gradient,) = torch.autograd.grad(int8_linear(x, weight, scale), x, slopes)
        torch.testing.assert_close(gradient, expected)


def test_gradcheck():
    x, bias = normal(11, 3, 5).double().requires_grad_(), normal(12, 4).double().requires_grad_()
    weight, scale = quantize_rows(normal(13, 4, 5), torch.int8)
    for choice in ("auto", "reference"):
        with implementation(choice):
            assert torch.autograd.gradcheck(lambda x, bias: casted_linear(x, weight, scale, bias), (x, bias))


@pytest.mark.parametrize("storage", STORAGE)
def test_quantized_matmul(storage):
    """fp8 activations, a scale for all or each column, fp8 results that saturate."""
    x = normal(14, 2, 3, 20).to(torch.float8_e4m3fn)
    weight, scale = quantize_rows(normal(15, 7, 20), storage)
    wide = x.double() @ (weight.double().T * scale.double())
    out = quantized_matmul(x, weight.T, input_scale=0.5, weight_scale=scale)
    torch.testing.assert_close(out.double(), 0.5 * wide, rtol=1e-5, atol=1e-5)
    out = quantized_matmul(x, weight.T, weight_scale=scale, output_dtype=ts.fp8, output_scale=0.25)
    expected = saturate((4 * wide).float(), torch.float8_e4m3fn)
    assert out.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(out.float(), expected.float(), rtol=2.0**-3, atol=2.0**-9)
    huge = quantized_matmul(x, weight.T, weight_scale=1e6, output_dtype="fp8_e4m3").float()
    assert huge.abs().max() == 448 and huge.isfinite().all()


def test_fp8_products():
    a, b = (normal(seed, 50).mul(8).to(torch.float8_e4m3fn) for seed in (16, 17))
    torch.testing.assert_close(mul_fp8(a, b).float(), saturate(a.float() * b.float(), a.dtype).float())
    with context({"hidden": 4.0}):
        torch.testing.assert_close(mul_fp8(a, b).float(), saturate(a.float() * b.float() / 4, a.dtype).float())
    expected = (a.double() * torch.sigmoid(1.5 * a.double())).to(torch.float8_e4m3fn)
    assert torch.equal(swish_fp8(a, 1.5).float(), expected.float())
    with pytest.raises(InputError, match="scales: 'hidden' is 0"), context({"hidden": 0}):
        pass


def test_registration_and_compile():
    weight, scale = quantize_rows(normal(18, 4, 6), torch.int8)
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = normal(19, 3, 6).to(dtype).requires_grad_(), normal(20, 4).requires_grad_()
        torch.library.opcheck(module._casted_linear_op.registered, (x, weight, scale, bias))
        torch.library.opcheck(module._int8_linear_op.registered, (x, weight, scale, None))
    compiled = torch.compile(lambda x: casted_linear(x, weight, scale).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x), x), torch.autograd.grad(casted_linear(x, weight, scale).sum(), x))


def test_the_scale_of_a_weight_is_a_constant():
    weight, scale = quantize_rows(normal(22, 4, 6), torch.int8)
    for linear, way in itertools.product((casted_linear, int8_linear), ("auto", "reference")):
        x, slopes = normal(23, 3, 6).requires_grad_(), scale.clone().requires_grad_()
        with implementation(way):
            linear(x, weight, slopes).sum().backward()
        assert slopes.grad is None and x.grad is not None


def test_empty_and_wrong():
    weight, scale = quantize_rows(normal(21, 4, 6), torch.int8)
    for linear in (casted_linear, int8_linear):
        assert linear(torch.zeros(0, 6), weight, scale).shape == (0, 4)
        with pytest.raises(ShapeError, match=r"weight has K=6 .* but x has K=5"):
            linear(torch.zeros(3, 5), weight, scale)
        with pytest.raises(ShapeError, match=r"scale has N=3 .* but weight has N=4"):
            linear(torch.zeros(3, 6), weight, scale[:3])
        with pytest.raises(ShapeError, match="weight is torch"):
            linear(torch.zeros(3, 6), weight.float(), scale)
    with pytest.raises(ShapeError, match="weight is torch"):
        int8_linear(torch.zeros(3, 6), weight.to(torch.float8_e4m3fn), scale)
