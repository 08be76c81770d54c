"""Kernels that read from all sides, and changes of what they read: their text stays, their meaning does not.

For test_cache_direct.py, which runs each case in this process and in a fresh one.
"""

import builtins
import contextlib
import dataclasses
import functools
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import tessera as ts
from tessera import Tile, f32, tile
from tessera.errors import TesseraError
from tessera.kernel import lang

X = torch.tensor([1.0, 2.0, 3.5])


def result(kernel: ts.Kernel, *more: Any) -> str:
    """What a fresh copy of a kernel gives for X, or its error."""
    out = torch.full_like(X, 7.0)
    try:
        kernel.retype({})(X, out, *more)
    except TesseraError as error:
        return str(error)
    return text(out)


# -- constants ------------------------------------------------------------------------------------

here = sys.modules[__name__]
SCALE, ZERO = 2.0, 0.0
settings = types.ModuleType("settings_of_a_test")
settings.inner = types.ModuleType("inner")
settings.inner.SCALE = 2.0
TABLE = {"scale": 2.0, "more": [1, 2]}


@dataclasses.dataclass
class Config:
    scale: float = 2.0
    shift: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    scale: float = 2.0


class Space:
    SCALE = 2.0


CONFIG, SLOTTED, NAMES = Config(), Slotted(), types.SimpleNamespace(scale=2.0)


@ts.kernel
def by_global(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * SCALE)


@ts.kernel
def by_module(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * settings.inner.SCALE)


@ts.kernel
def by_field(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * CONFIG.scale)


@ts.kernel
def by_slot(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * SLOTTED.scale)


@ts.kernel
def by_class(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * Space.SCALE)


@ts.kernel
def by_namespace(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * NAMES.scale)


@ts.kernel
def by_item(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * TABLE["scale"] * TABLE["more"][1])


@ts.kernel
def by_pi(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * math.pi)


@ts.kernel
def by_builtin(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * pow(2.0, 1.0))


@ts.kernel
def by_language(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.abs(tile.load(x)))


@ts.kernel
def by_type(x: Tile["N", f32], o: Tile["N", f32]):
    kind = 1.0 if isinstance(SCALE, bool) else 2.0 if isinstance(SCALE, int) else 3.0
    tile.store(o, tile.load(x) * kind)


@ts.kernel
def by_sign(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, 1.0 / (tile.load(x) * ZERO))


@ts.kernel
def by_absence(x: Tile["N", f32], o: Tile["N", f32]):
    if hasattr(CONFIG, "added"):
        tile.store(o, tile.load(x))
    else:
        tile.store(o, tile.load(x) * 2.0)


def closing(scale: Any) -> tuple[ts.Kernel, Callable[[Any], Any]]:
    """A kernel over a variable of this function, and what sets it; gives the value before."""

    @ts.kernel
    def closed(x: Tile["N", f32], o: Tile["N", f32]):
        tile.store(o, tile.load(x) * scale)

    def change(value: Any) -> Any:
        nonlocal scale
        before, scale = scale, value
        return before

    return closed, change


by_closure, set_closure = closing(2.0)


# -- functions and kernels that are called ----------------------------------------------------------


def scaled(value, by=2.0):
    return value * by


def once(value, by=2.0):
    return value


def deep(value):
    return scaled(value, SCALE)


def make_helper(scale):
    def helper(value):
        return value * scale

    return helper


first = second = make_helper(2.0)
actions = {"scale": make_helper(2.0)}
halve, double = make_helper(0.5), make_helper(2.0)
chosen = double


@ts.kernel
def inner(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * SCALE)


@ts.kernel
def same(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x))


@ts.kernel
def middle(x: Tile["N", f32], o: Tile["N", f32]):
    inner(x, o)


@ts.kernel
def by_helper(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, scaled(tile.load(x)))


@ts.kernel
def by_deep_helper(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, deep(tile.load(x)))


@ts.kernel
def by_kernel(x: Tile["N", f32], o: Tile["N", f32]):
    inner(x, o)


@ts.kernel
def by_kernels(x: Tile["N", f32], o: Tile["N", f32]):
    middle(x, o)


@ts.kernel
def by_two_names(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, second(first(tile.load(x))))


@ts.kernel
def by_identity(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * (2.0 if chosen is double else 0.5))


