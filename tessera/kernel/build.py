"""Builds typed IR: every operation's type rule, in one place.

In: operands and attributes, from the frontend or from a pass. Out: operations appended to the current
block, with result types inferred. A breach of a type rule raises `TypeRuleError`, which names what was
expected and holds the offending operands; the frontend turns it into a message with line and caret.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tessera.kernel import ir
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Location, Op, TileTy, Value, ViewTy
from tessera.types import (
    DType,
    bf16,
    bool_,
    f16,
    f32,
    f64,
    fp8_e4m3,
    fp8_e5m2,
    int4,
    int8,
    int32,
    int64,
    uint8,
)

_FLOAT_ORDER = (f32, f64)
_LOW_INTS = (int8, uint8, int4)
_LOW_FLOATS = (bf16, f16, fp8_e4m3, fp8_e5m2)


class TypeRuleError(Exception):
    """An operation does not type-check. `operands` are the values to point at."""

    def __init__(self, message: str, *operands: Value) -> None:
        super().__init__(message)
        self.operands = operands


def arithmetic_dtype(dtype: DType) -> DType:
    """The type that arithmetic on a storage type is done in and gives: f32 or int32 or wider."""
    if dtype in _LOW_FLOATS:
        return f32
    return int32 if dtype in _LOW_INTS or dtype == bool_ else dtype


def promote(x: Value, y: Value, what: str) -> DType:
    """The common arithmetic dtype of two operands; a float scalar or int scalar adapts to a float tile.

    Raises:
        TypeRuleError: an int tile meets a float tile, or a bool meets a number.
    """
    a, b = x.type.dtype, y.type.dtype
    if (a == bool_) != (b == bool_):
        raise TypeRuleError(f"{what}: {a} and {b} do not mix; cast one of them", x, y)
    a, b = arithmetic_dtype(a), arithmetic_dtype(b)
    if a.is_float != b.is_float:
        integer = y if a.is_float else x
        if integer.type.rank or ((x if a.is_float else y).type.rank == integer.type.rank == 0 and integer.expr is None):
            raise TypeRuleError(f"{what}: {x.type.dtype} and {y.type.dtype} do not mix; cast one of them", x, y)
        return a if a.is_float else b
    if x.type.rank and not y.type.rank:
        return a  # scalars are weak: they take the tile's type
    if y.type.rank and not x.type.rank:
        return b
    return a if a.bits >= b.bits else b


class Builder:
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
                value.expr = _expression(name, operands, attrs) or Dim.atom(value.name)
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
        return self.emit("const", [], [TileTy((), dtype)], value=kind(value)).result

    def size(self, expr: Dim) -> Value:
        """The int64 scalar of a symbolic size."""
        if expr.const is not None:
            return self.const(expr.const)
        return self.emit("dim", [], [TileTy((), int64)], expr=expr).result

    # -- elementwise --------------------------------------------------------------------------------

    def cast(self, x: Value, dtype: DType) -> Value:
        """x in another dtype: round to nearest even, float to int truncates, to bool is != 0."""
        if x.type.dtype == dtype:
            return x
        if dtype == int4:
            raise TypeRuleError("cast: int4 is a storage type of parameters; nothing can be cast to it", x)
        return self.emit("cast", [x], [TileTy(x.type.shape, dtype, x.type.valid)]).result

    def unary(self, name: str, x: Value) -> Value:
        """exp, log, neg, ...: float functions need a float, `not` a bool."""
        dtype = x.type.dtype
        if name in ir.UNARY_FLOAT and not dtype.is_float:
            raise TypeRuleError(f"{name}: {dtype} given; expected a float; cast it first", x)
        if name == "not" and dtype != bool_:
            raise TypeRuleError(f"not: {dtype} given; expected bool", x)
        if name in ir.UNARY_ANY and dtype == bool_:
            raise TypeRuleError(f"{name}: bool given; expected a number", x)
        target = dtype if name == "not" else arithmetic_dtype(dtype)
        x = self.cast(x, target)
        return self.emit(name, [x], [x.type if type(x.type) is TileTy else TileTy(x.type.shape, target)]).result

    def binary(self, name: str, x: Value, y: Value) -> Value:
        """add, mul, max, lt, and, ...: operands are promoted, then broadcast against each other."""
        if name in ir.BITWISE and x.type.dtype.is_float | y.type.dtype.is_float:
            raise TypeRuleError(f"{name}: {x.type.dtype} and {y.type.dtype} given; expected ints or bools", x, y)
        dtype = promote(x, y, name)
        if name in ("and", "or", "xor", "eq", "ne") and x.type.dtype == bool_:
            dtype = bool_
        elif name == "div" and not dtype.is_float:
            raise TypeRuleError(f"div: {dtype} given; expected floats; use // or cast", x, y)
        elif x.type.dtype == y.type.dtype == bool_ and name not in ir.COMPARE:
            raise TypeRuleError(f"{name}: bool given; expected numbers; cast to int32", x, y)
        x, y = self.broadcast_together([self.cast(x, dtype), self.cast(y, dtype)], name)
        result = bool_ if name in ir.COMPARE else dtype
        return self.emit(name, [x, y], [TileTy(x.type.shape, result, join_valid(x, y))]).result

    def where(self, condition: Value, x: Value, y: Value) -> Value:
        """x where the condition holds, else y; keeps a dtype that both share."""
        if condition.type.dtype != bool_:
            raise TypeRuleError(f"where: condition is {condition.type.dtype}; expected bool", condition)
        dtype = x.type.dtype if x.type.dtype == y.type.dtype else promote(x, y, "where")
        operands = self.broadcast_together([condition, self.cast(x, dtype), self.cast(y, dtype)], "where")
        return self.emit("where", operands, [TileTy(operands[0].type.shape, dtype, join_valid(*operands))]).result

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, rounded once."""
        dtype = promote(x, y, "fma")
        operands = self.broadcast_together([self.cast(v, dtype) for v in (x, y, z)], "fma")
        return self.emit("fma", operands, [TileTy(operands[0].type.shape, dtype, join_valid(*operands))]).result

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
        aligned = [_align(v, target, rank) for v in values]
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
        have, want = _product(x.type.shape), _product(shape)
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
        """Tiles joined along an axis; the other dims and the dtypes agree."""
        first = values[0]
        axis = self.axis(first, axis, "concat")
        for value in values[1:]:
            same = value.type.rank == first.type.rank and all(
                a == b for i, (a, b) in enumerate(zip(value.type.shape, first.type.shape)) if i != axis)
            if not same or value.type.dtype != first.type.dtype:
                raise TypeRuleError(
                    f"concat: {show(first)} and {show(value)} do not join along axis {axis}", first, value)
        if any(v.type.valid[axis] is not None for v in values):
            raise TypeRuleError("concat: a ragged dim cannot be joined", *values)
        shape = list(first.type.shape)
        shape[axis] = sum((v.type.shape[axis] for v in values), Dim.of(0))
        type_ = TileTy(tuple(shape), first.type.dtype, join_valid(*values))
        return self.emit("concat", values, [type_], axis=axis).result

    def slice(self, x: Value, spec: Sequence[tuple[Any, ...]], starts: Sequence[Value]) -> Value:
        """Part of a tile; `spec` as in `ir`. Dropping every axis gives a scalar (`extract`)."""
        shape, valid = _apply_spec(x.type, spec)
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

    # -- reductions, matmul, random -----------------------------------------------------------------

    def reduce(self, kind: str, x: Value, axis: int = -1) -> Value:
        """sum, mean, max, min, argmax, argmin (int32), any, all along one axis, which is dropped."""
        axis = self.axis(x, axis, f"reduce_{kind}")
        dtype = x.type.dtype
        if (kind in ("any", "all")) != (dtype == bool_):
            expected = "bool" if kind in ("any", "all") else "numbers"
            raise TypeRuleError(f"reduce_{kind}: {dtype} given; expected {expected}", x)
        if kind == "mean" and not dtype.is_float:
            raise TypeRuleError(f"reduce_mean: {dtype} given; expected a float", x)
        if kind in ("sum", "mean"):
            dtype = arithmetic_dtype(dtype)
            x = self.cast(x, dtype)
        if dtype == int4:
            x = self.cast(x, int32)
            dtype = int32
        result = int32 if kind.startswith("arg") else dtype
        drop = [i for i in range(x.type.rank) if i != axis]
        type_ = TileTy(tuple(x.type.shape[i] for i in drop), result, tuple(x.type.valid[i] for i in drop))
        return self.emit("reduce", [x], [type_], kind=kind, axis=axis).result

    def scan(self, kind: str, x: Value, axis: int = -1) -> Value:
        """cumsum or cummax along an axis."""
        axis = self.axis(x, axis, kind)
        x = self.cast(x, arithmetic_dtype(x.type.dtype))
        return self.emit("scan", [x], [x.type], kind=kind, axis=axis).result

    def sort(self, x: Value, axis: int = -1, descending: bool = False) -> tuple[Value, Value]:
        """Stable sort along an axis: values and int32 indices. NaN counts as the largest."""
        axis = self.axis(x, axis, "sort")
        op = self.emit("sort", [x], [x.type, TileTy(x.type.shape, int32, x.type.valid)],
                       axis=axis, descending=descending)
        return op.results[0], op.results[1]

    def mma(self, a: Value, b: Value, acc: Value | None = None) -> Value:
        """a @ b (+ acc): [*, M, K] x [*, K, N]; f32 accumulation (int32 for ints, f64 for f64).

        Raises:
            TypeRuleError: inner dims, batch dims, dtypes or the accumulator do not fit.
        """
        if a.type.rank < 2 or b.type.rank < 2:
            raise TypeRuleError(f"mma: {show(a)} x {show(b)}; expected at least two axes each", a, b)
        if a.type.shape[-1] != b.type.shape[-2]:
            raise TypeRuleError(
                f"mma: inner dims differ: {show(a)} x {show(b)}: {a.type.shape[-1]} against {b.type.shape[-2]}", a, b)
        batch = a.type.shape[:-2]
        if b.type.shape[:-2] not in ((), batch):
            raise TypeRuleError(f"mma: batch dims differ: {show(a)} x {show(b)}", a, b)
        a, b, dtype = self._mma_operands(a, b)
        shared = join_valid(a, b)[:-2] if b.type.shape[:-2] else a.type.valid[:-2]
        valid = (*shared, a.type.valid[-2], b.type.valid[-1])
        type_ = TileTy((*batch, a.type.shape[-2], b.type.shape[-1]), dtype, valid)
        if acc is not None and (acc.type.shape != type_.shape or acc.type.dtype != dtype):
            raise TypeRuleError(f"mma: accumulator is {show(acc)}; expected {dtype}{list(type_.shape)}", acc, a, b)
        return self.emit("mma", [a, b] if acc is None else [a, b, acc], [type_]).result

    def _mma_operands(self, a: Value, b: Value) -> tuple[Value, Value, DType]:
        left, right = a.type.dtype, b.type.dtype
        if left == bool_ or right == bool_:
            raise TypeRuleError("mma: bool given; expected numbers", a, b)
        if left.is_int and right.is_int:
            return a, b, int32
        if left.is_float and right.is_float:
            if f64 in (left, right):
                return self.cast(a, f64), self.cast(b, f64), f64
            if left != right:
                return self.cast(a, f32), self.cast(b, f32), f32
            return a, b, f32
        raise TypeRuleError(f"mma: {left} x {right} do not mix; cast one of them", a, b)

    def rand(self, seed: Value, offset: Value) -> Value:
        """Uniform f32 in [0, 1) from Philox4x32-10 of (seed, offset), Triton's `tl.rand` bit for bit."""
        if not offset.type.dtype.is_int:
            raise TypeRuleError(f"rand: offset is {show(offset)}; expected ints", offset)
        return self.emit("rand", [seed, offset], [TileTy(offset.type.shape, f32, offset.type.valid)]).result

    # -- memory -------------------------------------------------------------------------------------

    def view(self, base: Value, spec: Sequence[tuple[Any, ...]], starts: Sequence[Value]) -> Value:
        """A window on a view; `spec` as in `ir`."""
        if all(entry[0] == "all" for entry in spec):
            return base
        shape, valid = _apply_spec(base.type, spec)
        return self.emit("view", [base, *starts], [ViewTy(shape, base.type.dtype, valid)], spec=tuple(spec)).result

    def load(self, view: Value, loose: bool = False) -> Value:
        """The tile that a view shows."""
        type_ = TileTy(view.type.shape, view.type.dtype, view.type.valid)
        return self.emit("load", [view], [type_], loose=loose or None).result

    def store(self, view: Value, x: Value) -> None:
        """Write a tile (rounded to the view's dtype) through a view of the same shape; scalars fill.

        Raises:
            TypeRuleError: shapes differ, or an int meets a float.
        """
        x = self._fit(view, x, "store")
        self.emit("store", [view, x])

    def atomic_add(self, view: Value, x: Value) -> None:
        """view += x, safe between grid programs; for floats the order, so the last bits, may vary."""
        self.emit("atomic_add", [view, self._fit(view, x, "atomic_add")])

    def _fit(self, view: Value, x: Value, what: str) -> Value:
        if not isinstance(view.type, ViewTy):
            raise TypeRuleError(
                f"{what}: target is the tile {show(view)}; expected a parameter or a slice of one", view)
        if view.type.dtype == int4:
            raise TypeRuleError(f"{what}: int4 parameters are read-only", view)
        if (x.type.dtype.is_float != view.type.dtype.is_float) and x.type.dtype != bool_ and view.type.dtype != bool_:
            raise TypeRuleError(f"{what}: {show(x)} into {show(view)}: cast it to {view.type.dtype} first", x, view)
        x = self.cast(x, view.type.dtype)
        if x.type.rank == 0 and view.type.rank:
            return self.full(view.type.shape, x)
        if x.type.rank != view.type.rank or any(
                a != b and a.const != 1 for a, b in zip(x.type.shape, view.type.shape)):
            raise TypeRuleError(f"{what}: {show(x)} does not fit {show(view)}", x, view)
        return self.broadcast(x, view.type.shape, range(x.type.rank)) if x.type.shape != view.type.shape else x

    def gather(self, view: Value, index: Value) -> Value:
        """Rows of a view's first axis: index.shape + view.shape[1:]."""
        self._row_index("gather", view, index)
        type_ = TileTy(index.type.shape + view.type.shape[1:], view.type.dtype, index.type.valid + view.type.valid[1:])
        return self.emit("gather", [view, index], [type_]).result

    def scatter(self, view: Value, index: Value, x: Value) -> None:
        """view[index] = x for rows of the first axis; on equal indices one of them stays."""
        self._row_index("scatter", view, index)
        if x.type.shape != index.type.shape + view.type.shape[1:]:
            raise TypeRuleError(f"scatter: {show(x)} given; expected {list(index.type.shape + view.type.shape[1:])}", x)
        self.emit("scatter", [view, index, self.cast(x, view.type.dtype)])

    def _row_index(self, what: str, view: Value, index: Value) -> None:
        if not isinstance(view.type, ViewTy) or not view.type.rank:
            raise TypeRuleError(f"{what}: {show(view)} given; expected a parameter or a slice of one", view)
        if not index.type.dtype.is_int:
            raise TypeRuleError(f"{what}: index is {show(index)}; expected ints", index)


