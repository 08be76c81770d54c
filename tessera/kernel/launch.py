"""`Kernel`: what `@ts.kernel` makes of a function. Specialises, compiles and launches it.

In: torch tensors and numbers, as the function's signature says. Out: the tensors that the kernel writes.
A specialisation is made for each combination of dtypes, unit strides, absent arguments, compile-time
values, device and backend; a launch that has one takes a dictionary look-up.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tessera import env
from tessera.errors import InputError, LaunchError
from tessera.kernel import backends, direct, frontend
from tessera.kernel.binder import make_dispatcher, make_launcher
from tessera.kernel.dims import Dim
from tessera.kernel.frontend import Argument
from tessera.kernel.frontend.calls import is_hashable
from tessera.kernel.frontend.reads import Reads
from tessera.kernel.frontend.source import Source, source_of
from tessera.kernel.ir import Function
from tessera.kernel.members import Member, fix_sizes, members_of, read_widths, width_axes
from tessera.kernel.schedule import flatten
from tessera.kernel.signature import (
    EMPTY,
    Parameter,
    Signature,
    check_launch,
    make_signature,
    read_parameters,
)
from tessera.kernel.specialise import Run, Specialisation, Table, Tuner
from tessera.types import DType, dtype_of, f32, int4, uint8


class Kernel:
    """A function of the tile language, compiled on demand.

    Calling it with tensors launches it. `ir`, `source` and `check` show or check what it compiles to.
    Globals and closure variables that the function reads are constants: they are read when it is compiled.
    """

    def __init__(self, function: types.FunctionType, *, name: str | None = None,
                 schedule: Mapping[str, Any] | None = None, retypes: Mapping[DType, DType] | None = None,
                 tuner: Tuner | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = name or function.__name__
        self.schedule = {**getattr(function, "__tile_schedule__", {}), **(schedule or {})}
        self.retypes = dict(retypes or {})
        self.tuner: Tuner | None = tuner or getattr(function, "__tile_tuner__", None)
        self.__tile_kernel__ = self
        self._variants: dict[Any, Variant] = {}
        self._static: dict[Any, tuple[list[Parameter], list[tuple[int, str, int]]]] = {}
        self._lock = threading.RLock()
        self._launch: Callable[..., None] = self._first_launch

    # -- launching ----------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Launch with tensors and numbers as the signature says.

        Raises:
            LaunchError: an argument does not fit.
            CompileError: this specialisation does not compile.
        """
        return self._launch(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None or not self.is_method else BoundKernel(self, instance)

    def _first_launch(self, *args: Any, **kwargs: Any) -> None:
        """Choose the launch path: generated functions, where ranks and `self` do not vary from call to call."""
        if any(p.kind == "self" or p.has_ellipsis for p in self.parameters):
            self._launch = self._launch_varying
            return self._launch(*args, **kwargs)
        if any(p.optional for p in self.parameters):
            self._launch = make_dispatcher(self.name, self.parameters, lambda absent: self.variant(absent).launch)
        else:
            self._launch = self.variant(()).launch
        # Through a class of its own a call goes straight to the generated function, without packing the
        # arguments a second time: 0.4 of the 4 microseconds of a launch.
        self.__class__ = type("Kernel", (Kernel,), {"__call__": staticmethod(self._launch)})
        return self._launch(*args, **kwargs)

    def _launch_varying(self, *args: Any, **kwargs: Any) -> None:
        values = self._bind(args, kwargs)
        variant, extra = self._variant_for(values)
        variant.launch(*[v for p, v in zip(self.parameters, values) if p.kind != "self"], *extra)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Arguments in the order of the parameters.

        Raises:
            LaunchError: one is missing, unknown or too many.
        """
        names = [p.name for p in self.parameters]
        if len(args) > len(names):
            raise LaunchError(
                f"kernel {self.name}: {len(args)} arguments given; expected {len(names)}: {', '.join(names)}")
        values = dict(zip(names, args))
        for name, value in kwargs.items():
            if name not in names or name in values:
                what = "given twice" if name in values else f"is not a parameter; expected {', '.join(names)}"
                raise LaunchError(f"kernel {self.name}: argument {name!r} {what}")
            values[name] = value
        for p in self.parameters:
            if values.setdefault(p.name, p.default) is EMPTY:
                raise LaunchError(f"kernel {self.name}: argument {p.name!r} is missing")
        return [values[name] for name in names]

    def _variant_for(self, values: Sequence[Any]) -> tuple[Variant, list[torch.Tensor]]:
        """The variant for these arguments, and the tensors of `self` that it takes after them."""
        pattern: list[Any] = []
        found: list[Member] = []
        for p, value in zip(self.parameters, values):
            if p.kind == "self":
                found = members_of(value, self.source_tree)
            elif p.optional and value is None:
                pattern.append(p.name)
            elif p.has_ellipsis:
                if not isinstance(value, torch.Tensor) or value.ndim < len(p.dims) - 1:
                    raise LaunchError(f"kernel {self.name}: {p.name} given with "
                                      f"{getattr(value, 'ndim', 'no')} axes; expected at least {len(p.dims) - 1}")
                pattern.append((p.name, value.ndim - len(p.dims) + 1))
        if not found and not self.is_method:
            return self.variant(tuple(pattern)), []
        return self._method_variant(tuple(pattern), found, values), [m.value for m in found if m.is_tensor]

    def _method_variant(self, pattern: tuple[Any, ...], found: Sequence[Member], values: Sequence[Any]) -> Variant:
        """The variant for what `self` holds: its tensors' sizes, and the widths that they meet, are fixed."""
        with self._lock:
            known = self._static.get(pattern)
            if known is None:
                parameters = self._static_parameters(pattern)
                known = self._static[pattern] = parameters, width_axes(parameters)
            parameters, axes = known
            widths = read_widths(axes, values[1:]) if any(m.is_tensor for m in found) else {}
            key = (pattern, tuple(m.key for m in found), tuple(widths.items()))
            variant = self._variants.get(key)
            if variant is None:
                signature = make_signature(self.name, fix_sizes(parameters, widths, found))
                constants = {name: Dim.of(n) for name, n in widths.items()}
                variant = self._variants[key] = Variant(self, signature, constants, values[0])
            return variant

    def variant(self, pattern: tuple[Any, ...]) -> Variant:
        """The variant in which the named optional arguments are None and "..." has the given rank."""
        with self._lock:
            found = self._variants.get(pattern)
            if found is None:
                signature = make_signature(self.name, self._static_parameters(pattern))
                found = self._variants[pattern] = Variant(self, signature, {}, None)
            return found

    def _static_parameters(self, pattern: tuple[Any, ...]) -> list[Parameter]:
        absent = {item for item in pattern if isinstance(item, str)}
        ranks: dict[str, int] = dict(item for item in pattern if isinstance(item, tuple))
        result = []
        for p in self.parameters:
            if p.kind == "self":
                continue
            if p.name in absent:
                p = Parameter(p.name, "constant", optional=True, default=p.default)
            elif p.has_ellipsis:
                position = p.dims.index("...")
                leading = tuple(f"_{i}" for i in range(ranks.get(p.name, 1)))
                p = Parameter(p.name, p.kind, (*p.dims[:position], *leading, *p.dims[position + 1:]), p.dtype,
                              p.optional, p.default)
            result.append(p)
        return result

    # -- what the function says ---------------------------------------------------------------------

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its parameters; annotations are read at the first use, when the names in them exist."""
        code = self.function.__code__
        if code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
            raise InputError(f"kernel {self.name}: *args and **kwargs cannot be parameters of a kernel")
        names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
        positional = self.function.__defaults__ or ()
        defaults = dict(zip(names[code.co_argcount - len(positional):code.co_argcount], positional))
        defaults.update(self.function.__kwdefaults__ or {})
        parameters = read_parameters(self.function, names, defaults, self.retypes)
        if not any(p.kind == "tile" for p in parameters):
            raise InputError(f'kernel {self.name}: no parameter is a tensor; annotate one with Tile["S", "D", dtype]')
        # A block size of the schedule is the value of the compile-time parameter with its name.
        sizes = {**getattr(self.tuner, "defaults", {}), **self.schedule}
        return tuple(dataclasses.replace(p, default=sizes[p.name]) if p.kind == "constant" and p.name in sizes else p
                     for p in parameters)

    @functools.cached_property
    def source_tree(self) -> Source:
        """Its parsed source."""
        return source_of(self.function)

    @functools.cached_property
    def is_method(self) -> bool:
        """Whether its first parameter is `self`."""
        return self.function.__code__.co_varnames[:1] == ("self",)

    @functools.cached_property
    def signature(self) -> Signature:
        """Its signature with every optional argument present; "..." stands for one axis."""
        return make_signature(self.name, self._static_parameters(()))

    # -- looking inside -----------------------------------------------------------------------------

    def trace(self, *args: Any, **kwargs: Any) -> Function:
        """The IR of one specialisation.

        Args:
            args, kwargs: as for a launch; a tensor may be replaced by a dtype, and what is left out takes
                its default, its annotated dtype, or f32.

        Raises:
            CompileError: it does not compile.
        """
        return self.trace_for("cpu", args, kwargs)

    def trace_for(self, backend: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Function:
        """`trace` with the block sizes that a backend has by default."""
        variant, values = self._bound(args, kwargs)
        return variant.trace(values, backend)

    def specialise(self, backend: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Specialisation:
        """One specialisation as a launch makes it, with arguments as for `trace`; its `compiled` is the kernel."""
        variant, values = self._bound(args, kwargs)
        return variant.specialise(values, backend)

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Variant, list[Any]]:
        """The variant for what `trace` takes, and the arguments in its order."""
        values = self._bind_types(args, kwargs)
        if self.is_method:
            variant, extra = self._variant_for(values)
            return variant, [*values[1:], *extra]
        pattern = tuple(p.name if v is None else (p.name, getattr(v, "ndim", len(p.dims)) - len(p.dims) + 1)
                        for p, v in zip(self.parameters, values)
                        if (p.optional and v is None) or (p.has_ellipsis and v is not None))
        return self.variant(pattern), values

    def _bind_types(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        given = {**dict(zip((p.name for p in self.parameters), args)), **kwargs}
        unknown = set(given) - {p.name for p in self.parameters}
        if unknown or len(args) > len(self.parameters):
            what = f"no parameter is called {', '.join(map(repr, sorted(unknown)))}" if unknown else \
                f"{len(args)} arguments given"
            raise LaunchError(f"kernel {self.name}: {what}; expected {', '.join(p.name for p in self.parameters)}")
        values = []
        for p in self.parameters:
            value = given.get(p.name, None if p.optional and p.default is None else EMPTY)
            if value is EMPTY and p.kind == "tile":
                value = p.dtype or f32
            elif value is EMPTY and p.kind in ("float", "int"):
                value = 0
            elif value is EMPTY and p.default is not EMPTY:
                value = p.default
            elif value is EMPTY:
                raise LaunchError(f"kernel {self.name}: the compile-time argument {p.name!r} is missing")
            values.append(value)
        return values

    def ir(self, *args: Any, **kwargs: Any) -> str:
        """The text of `trace`."""
        return str(self.trace(*args, **kwargs))

    def source(self, backend: str, *args: Any, **kwargs: Any) -> str:
        """What a backend ("interp", "cpu", "cuda") makes of one specialisation, as text."""
        return backends.get(backend).source(self.trace_for(backend, args, kwargs))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compile to IR only.

        Raises:
            CompileError: it does not compile.
        """
        self.trace(*args, **kwargs)

    # -- variations ---------------------------------------------------------------------------------

    def retype(self, types_: Mapping[Any, Any]) -> Kernel:
        """The same kernel with dtypes replaced, in annotations and body: retype({ts.bf16: ts.f32})."""
        replaced = {dtype_of(old): dtype_of(new) for old, new in types_.items()}
        return Kernel(self.function, name=self.name, schedule=self.schedule, tuner=self.tuner,
                      retypes={**self.retypes, **replaced})

    def with_schedule(self, **options: Any) -> Kernel:
        """The same kernel under another schedule; options as for `ts.schedule`."""
        schedule = {**self.schedule, **flatten(options)}
        return Kernel(self.function, name=self.name, schedule=schedule, retypes=self.retypes, tuner=self.tuner)

    def with_tuner(self, tuner: Tuner) -> Kernel:
        """The same kernel, its schedule chosen by a tuner; what `ts.autotune` calls."""
        return Kernel(self.function, name=self.name, schedule=self.schedule, retypes=self.retypes, tuner=tuner)

    def __reduce__(self) -> str:
        """By its name, as functions are pickled; a copy is the kernel itself."""
        return self.function.__qualname__

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"


class Variant:
    """A kernel with parameters of fixed kinds and ranks: one signature, one launch function, many dtypes."""

    def __init__(self, kernel: Kernel, signature: Signature, constants: Mapping[str, Dim], instance: Any) -> None:
        self.kernel = kernel
        self.signature = signature
        self.named = {**signature.named, **constants}
        self.instance = instance
        self._table = Table()
        self.launch = make_launcher(signature, self._table.runs, self._slow, self._empty)

    def trace(self, values: Sequence[Any], backend: str) -> Function:
        """The IR for arguments that are tensors, dtypes, numbers or constants."""
        arguments = self._arguments(values)
        return self._trace(arguments, _blocks(arguments, backend), self.kernel.schedule)

    def specialise(self, values: Sequence[Any], backend: str) -> Specialisation:
        """The specialisation for such arguments; not yet compiled."""
        arguments = self._arguments(values)
        trace = functools.partial(self._trace, arguments, _blocks(arguments, backend))
        return Specialisation(self.kernel.name, backend, self.kernel.schedule, trace, self.kernel.tuner,
                              self._manifest(arguments, backend))

    def _arguments(self, values: Sequence[Any]) -> list[Argument]:
        return [self._argument(p, v) for p, v in zip(self.signature.parameters, values)]

    def _under(self, arguments: Sequence[Argument], schedule: Mapping[str, Any]) -> list[Argument]:
        """The arguments under a schedule to be tuned: its block sizes, unless the launch gave others than defaults."""
        defaults = {p.name: p.default for p in self.signature.parameters if p.kind == "constant"}
        return [dataclasses.replace(a, value=schedule[a.name])
                if a.name in schedule and a.name in defaults and a.value == defaults[a.name] else a
                for a in arguments]

    def _manifest(self, arguments: Sequence[Argument], backend: str) -> direct.Manifest | None:
        """Where the code may lie on disk; what is to be shown is traced."""
        keeping = backends.keeping(backend)
        if keeping is None or self.kernel.is_method or env.get("TESSERA_DUMP"):
            return None
        return direct.manifest(
            keeping, self.kernel.function, self.kernel.name, self._under(arguments, self.kernel.schedule),
            self.signature.sizes, self.named, self.kernel.schedule, _blocks(arguments, backend), self.kernel.retypes)

    def _trace(self, arguments: Sequence[Argument], blocks: Mapping[str, int], schedule: Mapping[str, Any],
               reads: Reads | None = None) -> Function:
        arguments = self._under(arguments, schedule)
        function = frontend.trace(
            self.kernel.source_tree, self.kernel.name, arguments, self.signature.sizes, self.named,
            schedule, blocks, self.kernel.retypes, self.instance, reads)
        if "ir" in env.get("TESSERA_DUMP").split(","):
            print(function, file=sys.stderr)
        return function

    def _argument(self, p: Parameter, value: Any) -> Argument:
        if p.kind != "tile":
            return Argument(p.name, p.kind, value=value)
        unit_stride = True
        if isinstance(value, torch.Tensor):
            unit_stride = not value.ndim or value.is_contiguous() or value.stride(-1) == 1
            value = value.dtype
        dtype = dtype_of(value)
        if p.dtype == int4 and dtype == uint8:
            dtype = int4
        return Argument(p.name, p.kind, self.signature.shapes[p.name], dtype, unit_stride)

    def _slow(self, values: Sequence[Any], key: Any) -> Run:
        """Say what is wrong with a launch, or compile it."""
        check_launch(self.signature, {p.name: v for p, v in zip(self.signature.parameters, values)})
        for p, value in zip(self.signature.parameters, values):
            if p.kind == "constant" and not is_hashable(value):
                raise LaunchError(f"kernel {self.kernel.name}: {p.name}={value!r} cannot be a compile-time value")
        with self.kernel._lock:
            return self._table.runs.get(key) or self._table.add(key, self._compile(values))

    def _compile(self, values: Sequence[Any]) -> Specialisation:
        backend = env.get("TESSERA_BACKEND")
        if backend == "auto":
            device = next(v for p, v in zip(self.signature.parameters, values) if p.kind == "tile").device
            backend = backends.for_device(device.type)
        return self.specialise(values, backend)

    def _empty(self, key: Any, args: Sequence[Any], sizes: Sequence[int]) -> None:
        """A launch in which a size is 0 has work to do only where an output has elements."""
        if any(args[i].numel() for i in self._table.specialisations[key].outputs):
            self._table.runs[key](args, sizes)


def _blocks(arguments: Sequence[Argument], backend: str) -> Mapping[str, int]:
    return backends.default_blocks(backend, [a.dtype for a in arguments if a.dtype is not None])


class BoundKernel:
    """A method kernel with its object: model.forward_kernel."""

    def __init__(self, kernel: Kernel, instance: Any) -> None:
        self.kernel = kernel
        self.instance = instance
        self.__tile_kernel__ = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.kernel(self.instance, *args, **kwargs)

    def ir(self, *args: Any, **kwargs: Any) -> str:
        """As `Kernel.ir`, with tensors for the arguments."""
        return self.kernel.ir(self.instance, *args, **kwargs)

    def source(self, backend: str, *args: Any, **kwargs: Any) -> str:
        """As `Kernel.source`."""
        return self.kernel.source(backend, self.instance, *args, **kwargs)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """As `Kernel.check`."""
        self.kernel.check(self.instance, *args, **kwargs)

    def retype(self, types_: Mapping[Any, Any]) -> BoundKernel:
        """As `Kernel.retype`."""
        return BoundKernel(self.kernel.retype(types_), self.instance)


def kernel(function: Callable[..., Any] | None = None, *, name: str | None = None,
           schedule: Mapping[str, Any] | None = None) -> Any:
    """Decorator: compile a function of the tile language.

    Args:
        name: what messages and generated code call it; by default the function's name.
        schedule: block sizes and options, as of `ts.schedule`.
    """

    def make(f: Callable[..., Any]) -> Kernel:
        if not isinstance(f, types.FunctionType):
            raise InputError(f"kernel: {f!r} given; expected a function")
        return Kernel(f, name=name, schedule=flatten(schedule or {}))

    return make if function is None else make(function)
