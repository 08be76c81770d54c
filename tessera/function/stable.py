"""`ts.stable`: the few steps of a norm that overflow, or whose gradients do, made safe.

In: tensors of any float dtype. Out: results in the types of the open `ts.precision`; outside one, sums are in f64 and
the rest in the wider of f32 and the input's dtype. Functions marked `@ts.numerically_stable` call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.function.precision import ActivePrecision, active_precision


def mean_of_squares(x: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    """mean(x^2), squared and added in the accumulate type.

    In f64 it holds for every f32 input: (1e38)^2 is 1e76.

    Returns:
        A tensor of the accumulate dtype, which may be too wide a range for any narrower one: take `sqrt` of it first.
    """
    accumulate = _types(x).accumulate
    return x.to(accumulate).square().mean(dim, keepdim=keepdim, dtype=accumulate)


def sqrt(x: Tensor) -> Tensor:
    """Square root, in the compute type; at 0 its gradient is 0 instead of infinite."""
    is_zero = x == 0
    root = torch.where(is_zero, 1.0, x).sqrt()
    return torch.where(is_zero, 0.0, root).to(_types(x).compute)


def divide(x: Tensor, y: Tensor) -> Tensor:
    """x / y in the compute type; where y is 0 the quotient is 0, and so are both gradients."""
    compute = torch.promote_types(_types(x).compute, _types(y).compute)
    is_zero = y == 0
    quotient = x.to(compute) / torch.where(is_zero, 1.0, y.to(compute))
    return torch.where(is_zero, 0.0, quotient)


def _types(x: Tensor) -> ActivePrecision:
    wide = torch.promote_types(x.dtype, torch.float32)
    return active_precision() or ActivePrecision(compute=wide, accumulate=torch.float64)
