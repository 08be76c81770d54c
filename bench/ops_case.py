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
    """One line of the table. A file ops_cases_*.py has a function `cases(quick: bool) -> Iterator[OpCase]`.

    Args:
        group: operation and dtype, "rms_norm f32".
        label: the group and the sizes.
        inputs: of both functions; the gradients of those that need one are computed and compared.
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


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal values that need a gradient."""
    return torch.randn(shape).to(dtype).requires_grad_()
