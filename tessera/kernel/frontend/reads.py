"""What a trace reads outside of the kernel's own source, and whether that is still what it was.

In: while a kernel is traced, each dotted name that its functions look up in closures, globals and Python's builtins.
Out: the list of these names with fingerprints of what they stood for, as plain data. `hold` looks the names up again,
perhaps in another process: where all fingerprints are the same, a trace would give the same IR.

A fingerprint says for certain what a value is: numbers with their type and bits, texts, tuples, lists and dicts of
these, dtypes, functions of Python and of the tile language, and kernels and plain functions, which the trace enters,
by their text, its place and their defaults; what they read is looked up in turn. Of modules, classes and objects
nothing is asked but plain attributes, by name. Whatever else a trace meets (properties, methods, objects as values,
functions that are compared) makes it uncertain: `Reads.certain` is False, and the list is good for nothing.
"""

from __future__ import annotations

import struct
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tessera.errors import TesseraError
from tessera.kernel import lang
from tessera.kernel.dims import Dim, Term
from tessera.kernel.frontend.source import MISSING, lookup, text_of
from tessera.kernel.ir import Value
from tessera.types import DType

_MAX_DEPTH = 8  # of tuples in tuples
_MAX_ITEMS = 4096  # of a tuple; bits of an int, characters of a text
_HEAP_TYPE = 1 << 9  # of a class's flags: made by a class statement, not by Python itself
_OF_DECORATORS = {"__tile_schedule__", "__tile_tuner__"}  # attributes of functions that traces do not look at
_UNKNOWN = object()


@dataclass(frozen=True)
class Read:
    """One dotted name: which function looked it up (0: the kernel), what it stood for, and, where that is a kernel or
    a function that the trace enters, which of the functions it is."""

    space: int
    name: str
    fingerprint: str
    enters: int | None


class Reads:
    """The names that one trace looks up; the frontend fills it in."""

    def __init__(self, kernel: types.FunctionType) -> None:
        self.certain = True
        self._spaces = [kernel]
        self._found: dict[tuple[int, str], Read] = {}

    @property
    def found(self) -> list[Read]:
        """What has been read, in order."""
        return list(self._found.values())

    def give_up(self) -> None:
        """The trace depends on something that fingerprints do not cover."""
        self.certain = False

    def note(self, function: types.FunctionType, names: Sequence[str]) -> None:
        """A function looks up a dotted name."""
        if not self.certain:
            return
        space = _index(self._spaces, function)
        if space is None:
            return self.give_up()
        key = space, ".".join(names)
        if key in self._found:
            return
        seen = _observe(function, names)
        if seen is None:
            return self.give_up()
        fingerprint, entered = seen
        enters = None
        if entered is not None:
            enters = _index(self._spaces, entered)
            if enters is None:
                enters = len(self._spaces)
                self._spaces.append(entered)
        self._found[key] = Read(*key, fingerprint, enters)

    def need_settled(self, *values: Any) -> None:
        """A result depends on what the values are, beyond their dotted names."""
        if not all(map(is_settled, values)):
            self.give_up()


def hold(kernel: types.FunctionType, reads: Sequence[Read]) -> bool:
    """Whether everything that a trace of the kernel read is what it was."""
    spaces = [kernel]
    for read in reads:
        if not 0 <= read.space < len(spaces):
            return False
        seen = _observe(spaces[read.space], read.name.split("."))
        if seen is None or seen[0] != read.fingerprint or (seen[1] is None) != (read.enters is None):
            return False
        if seen[1] is None:
            continue
        if read.enters == len(spaces):
            spaces.append(seen[1])
        elif _index(spaces, seen[1]) is None or read.enters != _index(spaces, seen[1]):
            return False  # where one function was reached by two names, it still must be
    return True


def _index(spaces: Sequence[Any], function: Any) -> int | None:
    return next((i for i, known in enumerate(spaces) if known is function), None)


# -- dotted names -----------------------------------------------------------------------------------


def _observe(function: types.FunctionType, names: Sequence[str]) -> tuple[str, types.FunctionType | None] | None:
    """A fingerprint of what a dotted name stands for in a function, and the function that a call of it enters.

    None: it cannot be judged.
    """
    value = lookup(function, names[0])
    if value is MISSING:
        return "nothing", None
    owners = ""  # how far the name was followed: m(odule), o(bject)
    for name in names[1:]:
        if fingerprint(value) is not None:
            break  # what a value has follows from what it is
        owners += "m" if isinstance(value, types.ModuleType) else "o"
        value = _attribute(value, name)
        if value is _UNKNOWN:
            return None
    plain = fingerprint(value)
    if plain is not None:
        return f"{owners} {plain}", None
    code = _code(value)
    return None if code is None else (f"{owners} {code[0]}", code[1])


def _attribute(owner: Any, name: str) -> Any:
    """An attribute that is there as such, with no code of anybody's between; _UNKNOWN for all others."""
    kind = type(owner)
    if isinstance(owner, types.ModuleType):
        if kind.__getattribute__ is not types.ModuleType.__getattribute__ or any(
                name in vars(base) for base in kind.__mro__) or (owner is lang and name not in lang.__all__):
            return _UNKNOWN
        found = vars(owner).get(name, _UNKNOWN)
        if found is _UNKNOWN and owner is sys.modules.get("tessera") and name in owner.__all__:
            return getattr(owner, name)  # imported now
        return found
    if kind is types.SimpleNamespace:
        return vars(owner).get(name, _UNKNOWN)
    if name.startswith("__"):
        return _UNKNOWN
    if kind is type:
        return _of_class(owner, name)
    if kind.__getattribute__ is not object.__getattribute__:
        return _UNKNOWN
    descriptor = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), _UNKNOWN)
    if type(descriptor) is types.MemberDescriptorType:
        try:
            return descriptor.__get__(owner)
        except AttributeError:
            return _UNKNOWN
    if hasattr(type(descriptor), "__set__") or hasattr(type(descriptor), "__delete__"):
        return _UNKNOWN
    mine = getattr(owner, "__dict__", None)
    if type(mine) is dict and name in mine:
        return mine[name]
    return _of_class(kind, name)