@ts.kernel
def by_action(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, actions["scale"](tile.load(x)))


# -- arguments, schedules, dtypes -------------------------------------------------------------------


@ts.kernel
def by_default(x: Tile["N", f32], o: Tile["N", f32], by: ts.constexpr = 2.0):
    tile.store(o, tile.load(x) * by)


@ts.kernel
def by_kind(x: Tile["N", f32], o: Tile["N", f32], flag: ts.constexpr = True):
    kind = 1.0 if isinstance(flag, bool) else 2.0 if isinstance(flag, int) else 3.0
    tile.store(o, tile.load(x) * kind)


@ts.kernel
def by_value(x: Tile["N", f32], o: Tile["N", f32], value: ts.constexpr):
    tile.store(o, 1.0 / (tile.load(x) * value))


@ts.kernel
def by_presence(x: Tile["N", f32], o: Tile["N", f32], y: Tile["N", f32] | None = None):
    if y is None:
        tile.store(o, tile.load(x))
    else:
        tile.store(o, tile.load(x) * tile.load(y))


@ts.kernel
def by_schedule(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * tile.context().block_m)


@ts.kernel
def by_rounding(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.cast(tile.load(x) * 1.001, ts.bf16))


# -- what nobody can judge: traced each time ---------------------------------------------------------


class Constant:
    @property
    def scale(self):
        return 3.0


CONSTANT = Constant()


@ts.kernel
def by_property(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * CONSTANT.scale)


# -- cases --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """What `run` gives, and what under a change; where not all is known without a trace, it is not `certain`."""

    run: Callable[[], str]
    change: Callable[[], contextlib.AbstractContextManager[Any]]
    before: str
    after: str
    certain: bool = True


def text(values: torch.Tensor) -> str:
    return " ".join(float(v).hex() for v in values)


def case(kernel: ts.Kernel, change: Callable[[], Any], before: float, after: float, certain: bool = True) -> Case:
    """A kernel that multiplies by one number, and by another after the change."""
    return Case(lambda: result(kernel), change, text(X * before), text(X * after), certain)


def attribute(owner: Any, name: str, value: Any) -> Callable[[], Any]:
    @contextlib.contextmanager
    def change() -> Iterator[None]:
        there = hasattr(owner, name)
        before = getattr(owner, name, None)
        setattr(owner, name, value)
        yield
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return change


def item(owner: dict[str, Any], name: str, value: Any) -> Callable[[], Any]:
    return lambda: mock.patch.dict(owner, {name: value})


@contextlib.contextmanager
def closure() -> Iterator[None]:
    before = set_closure(3.0)
    yield
    set_closure(before)


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args):
        return 3.0 * args[0]

    return wrapper


halved, tripled = make_helper(0.5), make_helper(3.0)
triple = ts.kernel(types.FunctionType(inner.function.__code__, {**vars(here), "SCALE": 3.0}, "inner"))
triple.function.__annotations__ = inner.function.__annotations__

