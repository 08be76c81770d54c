"""Normalisation over the last dim.

In: activations [..., D]. Out: the same shape and dtype; statistics are taken in f32 (f64 for f64). nn.RMSNorm and
nn.LayerNorm call them.

Dims: N rows, D their width, P blocks of rows whose gradients of the weight are added one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tessera.function.decorator import function
from tessera.ops import invariant
from tessera.ops.kernels.layer_norm import layer_norm_backward_kernel, layer_norm_kernel
from tessera.ops.kernels.rms_norm import add_rms_norm_kernel, rms_norm_backward_kernel, rms_norm_kernel
from tessera.ops.layout import as_rows, empty_like, widen
from tessera.ops.registration import Operation
from tessera.types import Tensor, floating, one_float

_MAX_BLOCKS, _MIN_ROWS = 64, 16  # of a gradient's partial sums: enough for the cores, few enough to add quickly


@function
def rms_norm(
    x: Tensor["...", "D", one_float], weight: Tensor["D", floating] | None = None, eps: float = 1e-5,
) -> Tensor["...", "D", one_float]:
    """x / sqrt(mean(x^2) + eps) * weight (RMSNorm, arXiv:1910.07467).

    Args:
        x: [..., D].
        weight: [D], any float dtype, or None for ones.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype, rounded once.

    Raises:
        ShapeError: weight is not [D].
    """
    if weight is None:
        weight = x.new_ones(x.shape[-1:])
    if invariant.is_invariant():
        return invariant.rms_norm(x, weight, eps, functools.partial(_rms_norm_reference, eps=eps))
    return _RMS_NORM(x, weight, eps)


@function
def add_rms_norm(
    x: Tensor["...", "D", one_float], residual: Tensor["...", "D", one_float], weight: Tensor["D", floating],
    eps: float = 1e-5,
) -> tuple[Tensor["...", "D", one_float], Tensor["...", "D", one_float]]:
    """(rms_norm(x + residual), x + residual): the residual stream takes a branch's result, the next branch reads it.

    Args:
        x, residual: [..., D], one shape and dtype.
        weight: [D].
        eps: added to the mean square.

    Returns:
        Both [..., D] in x's dtype; the norm is that of the rounded sum.

    Raises:
        ShapeError: residual has not x's shape, or weight is not [D].
    """
    if invariant.is_invariant():
        total = x + residual
        return rms_norm(total, weight, eps), total
    return _ADD_RMS_NORM(x, residual, weight, eps)


@function
def layer_norm(
    x: Tensor["...", "D", one_float], weight: Tensor["D", floating] | None = None,
    bias: Tensor["D", floating] | None = None, eps: float = 1e-5,
) -> Tensor["...", "D", one_float]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv:1607.06450).

    Args:
        x: [..., D].
        weight, bias: [D], any float dtype, or None for ones and zeros.
        eps: added to the (biased) variance.

    Returns:
        [..., D] in x's dtype, rounded once.

    Raises:
        ShapeError: weight or bias is not [D].
    """
    if weight is None:
        weight = x.new_ones(x.shape[-1:])
    if bias is None:
        bias = x.new_zeros(x.shape[-1:])
    if invariant.is_invariant():
        return invariant.layer_norm(x, weight, bias, eps, functools.partial(_layer_norm_reference, eps=eps))
    return _LAYER_NORM(x, weight, bias, eps)


@function
def stable_rms_norm(
    x: Tensor["...", "D", one_float], weight: Tensor["D", floating] | None = None, eps: float = 1e-6,
) -> Tensor["...", "D", one_float]:
    """`rms_norm` in plain torch of rows whose squares leave the range of f32: over their largest entries first.

    The kernel of `rms_norm` does the same where a row needs it; this is the reference, of any float dtype and device,
    with gradients of any order.

    Args:
        x: [..., D].
        weight: [D], or None for ones.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """
    wide = widen(x)
    top = wide.detach().abs().amax(-1, keepdim=True).clamp(min=max(eps**0.5, torch.finfo(wide.dtype).tiny))
    part = wide / top
    normed = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + (eps**0.5 / top).square())
    return (normed if weight is None else normed * widen(weight)).to(x.dtype)


@function
def sharded_rms_norm(
    x: Tensor["...", "P", one_float], weight: Tensor["P", floating], width: int, reduce: Callable[[Any], Any],
    eps: float = 1e-6,
) -> Tensor["...", "P", one_float]:
    """`rms_norm` of rows that several ranks hold in parts: one sum a row crosses the mesh.

    Args:
        x: [..., P], this rank's part of D.
        weight: [P].
        width: D.
        reduce: the sum of all ranks' tensors, differentiable; f64 [..., 1] is given, in which no square overflows.
        eps: added to the mean square.

    Returns:
        This rank's part of the result, x's shape and dtype.
    """
    wide = widen(x)
    total = reduce(torch.linalg.vector_norm(wide, dim=-1, keepdim=True, dtype=torch.float64).square())
    scale = torch.rsqrt(total / width + eps).to(wide.dtype)
    return (wide * scale * widen(weight)).to(x.dtype)


# -- kernels ----------------------------------------------------------------------------------------


