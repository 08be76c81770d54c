"""ops.linear: few rows, 16-bit types and 8-bit weights, by the kernel and by torch, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tessera import ops
from tessera.ops.linear import has_products_of
from tessera.ops.quantize import quantize_rows

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