CASES = {
    "a global": case(by_global, attribute(here, "SCALE", 3.0), 2, 3),
    "a variable of an enclosing function": case(by_closure, closure, 2, 3),
    "an attribute of a module": case(by_module, attribute(settings.inner, "SCALE", 3.0), 2, 3),
    "a module": case(by_module, attribute(settings, "inner", types.SimpleNamespace(SCALE=3.0)), 2, 3),
    "a field of a dataclass": case(by_field, attribute(CONFIG, "scale", 3.0), 2, 3),
    "a dataclass": case(by_field, attribute(here, "CONFIG", Config(scale=3.0)), 2, 3),
    "a dataclass with slots": case(by_slot, attribute(here, "SLOTTED", Slotted(scale=3.0)), 2, 3),
    "a property in place of a field": case(by_field, attribute(here, "CONFIG", Constant()), 2, 3),
    "an attribute of a class": case(by_class, attribute(Space, "SCALE", 3.0), 2, 3),
    "a name of a namespace": case(by_namespace, attribute(NAMES, "scale", 3.0), 2, 3),
    "an item of a dict": case(by_item, item(TABLE, "scale", 3.0), 4, 6),
    "an item of a list": case(by_item, item(TABLE, "more", [1, 3]), 4, 6),
    "math.pi": case(by_pi, attribute(math, "pi", 3), math.pi, 3),
    "a global for a function of Python": case(by_builtin, attribute(here, "pow", min), 2, 1),
    "Python's own function": case(by_builtin, attribute(builtins, "pow", min), 2, 1),
    "a function of the language": Case(
        lambda: result(by_language), attribute(lang, "abs", lang.neg), text(X), text(-X)),
    "an int for a float": case(by_type, attribute(here, "SCALE", 2), 3, 2),
    "a bool for a float": case(by_type, attribute(here, "SCALE", True), 3, 1),
    "the sign of zero": Case(lambda: result(by_sign), attribute(here, "ZERO", -0.0), "inf inf inf", "-inf -inf -inf"),
    "not a number": Case(lambda: result(by_sign), attribute(here, "ZERO", math.nan), "inf inf inf", "nan nan nan"),
    "an attribute that was not there": case(by_absence, attribute(CONFIG, "added", True), 2, 1, certain=False),
    "a default of a helper": case(by_helper, attribute(scaled, "__defaults__", (3.0,)), 2, 3),
    "a helper": case(by_helper, attribute(here, "scaled", halved), 2, 0.5),
    "the code of a helper": case(by_helper, attribute(scaled, "__code__", once.__code__), 2, 1),
    "a wrapper of a helper": case(by_helper, attribute(here, "scaled", decorated(scaled)), 2, 2),
    "a global of a helper's helper": case(by_deep_helper, attribute(here, "SCALE", 3.0), 2, 3),
    "a helper's helper": case(by_deep_helper, attribute(here, "scaled", once), 2, 1),
    "one of two names of a function": case(by_two_names, attribute(here, "second", tripled), 4, 6),
    "the other of two names of a function": case(by_two_names, attribute(here, "first", halved), 4, 1),
    "which of two functions it is": case(by_identity, attribute(here, "chosen", halve), 2, 0.5, certain=False),
    "a function in a dict": case(by_action, item(actions, "scale", tripled), 2, 3, certain=False),
    "a global of a kernel": case(by_kernel, attribute(here, "SCALE", 3.0), 2, 3),
    "a global of a kernel, two calls deep": case(by_kernels, attribute(here, "SCALE", 3.0), 2, 3),
    "a kernel": case(by_kernel, attribute(here, "inner", same), 2, 1),
    "a kernel, two calls deep": case(by_kernels, attribute(here, "inner", same), 2, 1),
    "a kernel of the same text with other globals": case(by_kernel, attribute(here, "inner", triple), 2, 3),
    "a default of a compile-time parameter": case(
        by_default, attribute(by_default.function, "__defaults__", (3.0,)), 2, 3),
    "a property": case(by_property, contextlib.nullcontext, 3, 3, certain=False),
}
# The same kernel with other arguments, schedules, dtypes: each pair must differ.
ARGUMENTS = {
    "True": (lambda: result(by_kind, True), text(X)),
    "1": (lambda: result(by_kind, 1), text(X * 2)),
    "1.0": (lambda: result(by_kind, 1.0), text(X * 3)),
    "0.0": (lambda: result(by_value, 0.0), "inf inf inf"),
    "-0.0": (lambda: result(by_value, -0.0), "-inf -inf -inf"),
    "absent": (lambda: result(by_presence), text(X)),
    "present": (lambda: result(by_presence, X), text(X * X)),
    "BM=8": (lambda: result(by_schedule.with_schedule(BM=8)), text(X * 8)),
    "BM=16": (lambda: result(by_schedule.with_schedule(BM=16)), text(X * 16)),
    "bf16": (lambda: result(by_rounding), text((X * 1.001).bfloat16())),
    "f16 for bf16": (lambda: result(by_rounding.retype({ts.bf16: ts.f16})), text((X * 1.001).half())),
    "other globals": (lambda: result(triple), text(X * 3)),
    "these globals": (lambda: result(inner), text(X * 2)),
}


def run_all() -> dict[str, str]:
    """Every case under its change, as a fresh process sees it."""
    found = {}
    for name, one in CASES.items():
        with one.change():
            found[name] = one.run()
    return {**found, **{name: run() for name, (run, _) in ARGUMENTS.items()}}


if __name__ == "__main__":
    print(json.dumps(run_all()))
