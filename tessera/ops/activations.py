"""Activation functions by name.

In: a tensor of any float dtype. Out: the same shape and dtype. ops.mlp calls them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv:2109.08668)."""
    return torch.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation (arXiv:1606.08415), as GPT-2 uses it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": torch.relu, "relu2": relu2,
}
