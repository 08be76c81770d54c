"""What a function's annotations say about tensors.

In: a Python function. Out: a `Signature` of specs, one for each parameter that mentions tensors and one for the
result. `match` checks values against it, `generate` writes the quick form of the same check, `tessera check` makes
values for it.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tessera.errors import CompileError, InputError
from tessera.kernel.dims import Dim, split_fraction
from tessera.kernel.frontend.source import source_of
from tessera.types import Annotation, DTypeGroup, Tensor, TensorType, TileType

_MENTIONS_TENSOR = re.compile(r"\bTensor\s*\[")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. `dims` is None where only "a tensor" is asked for; `ellipsis` is the place of "..." among them, and
    `broadcast` are the places of the dims that may also be 1, such as "#B", and -1 for "#..."."""

    annotation: TensorType | None = None
    dims: tuple[Dim, ...] | None = None
    ellipsis: int | None = None
    broadcast: frozenset[int] = frozenset()

    @property
    def dtypes(self) -> DTypeGroup | None:
        """The group of which the dtype is one."""
        return self.annotation.dtypes if self.annotation is not None else None

    @functools.cached_property
    def solved_dims(self) -> tuple[Dim, ...]:
        """The dims from which sizes can be found: a number where a dim may also be 1."""
        return tuple(Dim.of(1) if i in self.broadcast else d for i, d in enumerate(self.dims or ()))

    @functools.cached_property
    def plain_dims(self) -> tuple[str | int, ...] | None:
        """The dims as names and numbers; None where one of them is an expression, or "..." stands among them."""
        if self.dims is None or self.ellipsis is not None or self.broadcast:
            return None
        found = tuple(d.const if d.const is not None else str(d) for d in self.dims)
        return found if all(isinstance(d, int) or d.isidentifier() for d in found) else None

    def __str__(self) -> str:
        if self.annotation is None:
            return "a tensor"
        parts = [f'"{d}"' if isinstance(d, str) else str(d) for d in self.annotation.dims]
        dtype, device = self.annotation.dtype or self.annotation.dtypes, self.annotation.device
        return f"[{', '.join([*parts, *([str(dtype)] if dtype else []), *([device] if device else [])])}]"


@dataclass(frozen=True)
class UnionSpec:
    """One of several; a member that is a class asks for an instance of it, None for None."""

    members: tuple[Any, ...]

    def __str__(self) -> str:
        return " or ".join(m.__name__ if isinstance(m, type) else str(m) for m in self.members)


@dataclass(frozen=True)
class SequenceSpec:
    """A list or a tuple of any length, of one kind of members."""

    member: Any

    def __str__(self) -> str:
        return f"a list or tuple of {self.member}"


@dataclass(frozen=True)
class TupleSpec:
    """A tuple of this length; a member whose spec is None can be anything."""

    members: tuple[Any, ...]

    def __str__(self) -> str:
        return f"a tuple of {len(self.members)}"


@dataclass(frozen=True)
class MappingSpec:
    """A mapping whose values are of one kind."""

    member: Any

    def __str__(self) -> str:
        return f"a mapping to {self.member}"


Spec = TensorSpec | UnionSpec | SequenceSpec | TupleSpec | MappingSpec


@dataclass(frozen=True)
class Parameter:
    """One parameter; `spec` is None where nothing is asked of it."""

    name: str
    kind: Any  # of inspect.Parameter
    spec: Spec | None
    default: Any
    annotation: Any

    @property
    def has_default(self) -> bool:
        """Whether a call may leave it out."""
        return self.default is not inspect.Parameter.empty


@dataclass(frozen=True)
class Signature:
    """A function's parameters and result; `sizes` are the parameters whose numbers stand in dims."""

    name: str
    parameters: tuple[Parameter, ...]
    result: Spec | None
    sizes: tuple[str, ...]

    @property
    def is_trivial(self) -> bool:
        """Whether no annotation asks for anything."""
        return self.result is None and all(p.spec is None for p in self.parameters)


def read_signature(function: types.FunctionType, names: Mapping[str, Any] | None = None) -> Signature:
    """A function's signature.

    Args:
        names: where text annotations find what the function's globals and closure lack, e.g. the locals of the scope
            that defines it.

    Raises:
        InputError: an annotation of tensors cannot be read; the message has its file and line.
    """
    reader = _Reader(function, names or {})
    given = inspect.signature(function).parameters.values()
    parameters = []
    for p in given:
        annotation = reader.value(p.name)
        spec = reader.spec(annotation, p.name)
        if p.default is None and isinstance(spec, TensorSpec):
            spec = UnionSpec((spec, None))
        parameters.append(Parameter(p.name, p.kind, spec, p.default, annotation))
    # What such a function returns is not yet its result.
    deferred = (inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function)
                or inspect.isasyncgenfunction(function))
    result = None if deferred else reader.spec(reader.value("return"), "return")
    specs = [s for p in parameters for s in tensor_specs(p.spec)] + list(tensor_specs(result))
    atoms = {split_fraction(a)[0] for s in specs for dim in s.dims or () for a in dim.atoms}
    sizes = tuple(p.name for p in parameters if p.spec is None and p.name in atoms)
    return Signature(function.__qualname__.rpartition("<locals>.")[2], tuple(parameters), result, sizes)


