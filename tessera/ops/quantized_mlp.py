"""A gated MLP with weights of 8 bits, for inference.

In: activations in fp8 with their scales, or floats; weights and scales from `quantize_swiglu`. Out: activations of the
same kind. Models with quantized MLPs call it.

Dims: D d_model, F d_ffn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tessera.errors import InputError
from tessera.function.decorator import function
from tessera.ops.mlp import gated
from tessera.ops.quantize import is_quantized, quantize_rows
from tessera.ops.quantized_linear import quantized_matmul, saturate
from tessera.types import Tensor, floating

_SCALES = ("gate_weight", "up_weight", "down_weight")


@function
def quantize_swiglu(
    w_gate: Tensor["D", "F", floating], w_up: Tensor["D", "F", floating], w_down: Tensor["F", "D", floating],
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor["D", "F"], Tensor["D", "F"], Tensor["F", "D"], dict[str, Any]]:
    """The weights of a gated MLP in 8 bits, with a scale for each output.

    Args:
        w_gate, w_up: [D, F], any float dtype.
        w_down: [F, D].
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        The three weights in `dtype`, and the scales that `swiglu_quantized` takes: "gate_weight" and "up_weight" [F],
        "down_weight" [D]; "input", "hidden" and "output" are 1 and to be set where activations are fp8. Rounding
        moves a weight by at most half a scale (int8), or by 1/16 (e4m3) or 1/8 (e5m2) of itself.
    """
    codes, scales = zip(*(quantize_rows(weight.detach().t(), dtype) for weight in (w_gate, w_up, w_down)))
    w_gate, w_up, w_down = (code.t().contiguous() for code in codes)
    return w_gate, w_up, w_down, {**dict(zip(_SCALES, scales)), "input": 1.0, "hidden": 1.0, "output": 1.0}


@function
def swiglu_quantized(
    x: Tensor["...", "D"], w_gate: Tensor["D", "F"], w_up: Tensor["D", "F"], w_down: Tensor["F", "D"],
    scales: Mapping[str, Any], beta: float = 1.0,
) -> Tensor["...", "D"]:
    """`swiglu` of an input and three 8-bit weights. Sums, the activation and the gating are in f32.

    Args:
        x: [..., D], fp8 in multiples of scales["input"], or a float dtype in its own.
        w_gate, w_up: [D, F], int8 or fp8.
        w_down: [F, D].
        scales: "gate_weight", "up_weight" and "down_weight": one number, or one for each output. For an fp8 x also
            "input", and "hidden" and "output", the scales that the gated values and the result are stored with
            (default 1); what is too large for them becomes the largest number.
        beta: the factor inside the sigmoid.

    Returns:
        [..., D] in x's dtype.

    Raises:
        InputError: a scale is missing.
        ShapeError, UnsupportedError: as of `quantized_matmul`.
    """
    needed = (*_SCALES, "input") if is_quantized(x.dtype) else _SCALES
    missing = [name for name in needed if name not in scales]
    if missing:
        raise InputError(f"scales: {', '.join(scales) or 'none'} given; expected {', '.join(missing)} as well")
    if not is_quantized(x.dtype):
        scales = {**scales, "input": 1.0, "hidden": 1.0, "output": 1.0}
    input_scale = float(scales["input"])
    gate = quantized_matmul(x, w_gate, input_scale=input_scale, weight_scale=scales["gate_weight"])
    up = quantized_matmul(x, w_up, input_scale=input_scale, weight_scale=scales["up_weight"])
    hidden_scale = float(scales.get("hidden", 1.0))
    hidden = saturate(gated(gate, up, "silu", beta) / hidden_scale, x.dtype)
    return quantized_matmul(
        hidden, w_down, input_scale=hidden_scale, weight_scale=scales["down_weight"], output_dtype=x.dtype,
        output_scale=float(scales.get("output", 1.0)))
