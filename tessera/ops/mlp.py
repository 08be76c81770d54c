"""The elementwise middle of a transformer's MLP.

In: the outputs of the gate and up projections. Out: what the down projection reads. nn.MLP calls them.
"""

from __future__ import annotations

from torch import Tensor

from tessera.ops.activations import ACTIVATIONS


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up: SwiGLU with "silu", GEGLU with "gelu" (arXiv:2002.05202).

    Args:
        gate, up: [..., F], one dtype.
        activation: a name of `ACTIVATIONS`.

    Returns:
        [..., F] in gate's dtype.
    """
    return ACTIVATIONS[activation](gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the gated MLP of Llama; see `gated`."""
    return gated(gate, up, "silu")
