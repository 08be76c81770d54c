"""What a captured function was given and what it did: the key of a call, and the launches behind it.

In: any Python values (`describe`) and a running function (`record`). Out: a `Described` with a hashable key and
the tensors in order, and a `Recorded` with the kernel launches. `graph` makes replayable buckets of them.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import sys
import threading
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.errors import UnsupportedError
from tessera.kernel.specialise import Run, Specialisation, observing

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, enum.Enum)
_EXACT = frozenset([type(None), bool, int, str])  # equal and of one type means the same
_ITEMS = (tuple, list, set, frozenset, deque)
_NAMED = frozenset([type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType])  # count by identity
_ALLOCATIONS = frozenset(
    "aten::empty aten::empty_like aten::empty_strided aten::new_empty aten::new_empty_strided".split())
_READS = frozenset([torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__])
_HARMLESS = frozenset(["aten::_unsafe_view"])  # a view by another name


@dataclass
class Described:
    """Values as a key: everything of them that a recording may depend on, except the tensors' addresses and elements.

    `tensors` are those found, in order; `held` keeps alive what the key names by identity.
    """

    key: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    _seen: dict[int, int] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)  # so that an id means one object while this is filled
    _storages: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, value: Any, *, walk_objects: bool = True) -> None:
        """Append a value's part of the key.

        Args:
            walk_objects: look into objects' attributes; otherwise they count by identity.

        Raises:
            UnsupportedError: a tensor is not dense.
        """
        kind = type(value)
        if kind in _EXACT:
            return self.key.append((kind, value))
        if kind in _NAMED:
            return self._add_identity(value)
        if isinstance(value, torch.Tensor):
            return self._add_tensor(value)
        if isinstance(value, _PLAIN):
            return self.key.append((kind, repr(value)))  # by text, which tells 0.0 and -0.0 apart
        if id(value) in self._seen:
            return self.key.append(("again", self._seen[id(value)]))
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, (*_ITEMS, dict)):
            self._add_items(value, walk_objects)
        elif isinstance(value, (bytearray, memoryview, array)):
            self.key.append((kind, bytes(value)))
        elif hasattr(kind, "__array_interface__"):  # numpy's
            self.key.append((kind, value.dtype.str, value.shape, value.tobytes()))
        elif not walk_objects or isinstance(value, type):
            self._add_identity(value)
        elif hasattr(value, "__tile_kernel__"):
            self._add_identity(value.__tile_kernel__)
            self.add(getattr(value, "instance", None))  # of a method's kernel
        elif isinstance(value, types.MethodType):
            self._add_identity(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self.add((kind, value.func, value.args, value.keywords))
        else:
            self._add_object(value)

    def _add_items(self, value: Any, walk_objects: bool) -> None:
        """The elements of a container, a set's in the order that they come in; and what a subclass has besides."""
        kind = type(value)
        self.key.append((kind, len(value)))
        for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            self.add(item, walk_objects=walk_objects)
        if walk_objects and getattr(value, "__dict__", None):
            self.add(value.__dict__)

    def _add_object(self, value: Any) -> None:
        slots = [name for cls in type(value).__mro__ for name in _slot_names(cls) if hasattr(value, name)]
        # What C code keeps in an object that it makes is not in its attributes.
        if type(value).__new__ is not object.__new__ or not (slots or hasattr(value, "__dict__")):
            self._add_identity(value)
        if slots or hasattr(value, "__dict__"):
            self.key.append((type(value), "object"))
            self.add({**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}})

    def _add_identity(self, value: Any) -> None:
        self.held.append(value)
        self.key.append(("identity", id(value)))

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedError(f"graph: a tensor of type {type(tensor).__name__}, layout {tensor.layout} given; "
                                   "expected a dense torch.Tensor")
        storage, address = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        # Tensors on one storage: which, and how far apart, is part of the key.
        first, base = self._storages.setdefault(storage, (len(self.tensors), address)) if storage else (-1, address)
        self.key.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.device.type, tensor.device.index,
                         tensor.requires_grad and torch.is_grad_enabled(), first, address - base))
        self.tensors.append(tensor)


