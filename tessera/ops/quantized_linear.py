"""Linear maps with weights of 8 bits, and the fp8 operations between them.

In: activations, and weights as `ops.quantize_rows` stores them. Out: activations. nn.CastedLinear, nn.Int8Linear and
the quantized MLP call them.

Dims: M rows (all leading dims flattened), K inputs, N outputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from tessera.errors import UnsupportedError
from tessera.function.decorator import function
from tessera.ops.kernels.casted_linear import (
    casted_linear_kernel,
    int8_product_kernel,
    int8_rows_kernel,
)
from tessera.ops.kernels.quantize import quantize_kernel
from tessera.ops.quantize import context_scale, dequantize_rows, fake_quantize_rows, is_quantized
from tessera.ops.registration import Operation
from tessera.types import DType, Tensor, dtype_of, fp8_e4m3, fp8_e5m2, int8

_FEW_ROWS = 16  # up to so many, one launch that reads the weight once


@function
def casted_linear(
    x: Tensor["...", "K"], weight: Tensor["N", "K", int8 | fp8_e4m3 | fp8_e5m2],
    scale: Tensor["N"] | Tensor["N", 1], bias: Tensor["N"] | None = None,
) -> Tensor["...", "N"]:
    """x @ (weight * scale)^T + bias, with the weight read in its 8 bits and sums in f32.

    Against the float weight: |error| <= |x| @ e^T, where e is the rounding of each weight (ops.quantize), plus one
    rounding to x's dtype. The weight and its scale are constants: gradients go to x and bias.

    Args:
        x: [..., K], a float dtype.
        weight: [N, K], int8, float8_e4m3fn or float8_e5m2.
        scale: [N] or [N, 1] f32, of each row of the weight.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ShapeError: the shapes do not fit, or the weight has another dtype.
    """
    out_MN = _casted_linear_op(x.reshape(-1, x.shape[-1]), weight, scale.reshape(-1), bias)
    return out_MN.view(*x.shape[:-1], weight.shape[0])


@function
def int8_linear(
    x: Tensor["...", "K"], weight: Tensor["N", "K", int8], scale: Tensor["N"] | Tensor["N", 1],
    bias: Tensor["N"] | None = None,
) -> Tensor["...", "N"]:
    """`casted_linear` with x rounded to int8 as well, a scale for each row: sums of integers, which are exact.

    Against `casted_linear`: |error| <= max|x| / 254 * sum|weight * scale| of each row of x and of the weight, plus
    one rounding (LLM.int8(), arXiv:2208.07339, without its outliers). Gradients pass straight through the rounding.

    Args, returns, raises: as `casted_linear`; the weight is int8.
    """
    out_MN = _int8_linear_op(x.reshape(-1, x.shape[-1]), weight, scale.reshape(-1), bias)
    return out_MN.view(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
@function
def quantized_matmul(
    x: Tensor["...", "K"], weight: Tensor["K", "N"], *, input_scale: float = 1.0,
    weight_scale: Tensor["N"] | Tensor[1] | Tensor[()] | float | int = 1.0,
    output_dtype: DType | torch.dtype | str = torch.float32, output_scale: float = 1.0,
) -> Tensor["...", "N"]:
    """(x * input_scale) @ (weight * weight_scale) / output_scale, sums in f32, rounded once; for inference.

    Args:
        x: [..., K], 8-bit or float.
        weight: [K, N], int8 or fp8.
        input_scale: what x's numbers are multiples of.
        weight_scale: what the weight's numbers are multiples of; [N] for one each column.
        output_dtype: fp8 saturates at its largest number, as int8 does.
        output_scale: what the result's numbers are multiples of.

    Returns:
        [..., N] in output_dtype.

    Raises:
        ShapeError: the shapes do not fit.
        UnsupportedError: the weight has another dtype.
    """
    if not is_quantized(weight.dtype):
        raise UnsupportedError(f"weight: {weight.dtype} given; expected int8, float8_e4m3fn or float8_e5m2")
    scale_N = torch.as_tensor(weight_scale, dtype=torch.float32, device=x.device) * (input_scale / output_scale)
    scale_N = scale_N.reshape(-1).expand(weight.shape[-1]).contiguous()
    wide = x.float() if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) else x
    out_MN = _quantized_matmul_op(wide.reshape(-1, wide.shape[-1]), weight, scale_N)
    return saturate(out_MN.view(*x.shape[:-1], weight.shape[1]), dtype_of(output_dtype).torch)


@function
def swish_fp8(x: Tensor["..."], beta: float = 1.0) -> Tensor["..."]:
    """x * sigmoid(beta * x) of fp8 numbers, computed in f32, rounded once, saturated."""
    wide = x.float()
    return saturate(wide * torch.sigmoid(beta * wide), x.dtype)


@function
def mul_fp8(a: Tensor["..."], b: Tensor["..."]) -> Tensor["..."]:
    """a * b of fp8 numbers, in multiples of the "hidden" scale of `ops.quantize.context`; in f32, rounded once."""
    return saturate(a.float() * b.float() / context_scale("hidden"), a.dtype)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a narrower dtype, where what is too large becomes its largest number, not NaN; NaN stays (int8: 0)."""
    if dtype is torch.int8:
        return x.nan_to_num(nan=0.0).round().clamp(-128, 127).to(dtype)
    limit = torch.finfo(dtype).max
    return (x.clamp(-limit, limit) if limit < torch.finfo(x.dtype).max else x).to(dtype)


