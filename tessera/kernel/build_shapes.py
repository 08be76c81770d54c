"""Builds operations that make tiles or move their elements, and scalars.

In: operands and attributes. Out: operations appended to the current block, with result types inferred. `build.Builder`
adds arithmetic, reductions, products and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tessera.kernel.build_rules import (
    TypeRuleError,
    align,
    apply_spec,
    is_loose,
    join_valid,
    product,
    scalar_expression,
    show,
)
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Location, Op, TileTy, Value, ViewTy
from tessera.types import DType, bool_, f32, int4, int32, int64

PACK_INT4 = "write two to a uint8: (even & 15) | ((odd & 15) << 4)"  # what an error about int4 proposes


class ShapeBuilder:
    """Appends operations to `block` of `function`; `loc` is stamped on each."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.block = function.body
        self.loc: Location | None = None

    # -- the mechanism ------------------------------------------------------------------------------

    def emit(self, name: str, operands: Sequence[Value], types: Sequence[TileTy] = (),
             regions: Sequence[Block] = (), **attrs: Any) -> Op:
        """Append an operation whose result types the caller has worked out."""
        op = Op(name, list(operands), attrs={k: v for k, v in attrs.items() if v is not None},
                regions=list(regions), loc=self.loc)
        for type_ in types:
            value = Value(self.function.fresh(), type_, op)
            if type_.rank == 0 and type_.dtype.is_int and not isinstance(type_, ViewTy):
                value.expr = scalar_expression(name, operands, attrs) or Dim.atom(value.name)
            op.results.append(value)
        self.block.ops.append(op)
        return op

    def argument(self, type_: TileTy, hint: str = "") -> Value:
        """A new region argument (the caller puts it into `Block.args`)."""
        value = Value(self.function.fresh(), type_, hint=hint)
        if type_.rank == 0 and type_.dtype.is_int:
            value.expr = Dim.atom(value.name)
        return value

    @contextmanager
    def inside(self, block: Block) -> Iterator[Block]:
        """Append to another block for a while."""
        before, self.block = self.block, block
        try:
            yield block
        finally:
            self.block = before

    # -- scalars ------------------------------------------------------------------------------------

    def const(self, value: bool | int | float, dtype: DType | None = None) -> Value:
        """A compile-time scalar: bool, int (int64 when untyped) or float (f32 when untyped)."""
        if dtype is None:
            dtype = bool_ if isinstance(value, bool) else int64 if isinstance(value, int) else f32
        kind: type = float if dtype.is_float else bool if dtype == bool_ else int
        if kind is int and not -2**(dtype.bits - 1) <= int(value) < 2**(dtype.bits - (dtype.kind == "int")):
            raise TypeRuleError(f"{value} given; it does not fit {dtype}")
        return self.emit("const", [], [TileTy((), dtype)], value=kind(value)).result

    def size(self, expr: Dim) -> Value:
        """The int64 scalar of a symbolic size."""
        if expr.const is not None:
            return self.const(expr.const)
        return self.emit("dim", [], [TileTy((), int64)], expr=expr).result

    def cast(self, x: Value, dtype: DType) -> Value:
        """x in another dtype: round to nearest even, float to int truncates, to bool is != 0."""
        if x.type.dtype == dtype:
            return x
        if dtype == int4:
            raise TypeRuleError(
                f"cast: int4 is a storage type of parameters; nothing can be cast to it; {PACK_INT4}", x)
        return self.emit("cast", [x], [TileTy(x.type.shape, dtype, x.type.valid)]).result

    # -- shapes -------------------------------------------------------------------------------------

    def full(self, shape: Sequence[Dim], scalar: Value) -> Value:
        """A tile whose every element is the scalar."""
        return self.emit("full", [scalar], [TileTy(tuple(shape), scalar.type.dtype)]).result

    def iota(self, shape: Sequence[Dim], axis: int) -> Value:
        """0, 1, ... along an axis, int32."""
        return self.emit("iota", [], [TileTy(tuple(shape), int32)], axis=axis % len(shape)).result

    def broadcast(self, x: Value, shape: Sequence[Dim], axes: Sequence[int | None],
                  valid: Sequence[Dim | None] | None = None) -> Value:
        """x with new or expanded axes; `axes[i]` is the source of result axis i (None: new)."""
        if tuple(axes) == tuple(range(x.type.rank)) and tuple(shape) == x.type.shape:
            return x
        if valid is None:
            valid = [None if a is None or x.type.shape[a] != d else x.type.valid[a] for a, d in zip(axes, shape)]
        return self.emit("broadcast", [x], [TileTy(tuple(shape), x.type.dtype, tuple(valid))], axes=tuple(axes)).result

    def expand_dims(self, x: Value, axis: int) -> Value:
        """x with a new axis of size 1 before `axis` (negative counts from the end of the result)."""
        axis = axis % (x.type.rank + 1)
        axes: list[int | None] = list(range(x.type.rank))
        axes.insert(axis, None)
        shape = list(x.type.shape)
        shape.insert(axis, Dim.of(1))
        return self.broadcast(x, shape, axes)

    def broadcast_together(self, values: Sequence[Value], what: str) -> list[Value]:
        """Give all values one shape: axes align from the right, a size of 1 expands, scalars fill.

        A tile from `load_broadcast` may leave out axes anywhere: its dims are found by name.

        Raises:
            TypeRuleError: two dims differ.
        """
        target = max((v for v in values if not is_loose(v)), key=lambda v: v.type.rank, default=values[0])
        rank = max(v.type.rank for v in values)
        aligned = [align(v, target, rank) for v in values]
        shape: list[Dim] = []
        valid: list[Dim | None] = []
        for axis in range(rank):
            size, owner = Dim.of(1), target
            for value, axes in zip(values, aligned):
                source = axes[axis]
                dim = Dim.of(1) if source is None else value.type.shape[source]
                if dim.const == 1 or dim == size:
                    continue
                if size.const != 1:
                    raise TypeRuleError(
                        f"{what}: shapes {show(owner)} and {show(value)} do not fit: {size} against {dim}",
                        owner, value)
                size, owner = dim, value
            shape.append(size)
            valid.append(owner.type.valid[a] if (a := aligned[values.index(owner)][axis]) is not None else None)
        result = []
        for value, axes in zip(values, aligned):
            keep = [valid[i] if a is None or value.type.shape[a] != shape[i] else value.type.valid[a]
                    for i, a in enumerate(axes)]
            result.append(self.broadcast(value, shape, axes, keep) if rank else value)
        return result

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """Same elements in row-major order under another shape.

        Raises:
            TypeRuleError: the number of elements differs, or a ragged dim would be merged or split.
        """
        have, want = product(x.type.shape), product(shape)
        if have != want:
            raise TypeRuleError(f"reshape: {show(x)} has {have} elements, the new shape {list(shape)} has {want}", x)
        valid: list[Dim | None] = [None] * len(shape)
        prefix = 0
        while prefix < min(len(shape), x.type.rank) and shape[prefix] == x.type.shape[prefix]:
            valid[prefix] = x.type.valid[prefix]
            prefix += 1
        suffix = 0
        while suffix < min(len(shape), x.type.rank) - prefix and shape[-1 - suffix] == x.type.shape[-1 - suffix]:
            valid[-1 - suffix] = x.type.valid[-1 - suffix]
            suffix += 1
        if any(v is not None for v in x.type.valid[prefix:x.type.rank - suffix]):
            raise TypeRuleError(f"reshape: {show(x)} has a ragged dim that cannot be merged or split", x)
        return self.emit("reshape", [x], [TileTy(tuple(shape), x.type.dtype, tuple(valid))]).result

    def transpose(self, x: Value, perm: Sequence[int] | None = None) -> Value:
        """Axes reordered; by default the last two are swapped."""
        rank = x.type.rank
        if perm is None:
            if rank < 2:
                raise TypeRuleError(f"transpose: {show(x)} has fewer than two axes", x)
            perm = [*range(rank - 2), rank - 1, rank - 2]
        perm = [p % rank if -rank <= p < rank else p for p in perm]
        if sorted(perm) != list(range(rank)):
            raise TypeRuleError(f"transpose: {tuple(perm)} is not an order of the {rank} axes of {show(x)}", x)
        type_ = TileTy(tuple(x.type.shape[p] for p in perm), x.type.dtype, tuple(x.type.valid[p] for p in perm))
        return self.emit("transpose", [x], [type_], perm=tuple(perm)).result

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """What counts of the tiles, joined along an axis; the other dims and the dtypes agree."""
        first = values[0]
        axis = self.axis(first, axis, "concat")
        for value in values[1:]:
            same = value.type.rank == first.type.rank and all(
                a == b for i, (a, b) in enumerate(zip(value.type.shape, first.type.shape)) if i != axis)
            if not same or value.type.dtype != first.type.dtype:
                why = f"do not join along axis {axis}" if not same else "have different dtypes; cast one of them"
                raise TypeRuleError(f"concat: {show(first)} and {show(value)} {why}", first, value)
        shape, valid = list(first.type.shape), list(join_valid(*values))
        shape[axis] = sum((v.type.shape[axis] for v in values), Dim.of(0))
        ragged = any(v.type.valid[axis] is not None for v in values)
        valid[axis] = sum((v.type.extent(axis) for v in values), Dim.of(0)) if ragged else None
        type_ = TileTy(tuple(shape), first.type.dtype, tuple(valid))
        return self.emit("concat", values, [type_], axis=axis).result

    def slice(self, x: Value, spec: Sequence[tuple[Any, ...]], starts: Sequence[Value]) -> Value:
        """Part of a tile; `spec` as in `ir`. Dropping every axis gives a scalar (`extract`)."""
        shape, valid = apply_spec(x.type, spec)
        return self.emit("slice", [x, *starts], [TileTy(shape, x.type.dtype, valid)], spec=tuple(spec)).result

    def extract(self, x: Value, indices: Sequence[Value]) -> Value:
        """One element as a scalar."""
        self._one_index_an_axis("extract", x, indices)
        return self.emit("extract", [x, *indices], [TileTy((), x.type.dtype)]).result

    def insert(self, x: Value, scalar: Value, indices: Sequence[Value]) -> Value:
        """x with one element replaced."""
        self._one_index_an_axis("insert", x, indices)
        return self.emit("insert", [x, self.cast(scalar, x.type.dtype), *indices], [x.type]).result

    def _one_index_an_axis(self, what: str, x: Value, indices: Sequence[Value]) -> None:
        if len(indices) != x.type.rank:
            raise TypeRuleError(f"{what}: {len(indices)} indices given for {show(x)}; expected {x.type.rank}", x)
        for index in indices:
            if index.type.rank or not index.type.dtype.is_int:
                raise TypeRuleError(f"{what}: index is {show(index)}; expected an int scalar", index)

    def axis(self, x: Value, axis: int, what: str) -> int:
        """The axis counted from 0.

        Raises:
            TypeRuleError: it is outside the tile's rank.
        """
        if not -x.type.rank <= axis < x.type.rank:
            raise TypeRuleError(f"{what}: axis {axis} is outside {show(x)}", x)
        return axis % x.type.rank
