"""Softmax, log-softmax, and what goes with them: masked mean, normalisation to unit length.

In: tensors of any float dtype. Out: the same shape and dtype; statistics are taken in f32 (f64 for f64). Samplers,
losses and user code call them.

Dims: N rows (all dims but the reduced one), D entries.
"""

from __future__ import annotations

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
        dim: reduced dims; None for all.

    Returns:
        x's shape without the reduced dims, in x's dtype.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    mask = mask.expand(x.shape)
    dims = tuple(range(x.dim())) if dim is None else dim
    total = torch.where(mask, x, 0.0).sum(dims, dtype=wide)
    return (total / mask.sum(dims).clamp(min=1)).to(x.dtype)


@function
def l2_normalize(x: Tensor["...", one_float], dim: int = -1, eps: float = 1e-12) -> Tensor["...", one_float]:
    """x / max(|x|, eps) along a dim, for any magnitude: the squares of 1e30 would overflow f32.

    Args:
        x: any shape, any float dtype; computed in f32 (f64 for f64).
        dim: of the vectors.
        eps: the length under which vectors are not made unit vectors.
    """
    wide = x if x.dtype is torch.float64 else x.float()
    scale = wide.detach().abs().amax(dim, keepdim=True).clamp(min=eps)
    scaled = wide / scale
    length = scaled.square().sum(dim, keepdim=True)
    return (scaled * length.clamp(min=1.0).rsqrt()).to(x.dtype)  # at least 1, or the vector is shorter than eps


def _along(operation: Operation, x: Tensor, dim: int) -> Tensor:
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


def _contiguous_like(*tensors: Tensor) -> Tensor:
    return torch.empty(tensors[-1].shape, dtype=tensors[-1].dtype, device=tensors[-1].device)


def _writing(kernel: Any) -> Any:
    """The kernel as a function of its inputs, with the shape and dtype of the last as its result's."""
    def run(*inputs: Tensor) -> Tensor:
        out = _contiguous_like(*inputs)
        kernel(*inputs, out)
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
