"""Calls in a kernel's body: tile builtins, Python's own functions, and functions that are inlined."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

from tessera.errors import CompileError
from tessera.kernel import lang
from tessera.kernel.build import TypeRuleError
from tessera.kernel.dims import Dim
from tessera.kernel.frontend.expressions import Expressions, dotted
from tessera.kernel.frontend.frame import Context, Exit, Frame, Method, SelfObject
from tessera.kernel.frontend.liveness import Liveness
from tessera.kernel.frontend.source import MISSING, Source, source_of
from tessera.kernel.ir import Value, ViewTy
from tessera.kernel.lang.core import builder, describe, is_number
from tessera.kernel.lang.elementwise import binary, plain
from tessera.kernel.lang.program import LoopRange
from tessera.types import DType, f32, int64

_MAX_DEPTH = 32
_MATH: dict[Any, Any] = {
    math.sqrt: lang.sqrt, math.exp: lang.exp, math.log: lang.log, math.log2: lang.log2, math.sin: lang.sin,
    math.cos: lang.cos, math.tanh: lang.tanh, math.erf: lang.erf, math.floor: lang.floor, math.ceil: lang.ceil,
    math.fabs: lang.abs, math.pow: lang.pow,
}


class Calls(Expressions):
    """Evaluates calls; `run_body` is the statements' half."""

    def run_body(self, statements: list[ast.stmt]) -> Exit:
        """Defined by `tracer`."""
        raise NotImplementedError

    def call(self, node: ast.Call) -> Any:
        """The value of a call."""
        function = self.eval(node.func)
        args, kwargs = self._arguments(node)
        if isinstance(function, Method):
            function, args = function.function, [function.receiver, *args]
        if isinstance(function, types.MethodType) and not hasattr(function, "__tile_builtin__"):
            function, args = function.__func__, [self._receiver(node, function), *args]
        with self.at(node):
            return self.apply(function, args, kwargs, node)

    def _arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        for argument in node.args:
            args += self.sequence(argument.value) if isinstance(argument, ast.Starred) else [self.eval(argument)]
        kwargs = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.error("** in a call cannot be compiled", node)
            kwargs[keyword.arg] = self.eval(keyword.value)
        return args, kwargs

    def _receiver(self, node: ast.Call, method: Any) -> Any:
        if isinstance(node.func, ast.Attribute):
            owner = self.eval(node.func.value)
            if isinstance(owner, SelfObject):
                return owner
        return method.__self__

    def apply(self, function: Any, args: list[Any], kwargs: dict[str, Any], node: ast.Call) -> Any:
        """Call a function of any kind that a kernel may call.

        Raises:
            TypeRuleError: it cannot be compiled, or the arguments do not bind.
        """
        if hasattr(function, "__tile_builtin__"):
            _bind(function, args, kwargs, f"tile.{function.__name__}")
            return function(*args, **kwargs)
        if isinstance(function, functools.partial):
            return self.apply(function.func, [*function.args, *args], {**function.keywords, **kwargs}, node)
        kernel = getattr(function, "__tile_kernel__", None)
        if kernel is not None:
            return self._inline_kernel(kernel, args, kwargs, node)
        if isinstance(function, types.FunctionType):
            return self._inline(function, args, kwargs, node)
        if isinstance(function, DType):
            return lang.cast(*args)
        python = _PYTHON.get(function) if is_hashable(function) else None
        if python is not None:
            if function is hasattr:
                self.reads.need_settled(*(x for x in args if not isinstance(x, SelfObject)))
            if function in _OVER_ITEMS and args and isinstance(args[0], Value):
                raise TypeRuleError(f"{function.__name__}: {describe(args[0])} given; expected a tuple"
                                    f"{_OVER_ITEMS[function]}", args[0])
            return python(*args, **kwargs)
        return self._math(function, args, kwargs)

    def _math(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", None) or describe(function)
        known: Any = getattr(math, name, MISSING)
        if known is function:
            if all(is_number(a) for a in args):
                try:
                    return known(*args, **kwargs)
                except (ArithmeticError, ValueError, TypeError) as error:
                    raise TypeRuleError(f"math.{name}: {error}") from None
            if function in _MATH:
                return _MATH[function](*args, **kwargs)
        if not callable(function):
            raise TypeRuleError(f"{describe(function)} is not a function",
                                *([function] if isinstance(function, Value) else []))
        if isinstance(getattr(function, "__self__", None), (list, dict, set)):
            raise TypeRuleError(f"a call of {name} cannot be compiled: nothing that Python holds can be changed in a "
                                "kernel; make a tuple, or unroll with tile.static_range and join with +")
        raise TypeRuleError(
            f"a call of {name} cannot be compiled: it is neither a tile builtin nor a plain Python function")

    # -- inlining -----------------------------------------------------------------------------------

    def _inline(self, function: types.FunctionType, args: list[Any], kwargs: dict[str, Any], node: ast.Call,
                context: Context | None = None) -> Any:
        """Trace a function's body here; its result is what it returns."""
        source = self._source(function)
        env = _bind(function, args, kwargs, function.__name__)
        if any(f.source.function.__code__ is function.__code__ for f in self.frames):
            raise TypeRuleError(f"{function.__name__} calls itself; recursion cannot be compiled")
        if len(self.frames) >= _MAX_DEPTH:
            raise TypeRuleError(f"calls are nested more than {_MAX_DEPTH} deep")
        library = self.frame.library or function.__module__.startswith("tessera.kernel.lang")
        frame = Frame(source, {k: self.scalar_now(v) for k, v in env.items()}, self.liveness(),
                      context or self.frame.context, library=library)
        place = self.builder.loc
        if place is not None and not library:
            self.calls.append(place)
        self.frames.append(frame)
        try:
            returned = self.run_body(source.tree.body).returned
        finally:
            self.frames.pop()
            if place is not None and not library:
                self.calls.pop()
        return returned

    def _source(self, function: types.FunctionType) -> Source:
        if function.__name__ == "<lambda>":
            raise TypeRuleError("a lambda cannot be compiled; write it as a def")
        try:
            return source_of(function)
        except CompileError as error:
            raise TypeRuleError(str(error)) from None

    def _inline_kernel(self, kernel: Any, args: list[Any], kwargs: dict[str, Any], node: ast.Call) -> Any:
        """A kernel called in a kernel: its sizes are those of the tiles that it is given."""
        bound = _bind(kernel.function, args, kwargs, kernel.name)
        dims = kernel.signature.match(bound)
        context = self.frame.context.inner(dims)
        context.grids = self.frame.context.grids
        return self._inline(kernel.function, [], bound, node, context)

    # -- calls that change an argument ----------------------------------------------------------------

    def liveness(self) -> Liveness:
        """Liveness of a function's names, as the current frame sees them."""
        return Liveness(self.destination, self._is_view)

    def _is_view(self, name: str) -> bool:
        value = self.frame.env.get(name)
        return isinstance(value, Value) and isinstance(value.type, ViewTy)

    def destination(self, node: ast.Call) -> tuple[ast.expr, bool] | None:
        """The expression that a call statement changes (tile.fill(x, 0): x) and whether it is overwritten."""
        function = self._static(node.func)
        if function is MISSING or not callable(function):
            return None
        name, overwrites = getattr(function, "__tile_builtin__", ("", False))
        name = name or getattr(function, "__tile_inplace__", "")
        if not name:
            return None
        position = list(_signature(function).parameters).index(name)
        given = [k.value for k in node.keywords if k.arg == name] + node.args[position:position + 1]
        if not given or (isinstance(given[0], ast.Name) and self._is_view(given[0].id)):
            return None
        return given[0], overwrites

    def _static(self, node: ast.expr) -> Any:
        """A dotted name without evaluating anything that has effects; MISSING where it is not one."""
        names = dotted(node)
        if not names:
            return MISSING
        found = self.frame.env.get(names[0], MISSING)
        if found is MISSING:
            self.reads.note(self.frame.source.function, names)
            found = self.frame.source.lookup(names[0])
        for name in names[1:]:
            found = getattr(found, name, MISSING) if isinstance(found, types.ModuleType) else MISSING
        return found


def _bind(function: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments by parameter name.

    Raises:
        TypeRuleError: an argument is missing, unknown or one too many.
    """
    try:
        bound = _signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeRuleError(f"{name}: {error}; expected {name}{_parameters(function)}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _parameters(function: Callable[..., Any]) -> str:
    parts = []
    for parameter in _signature(function).parameters.values():
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parts.append(f"{star}{parameter.name}{default}")
    return f"({', '.join(parts)})"


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    # Defaults of the program's own functions may change, like all else that a kernel reads.
    return _of_builtin(function) if hasattr(function, "__tile_builtin__") else inspect.signature(function)


@functools.lru_cache(maxsize=1024)
def _of_builtin(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def is_hashable(x: Any) -> bool:
    """Whether a value can stand in a cache's key."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _float(x: Any = 0.0) -> Any:
    if isinstance(x, (str, int, float)):
        return float(x)
    return lang.cast(x, f32)


def _int(x: Any = 0) -> Any:
    if isinstance(x, (str, int, float)):
        return int(x)
    return x if isinstance(x, Dim) else lang.cast(x, int64)


def _bool(x: Any = False) -> Any:
    return binary("ne", x, 0) if isinstance(x, (Value, Dim)) else bool(x)


def _len(x: Any) -> Any:
    if isinstance(x, Value):
        if not x.type.rank:
            raise TypeRuleError(f"len: {describe(x)} has no axes", x)
        return plain(x.type.shape[0])
    if not isinstance(x, (tuple, list, str, dict)):
        raise TypeRuleError(f"len: {describe(x)} given; expected a tile or a tuple")
    return len(x)


def _extreme(name: str) -> Callable[..., Any]:
    def apply(*items: Any) -> Any:
        values = list(items[0]) if len(items) == 1 and isinstance(items[0], (tuple, list)) else list(items)
        if len(items) == 1 and isinstance(items[0], Value):
            raise TypeRuleError(
                f"{name}: one tile given, {describe(items[0])}; expected several, or tile.reduce_{name}", items[0])
        if not values:
            raise TypeRuleError(f"{name}: no operands given")
        result = values[0]
        for value in values[1:]:
            result = binary(name, result, value)
        return result

    return apply


def _folded(python: Callable[..., Any], of_tiles: Callable[..., Any]) -> Callable[..., Any]:
    """Python's own function where every argument is a number known now."""
    return lambda *args: python(*args) if all(map(is_number, args)) else of_tiles(*args)


def _sum(items: Any, start: Any = 0) -> Any:
    for item in items:
        start = item if is_number(start) and start == 0 else binary("add", start, item)
    return start


def _range(*bounds: Any) -> LoopRange:
    return lang.range(*bounds)


def _breakpoint() -> None:
    """Stop in the debugger on the interp backend; nothing elsewhere."""
    builder().emit("print", [], text="", breakpoint=True)


def _enumerate(items: Any, start: int = 0) -> tuple[Any, ...]:
    return tuple(enumerate(items, start))


def _isinstance(x: Any, kind: Any) -> bool:
    return not isinstance(x, (Value, Dim)) and isinstance(x, kind)


def _hasattr(x: Any, name: str) -> bool:
    return hasattr(x.object if isinstance(x, SelfObject) else x, name)


# Python's functions over items: a tile has none; what to write instead.
_OVER_ITEMS: dict[Any, str] = {
    sum: "; a tile's sum is tile.reduce_sum", tuple: "", list: "",
    **dict.fromkeys((enumerate, zip, reversed), "; a loop over rows is `for i in range(x.shape[0])`"),
}

_PYTHON: dict[Any, Callable[..., Any]] = {
    float: _float, int: _int, bool: _bool, len: _len, max: _extreme("max"), min: _extreme("min"), sum: _sum,
    abs: _folded(abs, lang.abs), round: _folded(round, lang.round), pow: _folded(pow, lang.pow),
    range: _range, print: lang.print, breakpoint: _breakpoint, tuple: tuple, list: list, enumerate: _enumerate,
    zip: lambda *items: tuple(zip(*items)), reversed: lambda items: tuple(reversed(items)),
    isinstance: _isinstance, hasattr: _hasattr,
}
