"""Activation functions, alone and gating, with their gradients.

`kind` is "silu", "gelu", "gelu_tanh", "relu", "relu2" or "softcap"; `beta` is the factor inside silu's sigmoid, and
softcap's cap.
"""

from __future__ import annotations

import math

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32

_TANH_SLOPE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_GAUSS = 1 / math.sqrt(2 * math.pi)


def activate(x, kind, beta):
    """The function of a tile, f32."""
    if kind == "silu":
        result = x * tile.sigmoid(x * beta)
    elif kind == "gelu":
        result = tile.gelu(x)
    elif kind == "gelu_tanh":
        result = tile.gelu(x, approximate="tanh")
    elif kind == "softcap":
        result = beta * tile.tanh(x / beta)
    elif kind == "relu":
        result = tile.relu(x)
    else:
        tile.static_assert(kind == "relu2", "kind: not an activation")
        result = tile.relu(x) * tile.relu(x)
    return result


def value_and_slope(x, kind, beta):
    """`activate` and its derivative; what both need is computed once."""
    if kind == "silu":
        share = tile.sigmoid(x * beta)
        value = x * share
        slope = share + beta * value * (1.0 - share)
    elif kind == "gelu":
        share = 0.5 + 0.5 * tile.erf(x * math.sqrt(0.5))
        value, slope = x * share, share + x * (_GAUSS * tile.exp(-0.5 * x * x))
    elif kind == "gelu_tanh":
        near = tile.clamp(x, -10.0, 10.0)  # beyond, tanh is 1 in f32, and the powers of x would overflow
        bend = tile.tanh(_TANH_SLOPE * (near + _TANH_CUBE * near * near * near))
        steep = _TANH_SLOPE * (1.0 + 3.0 * _TANH_CUBE * near * near)
        value, slope = 0.5 * x * (1.0 + bend), 0.5 * (1.0 + bend) + 0.5 * near * (1.0 - bend * bend) * steep
    elif kind == "softcap":
        bend = tile.tanh(x / beta)
        value, slope = beta * bend, 1.0 - bend * bend
    else:
        value, slope = activate(x, kind, beta), tile.where(x > 0.0, 1.0, 0.0)
        if kind == "relu2":
            slope = 2.0 * tile.relu(x)
    return value, slope


@kernel
def activation_kernel(x: Tile["B", "S", "F"], out: Tile["B", "S", "F"], kind: str, beta: float = 1.0):
    """out = activate(x), in f32, rounded once.

    Args:
        x, out: [B, S, F].
        kind, beta: which function.
    """
    tile.store(out, activate(tile.cast(tile.load(x), f32), kind, beta))


@kernel
def activation_backward_kernel(grad: Tile["B", "S", "F"], x: Tile["B", "S", "F"], grad_x: Tile["B", "S", "F"],
                               kind: str, beta: float = 1.0):
    """grad_x = grad * activate'(x).

    Args:
        grad, x, grad_x: [B, S, F].
        kind, beta: as in the forward pass.
    """
    _, slope = value_and_slope(tile.cast(tile.load(x), f32), kind, beta)
    tile.store(grad_x, tile.cast(tile.load(grad), f32) * slope)


@kernel
def gated_kernel(gate: Tile["B", "S", "F"], up: Tile["B", "S", "F"], out: Tile["B", "S", "F"], kind: str = "silu",
                 beta: float = 1.0):
    """out = activate(gate) * up, in f32, rounded once (arXiv:2002.05202).

    Args:
        gate, up, out: [B, S, F].
        kind, beta: which function; silu makes it SwiGLU.
    """
    tile.store(out, activate(tile.cast(tile.load(gate), f32), kind, beta) * tile.load(up))


@kernel
def gated_packed_kernel(gate_up: Tile["B", "S", "2*F"], out: Tile["B", "S", "F"], kind: str = "silu",
                        beta: float = 1.0):
    """`gated_kernel` of the two halves of each row.

    Args:
        gate_up: [B, S, 2 F], the gates before the others.
        out: [B, S, F].
        kind, beta: which function.
    """
    gate, up = tile.split(tile.load(gate_up), 2, axis=-1)
    tile.store(out, activate(tile.cast(gate, f32), kind, beta) * up)


@kernel
def gated_backward_kernel(
    grad: Tile["B", "S", "F"], gate: Tile["B", "S", "F"], up: Tile["B", "S", "F"], grad_gate: Tile["B", "S", "F"],
    grad_up: Tile["B", "S", "F"], kind: str = "silu", beta: float = 1.0,
):
    """grad_gate = grad * up * activate'(gate), grad_up = grad * activate(gate).

    Args:
        all: [B, S, F].
        kind, beta: as in the forward pass.
    """
    gate_f32, grad_f32 = tile.cast(tile.load(gate), f32), tile.cast(tile.load(grad), f32)
    value, slope = value_and_slope(gate_f32, kind, beta)
    tile.store(grad_gate, grad_f32 * tile.load(up) * slope)
    tile.store(grad_up, grad_f32 * value)
