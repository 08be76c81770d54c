"""Builtins that combine elements along an axis, and matrix products.

The order of every sum is fixed by the program (see the reduction order in docs), so results do not
depend on thread counts or batch sizes. Reduced axes are dropped; `keepdim=True` leaves a size of 1.
"""

from __future__ import annotations

from typing import Any

from tessera.kernel.build import TypeRuleError, show
from tessera.kernel.ir import Value
from tessera.kernel.lang.core import Operand, builder, builtin, int_of, tile_of
from tessera.types import bool_, int32


def _reduce(kind: str, x: Operand, axis: Any, keepdim: bool) -> Value:
    value = tile_of(x, what=f"reduce_{kind}")
    position = builder().axis(value, int_of(axis, f"reduce_{kind}: axis"), f"reduce_{kind}")
    result = builder().reduce(kind, value, position)
    return builder().expand_dims(result, position) if keepdim else result


@builtin
def reduce_sum(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """Sum along an axis, in f32 (int32 for small ints)."""
    return _reduce("sum", x, axis, keepdim)


@builtin
def reduce_mean(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """Sum along an axis divided by its size."""
    return _reduce("mean", x, axis, keepdim)


@builtin
def reduce_max(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """Largest element along an axis; NaN if one is there."""
    return _reduce("max", x, axis, keepdim)


@builtin
def reduce_min(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """Smallest element along an axis; NaN if one is there."""
    return _reduce("min", x, axis, keepdim)


@builtin
def argmax(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """int32 index of the largest element, the first of equals; a NaN wins."""
    return _reduce("argmax", x, axis, keepdim)


@builtin
def argmin(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """int32 index of the smallest element, the first of equals; a NaN wins."""
    return _reduce("argmin", x, axis, keepdim)


@builtin
def reduce_any(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """Whether a bool along the axis is set."""
    return _reduce("any", _as_bool(x), axis, keepdim)


@builtin
def reduce_all(x: Operand, axis: int = -1, keepdim: bool = False) -> Value:
    """Whether every bool along the axis is set."""
    return _reduce("all", _as_bool(x), axis, keepdim)


def _as_bool(x: Operand) -> Value:
    return builder().cast(tile_of(x), bool_)


@builtin
def cumsum(x: Operand, axis: int = -1) -> Value:
    """Running sums along an axis, added in ascending order, in f32 (int32 for small ints)."""
    return builder().scan("cumsum", tile_of(x, what="cumsum"), int_of(axis, "cumsum: axis"))


@builtin
def cummax(x: Operand, axis: int = -1) -> Value:
    """Running maxima along an axis."""
    return builder().scan("cummax", tile_of(x, what="cummax"), int_of(axis, "cummax: axis"))


@builtin
def sort(x: Operand, axis: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """Stable sort along an axis: values and their int32 indices. NaN counts as the largest."""
    return builder().sort(tile_of(x, what="sort"), int_of(axis, "sort: axis"), bool(descending))


@builtin
def topk(x: Operand, k: int, axis: int = -1) -> tuple[Value, Value]:
    """The k largest along an axis in descending order: values and int32 indices; equals keep their order."""
    value, count = tile_of(x, what="topk"), int_of(k, "topk: k")
    position = builder().axis(value, int_of(axis, "topk: axis"), "topk")
    size = value.type.shape[position].const
    if count < 1 or (size is not None and count > size):
        raise TypeRuleError(f"topk: k={count} given; axis {position} of {show(value)} has fewer", value)
    values, indices = builder().sort(value, position, True)
    spec: list[Any] = [("all",)] * value.type.rank
    spec[position] = ("range", 1, builder().const(count).expr, None)
    start = builder().const(0)
    return builder().slice(values, spec, [start]), builder().slice(indices, spec, [start])


@builtin
def mma(a: Operand, b: Operand, acc: Operand | None = None) -> Value:
    """a @ b (+ acc): [*, M, K] x [*, K, N] -> f32 (int32 for ints, f64 for f64).

    Each element is one chain acc = fma(a_k, b_k, acc) with k ascending.

    Raises:
        TypeRuleError: the inner dims differ, or the dtypes do not mix.
    """
    left, right = tile_of(a, what="mma"), tile_of(b, what="mma")
    return builder().mma(left, right, None if acc is None else tile_of(acc, what="mma"))


@builtin
def dot(a: Operand, b: Operand) -> Value:
    """Inner product along the last axis of two vectors [K], or a matrix product."""
    left, right = tile_of(a, what="dot"), tile_of(b, what="dot")
    if left.type.rank == right.type.rank == 1:
        if left.type.shape != right.type.shape:
            raise TypeRuleError(f"dot: sizes differ: {show(left)} and {show(right)}", left, right)
        return builder().reduce("sum", builder().binary("mul", left, right))
    return builder().mma(left, right)


@builtin
def dp4a(x: Operand, w: Operand, acc: Operand | None = None) -> Value:
    """acc + w @ x: int8 vector [K] against int8 rows [N, K], summed exactly in int32 [N].

    Raises:
        TypeRuleError: the operands are not int8 or uint8, or the sizes differ.
    """
    left, right = tile_of(x, what="dp4a"), tile_of(w, what="dp4a")
    if not (left.type.dtype.is_int and right.type.dtype.is_int and left.type.dtype.bits == right.type.dtype.bits == 8):
        raise TypeRuleError(f"dp4a: {show(left)} and {show(right)} given; expected int8", left, right)
    if left.type.rank != 1 or right.type.rank != 2 or left.type.shape[0] != right.type.shape[1]:
        raise TypeRuleError(f"dp4a: {show(left)} and {show(right)} given; expected [K] and [N, K]", left, right)
    product = builder().mma(builder().expand_dims(left, 0), builder().transpose(right))
    result = builder().reshape(product, product.type.shape[1:])
    return result if acc is None else builder().binary("add", builder().cast(tile_of(acc), int32), result)
