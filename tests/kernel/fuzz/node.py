"""What random programs are made of: tiles with their meaning, programs with what they must compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tessera.kernel.ir import TileTy, Value
from tessera.types import DType

from ..programs import Program
from .approx import Approx

Memo = dict[Any, Any]


@dataclass(eq=False)
class Node:
    """A tile of the program and its meaning.

    `exact`: all backends must agree with the reference to the bit; only such tiles are compared, truncated or
    sorted by index, so that a rounding cannot tip a decision. `same`: two backends must agree with each other
    to the bit, because the order of every sum is fixed. `bound`: the largest magnitude, kept small by clamping.
    """

    value: Value
    compute: Callable[[Memo], Approx]
    exact: bool
    same: bool
    bound: float
    product: bool = False  # a multiplication that an add may contract

    @property
    def dtype(self) -> DType:
        return self.value.type.dtype

    @property
    def type(self) -> TileTy:
        return self.value.type

    @property
    def whole(self) -> bool:
        """No dim is ragged."""
        return all(valid is None for valid in self.type.valid)

    def at(self, memo: Memo) -> Approx:
        """Its value, computed once for each iteration of the loops and grids around it."""
        if self not in memo:
            memo[self] = self.compute(memo)
        return memo[self]

    def number(self, memo: Memo) -> int:
        """The value of an int scalar."""
        return int(self.at(memo).x)


@dataclass
class Case:
    """A program with its arguments and what it must compute."""

    program: Program
    sizes: dict[str, int]
    inputs: list[Tensor | float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)  # as they are before the launch
    expected: list[Approx] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def run(self, backend: Any) -> list[Tensor]:
        """The outputs that a backend computes."""
        outputs = [x.clone() for x in self.outputs]
        self.program.run(*self.inputs, *outputs, backend=backend, **self.sizes)
        return outputs


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a program may be made of. The kept seeds mean something only with the vocabulary they were found in."""

    sizes: Sequence[int]
    floats: Sequence[DType]
    ints: Sequence[DType]
    kinds: Sequence[Callable[[Any], Node | None]]
    blocks: Sequence[int]  # rows of a grid program
    wide: bool = False  # also grids of two axes, and outputs that are scattered, added to, or written on a condition
