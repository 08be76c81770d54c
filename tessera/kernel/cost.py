"""What a launch moves and computes, read off the IR at the sizes of a call.

In: a traced function, the arguments and sizes of a launch. Out: a `Cost`; `profile` divides it by time.

Bytes are compulsory traffic: a tensor counts once for reading and once for writing, however often loops come
back to it, and only the part that is touched (gathered rows, not the table). Operations are counted on the
elements that count (the valid part of ragged blocks): 2 M N K for a matmul, 2 for an fma, 1 for other
floating-point arithmetic, functions and each element of a reduction or scan; none for casts, comparisons,
selections and integers. Where data decides (`while`, a bound read from memory, an early exit), a loop of
unknown length counts once, one that can end early in full, and of two branches the more expensive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tessera.kernel import ir
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Op, TileTy, Value

MAX_TRIPS = 4096  # iterations of a loop that are looked at one by one; of longer loops, evenly spaced ones
_ARITHMETIC = ir.ELEMENTWISE - ir.COMPARE - ir.BITWISE - {"where", "cast", "not"}
_INTS = frozenset(["int8", "uint8", "int4"])

Count = Counter[tuple[str, str]]  # ("read" | "written", parameter) -> bits; ("flops", class) -> operations


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes read and written, and operations by class: "f32", "f64", and for matmuls "bf16", "f16", "int8"."""

    bytes_read: int = 0
    bytes_written: int = 0
    flops: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def total_flops(self) -> int:
        """Operations of every class."""
        return sum(self.flops.values())


def cost(function: Function, args: Sequence[Any], sizes: Sequence[int]) -> Cost:
    """The cost of one launch.

    Args:
        args: in the order of function.params; of tensors nothing is read.
        sizes: in the order of function.sizes.
    """
    known = dict(zip(function.sizes, sizes))
    known.update({p.value.name: int(a) for p, a in zip(function.params, args)
                  if not p.is_view and p.value.type.dtype.is_int})
    count = _Counter(known).block(function.body)
    moved = {"read": 0, "written": 0}
    for p in function.params:
        if p.is_view:
            whole = _product([d.value(known) for d in p.value.type.shape]) * p.value.type.dtype.bits
            for way in moved:
                moved[way] += (min(count[way, p.value.name], whole) + 7) // 8
    flops = {kind: n for (what, kind), n in count.items() if what == "flops" and n}
    return Cost(bytes_read=moved["read"], bytes_written=moved["written"], flops=flops)


