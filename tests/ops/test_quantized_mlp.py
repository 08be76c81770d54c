"""The gated MLP with 8-bit weights: against the same weights in float64, and near the float one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera import ops
from tessera.errors import InputError, ShapeError
from tests.ops.checks import TOLERANCE, normal

SHAPES = {"x": (2, 5, 24), "w_gate": (24, 40), "w_up": (24, 40), "w_down": (40, 24)}


def formula(x, w_gate, w_up, w_down):
    return (F.silu(x @ w_gate) * (x @ w_up)) @ w_down


def tensors():
    return [normal(i, *shape).detach() / (shape[0] ** 0.5 if i else 1) for i, shape in enumerate(SHAPES.values())]


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_activations(dtype, weight_dtype):
    x, *weights = tensors()
    *codes, scales = ops.quantize_swiglu(*weights, weight_dtype)
    assert all(code.dtype == weight_dtype for code in codes)
    actual = ops.swiglu_quantized(x.to(dtype), *codes, scales)
    wide = [code.double() * scales[name].double() for code, name in zip(codes, ("gate_weight", "up_weight",
                                                                                 "down_weight"))]
    expected = formula(x.to(dtype).double(), *wide)
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= 4 * TOLERANCE[dtype] * expected.abs().max()
    float_result = formula(x.double(), *(w.double() for w in weights))
    share = {torch.int8: 0.02, torch.float8_e4m3fn: 0.08, torch.float8_e5m2: 0.16}[weight_dtype]
    assert (expected - float_result).norm() <= share * float_result.norm()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_activations(dtype):
    """Values of any size, by their scales; the result is within fp8's roundings of the float one."""
    x, *weights = tensors()
    x = x * 1e4
    *codes, scales = ops.quantize_swiglu(*weights)
    hidden = F.silu(x @ weights[0]) * (x @ weights[1])
    expected = hidden @ weights[2]
    for name, values in (("input", x), ("hidden", hidden), ("output", expected)):
        scales[name] = values.abs().max().item() / 400
    actual = ops.swiglu_quantized((x / scales["input"]).to(dtype), *codes, scales)
    assert actual.dtype == dtype
    error = (actual.float() * scales["output"] - expected).norm() / expected.norm()
    assert error <= {torch.float8_e4m3fn: 0.1, torch.float8_e5m2: 0.2}[dtype]


def test_too_large_values_saturate():
    x, *weights = tensors()
    *codes, scales = ops.quantize_swiglu(*(w * 100 for w in weights))
    out = ops.swiglu_quantized(x.to(torch.float8_e4m3fn), *codes, scales)
    assert out.float().abs().max() == 448 and out.float().isfinite().all()


def test_beta_and_errors():
    x, *weights = tensors()
    *codes, scales = ops.quantize_swiglu(*weights)
    assert not torch.equal(ops.swiglu_quantized(x, *codes, scales, beta=2.0), ops.swiglu_quantized(x, *codes, scales))
    assert ops.swiglu_quantized(x[:0], *codes, scales).shape == (0, 5, 24)
    with pytest.raises(InputError, match="expected down_weight as well"):
        ops.swiglu_quantized(x, *codes, {"gate_weight": 1.0, "up_weight": 1.0})
    with pytest.raises(InputError, match="expected input as well"):
        ops.swiglu_quantized(
            x.to(torch.float8_e5m2), *codes, dict.fromkeys(("gate_weight", "up_weight", "down_weight"), 1.0))
    with pytest.raises(ShapeError, match=r"w_gate has D=24 .* but x has D=23"):
        ops.swiglu_quantized(x[..., :-1], *codes, scales)
