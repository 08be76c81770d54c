"""Builds typed IR: every operation's type rule.

In: operands and attributes, from the frontend or from a pass. Out: operations appended to the current
block, with result types inferred. A breach of a type rule raises `TypeRuleError`, which names what was
expected and holds the offending operands; the frontend turns it into a message with line and caret.
What the rules share stands in `build_rules.py`, operations that only move elements in `build_shapes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessera.kernel import ir
from tessera.kernel.build_rules import TypeRuleError, apply_spec, arithmetic_dtype, join_valid, promote, show
from tessera.kernel.build_shapes import PACK_INT4, ShapeBuilder
from tessera.kernel.ir import TileTy, Value, ViewTy
from tessera.types import DType, bool_, f32, f64, int4, int32

__all__ = ["Builder", "TypeRuleError", "arithmetic_dtype", "show"]


class Builder(ShapeBuilder):
    """Appends operations of every kind to `block` of `function`; `loc` is stamped on each."""

    # -- elementwise --------------------------------------------------------------------------------

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
        if seed.type.rank or not seed.type.dtype.is_int:
            raise TypeRuleError(f"rand: seed is {show(seed)}; expected an int scalar", seed)
        return self.emit("rand", [seed, offset], [TileTy(offset.type.shape, f32, offset.type.valid)]).result

    # -- memory -------------------------------------------------------------------------------------

    def view(self, base: Value, spec: Sequence[tuple[Any, ...]], starts: Sequence[Value]) -> Value:
        """A window on a view; `spec` as in `ir`."""
        if all(entry[0] == "all" for entry in spec):
            return base
        shape, valid = apply_spec(base.type, spec)
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
        if view.type.dtype == bool_:
            raise TypeRuleError(f"atomic_add: {show(view)} given; expected numbers", view)
        self.emit("atomic_add", [view, self._fit(view, x, "atomic_add")])

    def _fit(self, view: Value, x: Value, what: str) -> Value:
        if not isinstance(view.type, ViewTy):
            raise TypeRuleError(
                f"{what}: target is the tile {show(view)}; expected a parameter or a slice of one", view)
        x = self._fit_dtype(view, x, what)
        if x.type.rank == 0 and view.type.rank:
            return self.full(view.type.shape, x)
        if x.type.rank != view.type.rank or any(
                a != b and a.const != 1 for a, b in zip(x.type.shape, view.type.shape)):
            raise TypeRuleError(f"{what}: {show(x)} does not fit {show(view)}", x, view)
        return self.broadcast(x, view.type.shape, range(x.type.rank)) if x.type.shape != view.type.shape else x

    def _fit_dtype(self, view: Value, x: Value, what: str) -> Value:
        if view.type.dtype == int4:
            raise TypeRuleError(f"{what}: int4 parameters are read-only; {PACK_INT4}", view)
        if (x.type.dtype.is_float != view.type.dtype.is_float) and x.type.dtype != bool_ and view.type.dtype != bool_:
            raise TypeRuleError(f"{what}: {show(x)} into {show(view)}: cast it to {view.type.dtype} first", x, view)
        return self.cast(x, view.type.dtype)

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
        self.emit("scatter", [view, index, self._fit_dtype(view, x, "scatter")])

    def _row_index(self, what: str, view: Value, index: Value) -> None:
        if not isinstance(view.type, ViewTy) or not view.type.rank:
            raise TypeRuleError(f"{what}: {show(view)} given; expected a parameter or a slice of one", view)
        if not index.type.dtype.is_int:
            raise TypeRuleError(f"{what}: index is {show(index)}; expected ints", index)
