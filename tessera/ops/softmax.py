"""Softmax, log-softmax, and what goes with them: masked mean, normalisation to unit length.

In: tensors of any float dtype. Out: the same shape and dtype; statistics are taken in f32 (f64 for f64). Samplers,
losses and user code call them.

Dims: N rows (all dims but the reduced one), D entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tessera.errors import ShapeError
from tessera.function.decorator import function
from tessera.ops.kernels.softmax import (
    log_softmax_backward_kernel,
    log_softmax_kernel,
    softmax_backward_kernel,
    softmax_kernel,
)
from tessera.ops.kernels.vectors import (
    l2_normalize_backward_kernel,
    l2_normalize_kernel,
    masked_mean_backward_kernel,
    masked_mean_columns_backward_kernel,
    masked_mean_columns_kernel,
    masked_mean_kernel,
)
from tessera.ops.layout import widen
from tessera.ops.registration import Operation
from tessera.types import Tensor, bool_, one_float


@function
def softmax(x: Tensor["...", one_float], dim: int = -1) -> Tensor["...", one_float]:
    """exp(x - max(x)) / sum(exp(x - max(x))), finite wherever x has no NaN.

    A row of -inf has no distribution: it gives zeros, and no gradient. Where a row has +inf, the places that have
    it share the whole.

    Args:
        x: any shape, any float dtype.
        dim: that sums to one.

    Raises:
        ShapeError: x has no such dim.
    """
    return _along(_softmax_op, x, dim)


@function
def log_softmax(x: Tensor["...", one_float], dim: int = -1) -> Tensor["...", one_float]:
    """log(softmax(x)) without its rounding: (x - max(x)) - log(sum(exp(x - max(x)))); see `softmax`."""
    return _along(_log_softmax_op, x, dim)


# The documents' names for the same.
softmax_safe, log_softmax_stable = softmax, log_softmax


@function
def masked_mean(
    x: Tensor["...", one_float], mask: Tensor["#...", bool_], dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Mean of x where the mask is true; 0 where it is nowhere true. What is masked may be NaN or infinite.

    Args:
        x: any shape, any float dtype; summed in f32 (f64 for f64).
        mask: bool, broadcast to x.
        dim: reduced dims; None or () for all.

    Returns:
        x's shape without the reduced dims, in x's dtype.

    Raises:
        ShapeError: x has no such dim.
    """
    rank = x.dim()
    dims = (dim,) if isinstance(dim, int) else dim or range(rank)
    if any(not -rank <= each < rank for each in dims):
        raise ShapeError(f"dim: {dim} given for {list(x.shape)}; expected {-rank}..{rank - 1}")
    reduced = sorted({each % rank for each in dims})
    kept = [each for each in range(rank) if each not in reduced]
    if not reduced or x.numel() == 0:  # one number, or none
        return torch.where(mask, x, 0.0).sum(reduced)
    shape, is_last = [x.shape[each] for each in kept], reduced[-1] == rank - 1
    order = kept + reduced if is_last else [*kept[:-1], *reduced, rank - 1]
    width = x.shape[-1] if is_last or not mask.dim() else mask.shape[-1]  # 1 where a mask shows whole rows
    mask = mask.expand(*x.shape[:-1], width).permute(order)
    sizes = math.prod(shape if is_last else shape[:-1]), -1
    out: Tensor = _masked_mean_op(
        x.permute(order).reshape(*sizes, x.shape[order[-1]]), mask.reshape(*sizes, mask.shape[-1]), is_last)[0]
    return out.view(shape)


@function
def l2_normalize(x: Tensor["...", one_float], dim: int = -1, eps: float = 1e-12) -> Tensor["...", one_float]:
    """x / max(|x|, eps) along a dim, for any magnitude: the squares of 1e30 would overflow f32.

    Args:
        x: any shape, any float dtype; computed in f32 (f64 for f64).
        dim: of the vectors.
        eps: the length under which vectors are not made unit vectors.
    """
    return _along(lambda x_ND: _l2_normalize_op(x_ND, float(eps)), x, dim)


def _along(operation: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"dim: {dim} given for {list(x.shape)}; expected {-x.dim()}..{x.dim() - 1}")
    if x.numel() == 0:
        return torch.zeros_like(x)
    moved = x.movedim(dim, -1)
    return operation(moved.reshape(-1, moved.shape[-1])).view(moved.shape).movedim(-1, dim)


