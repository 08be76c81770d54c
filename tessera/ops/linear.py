"""Linear maps.

In: activations [..., I] and a weight [O, I] in any storage type. Out: [..., O] in the activations'
dtype. nn.Linear calls `linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tessera.function.decorator import function
from tessera.function.precision import active_precision
from tessera.ops.invariant import block_products, is_invariant, tree_sum
from tessera.ops.kernels import linear_kernel
from tessera.ops.kernels.casted_linear import casted_linear_kernel
from tessera.ops.layout import widen
from tessera.ops.matmul import has_products_of, matmul_op
from tessera.ops.quantize import dequantize_rows
from tessera.ops.registration import Operation, is_readable, is_recording, wants_reference
from tessera.types import Tensor, floating

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_FEW_ROWS = 16  # up to here a product on the CPU is bound by the reading of the weight


@function
def linear(
    x: Tensor["...", "I", floating], weight: Tensor["O", "I"], bias: Tensor["O", floating] | None = None,
    scale: Tensor["O", floating] | None = None, blocks: tuple[int, ...] | None = None,
) -> Tensor["...", "O"]:
    """x @ weight^T + bias, with sums in f32; inside `ts.precision`, in its types.

    Args:
        x: [..., I], f32, bf16 or f16.
        weight: [O, I] of any storage type.
        bias: [O] or None.
        scale: [O] f32, for a weight of an 8-bit type.
        blocks: sizes of the parts of I whose sums are added in a tree in the invariant mode; None for one.

    Returns:
        [..., O] in x's dtype.

    Raises:
        ShapeError: the shapes do not fit.
    """
    active = active_precision()
    if active is not None and active.is_native:
        x = x.to(active.compute)
    if not is_invariant() and (is_recording() or _kernel_pays(x, weight, bias, scale)):
        return _run_kernel(x, weight, bias, scale)
    if not is_invariant() and scale is None and _is_emulated(x, weight):
        return _LINEAR(x, weight, bias, weight.requires_grad)
    if scale is not None:
        weight = dequantize_rows(weight, scale, x.dtype)
    elif weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if is_invariant():
        out = tree_sum(block_products(x, weight, blocks or (x.shape[-1],))).to(x.dtype)
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def _kernel_pays(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> bool:
    """Whether the tile kernel is the quickest way on this processor, and nothing needs a gradient.

    A few rows are bound by the reading of the weight, which torch does on one thread or at a third of the memory's
    speed; weights of other types go to registers as they are stored; and where the processor has no instructions
    for products of bf16 or f16, torch emulates them at a hundredth of the speed of f32.
    """
    if not is_readable(x) or not x.numel() or wants_reference():
        return False
    if active_precision() is not None:  # torch's products follow it
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    if x.dtype not in _FLOATS:
        return False
    return (x.numel() <= MAX_FEW_ROWS * x.shape[-1] or scale is not None or weight.dtype != x.dtype
            or not has_products_of(x.dtype))


def _is_emulated(x: Tensor, weight: Tensor) -> bool:
    """Whether torch would emulate the products, which kernels take at the speed of f32, in both directions.

    Operands that torch.autocast or an accumulator of `ts.precision` is to change are torch's.
    """
    active = active_precision()
    return (x.is_cpu and not has_products_of(x.dtype) and weight.dtype in _FLOATS and x.numel() > 0
            and not torch.is_autocast_enabled("cpu") and (active is None or active.is_native))


def _run_kernel(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scale_O: Tensor | None) -> Tensor:
    out = torch.empty(*x.shape[:-1], weight_OI.shape[0], dtype=x.dtype, device=x.device)
    x_NI, out_NO = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if scale_O is not None:
        casted_linear_kernel(x_NI, weight_OI, scale_O, out_NO, bias_O)
    else:
        linear_kernel(x_NI, weight_OI, out_NO, bias_O)
    return out


def _fake(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, with_weight: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_OI.shape[0]))


def _reference(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, with_weight: bool) -> Tensor:
    return F.linear(widen(x), widen(weight_OI), None if bias_O is None else widen(bias_O)).to(x.dtype)


def _backward(saved: list[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_OI, bias_dtype, with_weight = saved
    grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = matmul_op(grad_NO, weight_OI, x.dtype).view(x.shape)
    grad_weight = matmul_op(grad_NO.mT, x_NI, weight_OI.dtype) if with_weight else None
    grad_bias = None if bias_dtype is None else grad_NO.sum(0, dtype=torch.float32).to(bias_dtype)
    return grad_x, grad_weight, grad_bias, None


# The gradient of the weight comes in the weight's own type, rounded once: f32 weights learn in f32.
_LINEAR = Operation(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool with_weight) -> Tensor",
    kernel=lambda x, weight_OI, bias_O, with_weight: _run_kernel(x, weight_OI, bias_O, None),
    reference=_reference, fake=_fake,
    save=lambda inputs, output: (
        inputs[0], inputs[1], None if inputs[2] is None else inputs[2].dtype, inputs[3]),
    backward=_backward)
