"""Values that meet: out of two branches, or around a loop.

In: what the frontend binds to names: IR values, Python numbers, sizes, tuples of these, and other
compile-time objects. Out: their leaves that can be run-time values, and rules for a common type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tessera.kernel.build import Builder
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, TileTy, Value, ViewTy, walk
from tessera.kernel.lang.core import describe, is_number
from tessera.types import DType, bool_, f32, int64


def is_leaf(x: Any) -> bool:
    """Whether x is, or can become, one run-time value."""
    return is_number(x) or isinstance(x, Dim) or (isinstance(x, Value) and not isinstance(x.type, ViewTy))


def is_mergeable(x: Any) -> bool:
    """Whether x is a leaf or a tuple of leaves."""
    return is_leaf(x) or (isinstance(x, (tuple, list)) and all(is_mergeable(item) for item in x))


def leaves(x: Any) -> list[Any]:
    """The leaves of a mergeable object, in order."""
    if isinstance(x, (tuple, list)):
        return [leaf for item in x for leaf in leaves(item)]
    return [x]


def rebuild(like: Any, take: Callable[[], Any]) -> Any:
    """An object of the structure of `like` with leaves from `take`."""
    if isinstance(like, (tuple, list)):
        return type(like)(rebuild(item, take) for item in like)
    return take()


def same_structure(x: Any, y: Any) -> bool:
    """Whether two mergeable objects have leaves at the same places."""
    if isinstance(x, (tuple, list)) or isinstance(y, (tuple, list)):
        return (isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)) and len(x) == len(y)
                and all(same_structure(a, b) for a, b in zip(x, y)))
    return is_leaf(x) and is_leaf(y)


def same_constant(x: Any, y: Any) -> bool:
    """Whether two objects are the same at compile time (an IR value only equals itself)."""
    if x is y:
        return True
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(same_constant(a, b) for a, b in zip(x, y))
    if isinstance(x, Value) or isinstance(y, Value) or type(x) is not type(y):
        return False
    if isinstance(x, float):
        return repr(x) == repr(y)  # 0.0 is not -0.0, and nan is nan
    try:
        return bool(x == y)
    except Exception:
        return False


def leaf_type(x: Any) -> TileTy:
    """The type a leaf has as a run-time value."""
    if isinstance(x, Value):
        return x.type
    if isinstance(x, bool):
        return TileTy((), bool_)
    return TileTy((), f32 if isinstance(x, float) else int64)


def materialise(builder: Builder, x: Any, dtype: DType) -> Value:
    """A leaf as a run-time value of the dtype."""
    if isinstance(x, Value):
        return builder.cast(x, dtype)
    if isinstance(x, Dim):
        return builder.cast(builder.size(x), dtype)
    return builder.const(x, dtype)


def names_inside(block: Block) -> frozenset[str]:
    """Every value that a block defines, for asking whether a size is known outside it."""
    found = {argument.name for argument in block.args}
    for op in walk(block):
        found.update(result.name for result in op.results)
        for region in op.regions:
            found.update(argument.name for argument in region.args)
    return frozenset(found)


class Mismatch(Exception):
    """Two values cannot be one; the message says why."""


def join_types(x: Any, y: Any, inside: frozenset[str] = frozenset()) -> TileTy:
    """The type of a leaf that is x on one way and y on another; Python numbers take the other's dtype.

    Args:
        inside: values that are not known where the ways meet.

    Raises:
        Mismatch: shapes, dtypes or ragged ends differ.
    """
    a, b = leaf_type(x), leaf_type(y)
    if a.shape != b.shape:
        raise Mismatch(f"{describe(x)} and {describe(y)}: the shapes differ")
    dtype = _join_dtypes(x, a.dtype, y, b.dtype)
    valid = []
    for first, second in zip(a.valid, b.valid):
        joined = first if second is None or first == second else second if first is None else first.minimum(second)
        if joined is not None and joined.atoms & inside:
            raise Mismatch(f"{describe(x)} and {describe(y)}: how many elements count, {joined}, is not known outside "
                           f"the block that defines it; write to {getattr(y, 'hint', '') or 'it'}[...]: the rest then "
                           "keeps its values")
        valid.append(joined)
    return TileTy(a.shape, dtype, tuple(valid))


def _join_dtypes(x: Any, a: DType, y: Any, b: DType) -> DType:
    if a == b:
        return a
    x_weak, y_weak = not isinstance(x, Value), not isinstance(y, Value)
    if x_weak and y_weak and bool_ not in (a, b):
        return f32 if f32 in (a, b) else int64
    for weak, mine, other in ((x_weak, a, b), (y_weak, b, a)):
        if weak and bool_ not in (mine, other) and (other.is_float or not mine.is_float):
            return other
    raise Mismatch(f"{describe(x)} and {describe(y)}: the dtypes {a} and {b} differ; cast one of them")
