"""What the frontend keeps while it walks a function: names and their values, loops, context, exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tessera.kernel.build import TypeRuleError
from tessera.kernel.diagnostics import did_you_mean
from tessera.kernel.dims import Dim
from tessera.kernel.frontend.liveness import Exits, Liveness
from tessera.kernel.frontend.source import Source
from tessera.kernel.ir import Location, Value
from tessera.kernel.lang.core import builtin, int_of
from tessera.kernel.lang.elementwise import plain

_BLOCK_NAMES = {"block_m": "BM", "block_n": "BN", "block_k": "BK"}


@dataclass(frozen=True)
class Undefined:
    """Bound to a name that has no value here; using the name raises `reason`."""

    reason: str


@dataclass(frozen=True)
class Scope:
    """The innermost block that control can leave: a function's body, a loop's, or a branch of an `if`.

    `names` are the variables that its exits hand on: what a loop carries.
    """

    kind: str  # "function", "loop", "unrolled", "grid"
    exits: Exits = field(default_factory=Exits)
    names: tuple[str, ...] = ()

    def ending_with(self, end: frozenset[str]) -> Scope:
        """The same scope for a nested block, after which `end` is live."""
        return replace(self, exits=replace(self.exits, end=end))


@dataclass(frozen=True)
class Exit:
    """How a block was left. `stop`: whether the enclosing loop ends, known now or at run time."""

    stop: bool | Value = False
    returned: Any = None
    has_returned: bool = False


@dataclass(eq=False)
class Frame:
    """One function being traced: the kernel, or a function inlined into it."""

    source: Source
    env: dict[str, Any]
    liveness: Liveness
    context: Context
    scope: Scope = field(default_factory=lambda: Scope("function"))
    library: bool = False  # part of the language: messages point at its caller


class Context:
    """`tile.context()`: sizes by name, the block sizes of the schedule, the enclosing grid."""

    def __init__(self, dims: Mapping[str, Dim], schedule: Mapping[str, Any], blocks: Mapping[str, int]) -> None:
        self._dims = {attribute_name(name): dim for name, dim in dims.items()}
        self._schedule, self._blocks = schedule, blocks
        self.grids: list[tuple[list[Value], list[Any]]] = []

    def inner(self, dims: Mapping[str, Dim]) -> Context:
        """The context of a kernel that is inlined."""
        return Context(dims, self._schedule, self._blocks)

    def get(self, name: str) -> Any:
        """The value of `ctx.name`.

        Raises:
            TypeRuleError: there is no such size.
        """
        if name in self._dims:
            return plain(self._dims[name])
        if name in _BLOCK_NAMES:
            key = _BLOCK_NAMES[name]
            return int(self._schedule.get(key, self._blocks[key]))
        if name in self._schedule:
            return self._schedule[name]
        if name in ("program_id", "num_programs"):
            return getattr(self, name)
        hint = did_you_mean(name, [*self._dims, *_BLOCK_NAMES])
        raise TypeRuleError(f"context: no size {name!r}{hint}; the signature names {', '.join(self._dims) or 'none'}")

    @builtin
    def program_id(self, axis: int = 0) -> Value:
        """The index of the outermost enclosing grid loop along an axis."""
        return self._grid(axis)[0]

    @builtin
    def num_programs(self, axis: int = 0) -> Any:
        """The extent of the outermost enclosing grid loop along an axis."""
        return self._grid(axis)[1]

    def _grid(self, axis: int) -> tuple[Value, Any]:
        if not self.grids:
            raise TypeRuleError("program_id: no tile.grid loop around this; write `for i in tile.grid(n):`")
        indices, extents = self.grids[0]
        position = int_of(axis, "program_id: axis")
        if not 0 <= position < len(indices):
            raise TypeRuleError(f"program_id: axis {position} of a grid of {len(indices)} axes")
        return indices[position], extents[position]


def attribute_name(dim: str) -> str:
    """The attribute of a context that names a size: "BS" of "B*S", "D_ff" of "D_ff"."""
    return "".join(c for c in dim if c.isalnum() or c == "_")


@dataclass(eq=False)
class SelfObject:
    """`self` of a method kernel, or an object reached from it; its tensors are parameters of the kernel."""

    object: Any
    path: str
    tensors: Mapping[str, Value]


@dataclass(frozen=True, eq=False)
class Method:
    """A builtin bound to the tile before the dot: x.reshape."""

    function: Any
    receiver: Any


@dataclass(frozen=True)
class Binding:
    """What a kernel's parameter is in one specialisation: a typed run-time value or a constant."""

    name: str
    value: Value | None = None
    constant: Any = None
    loc: Location | None = None