def _rms_norm_kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = empty_like(x)
    if x.dim() == 3:
        rms_norm_kernel(x, weight, out, eps)
    else:
        rms_norm_kernel(as_rows(x), weight, as_rows(out), eps)
    return out


def _add_rms_norm_kernel(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = empty_like(x), empty_like(x)
    if x.dim() == 3:
        add_rms_norm_kernel(x, residual, weight, out, total, eps)
    else:
        add_rms_norm_kernel(as_rows(x), as_rows(residual), weight, as_rows(out), as_rows(total), eps)
    return out, total


def _layer_norm_kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = empty_like(x)
    layer_norm_kernel(as_rows(x), weight, bias, as_rows(out), eps)
    return out


def _partials(x: Tensor, count: int) -> list[Tensor]:
    """Scratch for `count` vectors a block of rows; the blocks depend on the number of rows alone."""
    width = x.shape[-1]
    blocks = min(_MAX_BLOCKS, -(-x.numel() // (width * _MIN_ROWS)))
    return [torch.empty(blocks, width, device=x.device) for _ in range(count)]


def _rms_norm_backward_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, upstream: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = empty_like(x), torch.empty_like(weight)
    if not x.numel():
        return grad_x, grad_weight.zero_()
    rows = (-1, x.shape[-1])
    rms_norm_backward_kernel(
        grad.reshape(rows), x.reshape(rows), weight, None if upstream is None else upstream.reshape(rows),
        grad_x.view(rows), *_partials(x, 1), grad_weight, eps)
    return grad_x, grad_weight


def _layer_norm_backward_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    rows = (-1, x.shape[-1])
    layer_norm_backward_kernel(
        grad.reshape(rows), x.reshape(rows), weight, grad_x.view(rows), *_partials(x, 2), grad_weight, grad_bias, eps)
    return grad_x, grad_weight, grad_bias


# -- references -------------------------------------------------------------------------------------


def _rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide, weight_wide = widen(x), widen(weight)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_wide).to(x.dtype)


def _add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm_reference(total, weight, eps), total


def _layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide, weight_wide, bias_wide = widen(x), widen(weight), widen(bias)
    dtype = functools.reduce(torch.promote_types, (wide.dtype, weight_wide.dtype, bias_wide.dtype))
    return F.layer_norm(wide.to(dtype), x.shape[-1:], weight_wide.to(dtype), bias_wide.to(dtype), eps).to(x.dtype)


def _rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, upstream: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    wide, slope, weight_wide = widen(x), widen(grad), widen(weight)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    pull = (slope * weight_wide * wide).mean(-1, keepdim=True) * scale.square()
    grad_x = (slope * weight_wide - wide * pull) * scale
    if upstream is not None:
        grad_x = grad_x + upstream
    return grad_x.to(x.dtype), (slope * wide * scale).flatten(0, -2).sum(0).to(weight.dtype)


def _layer_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, slope, weight_wide = widen(x), widen(grad), widen(weight)
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed, pushed = centred * scale, slope * weight_wide
    grad_x = (pushed - pushed.mean(-1, keepdim=True) - normed * (pushed * normed).mean(-1, keepdim=True)) * scale
    sums = [(slope * normed).flatten(0, -2).sum(0), slope.flatten(0, -2).sum(0)]
    return grad_x.to(x.dtype), sums[0].to(weight.dtype), sums[1].to(bias.dtype)


# -- operations -------------------------------------------------------------------------------------


def _fake_norm(x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def _fake_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return empty_like(x), empty_like(x)


_RMS_NORM_BACKWARD = Operation(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? upstream, float eps) -> (Tensor, Tensor)",
    kernel=_rms_norm_backward_kernel, reference=_rms_norm_backward_reference,
    fake=lambda grad, x, weight, upstream, eps: (empty_like(x), torch.empty_like(weight)))

_RMS_NORM = Operation(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    kernel=_rms_norm_kernel, reference=_rms_norm_reference, fake=_fake_norm,
    save=lambda inputs, output: tuple(inputs),
    backward=lambda saved, grad: (*_RMS_NORM_BACKWARD(grad, saved[0], saved[1], None, saved[2]), None))


def _add_rms_norm_backward(saved: Any, grad: Tensor, grad_total: Tensor) -> tuple[Any, ...]:
    total, weight, eps = saved
    grad_x, grad_weight = _RMS_NORM_BACKWARD(grad, total, weight, grad_total, eps)
    return grad_x, grad_x, grad_weight, None


_ADD_RMS_NORM = Operation(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    kernel=_add_rms_norm_kernel, reference=_add_rms_norm_reference, fake=_fake_add_norm,
    save=lambda inputs, output: (output[1], inputs[2], inputs[3]), backward=_add_rms_norm_backward)

_LAYER_NORM_BACKWARD = Operation(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    kernel=_layer_norm_backward_kernel, reference=_layer_norm_backward_reference,
    fake=lambda grad, x, weight, bias, eps: (empty_like(x), torch.empty_like(weight), torch.empty_like(bias)))

_LAYER_NORM = Operation(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    kernel=_layer_norm_kernel, reference=_layer_norm_reference, fake=_fake_norm,
    save=lambda inputs, output: tuple(inputs),
    backward=lambda saved, grad: (*_LAYER_NORM_BACKWARD(grad, *saved), None))
