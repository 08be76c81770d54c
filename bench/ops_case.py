"""What bench/ops.py measures: one operation, its plain expression, and what goes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One line of the table. A file ops_cases_*.py has `cases(quick: bool, fast_bf16: bool) -> Iterator[OpCase]`.

    Args:
        group: operation and dtype, "rms_norm f32".
        label: the group and the sizes.
        inputs: of both functions; the gradients of those that need one are computed and compared. Where none needs
            one, the forward pass alone is measured.
        ours: our operation, giving a tensor or a tuple of them.
        formula: the same in plain torch, which torch.compile gets; float64 inputs make it the reference.
        tolerance: largest error, relative to the largest value of its tensor.
    """

    group: str
    label: str
    inputs: list[Tensor]
    ours: Callable[..., Any]
    formula: Callable[..., Any]
    tolerance: float

    def gradients(self, outs: Any) -> list[Tensor]:
        """A gradient for each result, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(out.shape, generator=generator).to(out.dtype)
                for out in (outs if isinstance(outs, tuple) else (outs,))]


def make(operation: str, name: str, sizes: str, made: tuple, tolerance: float | None = None) -> OpCase:
    """A case from (inputs, ours, formula).

    Args:
        operation, name, sizes: of the group and the label; the name is a dtype's.
        tolerance: by default that of sums in f32; for bf16, of two roundings.
    """
    inputs, ours, formula = made
    if tolerance is None:
        tolerance = 1e-4 if DTYPES.get(name, torch.float32) is torch.float32 else 2.0**-6
    return OpCase(group=f"{operation} {name}", label=f"{operation} {name} {sizes}", inputs=inputs, ours=ours,
                  formula=formula, tolerance=tolerance)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values that need a gradient."""
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def wide(x: Tensor) -> Tensor:
    """x in f32, f64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
