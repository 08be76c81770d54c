"""What the emitter handles: axes of Triton tensors, indices into tiles, and emitted values.

Nothing here writes text into the kernel; `emit.Emitter` creates these and `rules`, `contract`, `memory`
and `control` pass them on. A tile of the IR is never emitted as such. A consumer asks for it at one
`Index` an axis, and gets a `Value`: the name of a Triton tensor whose dims are the `Axis` objects that the
indices range over. An index without an axis is a scalar, and its dim does not exist in the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tessera.kernel.dims import Dim, Term


@dataclass(frozen=True, eq=False)
class Axis:
    """One dim of Triton tensors: `size` (a power of two) consecutive positions, held by the variable `offsets`.

    They begin at the value of the text `start`; a blocked axis begins at a multiple of its size, known at run time.
    """

    name: str
    offsets: str
    size: int
    size_text: str
    depth: int
    start: str = "0"

    @property
    def blocked(self) -> bool:
        """Whether it may begin elsewhere than at 0."""
        return self.start != "0"

    def __repr__(self) -> str:
        return f"Axis({self.name}:{self.size})"


@dataclass(frozen=True)
class Val:
    """An emitted value: text (a name or a literal), the axes that its dims are, the depth that defines it.

    `zero` lists what was masked at load: along those axes, the elements at or past the limit are zeros.
    """

    text: str
    axes: tuple[Axis, ...] = ()
    depth: int = 0
    zero: frozenset[tuple[Axis, Dim]] = frozenset()


@dataclass(frozen=True)
class Index:
    """Which elements along one axis of a tile: `value`, a scalar or a tensor of positions.

    limits: the positions that count, as "axis offsets < limit"; guards: further conditions, as bool values.
    start: the first position where the index is `start + axis offsets`, as far as it is known symbolically.
    shared: so many neighbouring positions of its axis are one element: the value is `axis offsets // shared`.
    """

    value: Val
    start: Dim | None = None
    limits: frozenset[tuple[Axis, Dim]] = frozenset()
    guards: tuple[Val, ...] = field(default=())
    shared: int = 1

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.value.axes

    @property
    def key(self) -> tuple[object, ...]:
        """What two equal demands share."""
        return self.value.text, self.value.axes, self.limits, self.guards

    @property
    def depth(self) -> int:
        return max([self.value.depth, *(guard.depth for guard in self.guards)])

    def ends(self) -> list[Dim]:
        """Upper bounds of one past the last position that counts, where they are known symbolically."""
        if self.start is None:
            return []
        if not self.axes:
            return [self.start + 1]
        return [self.start + part for axis, limit in self.limits if axis is self.axes[0] and len(self.axes) == 1
                for part in minimum_parts(limit)]

    def moved(self, value: Val, start: Dim | None) -> Index:
        """The same elements counted from elsewhere."""
        return replace(self, value=value, start=start, shared=1)


def order(indices: Sequence[Index]) -> tuple[Axis, ...]:
    """The axes of a demand, in the order in which its indices name them."""
    return tuple(dict.fromkeys(axis for index in indices for axis in index.axes))


def depth_of(indices: Sequence[Index]) -> int:
    """The innermost scope that the indices need."""
    return max((index.depth for index in indices), default=0)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def at_most(small: Dim, large: Dim) -> bool:
    """Whether small <= large can be seen: every coefficient of the difference of sizes is >= 0."""
    gap = large - small
    if all(factor >= 0 and _is_size(monomial) for monomial, factor in gap.terms):
        return True
    return any(at_most(part, large) for part in minimum_parts(small)[1:])


def minimum_parts(dim: Dim) -> list[Dim]:
    """[dim, a, b, ...] where dim is min(a, min(b, ...)); [dim] otherwise."""
    parts = [dim]
    if len(dim.terms) == 1 and dim.terms[0][1] == 1 and len(dim.terms[0][0]) == 1:
        atom = dim.terms[0][0][0]
        if isinstance(atom, Term) and atom.op == "min":
            parts += _leaves(atom.left) + _leaves(atom.right)
    return parts


def _leaves(dim: Dim) -> list[Dim]:
    parts = minimum_parts(dim)
    return parts if len(parts) == 1 else parts[1:]


def _is_size(monomial: tuple[object, ...]) -> bool:
    return all(isinstance(atom, str) and not atom.startswith("%") for atom in monomial)
