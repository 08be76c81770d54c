"""Linear, norms, activations and look-ups against float64 formulas."""

import math

import pytest
import torch

from tessera import ops
from tessera.errors import UnsupportedError

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 33), (2, 1, 128)])
def test_norms(shape, dtype, bound):
    """Also with a large mean and with tiny values, and with f32 weights for narrower activations."""
    weight, bias = normal(1, shape[-1]), normal(2, shape[-1])
    for x in (normal(3, *shape), normal(4, *shape) * 1e-4, normal(5, *shape) + 30):
        x = x.to(dtype)
        wide = x.double()
        rms = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        centred = wide - wide.mean(-1, keepdim=True)
        layer = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double() + bias.double()
        for actual, expected in ((ops.rms_norm(x, weight, 1e-5), rms), (ops.layer_norm(x, weight, bias, 1e-5), layer)):
            assert actual.dtype == dtype
            error = (actual.double() - expected).abs().max()
            assert error <= 4 * bound * expected.abs().max() + (1e-4 if dtype is torch.float32 else 0)


@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_linear(dtype, bound):
    x, weight, bias = normal(1, 3, 5, 70), normal(2, 41, 70), normal(3, 41)
    actual = ops.linear(x.to(dtype), weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= 2 * bound * expected.abs().max()


@pytest.mark.parametrize("d_out", [1, 7, 12, 64])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (1, 1, 70), (2, 1, 70), (3, 5, 70), (16, 70), (17, 70), (0, 70)])
def test_linear_without_gradients(shape, d_out):
    """Few rows take another way through torch; also for a weight that is a transpose and rows that are strided."""
    x, weight, bias = normal(1, *shape), normal(2, d_out, 70), normal(3, d_out)
    expected = x.double() @ weight.double().T + bias.double()
    with torch.no_grad():
        for rows in (x, x.mT.contiguous().mT if x.dim() > 1 else x):
            for w in (weight, weight.T.contiguous().T):
                actual = ops.linear(rows, w, bias)
                assert actual.shape == (*shape[:-1], d_out)
                torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(ops.linear(rows, w), actual - bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, step", [(torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3), (torch.int8, 0)])
def test_quantized_rows(dtype, step):
    """Every entry is within half a step of itself (fp8) plus half the finest step of its row's largest."""
    weight = normal(4, 9, 50) * torch.logspace(-30, 30, 9)[:, None]
    weight[3] = 0
    quantized, scale = ops.quantize_rows(weight, dtype)
    assert quantized.dtype == dtype and scale.shape == (9,) and scale[3] == 1
    finest = {torch.float8_e4m3fn: 2**-9 / 448, torch.float8_e5m2: 2**-16 / 57344, torch.int8: 1 / 127}[dtype]
    largest = weight.abs().amax(-1, keepdim=True)
    error = (ops.dequantize_rows(quantized, scale, torch.float32) - weight).abs()
    assert (error <= 1.001 * (step * weight.abs() + finest * largest / 2)).all()
    x = normal(5, 2, 50)
    expected = x.double() @ (quantized.double() * scale.double()[:, None]).T
    torch.testing.assert_close(ops.linear(x, quantized, scale=scale).double(), expected, rtol=1e-5, atol=1e25)
    with pytest.raises(UnsupportedError, match=r"dtype: torch\.float16 given"):
        ops.quantize_rows(weight, torch.float16)


def test_fake_quantization_passes_gradients_through():
    weight = normal(6, 4, 30).requires_grad_()
    rounded = ops.fake_quantize_rows(weight, torch.float8_e4m3fn)
    expected = ops.dequantize_rows(*ops.quantize_rows(weight.detach(), torch.float8_e4m3fn), torch.float32)
    torch.testing.assert_close(rounded.detach(), expected, rtol=1e-6, atol=1e-7)
    (rounded * normal(7, 4, 30)).sum().backward()
    assert torch.equal(weight.grad, normal(7, 4, 30))


FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
}


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activations(name):
    x = normal(8, 100) * 3
    expected = torch.tensor([FORMULAS[name](value) for value in x.tolist()])
    torch.testing.assert_close(ops.ACTIVATIONS[name](x), expected, rtol=1e-5, atol=1e-6)
    up = normal(9, 100)
    torch.testing.assert_close(ops.gated(x, up, name), expected * up, rtol=1e-5, atol=1e-6)
    if name == "silu":
        assert torch.equal(ops.swiglu(x, up), ops.gated(x, up, name))


def test_embedding():
    table, ids = normal(10, 11, 6), torch.tensor([[3, 10], [0, 3]])
    assert torch.equal(ops.embedding(ids, table), table[ids])
    assert torch.equal(ops.embedding(ids, table, torch.bfloat16), table.bfloat16()[ids])
