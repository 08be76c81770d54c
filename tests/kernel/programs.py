"""Tile programs built by hand for the tests: parameters in one line, then `ir` operations by the Builder."""

from collections.abc import Sequence
from typing import Any

import torch

from tessera.kernel.backends import interp
from tessera.kernel.build import Builder
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Location, Param, TileTy, Value, ViewTy
from tessera.types import DType, int64


class Program(Builder):
    """A function under construction. Sizes bind by name in the order of first use."""

    def __init__(self, name: str = "program") -> None:
        super().__init__(Function(name, [], [], Block()))
        self.loc = Location("made.py", 1, 0, 4, "made")

    def tensor(self, name: str, dims: Sequence[str | int | Dim], dtype: DType, output: bool = False) -> Value:
        """A tensor parameter; names among the dims become sizes."""
        shape = tuple(Dim.of(d) for d in dims)
        for atom in sorted(a for d in shape for a in d.atoms):
            if atom not in self.function.sizes:
                self.function.sizes.append(atom)
        value = Value(self.function.fresh(), ViewTy(shape, dtype), hint=name)
        self.function.params.append(Param(name, value, is_output=output))
        return value

    def scalar(self, name: str, dtype: DType) -> Value:
        """A run-time scalar parameter."""
        value = self.argument(TileTy((), dtype), name)
        self.function.params.append(Param(name, value))
        return value

    def output(self, name: str, x: Value) -> None:
        """A new output parameter with the shape and dtype of x, and the store to it."""
        self.store(self.tensor(name, x.type.shape, x.type.dtype, output=True), x)

    def loop(self, low: Value, high: Value, step: Value, initial: Sequence[Value], body: Any) -> list[Value]:
        """A `for`: body(i, *carried) returns the next carried values."""
        region = Block([self.argument(TileTy((), int64)), *(self.argument(v.type) for v in initial)])
        with self.inside(region):
            carried = body(*region.args)
            self.emit("yield", carried)
        return self.emit("for", [low, high, step, *initial], [v.type for v in initial], [region]).results

    def grid(self, *counts: Value) -> Block:
        """A grid's region, to be filled with `inside`."""
        region = Block([self.argument(TileTy((), int64)) for _ in counts])
        self.emit("grid", counts, regions=[region])
        return region

    def branch(self, condition: Value, then: Any, other: Any) -> list[Value]:
        """An `if`; both functions return the values of its results."""
        regions = []
        for make in (then, other):
            with self.inside(Block()) as region:
                values = make()
                self.emit("yield", values)
            regions.append(region)
        return self.emit("if", [condition], [v.type for v in values], regions).results

    def run(self, *args: Any, backend: Any = interp, **sizes: int) -> None:
        """Compile and run with arguments in the order of the parameters."""
        backend.compile(self.function)(args, [sizes[name] for name in self.function.sizes])


def apply(program: Program, value: Value, *args: Any, backend: Any = interp, **sizes: int) -> torch.Tensor:
    """The tile `value` of a program, computed by storing it to a new output."""
    program.output("result", value)
    out = torch.zeros([dim.value(sizes) for dim in value.type.shape], dtype=value.type.dtype.torch)
    program.run(*args, out, backend=backend, **sizes)
    return out
