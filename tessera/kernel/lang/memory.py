"""Builtins that read and write parameters: loads, stores, gathers, atomics.

A view is a parameter, or a slice or element of one (`x[i]`, `x[i:i+Br, :]`). Reads and writes at the
ragged end of a dim touch only what exists.
"""

from __future__ import annotations

from typing import Any

from tessera.kernel.build import TypeRuleError, show
from tessera.kernel.ir import Value, ViewTy
from tessera.kernel.lang.core import Operand, builder, builtin, describe, dtype_arg, is_number, shape_of, tile_of


def _view(x: Any, what: str) -> Value:
    if not isinstance(x, Value) or not isinstance(x.type, ViewTy):
        raise TypeRuleError(f"{what}: {describe(x)} given; expected a parameter or a slice of one",
                            *([x] if isinstance(x, Value) else []))
    return x


@builtin
def load(x: Operand, shape: Any = None, dtype: Any = None) -> Value:
    """The tile that a parameter or a slice of one shows; a tile stays as it is.

    Args:
        shape: what the tile's shape is, checked.
        dtype: cast to it.

    Raises:
        TypeRuleError: the shape is another.
    """
    value = tile_of(x, what="load")
    if shape is not None and (expected := shape_of(shape, "load: shape")) != value.type.shape:
        raise TypeRuleError(f"load: {show(value)} given; shape= says {list(expected)}", value)
    return value if dtype is None else builder().cast(value, dtype_arg(dtype, "load: dtype"))


@builtin
def load_broadcast(x: Operand, dtype: Any = None) -> Value:
    """A tile whose missing axes are found by name where it meets a larger tile: [S, D/2] meets [S, H, D/2]."""
    view = _view(x, "load_broadcast")
    value = builder().load(view, loose=True)
    return value if dtype is None else builder().cast(value, dtype_arg(dtype, "load_broadcast: dtype"))


@builtin
def load_vector(x: Operand, dtype: Any = None) -> Value:
    """`load` of one row."""
    return load(x, dtype=dtype)


@builtin(destination="destination", overwrites=True)
def load_async(source: Operand, destination: Operand) -> Value | None:
    """Start to load `source` into the tile `destination`; `wait` before it is read.

    Raises:
        TypeRuleError: the shapes differ.
    """
    return copy(source, destination)


@builtin
def wait() -> None:
    """Wait for the loads that `load_async` started."""


@builtin(destination="destination", overwrites=True)
def copy(source: Operand, destination: Operand) -> Value | None:
    """Write `source` to a parameter's slice, or to a tile (or a slice of one) of the same shape.

    Raises:
        TypeRuleError: the shapes differ.
    """
    value = tile_of(source, what="copy")
    if isinstance(destination, Value) and isinstance(destination.type, ViewTy):
        builder().store(destination, value)
        return None
    target = tile_of(destination, what="copy: destination")
    if value.type.shape != target.type.shape:
        raise TypeRuleError(f"copy: {show(value)} does not fit {show(target)}", value, target)
    return builder().cast(value, target.type.dtype)


@builtin(destination="destination", overwrites=True)
def fill(destination: Operand, value: Operand) -> Value | None:
    """Set every element of a tile or of a parameter's slice to a scalar."""
    if isinstance(destination, Value) and isinstance(destination.type, ViewTy):
        return store(destination, value)
    target = tile_of(destination, what="fill")
    scalar = tile_of(value, target.type.dtype if target.type.dtype.is_float else None, "fill: value")
    if scalar.type.rank:
        raise TypeRuleError(f"fill: {show(scalar)} given; expected a scalar", scalar)
    return builder().full(target.type.shape, builder().cast(scalar, target.type.dtype))


@builtin(destination="destination", overwrites=True)
def store(destination: Operand, x: Operand) -> Value | None:
    """Write a tile through a parameter or a slice of one, rounded to its dtype; a scalar fills it.

    Raises:
        TypeRuleError: the shapes differ, or an int meets a float.
    """
    if isinstance(destination, Value) and not isinstance(destination.type, ViewTy) and destination.type.rank:
        return fill(destination, x) if is_number(x) else copy(x, destination)
    view = _view(destination, "store")
    builder().store(view, tile_of(x, view.type.dtype if isinstance(x, (int, float)) else None, "store"))
    return None


@builtin
def store_vector(destination: Operand, x: Operand) -> None:
    """`store` of one row."""
    store(_view(destination, "store_vector"), x)


@builtin
def atomic_add(destination: Operand, x: Operand) -> None:
    """destination += x, safe between the programs of a grid; the order of float sums may vary."""
    view = _view(destination, "atomic_add")
    builder().atomic_add(view, tile_of(x, view.type.dtype if isinstance(x, (int, float)) else None, "atomic_add"))


@builtin
def gather(x: Operand, index: Operand) -> Value:
    """Rows of a parameter's first axis: [V, *] at int index [*I] -> [*I, *]."""
    return builder().gather(_view(x, "gather"), tile_of(index, what="gather: index"))


@builtin
def scatter(destination: Operand, index: Operand, x: Operand) -> None:
    """destination[index] = x for rows of the first axis; of equal indices one stays."""
    builder().scatter(_view(destination, "scatter"), tile_of(index, what="scatter: index"), tile_of(x, what="scatter"))
