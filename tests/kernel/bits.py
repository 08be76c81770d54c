"""The bits contract of a kernel: no result depends on the number of threads, on the batch, or on a row's place in it.

In: a kernel with the arguments of a launch, each marked with the axis that counts rows. Out: nothing, or an
assertion that names the number of threads or of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

THREADS = (2, 3, 5, 8, 64)
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64)
ROWS = 67  # of the whole batch


@dataclass(frozen=True)
class Arg:
    """An argument; `axis` counts rows (None: every row needs all of it). Outputs are compared, scratch is not."""

    value: Any
    axis: int | None = None
    is_output: bool = False


class Draw:
    """Makes the arguments of a launch in one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def rows(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Arg:
        """Normal values of every row."""
        return Arg((self.normal(ROWS, *shape, dtype=torch.float32) * scale).to(dtype or self.dtype), 0)

    def whole(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Arg:
        """Normal values that all rows share."""
        return Arg((self.normal(*shape, dtype=torch.float32) * scale).to(dtype or self.dtype))

    def ints(self, high: int, *shape: int, shared: bool = False, dtype: torch.dtype = torch.int32) -> Arg:
        """0 .. high - 1, of every row or shared."""
        size = shape if shared else (ROWS, *shape)
        return Arg(torch.randint(0, high, size, generator=self.generator).to(dtype), None if shared else 0)

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Arg:
        """An output of every row."""
        return Arg(torch.zeros(ROWS, *shape, dtype=dtype or self.dtype), 0, True)

    def sum(self, *shape: int, dtype: torch.dtype = torch.float32) -> Arg:
        """An output that all rows add to."""
        return Arg(torch.zeros(*shape, dtype=dtype), None, True)


def check(kernel: Any, args: Sequence[Arg], **options: Any) -> None:
    """Launch with every number of threads, and with parts of the batch.

    With an output that all rows add to, rows are not taken out: it depends on them.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = _launch(kernel, args, options, 0, ROWS)
        for threads in THREADS:
            torch.set_num_threads(threads)
            _compare(_launch(kernel, args, options, 0, ROWS), expected, f"{threads} threads")
    finally:
        torch.set_num_threads(before)
    if any(arg.axis is not None for arg in args):
        for count in COUNTS:
            start = 5 * count % (ROWS + 1 - count)
            part = [Arg(e.value.narrow(e.axis, start, count), e.axis, True) if e.axis is not None else None
                    for e in expected]
            _compare(_launch(kernel, args, options, start, count), part, f"rows {start} to {start + count}")


def _launch(kernel: Any, args: Sequence[Arg], options: dict[str, Any], start: int, count: int) -> list[Arg]:
    given = []
    for arg in args:
        value = arg.value
        if arg.axis is not None:
            value = value.narrow(arg.axis, start, count)
            value = value if arg.axis == 0 else value.contiguous()
        given.append(value.clone() if arg.is_output else value)
    kernel(*given, **options)
    return [Arg(value, arg.axis, True) for value, arg in zip(given, args) if arg.is_output]


def _compare(found: Sequence[Arg], expected: Sequence[Arg | None], what: str) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if b is not None:
            assert not a.value.isnan().any() if a.value.is_floating_point() else True
            assert torch.equal(a.value, b.value), f"output {number}, {what}"
