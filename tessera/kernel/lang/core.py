"""What every builtin of `tessera.tile` stands on: the kernel being traced, and operand conversion.

In: what a kernel's expressions evaluate to: IR values, Python numbers, symbolic sizes (`Dim`). Out: IR
values of the builder that the frontend has made active on this thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch

from tessera.errors import InputError
from tessera.kernel.build import Builder, TypeRuleError, arithmetic_dtype
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Value, ViewTy
from tessera.types import DType, bool_, dtype_of, f32, f64

Number = bool | int | float
Operand = Value | Dim | Number
F = TypeVar("F", bound=Callable[..., Any])


class Tracer(Protocol):
    """What builtins ask of the frontend."""

    builder: Builder

    def context(self) -> Any:
        """The object that `tile.context()` returns."""


_active = threading.local()


@contextmanager
def tracing(tracer: Tracer) -> Iterator[None]:
    """Make a tracer the one that builtins emit to, on this thread."""
    before = getattr(_active, "tracer", None)
    _active.tracer = tracer
    try:
        yield
    finally:
        _active.tracer = before


def tracer() -> Tracer:
    """The active tracer.

    Raises:
        InputError: no kernel is being compiled: a builtin was called from ordinary Python.
    """
    found: Tracer | None = getattr(_active, "tracer", None)
    if found is None:
        raise InputError("tessera.tile: a builtin was called outside a kernel; call it in a function under @ts.kernel")
    return found


def builder() -> Builder:
    """The active tracer's builder."""
    return tracer().builder


def builtin(function: F | None = None, *, destination: str = "", overwrites: bool = False) -> Any:
    """Mark a function as a tile builtin.

    Args:
        destination: the parameter that the builtin changes when it is called as a statement: the result
            is then bound to the name (or written to the element or slice) that was passed for it.
        overwrites: the destination's old value does not matter.
    """

    def mark(f: F) -> F:
        f.__tile_builtin__ = (destination, overwrites)  # type: ignore[attr-defined]
        return f

    return mark if function is None else mark(function)


def is_number(x: Any) -> bool:
    """Whether x is a Python number (a compile-time scalar)."""
    return isinstance(x, (bool, int, float))


def tile_of(x: Any, dtype: DType | None = None, what: str = "operand") -> Value:
    """x as a tile: parameters are loaded, numbers and sizes become scalars (floats of `dtype`, default f32).

    Raises:
        TypeRuleError: x is neither.
    """
    if isinstance(x, Value):
        if not isinstance(x.type, ViewTy):
            return x
        loaded = builder().load(x)
        loaded.hint = x.hint
        return loaded
    if isinstance(x, Dim):
        return builder().size(x)
    if is_number(x):
        return builder().const(x, dtype)
    hint = "; take one of its items" if isinstance(x, (tuple, list)) and any(isinstance(i, Value) for i in x) else ""
    if isinstance(x, torch.Tensor):
        hint = "; make it a parameter, or read it from `self` by its name"
    raise TypeRuleError(f"{what}: {describe(x)} given; expected a tile, a parameter or a number{hint}")


def tiles_of(*xs: Any, what: str = "operand") -> list[Value]:
    """Operands of one operation as tiles; Python numbers take the kind of the tiles that they meet."""
    known = [tile_of(x, what=what) if isinstance(x, Value) else None for x in xs]
    peers = [v.type.dtype for v in known if v is not None]
    return [v if v is not None else tile_of(x, _literal_dtype(x, peers), what) for v, x in zip(known, xs)]


def _literal_dtype(x: Any, peers: Sequence[DType]) -> DType | None:
    """The dtype in which a literal meets its peers; None: its own."""
    if not is_number(x) or isinstance(x, bool):
        return None
    floats = [d for d in peers if d.is_float]
    if isinstance(x, float):
        return f64 if f64 in floats else f32
    if floats:
        return f64 if f64 in floats else f32
    ints = {arithmetic_dtype(d) for d in peers if d.is_int}
    if len(ints) == 1 and (dtype := ints.pop()).bits >= 32 and -2**31 <= x < 2**31:
        return dtype
    return None


def dim_of(x: Any, what: str) -> Dim:
    """x as a size: an int, a `Dim`, or an int scalar whose number is known symbolically.

    Raises:
        TypeRuleError: x is something else.
    """
    if isinstance(x, Dim):
        return x
    if isinstance(x, int) and not isinstance(x, bool):
        return Dim.of(x)
    if isinstance(x, Value) and not x.type.rank:
        x = tile_of(x)
        if x.expr is not None:
            return x.expr
    raise TypeRuleError(f"{what}: {describe(x)} given; expected a size", *([x] if isinstance(x, Value) else []))


def shape_of(shape: Any, what: str) -> tuple[Dim, ...]:
    """A shape from a size or a tuple of sizes."""
    items = shape if isinstance(shape, (tuple, list)) else (shape,)
    return tuple(dim_of(d, what) for d in items)


def int_of(x: Any, what: str) -> int:
    """x as a compile-time int.

    Raises:
        TypeRuleError: it is not known when the kernel is compiled.
    """
    if isinstance(x, Dim) and x.const is not None:
        return x.const
    if isinstance(x, int) and not isinstance(x, bool):
        return x
    raise TypeRuleError(f"{what}: {describe(x)} given; expected an int known at compile time",
                        *([x] if isinstance(x, Value) else []))


def dtype_arg(x: Any, what: str) -> DType:
    """x as a dtype.

    Raises:
        TypeRuleError: it is none.
    """
    try:
        return dtype_of(x)
    except InputError:
        given = repr(x) if isinstance(x, type) else describe(x)
        raise TypeRuleError(f"{what}: {given} given; expected a dtype, as tessera's bf16 or torch's") from None


@builtin
def require(holds: Any, message: str, *operands: Any) -> None:
    """What the library's functions ask of their arguments; `{}` in the message stands for each operand.

    Raises:
        TypeRuleError: it does not hold.
    """
    if holds is not True:
        raise TypeRuleError(message.format(*map(describe, operands)), *(x for x in operands if isinstance(x, Value)))


def scalar_of(x: Any, dtype: DType, what: str) -> Value:
    """A number or rank-0 tile as a scalar of the dtype.

    Raises:
        TypeRuleError: x has axes, or an int is wanted and a float given.
    """
    value = tile_of(x, dtype if is_number(x) and (dtype.is_float or not isinstance(x, float)) else None, what)
    if value.type.rank:
        raise TypeRuleError(f"{what}: {describe(value)} given; expected a scalar", value)
    if value.type.dtype.is_float and not dtype.is_float:
        raise TypeRuleError(f"{what}: {describe(x)} given; expected {dtype}", value)
    return builder().cast(value, dtype)


def describe(x: Any) -> str:
    """How messages name any value of a kernel's program."""
    if isinstance(x, Value):
        return f"{x.hint}: {x.type}" if x.hint else str(x.type)
    if isinstance(x, Dim):
        return f"the size {x}"
    if isinstance(x, (tuple, list)):
        return "(" + ", ".join(describe(item) for item in x) + ")"
    if isinstance(x, torch.Tensor):
        return f"a torch tensor of shape {list(x.shape)}"
    if isinstance(x, ModuleType):
        return f"the module {x.__name__.removeprefix('tessera.kernel.').replace('lang', 'tile')}"
    if isinstance(x, type) or callable(x):
        return getattr(x, "__name__", repr(x))
    return repr(x)


def is_bool(x: Any) -> bool:
    """Whether x is a bool or a bool tile."""
    return isinstance(x, bool) or (isinstance(x, Value) and x.type.dtype == bool_)
