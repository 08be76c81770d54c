"""Activation functions by name.

In: a tensor of any float dtype. Out: the same shape and dtype, computed in f32 (f64 for f64) and rounded once.
ops.mlp and models call them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tessera.errors import InputError
from tessera.function.decorator import function
from tessera.ops import invariant
from tessera.ops.kernels.activations import activation_backward_kernel, activation_kernel
from tessera.ops.layout import as_rows, empty_like, widen
from tessera.ops.registration import Operation
from tessera.types import Tensor, one_float


@function
def silu(x: Tensor["...", one_float]) -> Tensor["...", one_float]:
    """x * sigmoid(x) (arXiv:1702.03118)."""
    return invariant.pointwise("silu", x, F.silu) if invariant.is_invariant() else _ACTIVATION(x, "silu", 1.0)


@function
def swish(x: Tensor["...", one_float], beta: float = 1.0) -> Tensor["...", one_float]:
    """x * sigmoid(beta x) (arXiv:1710.05941)."""
    return silu(x) if beta == 1 else _ACTIVATION(x, "silu", beta)


@function
def gelu(x: Tensor["...", one_float]) -> Tensor["...", one_float]:
    """x * Phi(x) (arXiv:1606.08415)."""
    return invariant.pointwise("gelu", x, F.gelu) if invariant.is_invariant() else _ACTIVATION(x, "gelu", 1.0)


@function
def gelu_tanh(x: Tensor["...", one_float]) -> Tensor["...", one_float]:
    """GELU with the tanh approximation (arXiv:1606.08415), as GPT-2 uses it."""
    if invariant.is_invariant():
        return invariant.pointwise("gelu_tanh", x, functools.partial(F.gelu, approximate="tanh"))
    return _ACTIVATION(x, "gelu_tanh", 1.0)


@function
def relu(x: Tensor["...", one_float]) -> Tensor["...", one_float]:
    """max(x, 0)."""
    return _ACTIVATION(x, "relu", 1.0)


@function
def relu2(x: Tensor["...", one_float]) -> Tensor["...", one_float]:
    """max(x, 0)^2 (Primer, arXiv:2109.08668)."""
    return _ACTIVATION(x, "relu2", 1.0)


@function
def softcap(x: Tensor["...", one_float], cap: float) -> Tensor["...", one_float]:
    """cap * tanh(x / cap): x, kept within -cap..cap (Gemma 2, arXiv:2408.00118).

    Raises:
        InputError: cap is not above 0.
    """
    if not cap > 0:
        raise InputError(f"cap: {cap} given; expected a number above 0")
    if invariant.is_invariant():
        return cap * invariant.pointwise("tanh", x / cap, torch.tanh)
    return _ACTIVATION(x, "softcap", float(cap))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "relu2": relu2,
}


def reference(x: Tensor, kind: str, beta: float) -> Tensor:
    """The function in plain torch, in x's dtype; kinds are those of `ACTIVATIONS`, and "softcap".

    Args:
        x: any shape.
        kind: which.
        beta: silu: the factor inside the sigmoid; softcap: the cap.
    """
    if kind == "silu":
        return F.silu(x) if beta == 1 else x * torch.sigmoid(beta * x)
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "softcap":
        return beta * torch.tanh(x / beta)
    return torch.relu(x) if kind == "relu" else torch.relu(x).square()


def reference_slope(x: Tensor, kind: str, beta: float) -> Tensor:
    """The derivative of `reference`."""
    if kind == "silu":
        share = torch.sigmoid(beta * x)
        return share * (1 + x * beta * (1 - share))
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if kind == "gelu_tanh":
        x = x.clamp(-10, 10)  # beyond, tanh is 1, and the powers of x would overflow
        factor = math.sqrt(2 / math.pi)
        bend = torch.tanh(factor * (x + 0.044715 * x**3))
        return 0.5 * (1 + bend) + 0.5 * x * (1 - bend * bend) * factor * (1 + 3 * 0.044715 * x * x)
    if kind == "softcap":
        return 1 - torch.tanh(x / beta).square()
    return (x > 0).to(x.dtype) if kind == "relu" else 2 * torch.relu(x)


def _kernel(x: Tensor, kind: str, beta: float) -> Tensor:
    out = empty_like(x)
    activation_kernel(as_rows(x), as_rows(out), kind, beta)
    return out


def _backward_kernel(grad: Tensor, x: Tensor, kind: str, beta: float) -> Tensor:
    grad_x = empty_like(x)
    activation_backward_kernel(as_rows(grad), as_rows(x), as_rows(grad_x), kind, beta)
    return grad_x


def _reference(x: Tensor, kind: str, beta: float) -> Tensor:
    return reference(widen(x), kind, beta).to(x.dtype)


def _backward_reference(grad: Tensor, x: Tensor, kind: str, beta: float) -> Tensor:
    return (grad * reference_slope(widen(x), kind, beta)).to(x.dtype)


_BACKWARD = Operation(
    "activation_backward(Tensor grad, Tensor x, str kind, float beta) -> Tensor",
    kernel=_backward_kernel, reference=_backward_reference, fake=lambda grad, x, kind, beta: empty_like(x))

_ACTIVATION = Operation(
    "activation(Tensor x, str kind, float beta) -> Tensor",
    kernel=_kernel, reference=_reference, fake=lambda x, kind, beta: empty_like(x),
    save=lambda inputs, output: tuple(inputs),
    backward=lambda saved, grad: (_BACKWARD(grad, *saved), None, None))
