"""Tensors of any rank as the row kernels take them: [B, S, D], any strides.

In: an operation's arguments. Out: views of them, and tensors for results. Operations on rows (norms, activations,
rotation) call it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] with three axes: a view where its strides allow, else a copy."""
    rank = x.dim()
    if rank == 3:
        return x
    if rank > 3:
        return x.flatten(0, -3)
    return x[None] if rank == 2 else x.view(1, 1, -1)


def empty_like(x: Tensor) -> Tensor:
    """Contiguous memory of x's shape and dtype, whatever x's strides: as_rows of it is a view."""
    if x.is_contiguous():
        return torch.empty_like(x)  # quicker without an option
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def widen(x: Tensor) -> Tensor:
    """x in f32, f64 stays: what references compute in."""
    return x if x.dtype == torch.float64 else x.float()