def tensor_specs(spec: Any) -> Iterator[TensorSpec]:
    """Every tensor that a spec speaks of."""
    if isinstance(spec, TensorSpec):
        yield spec
    elif isinstance(spec, (SequenceSpec, MappingSpec)):
        yield from tensor_specs(spec.member)
    elif isinstance(spec, (UnionSpec, TupleSpec)):
        for member in spec.members:
            yield from tensor_specs(member)


def _mentions_dims(annotation: Any) -> bool:
    """Whether dims of tensors stand somewhere in an annotation."""
    parts = annotation if isinstance(annotation, (list, tuple)) else typing.get_args(annotation)
    return isinstance(annotation, Annotation) or any(map(_mentions_dims, parts))


class _Reader:
    """Reads the annotations of one function."""

    def __init__(self, function: types.FunctionType, names: Mapping[str, Any]) -> None:
        function = inspect.unwrap(function)  # under other decorators, such as torch.no_grad()
        self.function = function
        cells = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                cells[name] = cell.cell_contents
            except ValueError:  # assigned later
                continue
        self.names = {**names, **cells}

    def value(self, name: str) -> Any:
        """A parameter's annotation; text, as `from __future__ import annotations` leaves it, is evaluated."""
        return self._evaluate(self.function.__annotations__.get(name), name)

    def _evaluate(self, annotation: Any, name: str) -> Any:
        if isinstance(annotation, typing.ForwardRef):
            annotation = annotation.__forward_arg__
        if not isinstance(annotation, str):
            return annotation
        try:
            # The text is the function's own source: evaluating it is what Python does without the future import.
            return eval(annotation, self.function.__globals__, dict(self.names))
        except Exception as error:
            if _MENTIONS_TENSOR.search(annotation):
                raise self._error(name, f"{annotation} cannot be evaluated: {error}") from None
            return None  # not ours: often a name that only type checkers import

    def spec(self, annotation: Any, name: str) -> Spec | None:
        """What an annotation asks for; None where it does not speak of tensors."""
        annotation = self._evaluate(annotation, name)
        if annotation is Tensor or (isinstance(annotation, type) and issubclass(annotation, torch.Tensor)):
            return TensorSpec()
        if isinstance(annotation, Annotation):
            return self._tensor(annotation, name)
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            return self.spec(args[0], name)
        if origin in (typing.Union, types.UnionType) or hasattr(annotation, "members"):
            members = tuple(args) if origin else annotation.members
            return self._union([self._evaluate(m, name) for m in members], name)
        if origin is None:
            return None
        return self._container(annotation, origin, args, name)

    def _container(self, annotation: Any, origin: Any, args: tuple[Any, ...], name: str) -> Spec | None:
        specs = [self.spec(a, name) for a in args if a is not Ellipsis and not isinstance(a, list)]
        if not any(specs) and not _mentions_dims(args):
            return None
        if origin is tuple and args[-1] is not Ellipsis:
            return TupleSpec(tuple(specs))
        if origin is tuple or origin in (list, collections.abc.Sequence):
            return SequenceSpec(specs[0])
        if origin in (dict, collections.abc.Mapping) and specs[0] is None:
            return MappingSpec(specs[1])
        if _mentions_dims(args):
            raise self._error(name, f"{annotation}: tensors can stand in tuples, lists, dict values and unions")
        return None

    def _union(self, members: list[Any], name: str) -> Spec | None:
        found: list[Any] = []
        for member in members:
            spec = self.spec(member, name)
            if spec is not None:
                found.append(spec)
            elif member is None or member is type(None):
                found.append(None)
            else:
                plain = typing.get_origin(member) or member
                found.append(plain if isinstance(plain, type) else object)
        return UnionSpec(tuple(found)) if any(isinstance(m, Spec) for m in found) else None

    def _tensor(self, annotation: Annotation, name: str) -> TensorSpec:
        if isinstance(annotation, TileType):
            raise self._error(name, "Tile[...] describes a kernel's parameter; expected Tensor[...]")
        assert isinstance(annotation, TensorType)
        places = [i for i, d in enumerate(annotation.dims) if d in ("...", "#...")]
        if len(places) > 1:
            raise self._error(name, f'{list(annotation.dims)}: "..." can stand once')
        written = [d for i, d in enumerate(annotation.dims) if i not in places]
        loose = {i for i, d in enumerate(written) if isinstance(d, str) and d.startswith("#")}
        try:
            dims = tuple(Dim.of(d.removeprefix("#") if isinstance(d, str) else d) for d in written)
        except InputError as error:
            raise self._error(name, str(error)) from None
        if places and annotation.dims[places[0]] == "#...":
            loose.add(-1)
        return TensorSpec(annotation, dims, places[0] if places else None, frozenset(loose))

    def _error(self, name: str, problem: str) -> InputError:
        what = "the result's annotation" if name == "return" else f"the annotation of {name!r}"
        return InputError(f"{_place(self.function, name)}: function {self.function.__name__}: {what}: {problem}")


def _place(function: types.FunctionType, name: str) -> str:
    """file:line of a parameter's annotation, or of the function where its source cannot be read."""
    try:
        source = source_of(function)
    except CompileError:
        return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
    arguments = source.tree.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    nodes: dict[str, ast.AST | None] = {a.arg: a.annotation for a in every if a is not None}
    nodes["return"] = source.tree.returns
    return str(source.location(nodes.get(name) or source.tree))
