"""The sum of the residual stream and a branch.

In: two tensors of one shape. Out: their sum. nn.Block calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.kernels.residual import add_kernel
from tessera.ops.registration import is_recording


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, by torch except in a recorded step, which holds kernels alone.

    Args:
        x, y: one dtype, and one shape (outside a recorded step: that broadcast).
    """
    if not is_recording():
        return x + y
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    add_kernel(x.view(-1), y.view(-1), out.view(-1))
    return out