def is_loose(value: Value) -> bool:
    """Whether a value comes from `load_broadcast` (through casts), so that its dims align by name."""
    while value.op is not None and value.op.name == "cast":
        value = value.op.operands[0]
    return value.op is not None and bool(value.op.attrs.get("loose"))


def show(value: Value) -> str:
    """A value as messages name it: x: bf16[S, D]."""
    return f"{value.hint}: {value.type}" if value.hint else str(value.type)


def join_valid(*values: Value) -> tuple[Dim | None, ...]:
    """What counts of a combination of equally shaped tiles: where all of them count."""
    joined: list[Dim | None] = list(values[0].type.valid)
    for value in values[1:]:
        for axis, valid in enumerate(value.type.valid):
            mine = joined[axis]
            joined[axis] = valid if mine is None else mine if valid is None or valid == mine else mine.minimum(valid)
    return tuple(joined)


def _align(value: Value, target: Value, rank: int) -> list[int | None]:
    """For each of `rank` axes of the result, the axis of `value` that feeds it."""
    missing = rank - value.type.rank
    right_aligned: list[int | None] = [None] * missing + list(range(value.type.rank))
    if not is_loose(value) or not missing:
        return right_aligned
    axes: list[int | None] = [None] * rank
    position = rank
    for source in reversed(range(value.type.rank)):
        position -= 1
        while position >= 0 and target.type.shape[position] != value.type.shape[source]:
            position -= 1
        if position < 0:
            return right_aligned
        axes[position] = source
    return axes