def _shifted(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(x less its largest, whether the row is all -inf [N, 1]), in f32 or f64."""
    x_ND = x_ND if x_ND.dtype is torch.float64 else x_ND.float()
    top_N1 = x_ND.detach().amax(-1, keepdim=True)
    finite_N1 = top_N1.isfinite() | top_N1.isnan()
    shifted_ND = x_ND - torch.where(finite_N1, top_N1, 0.0)
    at_top_ND = torch.where(x_ND.detach() == top_N1, 0.0, -torch.inf).to(shifted_ND.dtype)
    return torch.where(finite_N1, shifted_ND, at_top_ND), top_N1 == -torch.inf


def _softmax_reference(x_ND: Tensor) -> Tensor:
    shifted_ND, dead_N1 = _shifted(x_ND)
    return torch.where(dead_N1, 0.0, shifted_ND.softmax(-1)).to(x_ND.dtype)


def _log_softmax_reference(x_ND: Tensor) -> Tensor:
    shifted_ND, dead_N1 = _shifted(x_ND)
    return torch.where(dead_N1, -torch.inf, shifted_ND.log_softmax(-1)).to(x_ND.dtype)


def _softmax_backward_reference(grad_ND: Tensor, out_ND: Tensor) -> Tensor:
    return ((grad_ND - (grad_ND * out_ND).sum(-1, keepdim=True)) * out_ND).to(out_ND.dtype)


def _log_softmax_backward_reference(grad_ND: Tensor, out_ND: Tensor) -> Tensor:
    d_x_ND = grad_ND - out_ND.exp() * grad_ND.sum(-1, keepdim=True)
    return torch.where((out_ND == -torch.inf).all(-1, keepdim=True), 0.0, d_x_ND).to(out_ND.dtype)


def _masked_mean_reference(x_NRD: Tensor, mask_NRD: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
    """The means, [N] or over the middle axis [N, D], and what sums were divided by."""
    dims = (1, 2) if is_last else (1,)
    total = widen(torch.where(mask_NRD, x_NRD, 0.0)).sum(dims)
    count = mask_NRD.expand(x_NRD.shape).sum(dims).clamp(min=1).to(total.dtype)
    return (total / count).to(x_NRD.dtype), count


def _masked_mean_backward_reference(grad: Tensor, mask_NRD: Tensor, count: Tensor, is_last: bool) -> Tensor:
    slope = grad / count
    slope_NRD = slope[:, None, None] if is_last else slope[:, None, :]
    return torch.where(mask_NRD, slope_NRD, 0.0).to(grad.dtype)


def _fake_masked_mean(x_NRD: Tensor, mask_NRD: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
    shape = x_NRD.shape[:1] if is_last else (x_NRD.shape[0], x_NRD.shape[2])
    return x_NRD.new_empty(shape), x_NRD.new_empty(shape, dtype=torch.promote_types(x_NRD.dtype, torch.float32))


def _masked_mean_kernel(x_NRD: Tensor, mask_NRD: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
    out, count = _fake_masked_mean(x_NRD, mask_NRD, is_last)
    if is_last:
        totals = x_NRD.new_empty(x_NRD.shape[:2], dtype=torch.float32)
        masked_mean_kernel(x_NRD, mask_NRD, totals, torch.empty_like(totals, dtype=torch.int32), out, count)
    else:
        masked_mean_columns_kernel(x_NRD, *_mask_or_rows(mask_NRD, x_NRD.shape[2]), out, count)
    return out, count


def _mask_or_rows(mask_NRD: Tensor, width: int) -> tuple[Tensor | None, Tensor | None]:
    return (mask_NRD, None) if mask_NRD.shape[2] == width else (None, mask_NRD[..., 0])


def _fake_masked_mean_backward(grad: Tensor, mask_NRD: Tensor, count: Tensor, is_last: bool) -> Tensor:
    return grad.new_empty(*mask_NRD.shape[:2], mask_NRD.shape[2] if is_last else grad.shape[1])


def _masked_mean_backward_kernel(grad: Tensor, mask_NRD: Tensor, count: Tensor, is_last: bool) -> Tensor:
    out_NRD = _fake_masked_mean_backward(grad, mask_NRD, count, is_last)
    if is_last:
        masked_mean_backward_kernel(grad, mask_NRD, count, out_NRD)
    else:
        masked_mean_columns_backward_kernel(grad, *_mask_or_rows(mask_NRD, grad.shape[1]), count, out_NRD)
    return out_NRD


def _unit_parts(x_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x / its row's scale, that scale, the squared length over it): the squares of 1e30 would overflow."""
    wide_ND = widen(x_ND)
    scale_N1 = wide_ND.detach().abs().amax(-1, keepdim=True).clamp(min=eps)
    scaled_ND = wide_ND / scale_N1
    return scaled_ND, scale_N1, scaled_ND.square().sum(-1, keepdim=True)


def _l2_normalize_reference(x_ND: Tensor, eps: float) -> Tensor:
    scaled_ND, _, square_N1 = _unit_parts(x_ND, eps)
    # At least 1, or the vector is shorter than eps.
    return (scaled_ND * square_N1.clamp(min=1.0).rsqrt()).to(x_ND.dtype)


def _l2_normalize_backward_reference(grad_ND: Tensor, x_ND: Tensor, eps: float) -> Tensor:
    scaled_ND, scale_N1, square_N1 = _unit_parts(x_ND, eps)
    inverse_N1 = square_N1.clamp(min=1.0).rsqrt()
    unit_ND = scaled_ND * inverse_N1
    along_N1 = torch.where(square_N1 >= 1.0, (grad_ND * unit_ND).sum(-1, keepdim=True), 0.0)
    return ((grad_ND - unit_ND * along_N1) * (inverse_N1 / scale_N1)).to(x_ND.dtype)


def _contiguous_like(*tensors: Tensor) -> Tensor:
    return torch.empty(tensors[-1].shape, dtype=tensors[-1].dtype, device=tensors[-1].device)


def _writing(kernel: Any) -> Any:
    """The kernel as a function of its inputs and options; its result has the last input's shape and dtype."""
    def run(*args: Any) -> Tensor:
        inputs = [arg for arg in args if isinstance(arg, torch.Tensor)]
        out = _contiguous_like(*inputs)
        kernel(*inputs, out, *args[len(inputs):])
        return out

    return run


_softmax_backward_op = Operation(
    "softmax_backward(Tensor grad, Tensor out) -> Tensor", kernel=_writing(softmax_backward_kernel),
    reference=_softmax_backward_reference, fake=_contiguous_like)
_softmax_op = Operation(
    "softmax(Tensor x) -> Tensor", kernel=_writing(softmax_kernel), reference=_softmax_reference,
    fake=_contiguous_like, save=lambda inputs, output: (output,),
    backward=lambda saved, grad: _softmax_backward_op(grad, saved[0]))
_log_softmax_backward_op = Operation(
    "log_softmax_backward(Tensor grad, Tensor out) -> Tensor", kernel=_writing(log_softmax_backward_kernel),
    reference=_log_softmax_backward_reference, fake=_contiguous_like)
_log_softmax_op = Operation(
    "log_softmax(Tensor x) -> Tensor", kernel=_writing(log_softmax_kernel), reference=_log_softmax_reference,
    fake=_contiguous_like, save=lambda inputs, output: (output,),
    backward=lambda saved, grad: _log_softmax_backward_op(grad, saved[0]))
_masked_mean_backward_op = Operation(
    "masked_mean_backward(Tensor grad, Tensor mask, Tensor count, bool is_last) -> Tensor",
    kernel=_masked_mean_backward_kernel, reference=_masked_mean_backward_reference, fake=_fake_masked_mean_backward)
_masked_mean_op = Operation(
    "masked_mean(Tensor x, Tensor mask, bool is_last) -> (Tensor, Tensor)", kernel=_masked_mean_kernel,
    reference=_masked_mean_reference, fake=_fake_masked_mean,
    save=lambda inputs, outputs: (inputs[1], outputs[1], inputs[2]),
    backward=lambda saved, grad, _: (_masked_mean_backward_op(grad, *saved), None, None))
_l2_normalize_backward_op = Operation(
    "l2_normalize_backward(Tensor grad, Tensor x, float eps) -> Tensor",
    kernel=_writing(l2_normalize_backward_kernel), reference=_l2_normalize_backward_reference,
    fake=lambda grad_ND, x_ND, eps: _contiguous_like(x_ND))
_l2_normalize_op = Operation(
    "l2_normalize(Tensor x, float eps) -> Tensor", kernel=_writing(l2_normalize_kernel),
    reference=_l2_normalize_reference, fake=lambda x_ND, eps: _contiguous_like(x_ND),
    save=lambda inputs, output: tuple(inputs),
    backward=lambda saved, grad: (_l2_normalize_backward_op(grad, *saved), None))