def _slot_names(cls: type) -> Sequence[str]:
    slots = cls.__dict__.get("__slots__", ())
    private = "_" + cls.__name__.lstrip("_")  # what Python puts before __names
    return [private + name if name.startswith("__") and not name.endswith("__") else name
            for name in ((slots,) if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


@dataclass(frozen=True, kw_only=True)
class NativeStep:
    """Native code that is no kernel (a collective over shared memory), where a launch has its specialisation.

    `compiled` is what `backends.cpu.replay` needs of a compiled kernel; `outputs` as of a Specialisation.
    """

    name: str
    compiled: Any
    outputs: Sequence[int]
    backend: str = "cpu"

    def resolve(self, args: Sequence[Any], sizes: Sequence[int]) -> Any:
        """What runs."""
        return self.compiled


@dataclass(frozen=True, kw_only=True)
class RecordedLaunch:
    """One kernel launch as it was made."""

    specialisation: Specialisation | NativeStep
    args: Sequence[Any]
    sizes: Sequence[int]


@dataclass
class Recorded:
    """The launches of one run of a function, and the tensors that it allocated."""

    launches: list[RecordedLaunch] = field(default_factory=list)
    allocated: list[torch.Tensor] = field(default_factory=list)


_state = threading.local()


def is_recording() -> bool:
    """Whether this thread is inside `record`."""
    return getattr(_state, "recorded", None) is not None


def add(step: NativeStep, args: Sequence[torch.Tensor]) -> None:
    """Keep a step that this thread, which must be recording, has just done with these tensors."""
    _state.recorded.launches.append(RecordedLaunch(specialisation=step, args=args, sizes=()))


@contextmanager
def record(name: str) -> Iterator[Recorded]:
    """Collect the kernel launches that this thread makes in the block; they run as well.

    Args:
        name: the graph, for messages.

    Raises:
        UnsupportedError: something else than kernels, allocations and views computes on tensors, or a kernel runs
            on the interpreter.
    """
    recorded = Recorded()
    watch = _Watch(name, recorded)
    thread = threading.get_ident()

    def wrap(specialisation: Specialisation, run: Run) -> Run:
        def launch(args: Sequence[Any], sizes: Sequence[int]) -> None:
            if threading.get_ident() != thread:
                return run(args, sizes)
            if specialisation.backend not in ("cpu", "cuda"):
                raise UnsupportedError(f"graph {name}: kernel {specialisation.name} runs on the backend "
                                       f"{specialisation.backend}; only launches on cpu and cuda can be recorded")
            with watch.paused():
                run(args, sizes)
            recorded.launches.append(RecordedLaunch(specialisation=specialisation, args=args, sizes=sizes))

        return launch

    _state.recorded = recorded
    try:
        with observing(wrap), watch, _WatchReads(watch):
            yield recorded
    finally:
        _state.recorded = None


class _Watch(TorchDispatchMode):
    """Sees every torch operation: keeps allocations, lets views pass, refuses the rest."""

    def __init__(self, name: str, recorded: Recorded) -> None:
        super().__init__()
        self._name, self._recorded, self._paused = name, recorded, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let what a launch does itself (compiling, tuning) pass."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func._schema.name
        if not (func.is_view or operation in _ALLOCATIONS or operation in _HARMLESS):
            self.refuse(operation)
        result = func(*args, **(kwargs or {}))
        if operation in _ALLOCATIONS and not self._paused:
            self._recorded.allocated.append(result)
        return result

    def refuse(self, operation: str) -> None:
        """Raise UnsupportedError, unless a launch does it."""
        if not self._paused:
            raise UnsupportedError(
                f"graph {self._name}: {operation} {_caller()}is an operation of torch, which a replay would leave out; "
                "allocate with torch.empty and compute in kernels")


class _WatchReads(TorchFunctionMode):
    """Sees what hands a tensor's elements to Python without an operation of torch."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self._watch.refuse(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The line outside torch and this file that is being executed."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] not in ("torch", "contextlib"):
            return f"at {frame.f_code.co_filename}:{frame.f_lineno} "
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def outside_values(function: Callable[..., Any]) -> Callable[[], tuple[Any, ...]]:
    """A function that gives what `function` reads from closures and globals now, always in the same order."""
    code = getattr(function, "__code__", None)
    if code is None:
        return tuple
    cells = getattr(function, "__closure__", None) or ()
    space = function.__globals__
    names = [name for name in sorted(_global_names(code)) if name in space or not hasattr(builtins, name)]

    def read() -> tuple[Any, ...]:
        return (*(space.get(name, _MISSING) for name in names), *map(_content, cells))

    return read


_MISSING = "not assigned yet"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _global_names(code: types.CodeType) -> set[str]:
    """The globals that a function names, also in the comprehensions and functions inside it."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(const) for const in code.co_consts if isinstance(const, types.CodeType)))
