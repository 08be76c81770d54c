"""What the type rules of operations share: promotion of dtypes, alignment of shapes, values as messages name them.

In: values and types. Out: dtypes, shapes and symbolic sizes, or a `TypeRuleError` that holds the values to point at.
Called by the builders (`build.py`); the frontend turns the errors into messages with line and caret.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessera.kernel.dims import Dim
from tessera.kernel.ir import TileTy, Value
from tessera.types import DType, bf16, bool_, f16, f32, fp8_e4m3, fp8_e5m2, int4, int8, int32, uint8

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


def align(value: Value, target: Value, rank: int) -> list[int | None]:
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


def apply_spec(type_: TileTy, spec: Sequence[tuple[Any, ...]]) -> tuple[tuple[Dim, ...], tuple[Dim | None, ...]]:
    shape, valid = [], []
    for entry, dim, known in zip(spec, type_.shape, type_.valid):
        if entry[0] == "all":
            shape.append(dim)
            valid.append(known)
        elif entry[0] == "range":
            shape.append(entry[2])
            valid.append(entry[3])
    return tuple(shape), tuple(valid)


def product(shape: Sequence[Dim]) -> Dim:
    total = Dim.of(1)
    for dim in shape:
        total = total * dim
    return total


def scalar_expression(name: str, operands: Sequence[Value], attrs: dict[str, Any]) -> Dim | None:
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
