"""Builtins that make tiles or change their shape. Shapes are tuples of ints and sizes (`ctx.D`)."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from tessera.kernel.build import TypeRuleError, show
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Value
from tessera.kernel.lang.core import (
    Operand,
    builder,
    builtin,
    describe,
    dim_of,
    dtype_arg,
    int_of,
    scalar_of,
    shape_of,
    tile_of,
    tiles_of,
)
from tessera.kernel.lang.elementwise import plain
from tessera.types import f32


@builtin
def full(shape: Any, value: Operand, dtype: Any = f32) -> Value:
    """A tile whose every element is the scalar `value`."""
    target = dtype_arg(dtype, "full: dtype")
    return builder().full(shape_of(shape, "full: shape"), scalar_of(value, target, "full: value"))


@builtin
def zeros(shape: Any, dtype: Any = f32) -> Value:
    """A tile of zeros."""
    return full(shape, 0, dtype)


@builtin
def ones(shape: Any, dtype: Any = f32) -> Value:
    """A tile of ones."""
    return full(shape, 1, dtype)


@builtin
def alloc_shared(shape: Any, dtype: Any = f32) -> Value:
    """A tile to be written before it is read (`load_async`, `copy`, `fill`); it starts as zeros.

    Where it lies is the compiler's choice: tiles are values, and the name tells the reader what is meant.
    """
    value = full(shape, 0, dtype)
    assert value.op is not None
    value.op.attrs["undefined"] = True  # the interpreter reports a read of what was never written
    return value


@builtin
def arange(start: Any, stop: Any = None, step: Any = 1) -> Value:
    """int32 start, start + step, ... below stop; `arange(n)` counts from 0."""
    if stop is None:
        start, stop = 0, start
    stride = int_of(step, "arange: step")
    if stride <= 0:
        raise TypeRuleError(f"arange: step {stride} given; expected a positive int")
    first = dim_of(start, "arange: start")
    count = (dim_of(stop, "arange: stop") - first).ceildiv(stride)
    index = builder().iota((count,), 0)
    if stride != 1:
        index = builder().binary("mul", *tiles_of(index, stride))
    return index if first.const == 0 else builder().binary("add", *tiles_of(index, plain(first)))


@builtin
def reshape(x: Operand, *shape: Any) -> Value:
    """The same elements in row-major order under another shape; one size may be -1.

    Raises:
        TypeRuleError: the number of elements differs.
    """
    value = tile_of(x, what="reshape")
    items = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    open_axes = [i for i, item in enumerate(items) if isinstance(item, int) and item == -1]
    if len(open_axes) > 1:
        raise TypeRuleError("reshape: more than one -1 in the new shape", value)
    if open_axes:
        items[open_axes[0]] = _missing_size(value, [d for i, d in enumerate(items) if i != open_axes[0]])
    return builder().reshape(value, shape_of(items, "reshape: shape"))


def _missing_size(x: Value, others: Sequence[Any]) -> Dim:
    total, known = Dim.of(1), Dim.of(1)
    for dim in x.type.shape:
        total = total * dim
    for item in others:
        known = known * dim_of(item, "reshape: shape")
    if known.const == 0:
        raise TypeRuleError(f"reshape: -1 beside a size of 0 for {show(x)}", x)
    quotient = total // known
    if quotient * known != total:
        raise TypeRuleError(f"reshape: {show(x)} has {total} elements, which {known} does not divide", x)
    return quotient


@builtin
def transpose(x: Operand, *perm: Any) -> Value:
    """Axes in another order; by default the last two are swapped, `transpose(x, 0, 2)` of rank 3 or more swaps two."""
    value = tile_of(x, what="transpose")
    items = perm[0] if len(perm) == 1 and isinstance(perm[0], (tuple, list)) else perm
    order = [int_of(p, "transpose: axis") for p in items]
    if len(order) == 2 and value.type.rank > 2:
        first, second = (builder().axis(value, a, "transpose") for a in order)
        order = list(builtins.range(value.type.rank))
        order[first], order[second] = second, first
    return builder().transpose(value, order or None)


@builtin
def broadcast(x: Operand, axis: int | None = None, shape: Any = None) -> Value:
    """x with a new axis of size 1 at `axis`, which expands where it meets a tile; or x expanded to `shape`.

    With neither, x as it is: scalars meet any tile.
    """
    value = tile_of(x, what="broadcast")
    if shape is not None:
        target = shape_of(shape, "broadcast: shape")
        missing = len(target) - value.type.rank
        axes = [None] * missing + list(builtins.range(value.type.rank))
        for have, want in zip(value.type.shape, target[builtins.max(missing, 0):]):
            if missing < 0 or (have != want and have.const != 1):
                raise TypeRuleError(f"broadcast: {show(value)} does not expand to {list(target)}", value)
        return builder().broadcast(value, target, axes)
    if axis is None or not value.type.rank:
        return value
    return expand_dims(value, axis)


@builtin
def expand_dims(x: Operand, axis: int) -> Value:
    """x with a new axis of size 1 at `axis` of the result."""
    value, position = tile_of(x, what="expand_dims"), int_of(axis, "expand_dims: axis")
    if not -value.type.rank - 1 <= position <= value.type.rank:
        raise TypeRuleError(f"expand_dims: axis {position} is outside {show(value)} with one more axis", value)
    return builder().expand_dims(value, position)


@builtin
def concat(tiles: Sequence[Operand], axis: int = 0) -> Value:
    """Tiles joined along an axis; the other dims and the dtypes agree."""
    if not isinstance(tiles, (tuple, list)) or not tiles:
        raise TypeRuleError(f"concat: {describe(tiles)} given; expected a list of tiles")
    return builder().concat([tile_of(t, what="concat") for t in tiles], int_of(axis, "concat: axis"))


@builtin
def split(x: Operand, parts: Any, axis: int = -1, dim: int | None = None) -> tuple[Value, ...]:
    """x cut along an axis into `parts` equal tiles, or into tiles of the sizes of a tuple.

    Raises:
        TypeRuleError: the axis does not divide, or the sizes do not add up.
    """
    value = tile_of(x, what="split")
    axis = builder().axis(value, int_of(axis if dim is None else dim, "split: axis"), "split")
    total = value.type.shape[axis]
    if isinstance(parts, (tuple, list)):
        sizes = [dim_of(p, "split: sizes") for p in parts]
    else:
        count = int_of(parts, "split: parts")
        if count < 1 or (total // count) * count != total:
            raise TypeRuleError(f"split: {total} of {show(value)} is not known to divide into {count} parts", value)
        sizes = [total // count] * count
    if builtins.sum(sizes, Dim.of(0)) != total:
        raise TypeRuleError(f"split: sizes {sizes} do not add up to {total} of {show(value)}", value)
    if value.type.valid[axis] is not None:
        raise TypeRuleError(f"split: {show(value)} has a ragged axis {axis}", value)
    pieces, start = [], Dim.of(0)
    for size in sizes:
        spec = [("all",)] * value.type.rank
        spec[axis] = ("range", 1, size, None)  # type: ignore[assignment]
        pieces.append(builder().slice(value, spec, [builder().size(start)]))
        start = start + size
    return tuple(pieces)