class _Counter:
    """Counts blocks; `known` holds sizes, int arguments and the indices of the loops around."""

    def __init__(self, known: dict[str, int]) -> None:
        self.known = known
        self._dims: dict[int, frozenset[Dim]] = {}

    def block(self, block: Block) -> Count:
        total: Count = Counter()
        for op in block.ops:
            total.update(self._op(op))
        return total

    def _op(self, op: Op) -> Count:
        if op.name == "grid":
            counts = [self._number(v) for v in op.operands]
            return self._loops([(arg, 0, 1 if n is None else n, 1) for arg, n in zip(op.regions[0].args, counts)],
                               op.regions[0])
        if op.name == "for":
            bounds = [self._number(v) for v in op.operands[:3]]
            low, high, step = (0, 1, 1) if None in bounds else (int(n or 0) for n in bounds)
            return self._loops([(op.regions[0].args[0], low, high, step)], op.regions[0])
        if op.name in ("if", "while"):
            arms = [self.block(region) for region in op.regions]
            return sum(arms, Counter()) if op.name == "while" else max(arms, key=lambda arm: sum(arm.values()))
        return self._plain(op)

    def _loops(self, axes: list[tuple[Value, int, int, int]], body: Block) -> Count:
        """All iterations of nested loops: (index, low, high, step) from the outermost in."""
        if not axes:
            return self.block(body)
        (index, low, high, step), *inner = axes
        trips = range(low, high, step or 1)
        dims = [d for d in self._dims_of(body) if index.name in d.atoms]
        if not trips or not dims:
            return _times(self._loops(inner, body), len(trips)) if trips else Counter()
        total: Count = Counter()
        seen: dict[Any, Count] = {}
        looked = trips if len(trips) <= MAX_TRIPS else [trips[k * len(trips) // MAX_TRIPS] for k in range(MAX_TRIPS)]
        for self.known[index.name] in looked:
            key: Any = tuple(self._value(d) for d in dims)
            if None in key:
                key = self.known[index.name]  # a size also depends on an inner index, not known yet
            if key not in seen:
                seen[key] = self._loops(inner, body)
            total.update(seen[key])
        del self.known[index.name]
        return total if looked is trips else _times(total, len(trips) / MAX_TRIPS)

    def _dims_of(self, block: Block) -> frozenset[Dim]:
        """Every size that a block's cost depends on."""
        if id(block) not in self._dims:
            found: set[Dim] = set()
            for op in ir.walk(block):
                for value in (*op.operands, *op.results):
                    found.update(value.type.extent(axis) for axis in range(value.type.rank))
                if op.name in ("for", "grid"):
                    found.update(v.expr for v in op.operands if v.expr is not None)
            self._dims[id(block)] = frozenset(found)
        return self._dims[id(block)]

    def _plain(self, op: Op) -> Count:
        name = op.name
        if name in ("load", "gather"):
            return self._access("read", op.operands[0], op.result.type)
        if name == "store":
            return self._access("written", op.operands[0], op.operands[0].type)
        if name == "scatter":
            return self._access("written", op.operands[0], op.operands[2].type)
        if name == "atomic_add":
            both = self._access("read", op.operands[0], op.operands[1].type)
            both.update(self._access("written", op.operands[0], op.operands[1].type))
            return both
        if name == "mma":
            a, b = op.operands[0].type, op.operands[1].type
            depth = self._extent(a, a.rank - 1)
            return Counter({("flops", _matmul_class(a, b)): 2 * depth * self._elements(op.result.type)})
        if name in _ARITHMETIC and op.result.type.dtype.is_float:
            return _flops(op.result.type, self._elements(op.result.type) * (2 if name == "fma" else 1))
        if name in ("reduce", "scan") and op.operands[0].type.dtype.is_float:
            return _flops(op.operands[0].type, self._elements(op.operands[0].type))
        return Counter()

    def _access(self, way: str, view: Value, touched: TileTy) -> Count:
        while view.op is not None and view.op.operands:
            view = view.op.operands[0]
        return Counter({(way, view.name): self._elements(touched) * touched.dtype.bits})

    def _elements(self, ty: TileTy) -> int:
        return _product([self._extent(ty, axis) for axis in range(ty.rank)])

    def _extent(self, ty: TileTy, axis: int) -> int:
        """Elements of an axis that count; of a length that only the running kernel knows, its bound."""
        found = self._value(ty.extent(axis))
        if found is None:
            found = self._value(ty.shape[axis])
        return max(0, 1 if found is None else found)

    def _number(self, scalar: Value) -> int | None:
        return None if scalar.expr is None else self._value(scalar.expr)

    def _value(self, dim: Dim) -> int | None:
        try:
            return dim.value(self.known)
        except (KeyError, ZeroDivisionError):
            return None


def _flops(ty: TileTy, n: int) -> Count:
    return Counter({("flops", "f64" if ty.dtype.bits == 64 else "f32"): n})


def _matmul_class(a: TileTy, b: TileTy) -> str:
    """The kind of multiplier that a matmul can use."""
    names = {a.dtype.name, b.dtype.name}
    if names <= _INTS:
        return "int8"
    return a.dtype.name if len(names) == 1 and a.dtype.name in ("f64", "bf16", "f16") else "f32"


def _times(count: Count, factor: float) -> Count:
    return Counter({key: round(n * factor) for key, n in count.items()})


def _product(numbers: Sequence[int]) -> int:
    total = 1
    for n in numbers:
        total *= n
    return total