@functools.cache
def _has_byte_products() -> bool:
    """Whether the processor has dot products of bytes (VNNI, or the ones of AArch64)."""
    return torch.cpu._is_vnni_supported() or "aarch64" in torch.__config__.show().lower()


def _casted_linear(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    out_MN = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
    casted_linear_kernel(x_MK, weight_NK, scale_N, out_MN, bias_N)
    return out_MN


def _casted_linear_reference(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    wide = torch.float64 if x_MK.dtype is torch.float64 else torch.float32
    out_MN = F.linear(x_MK.to(wide), dequantize_rows(weight_NK, scale_N.detach(), wide))
    return (out_MN if bias_N is None else out_MN + bias_N.to(wide)).to(x_MK.dtype)


def _quantized_matmul(x_MK: Tensor, weight_KN: Tensor, scale_N: Tensor) -> Tensor:
    out_MN = _fake_matmul(x_MK, weight_KN, scale_N)
    casted_linear_kernel(x_MK, weight_KN.t(), scale_N, out_MN)
    return out_MN


def _fake_matmul(x_MK: Tensor, weight_KN: Tensor, scale_N: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_KN.shape[1], dtype=torch.float32)


def _int8_linear(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    out_MN = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
    if x_MK.is_cpu and x_MK.shape[0] <= _FEW_ROWS:
        int8_rows_kernel(x_MK, weight_NK, scale_N, out_MN, bias_N)
        return out_MN
    quantized_MK = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
    x_scale_M = x_MK.new_empty(x_MK.shape[0], dtype=torch.float32)
    quantize_kernel(x_MK, quantized_MK, x_scale_M, None, "int8")
    in_floats = x_MK.is_cpu and not _has_byte_products()
    int8_product_kernel(quantized_MK, x_scale_M, weight_NK, scale_N, out_MN, bias_N, in_floats)
    return out_MN


def _int8_linear_reference(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Tensor:
    wide = x_MK if x_MK.dtype is torch.float64 else x_MK.float()
    rounded_MK = fake_quantize_rows(wide, torch.int8)
    return _casted_linear_reference(rounded_MK, weight_NK, scale_N, bias_N).to(x_MK.dtype)


def _backward(
    saved: list[Tensor], grad_MN: Tensor,
) -> tuple[Tensor | None, ...]:
    """To x: (grad * scale) @ weight; to bias: the sum over rows."""
    weight_NK, scale_N, has_bias = saved
    scaled_MN = grad_MN * scale_N.to(grad_MN.dtype)
    d_bias_N = grad_MN.sum(0) if has_bias else None
    return scaled_MN @ weight_NK.to(grad_MN.dtype), None, None, d_bias_N


def _operation(name: str, kernel: object, reference: object) -> Operation:
    return Operation(
        f"{name}(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", kernel=kernel,  # type: ignore
        reference=reference,  # type: ignore
        fake=lambda x_MK, weight_NK, scale_N, bias_N: x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0]),
        save=lambda inputs, output: (inputs[1], inputs[2], inputs[3] is not None), backward=_backward)


_casted_linear_op = _operation("casted_linear", _casted_linear, _casted_linear_reference)
_int8_linear_op = _operation("int8_linear", _int8_linear, _int8_linear_reference)
_quantized_matmul_op = Operation(
    "quantized_matmul(Tensor x, Tensor weight, Tensor scale) -> Tensor", kernel=_quantized_matmul, fake=_fake_matmul,
    reference=lambda x_MK, weight_KN, scale_N: (x_MK.float() @ weight_KN.float()) * scale_N)
