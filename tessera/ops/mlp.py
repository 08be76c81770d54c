"""The elementwise middle of a transformer's MLP, and the whole of a gated one.

In: the outputs of the gate and up projections, or the MLP's input and weights. Out: what the down projection reads, or
the MLP's output. nn.MLP calls them.

Dims: D d_model, F d_ffn.
"""

from __future__ import annotations

from typing import overload

import torch
from torch.utils.checkpoint import checkpoint

from tessera.errors import InputError
from tessera.function.decorator import function
from tessera.ops import activations, invariant
from tessera.ops.kernels.activations import gated_backward_kernel, gated_kernel, gated_packed_kernel
from tessera.ops.layout import as_rows, empty_like, widen
from tessera.ops.registration import Operation
from tessera.types import Tensor, floating, one_float


@function
def gated(
    gate: Tensor["...", "F", one_float], up: Tensor["...", "F", floating], activation: str = "silu", beta: float = 1.0,
) -> Tensor["...", "F", one_float]:
    """activation(gate) * up: SwiGLU with "silu", GEGLU with "gelu" (arXiv:2002.05202).

    Args:
        gate, up: [..., F], one shape.
        activation: a name of `ACTIVATIONS`.
        beta: the factor inside silu's sigmoid.

    Returns:
        [..., F] in gate's dtype, rounded once.

    Raises:
        ShapeError: the shapes differ.
        InputError: an unknown activation.
    """
    _check_activation(activation)
    if invariant.is_invariant() and beta == 1:
        return activations.ACTIVATIONS[activation](gate) * up
    return _GATED(gate, up, activation, beta)


@function
def gated_packed(
    gate_up: Tensor["...", "2*F", one_float], activation: str = "silu", beta: float = 1.0,
) -> Tensor["...", "F", one_float]:
    """`gated` of the two halves of the last dim, as a fused gate and up projection gives them.

    Args:
        gate_up: [..., 2 F], the gates before the others; any strides.
        activation, beta: as for `gated`.

    Returns:
        [..., F].

    Raises:
        ShapeError: an odd last dim.
        InputError: an unknown activation.
    """
    _check_activation(activation)
    if invariant.is_invariant() and beta == 1:
        gate, up = _halves(gate_up)
        return activations.ACTIVATIONS[activation](gate) * up
    return _GATED_PACKED(gate_up, activation, beta)


@overload
def swiglu(gate: Tensor, up: Tensor, /, *, beta: float = ...) -> Tensor: ...


@overload
def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, /, beta: float = ...) -> Tensor: ...


def swiglu(
    first: Tensor, second: Tensor, w_up: Tensor | None = None, w_down: Tensor | None = None, /, beta: float = 1.0,
) -> Tensor:
    """silu(gate) * up, or the whole gated MLP of Llama (arXiv:2002.05202).

    Args:
        first, second: gate and up, [..., F]; with the two weights below, x [..., D] and w_gate [D, F].
        w_up, w_down: [D, F] and [F, D], for (swish(x w_gate, beta) * (x w_up)) w_down.
        beta: the factor inside the sigmoid.

    Returns:
        [..., F], or [..., D].

    Raises:
        ShapeError: the tensors do not fit.
        InputError: one weight given without the other.
    """
    if w_up is None and w_down is None:
        return gated(first, second, "silu", beta)
    if w_up is None or w_down is None:
        raise InputError("swiglu: 3 tensors given; expected gate and up, or x, w_gate, w_up and w_down")
    return _swiglu(first, second, w_up, w_down, beta)


@function
def _swiglu(
    x: Tensor["...", "D", floating], w_gate: Tensor["D", "F", floating], w_up: Tensor["D", "F", floating],
    w_down: Tensor["F", "D", floating], beta: float,
) -> Tensor["...", "D"]:
    return gated(x @ w_gate, x @ w_up, "silu", beta) @ w_down


@function
def fused_mlp(
    x: Tensor["...", "D", floating], up: Tensor["D", "F", floating], gate: Tensor["D", "F", floating],
    down: Tensor["F", "D", floating], activation: str = "silu",
) -> Tensor["...", "D"]:
    """(activation(x gate) * (x up)) down: a whole gated MLP.

    Args:
        x: [..., D].
        up, gate: [D, F].
        down: [F, D].
        activation: a name of `ACTIVATIONS`.

    Returns:
        [..., D].

    Raises:
        ShapeError: the weights do not fit.
        InputError: an unknown activation.
    """
    return gated(x @ gate, x @ up, activation) @ down


@function
def swiglu_packed(gate_up: Tensor["...", "2*F", one_float], *, beta: float = 1.0) -> Tensor["...", "F", one_float]:
    """silu(gate) * up of the halves [gate, up] of the last dim; see `gated_packed`."""
    return gated_packed(gate_up, "silu", beta)


