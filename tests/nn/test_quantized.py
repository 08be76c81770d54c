"""Layers with 8-bit weights stay within their own error bounds of the float layers they were made from."""

from __future__ import annotations

import pytest
import torch

from tessera import nn
from tessera.errors import UnsupportedError
from tessera.nn.quantized import CastedLinear, Int8Linear


def float_layer(seed: int, d_in: int, d_out: int, dtype: torch.dtype, bias: bool) -> torch.nn.Linear:
    """A layer whose rows differ in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(d_out, d_in, generator=generator) * torch.logspace(-3, 3, d_out)[:, None])
        if bias:
            layer.bias.copy_(torch.randn(d_out, generator=generator))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed, d_in, d_out, bias", [(1, 1, 1, True), (2, 33, 9, False), (3, 200, 65, True)])
@pytest.mark.parametrize("make", [
    lambda layer: CastedLinear.from_float(layer), lambda layer: CastedLinear.from_float(layer, weight_dtype="fp8_e4m3"),
    lambda layer: CastedLinear.from_float(layer, weight_dtype="fp8_e5m2"), Int8Linear.from_float])
def test_error_bound(make, seed, d_in, d_out, bias, dtype):
    layer = float_layer(seed, d_in, d_out, dtype, bias)
    x = torch.randn(4, 3, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
    casted = make(layer)
    out = casted(x)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    error, bound = (out.double() - expected).abs(), casted.error_bound(x)
    assert out.dtype == dtype and (error <= bound).all()
    if d_in > 1:
        magnitude = x.double().abs() @ layer.weight.double().abs().T
        assert (bound <= 0.3 * magnitude + 2 * expected.abs().max() * torch.finfo(dtype).eps).all()  # it says something
        assert (error.amax((0, 1)) > 0).any()


def test_stored_small_and_saved():
    layer = float_layer(4, 64, 32, torch.float32, True)
    casted = CastedLinear.from_float(layer)
    assert casted.weight.nbytes * 4 == layer.weight.nbytes and not casted.weight.requires_grad
    other = CastedLinear(64, 32, activation_dtype="f32")
    other.load_state_dict(casted.state_dict())
    x = torch.randn(5, 64)
    assert torch.equal(other(x), casted(x))
    assert "64 -> 32" in repr(casted)


def test_random_layer_and_gradients():
    torch.manual_seed(5)
    layer = CastedLinear(256, 64, activation_dtype="f32")
    x = torch.randn(100, 256, requires_grad=True)
    out = layer(x)
    assert 0.8 < out.std() < 1.2
    out.sum().backward()
    assert x.grad.abs().sum() > 0 and torch.equal(layer.bias.grad, torch.full((64,), 100.0))
    wide = CastedLinear(256, 64, activation_dtype="f32", accumulate_dtype="f64")
    wide.load_state_dict(layer.state_dict())
    torch.testing.assert_close(wide(x), out, rtol=1e-5, atol=1e-5)
    assert CastedLinear(8, 4)(torch.randn(2, 8)).dtype == torch.bfloat16
    for wrong in ({"weight_dtype": "bf16"}, {"accumulate_dtype": "bf16"}):
        with pytest.raises(UnsupportedError, match="dtype: bf16 given"):
            CastedLinear(8, 4, **wrong)


def test_parameters_of_any_dtype():
    assert nn.Parameter(torch.zeros(2)).requires_grad and not nn.Parameter(torch.zeros(2), False).requires_grad
    for dtype in (torch.int8, torch.float8_e4m3fn):
        parameter = nn.Parameter(torch.zeros(2).to(dtype))
        assert not parameter.requires_grad and isinstance(parameter, nn.Parameter)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_modules(reduction):
    hidden, weight, targets = torch.randn(2, 5, 8), torch.randn(20, 8), torch.randint(20, (2, 5))
    targets[0, 1] = 7
    options = {"ignore_index": 7, "label_smoothing": 0.1, "reduction": reduction}
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), **options)
    torch.testing.assert_close(nn.CrossEntropyLoss(**options)(hidden @ weight.T, targets), expected)
    torch.testing.assert_close(nn.LinearCrossEntropyLoss(**options)(hidden, weight, targets), expected)