def _apply_spec(type_: TileTy, spec: Sequence[tuple[Any, ...]]) -> tuple[tuple[Dim, ...], tuple[Dim | None, ...]]:
    shape, valid = [], []
    for entry, dim, known in zip(spec, type_.shape, type_.valid):
        if entry[0] == "all":
            shape.append(dim)
            valid.append(known)
        elif entry[0] == "range":
            shape.append(entry[2])
            valid.append(entry[3])
    return tuple(shape), tuple(valid)


def _product(shape: Sequence[Dim]) -> Dim:
    total = Dim.of(1)
    for dim in shape:
        total = total * dim
    return total


def _expression(name: str, operands: Sequence[Value], attrs: dict[str, Any]) -> Dim | None:
    """The symbolic value of an int scalar operation, where it is known."""
    if name == "const":
        return Dim.of(int(attrs["value"]))
    if name == "dim":
        return attrs["expr"]
    if name == "cast" and operands[0].expr is not None:
        return operands[0].expr
    if len(operands) != 2 or operands[0].expr is None or operands[1].expr is None:
        return None
    x, y = operands[0].expr, operands[1].expr
    if name in ("floordiv", "mod") and y.const == 0:
        return None
    operations = {"add": Dim.__add__, "sub": Dim.__sub__, "mul": Dim.__mul__, "floordiv": Dim.__floordiv__,
                  "mod": Dim.__mod__, "min": Dim.minimum, "max": Dim.maximum}
    return operations[name](x, y) if name in operations else None