@function
def swiglu_memory_efficient(
    x: Tensor["...", "D", one_float], w_gate: Tensor["D", "F", floating], w_up: Tensor["D", "F", floating],
    w_down: Tensor["F", "D", floating], chunk_size: int = 512, beta: float = 1.0,
) -> Tensor["...", "D", one_float]:
    """`swiglu` of an input and three weights, by chunks of d_ffn that the backward pass computes again.

    No tensor is wider than a chunk: the memory kept for the backward pass is x alone, where `swiglu` keeps 3 F numbers
    a row.

    Args:
        x: [..., D].
        w_gate, w_up: [D, F].
        w_down: [F, D].
        chunk_size: of F, >= 1.
        beta: the factor inside the sigmoid.

    Returns:
        [..., D] in x's dtype; the chunks' products are added in f32.

    Raises:
        ShapeError: the weights do not fit.
        InputError: chunk_size below 1.
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size: {chunk_size} given; expected at least 1")
    out = torch.zeros(x.shape, dtype=widen(x[..., :0]).dtype, device=x.device)
    # split: a slice's gradient would be as large as the weight.
    for weights in zip(w_gate.split(chunk_size, 1), w_up.split(chunk_size, 1), w_down.split(chunk_size)):
        out = out + checkpoint(swiglu, x, *weights, beta=beta, use_reentrant=False)
    return out.to(x.dtype)


def _check_activation(activation: str) -> None:
    if activation not in activations.ACTIVATIONS:
        raise InputError(f"activation: {activation!r} given; expected one of {', '.join(activations.ACTIVATIONS)}")


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    width = gate_up.shape[-1] // 2
    return gate_up[..., :width], gate_up[..., width:]


def _kernel(gate: Tensor, up: Tensor, kind: str, beta: float) -> Tensor:
    out = empty_like(gate)
    if gate.dim() == 3:
        gated_kernel(gate, up, out, kind, beta)
    else:
        gated_kernel(as_rows(gate), as_rows(up), as_rows(out), kind, beta)
    return out


def _packed_kernel(gate_up: Tensor, kind: str, beta: float) -> Tensor:
    out = _fake_packed(gate_up, kind, beta)
    gated_packed_kernel(as_rows(gate_up), as_rows(out), kind, beta)
    return out


def _backward_kernel(grad: Tensor, gate: Tensor, up: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = empty_like(gate), empty_like(up)
    gated_backward_kernel(
        as_rows(grad), as_rows(gate), as_rows(up), as_rows(grad_gate), as_rows(grad_up), kind, beta)
    return grad_gate, grad_up


def _packed_backward_kernel(grad: Tensor, gate_up: Tensor, kind: str, beta: float) -> Tensor:
    grad_gate_up = empty_like(gate_up)
    gated_backward_kernel(as_rows(grad), *_halves(as_rows(gate_up)), *_halves(as_rows(grad_gate_up)), kind, beta)
    return grad_gate_up


def _reference(gate: Tensor, up: Tensor, kind: str, beta: float) -> Tensor:
    return (activations.reference(widen(gate), kind, beta) * up).to(gate.dtype)


def _backward_reference(grad: Tensor, gate: Tensor, up: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    gate_wide, grad_wide = widen(gate), widen(grad)
    grad_gate = grad_wide * up * activations.reference_slope(gate_wide, kind, beta)
    return grad_gate.to(gate.dtype), (grad_wide * activations.reference(gate_wide, kind, beta)).to(up.dtype)


def _fake(gate: Tensor, up: Tensor, kind: str, beta: float) -> Tensor:
    return empty_like(gate)


def _fake_packed(gate_up: Tensor, kind: str, beta: float) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_BACKWARD = Operation(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, str kind, float beta) -> (Tensor, Tensor)",
    kernel=_backward_kernel, reference=_backward_reference,
    fake=lambda grad, gate, up, kind, beta: (empty_like(gate), empty_like(up)))

_GATED = Operation(
    "gated(Tensor gate, Tensor up, str kind, float beta) -> Tensor",
    kernel=_kernel, reference=_reference, fake=_fake, save=lambda inputs, output: tuple(inputs),
    backward=lambda saved, grad: (*_BACKWARD(grad, *saved), None, None))

_PACKED_BACKWARD = Operation(
    "gated_packed_backward(Tensor grad, Tensor gate_up, str kind, float beta) -> Tensor",
    kernel=_packed_backward_kernel,
    reference=lambda grad, gate_up, kind, beta: torch.cat(
        _backward_reference(grad, *_halves(gate_up), kind, beta), -1),
    fake=lambda grad, gate_up, kind, beta: empty_like(gate_up))

_GATED_PACKED = Operation(
    "gated_packed(Tensor gate_up, str kind, float beta) -> Tensor",
    kernel=_packed_kernel, reference=lambda gate_up, kind, beta: _reference(*_halves(gate_up), kind, beta),
    fake=_fake_packed, save=lambda inputs, output: tuple(inputs),
    backward=lambda saved, grad: (_PACKED_BACKWARD(grad, *saved), None, None))
