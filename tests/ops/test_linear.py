"""ops.linear: few rows, 16-bit types and 8-bit weights, by the kernel and by torch, against float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

import tessera as ts
from tessera import ops
from tessera.ops.linear import _LINEAR
from tessera.ops.matmul import has_products_of
from tessera.ops.quantize import quantize_rows
from tests.ops.checks import check_against_float64, check_compiled, layouts

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize(("x_dtype", "w_dtype"), list(itertools.product(TOLERANCE, TOLERANCE)))
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_against_float64(rows, x_dtype, w_dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 33, generator=generator).to(x_dtype)
    weight = torch.randn(19, 33, generator=generator).to(w_dtype)
    bias = torch.randn(19, generator=generator)
    for given in (None, bias):
        expected = x.double() @ weight.double().t() + (0 if given is None else given.double())
        tolerance = 10 * max(TOLERANCE[x_dtype], TOLERANCE[w_dtype])
        for grad in (False, True):
            wanted = weight.clone().requires_grad_(grad)
            actual = ops.linear(x, wanted, given)
            assert actual.dtype is x_dtype and actual.requires_grad is grad
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 30])
def test_eight_bit_weights(rows, x_dtype, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, 48, generator=generator).to(x_dtype)
    quantized, scale = quantize_rows(torch.randn(21, 48, generator=generator), dtype)
    bias = torch.randn(21, generator=generator).to(x_dtype)
    expected = x.double() @ (quantized.double() * scale.double()[:, None]).t() + bias.double()
    tolerance = 4 * TOLERANCE[x_dtype]
    torch.testing.assert_close(ops.linear(x, quantized, bias, scale).double(), expected, rtol=tolerance, atol=tolerance)
    x.requires_grad_()
    ops.linear(x, quantized, bias, scale).sum().backward()
    slope = (quantized.double() * scale.double()[:, None]).sum(0).expand(2, rows, 48)
    torch.testing.assert_close(x.grad.double(), slope, rtol=0.05, atol=0.05)


def test_no_rows_and_views():
    weight = torch.randn(7, 12)
    assert ops.linear(torch.empty(0, 12), weight).shape == (0, 7)
    x = torch.randn(24, 3).t()[:, ::2]
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.linear(x[0], weight), weight @ x[0], rtol=1e-5, atol=1e-5)


def test_what_the_processor_has():
    assert has_products_of(torch.float32)
    has = torch.cpu.get_capabilities()
    if has.get("architecture") == "x86_64":
        assert has_products_of(torch.bfloat16) is (has["avx512_bf16"] or has["amx_bf16"])


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def is_emulated(request, monkeypatch):
    """As on a processor without instructions for products of 16 bits, and on one that has them."""
    module = importlib.import_module("tessera.ops.matmul")  # ops.matmul is the function
    monkeypatch.setattr(module, "_EMULATED", frozenset(TOLERANCE) - {torch.float32} if request.param else frozenset())
    return request.param


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, d_in, d_out", [((1,), 1, 1), ((7,), 33, 19), ((2, 33), 65, 40), ((), 5, 7)])
def test_gradients_in_16_bits(rows, d_in, d_out, w_dtype, is_emulated):
    """Activations in bf16, weights in f32 or bf16: values and gradients, in any layout."""
    generator = torch.Generator().manual_seed(d_in)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((*rows, d_in), (d_out, d_in), (d_out,)))
    # Kernels round a weight's gradient once, to its type; torch rounds it, and the weight, to bf16 first.
    factor = 1 if is_emulated else 400 if w_dtype is torch.float32 else 2
    for view in layouts(x.bfloat16()):
        leaves = (view, weight.to(w_dtype).requires_grad_(), bias.to(w_dtype).requires_grad_())
        check_against_float64(ops.linear, torch.nn.functional.linear, leaves, factor=factor)


def test_weights_learn_in_f32():
    """A weight's gradient is rounded once, to f32: 2^-12 beside 1 would be lost in bf16."""
    if has_products_of(torch.bfloat16):
        pytest.skip("torch's products round it to bf16")
    x, weight = torch.tensor([[1.0], [2.0**-12]]).bfloat16(), torch.zeros(1, 1, requires_grad=True)
    ops.linear(x, weight).sum().backward()
    assert weight.grad.item() == 1 + 2.0**-12


def test_frozen_and_second_derivatives():
    x, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(5, 4)
    out = ops.linear(x, weight)
    (slope,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    slope.float().sum().backward()
    expected = (2 * weight.T @ weight).sum(0).expand(3, 4)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.05, atol=0.2)
    assert weight.grad is None


def test_registered_operation():
    x, weight, bias = torch.randn(2, 3, 4).bfloat16(), torch.randn(5, 4), torch.randn(5)
    for given in (None, bias):
        torch.library.opcheck(_LINEAR.registered, (
            x.requires_grad_(), weight.requires_grad_(), given, True))
    check_compiled(lambda x, w, b: ops.linear(x, w, b), (x, weight, bias.requires_grad_()))


def test_precision_of_products():
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with ts.precision(compute="bf16"):
        out = ops.linear(x, weight)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), x @ weight.T, rtol=0.02, atol=0.05)
    out.float().sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(20, 8), rtol=0.02, atol=0.05)