def _of_class(owner: type, name: str) -> Any:
    """An attribute of a class that Python hands out as it is."""
    found = next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), _UNKNOWN)
    plain = type(found) is not types.FunctionType and fingerprint(found) is not None
    return found if plain or type(found) is type else _UNKNOWN


# -- values -----------------------------------------------------------------------------------------


def fingerprint(value: Any, depth: int = 0) -> str | None:
    """What a compile-time value is; None where its text does not say all of it."""
    kind = type(value)
    if value is None or kind is bool:
        return str(value)
    if kind is int:
        return f"int {value}" if value.bit_length() <= _MAX_ITEMS else None
    if kind is float:
        return f"float {struct.pack('>d', value).hex()}"  # the sign of zero and the bits of NaN count
    if kind is str:
        return f"str {value!r}" if len(value) <= _MAX_ITEMS else None
    if kind is tuple or kind is list:
        if depth == _MAX_DEPTH or len(value) > _MAX_ITEMS:
            return None
        parts = [fingerprint(item, depth + 1) for item in value]
        return None if None in parts else f"{kind.__name__}({', '.join(map(str, parts))})"
    if kind is dict:
        items = None if depth == _MAX_DEPTH else fingerprint(tuple(value.items()), depth + 1)
        return None if items is None else f"dict {items}"
    if kind is DType:
        return f"dtype {value.name!r} {value.torch} {value.bits} {value.kind}"
    if kind is torch.dtype:
        return str(value)
    if kind is types.FunctionType:
        return _of_the_language(value) if "__tile_builtin__" in value.__dict__ else None
    return _of_python(value)


def size_fingerprint(dim: Dim) -> str:
    """What a size is; the text of a `Dim` shows 2*(D/2) as D."""
    def atom(a: str | Term) -> str:
        return a if isinstance(a, str) else f"{a.op}({size_fingerprint(a.left)}; {size_fingerprint(a.right)})"

    return " + ".join(f"{factor}*[{', '.join(map(atom, monomial))}]" for monomial, factor in dim.terms)


def is_settled(value: Any) -> bool:
    """Whether comparing a value asks for nothing but the data that a trace has made or that fingerprints tell."""
    if isinstance(value, (tuple, list)):
        return all(map(is_settled, value))
    if isinstance(value, dict):
        return all(is_settled(part) for item in value.items() for part in item)
    return value is None or isinstance(value, (Value, Dim)) or type(value) in (
        bool, int, float, str, DType, torch.dtype)


def _of_python(value: Any) -> str | None:
    """A function or class that is part of Python."""
    if type(value) is types.BuiltinFunctionType:
        home = value.__self__
        name = home.__name__ if isinstance(home, types.ModuleType) else ""
        known = name in ("builtins", "math") and vars(home).get(value.__name__) is value
        return f"python {name}.{value.__name__}" if known else None
    if type(value) is type and not value.__flags__ & _HEAP_TYPE and value.__module__ == "builtins":
        return f"python {value.__qualname__}"
    return None


def _of_the_language(value: Any) -> str | None:
    """A function of the tile language: the compiler's version says what it does."""
    if type(value) is not types.FunctionType or not value.__module__.startswith("tessera.kernel.lang"):
        return None
    home = sys.modules.get(value.__module__)
    known = home is not None and vars(home).get(value.__qualname__) is value
    return f"tile {value.__module__}.{value.__qualname__}" if known else None


def _code(value: Any) -> tuple[str, types.FunctionType] | None:
    """A kernel or function that the trace enters: what it is, without what it reads; and the function."""
    if type(value) is types.FunctionType:
        text = _of_the_language(value) or function_fingerprint(value)
        return None if text is None else (text, value)
    if type(value).__module__ != "tessera.kernel.launch" or type(value).__name__ != "Kernel" or value.is_method:
        return None
    try:
        parameters = [(p.name, p.kind, fingerprint(p.dims), str(p.dtype), p.optional) for p in value.parameters]
    except TesseraError:
        return None
    parts = (function_fingerprint(value.function), mapping_fingerprint(value.schedule),
             mapping_fingerprint(value.retypes), fingerprint(value.name), fingerprint(value.__name__))
    if None in parts or any(dims is None for _, _, dims, _, _ in parameters):
        return None
    return f"kernel {parts} {parameters}", value.function


def function_fingerprint(function: types.FunctionType) -> str | None:
    """A plain function: its text and place, and its defaults; not what it reads. None: its text is not all of it."""
    if not function.__dict__.keys() <= _OF_DECORATORS:
        return None  # a wrapper, say
    try:
        text = text_of(function)
    except TesseraError:
        return None
    defaults = fingerprint(function.__defaults__), mapping_fingerprint(function.__kwdefaults__ or {})
    if None in defaults:
        return None
    code = function.__code__
    # The names of the code that runs: its file may have been changed since.
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return (f"function {function.__module__} {function.__name__} {code.co_name} {arguments} {code.co_varnames} "
            f"{code.co_freevars} {text.file!r}:{text.first} {text.digest} {defaults}")


def mapping_fingerprint(values: Any) -> str | None:
    """Options by name, or dtypes for dtypes."""
    return fingerprint(dict(values))
