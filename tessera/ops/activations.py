"""Activation functions by name.

In: a tensor of any float dtype. Out: the same shape and dtype. ops.mlp calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ops import invariant


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv:2109.08668)."""
    return torch.relu(x).square()


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) (arXiv:1702.03118)."""
    return invariant.pointwise("silu", x, F.silu) if invariant.is_invariant() else F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) (arXiv:1606.08415)."""
    return invariant.pointwise("gelu", x, F.gelu) if invariant.is_invariant() else F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation (arXiv:1606.08415), as GPT-2 uses it."""
    if invariant.is_invariant():
        return invariant.pointwise("gelu_tanh", x, functools.partial(F.gelu, approximate="tanh"))
    return F.gelu(x, approximate="tanh")


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): x, kept within -cap..cap (Gemma 2, arXiv:2408.00118)."""
    x = x / cap
    return cap * (invariant.pointwise("tanh", x, torch.tanh) if invariant.is_invariant() else torch.tanh(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": torch.relu, "relu2": relu2,
}
