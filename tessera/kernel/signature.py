"""Annotations of a kernel's parameters: kinds, named sizes, and how a launch finds and checks the sizes.

In: a function's annotations (`Tile["B*S", "D/2", bf16]`, `float`, `bool`, ...). Out: a `Signature`: the
shape of every tile parameter in normal form, the sizes that a launch binds, and the steps that solve them.
The frontend reads the shapes, `binder` generates the launch code, `launch` reports mismatches with it.

"D/2" is a promise that 2 divides D. A product none of whose names is known otherwise ("B*S" alone) is one
size with that name. "..." stands for any number of leading axes.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tessera.errors import CompileError, InputError, LaunchError
from tessera.kernel.diagnostics import compile_error
from tessera.kernel.dims import Dim, split_fraction
from tessera.kernel.ir import Value
from tessera.types import Annotation, DType, dtype_of, int4

EMPTY = object()


class constexpr:
    """Annotation of a parameter whose value is known when the kernel is compiled: `block: ts.constexpr`."""

    def __class_getitem__(cls, item: Any) -> type[constexpr]:
        return cls


@dataclass(frozen=True)
class Parameter:
    """One parameter: a tile with its dims, a run-time scalar, or a compile-time constant."""

    name: str
    kind: str  # "tile", "float", "int", "constant" or "self"
    dims: tuple[str | int, ...] = ()
    dtype: DType | None = None
    optional: bool = False
    default: Any = EMPTY

    @property
    def has_ellipsis(self) -> bool:
        """Whether its rank is open."""
        return "..." in self.dims


@dataclass(frozen=True)
class Step:
    """Solve one size: name = (n - rest) * times // factor, where n is the size of `axis` of `parameter`."""

    name: str
    parameter: str
    axis: int
    rest: Dim
    factor: Dim
    times: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether the size is the axis itself."""
        return not self.rest.terms and self.factor == Dim.of(1) and self.times == 1


@dataclass(frozen=True)
class Signature:
    """Parameters of fixed rank, with their sizes solved.

    `dims` are as written (texts parsed), `shapes` in the normal form of the IR, where an exact fraction is
    an atom; `sizes` lists what a launch binds; `named` is what `tile.context()` can ask for.
    """

    name: str
    parameters: tuple[Parameter, ...]
    dims: Mapping[str, tuple[Dim, ...]]
    shapes: Mapping[str, tuple[Dim, ...]]
    sizes: tuple[str, ...]
    steps: tuple[Step, ...]
    named: Mapping[str, Dim]
    divisors: Mapping[str, int]

    @property
    def tiles(self) -> list[Parameter]:
        """The tile parameters in order."""
        return [p for p in self.parameters if p.kind == "tile"]

    def solve(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Sizes from the tensors' shapes, unchecked."""
        sizes: dict[str, int] = {}
        for step in self.steps:
            n = shapes[step.parameter][step.axis]
            factor = step.factor.value(sizes)
            sizes[step.name] = (n - step.rest.value(sizes)) * step.times // factor if factor else 0
        return sizes

    def match(self, arguments: Mapping[str, Any]) -> dict[str, Dim]:
        """The sizes by name when the kernel is called in another kernel with these values.

        Raises:
            LaunchError: a rank or a size does not fit.
        """
        known: dict[str, Dim] = {}
        values = {p.name: arguments[p.name] for p in self.tiles if isinstance(arguments.get(p.name), Value)}
        for name, value in values.items():
            if value.type.rank != len(self.dims[name]):
                raise LaunchError(f"{self.name}: {name} has {value.type.rank} axes; expected {_text(self.dims[name])}")
        for step in self.steps:
            if step.parameter in values:
                n = values[step.parameter].type.shape[step.axis]
                known[step.name] = (n - _at(step.rest, known)) * step.times // _at(step.factor, known)
        for name, value in values.items():
            for have, want in zip(value.type.shape, self.dims[name]):
                expected = _at(want, known)
                if expected != have:
                    raise LaunchError(f"{self.name}: {name} has {want}={have} where {want} is {expected}")
        return {name: _at(dim, known) for name, dim in self._context_dims().items()
                if all(split_fraction(a)[0] in known for a in dim.atoms)}

    def _context_dims(self) -> dict[str, Dim]:
        return {**{name: Dim.atom(name) for name in self.sizes}, **_written(self.parameters, self.dims)}


def _at(dim: Dim, known: Mapping[str, Dim]) -> Dim:
    def lookup(atom: str) -> Dim:
        name, divisor = split_fraction(atom)
        return known[name] // divisor if name in known else Dim.atom(atom)

    return dim.evaluate(lookup)


def _text(dims: Iterable[Any]) -> str:
    return "[" + ", ".join(str(d) for d in dims) + "]"


# -- reading annotations ----------------------------------------------------------------------------


def read_parameters(function: types.FunctionType, names: Sequence[str], defaults: Mapping[str, Any],
                    retypes: Mapping[DType, DType]) -> tuple[Parameter, ...]:
    """The parameters of a kernel.

    Raises:
        CompileError: an annotation is missing or not understood.
    """
    annotations = {name: _evaluate(function, name, text) for name, text in function.__annotations__.items()}
    found = []
    for position, name in enumerate(names):
        if name == "self" and position == 0 and name not in annotations:
            found.append(Parameter(name, "self"))
            continue
        if name not in annotations:
            raise _error(function, name, "has no annotation; "
                         'expected Tile["S", "D", dtype], float, int, bool or ts.constexpr')
        parameter = _parameter(function, name, annotations[name], defaults.get(name, EMPTY))
        found.append(replace(parameter, dtype=retypes.get(parameter.dtype, parameter.dtype))
                     if parameter.dtype is not None else parameter)
    return tuple(found)


def _evaluate(function: types.FunctionType, name: str, annotation: Any) -> Any:
    """An annotation's value; under `from __future__ import annotations` it is text."""
    if not isinstance(annotation, str):
        return annotation
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    local = {}
    for variable, cell in cells:
        try:
            local[variable] = cell.cell_contents
        except ValueError:
            continue
    try:
        # The text is the function's own source: evaluating it is what Python does without the future import.
        return eval(annotation, function.__globals__, local)
    except Exception as error:
        raise CompileError(f"kernel {function.__name__}: annotation of {name!r}, {annotation}, cannot be evaluated: "
                           f"{error}") from None


def _parameter(function: types.FunctionType, name: str, annotation: Any, default: Any) -> Parameter:
    members = _members(annotation)
    optional = any(m in (None, type(None)) for m in members) or default is None
    members = [m for m in members if m not in (None, type(None))]
    if len(members) == 1:
        kind = members[0]
        if isinstance(kind, Annotation):
            return Parameter(name, "tile", kind.dims, kind.dtype, optional, default)
        if kind is float or kind is int:
            return Parameter(name, kind.__name__, optional=optional, default=default)
        if kind in (bool, str, DType, torch.dtype, tuple) or (isinstance(kind, type) and issubclass(kind, constexpr)):
            return Parameter(name, "constant", optional=optional, default=default)
    raise _error(function, name, f"is annotated {annotation!r}; expected "
                 'Tile["S", "D", dtype], Optional[Tile[...]], float, int, bool, str or ts.constexpr')


def _error(function: types.FunctionType, name: str, message: str) -> CompileError:
    """What is wrong with a parameter, at its place."""
    from tessera.kernel.frontend.source import source_of  # the frontend reads signatures

    try:
        source = source_of(function)
    except CompileError:  # typed at a prompt: say at least what is wrong
        place = None
    else:
        place = next((source.location(node) for node in source.parameters if node.arg == name), None)
    return compile_error(f"kernel {function.__name__}: parameter {name!r} {message}", place)


def _members(annotation: Any) -> list[Any]:
    if isinstance(annotation, Annotation):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    if hasattr(annotation, "members"):
        return list(annotation.members)
    return [annotation]


# -- solving sizes ----------------------------------------------------------------------------------


def make_signature(name: str, parameters: Sequence[Parameter]) -> Signature:
    """Work out the sizes of parameters of fixed rank.

    Raises:
        CompileError: a dim's text is not a size.
    """
    dims: dict[str, tuple[Dim, ...]] = {}
    for p in parameters:
        if p.kind == "tile":
            try:
                dims[p.name] = tuple(Dim.of(d) for d in p.dims)
            except InputError as error:
                raise CompileError(f"kernel {name}: parameter {p.name!r}: {error}") from None
    steps = solve(dims)
    whole = {s.name for s in steps if not s.name.isidentifier()}
    dims = {n: tuple(Dim.atom(str(d)) if str(d) in whole else d for d in shape) for n, shape in dims.items()}
    divisors = _divisors(dims.values())
    exact: dict[str, Dim] = {}
    for base, lcm in divisors.items():
        exact[base] = lcm * Dim.atom(f"{base}/{lcm}")
        exact |= {f"{base}/{k}": (lcm // k) * Dim.atom(f"{base}/{lcm}") for k in range(2, lcm + 1) if lcm % k == 0}
    shapes = {n: tuple(d.substitute(exact) for d in shape) for n, shape in dims.items()}
    sizes = tuple(dict.fromkeys(s.name for s in steps))
    names = {**_written(parameters, dims), **{s: Dim.atom(s) for s in sizes if s.isidentifier()}}
    named = {n: d.substitute(exact) for n, d in names.items() if d.const is None}
    return Signature(name, tuple(parameters), dims, shapes, sizes, steps, named, divisors)


def _written(parameters: Iterable[Parameter], dims: Mapping[str, Sequence[Dim]]) -> dict[str, Dim]:
    """Sizes by their text in the annotations: "G*C", which is not the text of its normal form."""
    return {str(text): dim for p in parameters if p.kind == "tile" for text, dim in zip(p.dims, dims[p.name])}


def _divisors(shapes: Iterable[Sequence[Dim]]) -> dict[str, int]:
    """For each name, the least common multiple of the fractions of it that stand in the signature."""
    found: dict[str, int] = {}
    for shape in shapes:
        for dim in shape:
            for atom in dim.atoms:
                base, divisor = split_fraction(atom)
                if divisor > 1:
                    found[base] = math.lcm(found.get(base, 1), divisor)
    return found


def solve(dims: Mapping[str, Sequence[Dim]], given: Iterable[str] = ()) -> tuple[Step, ...]:
    """How to find the sizes: a step for each name of the dims that is not given, in an order that works.

    A size none of whose names can be found is one name: its text.
    """
    entries = [(name, axis, dim) for name, shape in dims.items() for axis, dim in enumerate(shape)]
    steps: list[Step] = []
    known = set(given)
    for name, axis, dim in entries:  # names that stand alone, first whole, then as fractions
        if len(dim.terms) == 1 and dim.terms[0][1] == 1 and len(dim.terms[0][0]) == 1:
            atom = dim.terms[0][0][0]
            if isinstance(atom, str) and atom not in known and "/" not in atom:
                known.add(atom)
                steps.append(Step(atom, name, axis, Dim.of(0), Dim.of(1)))
    progress = True
    while progress:
        progress = False
        for name, axis, dim in entries:
            step = _linear(name, axis, dim, known)
            if step is not None:
                known.add(step.name)
                steps.append(step)
                progress = True
    for name, axis, dim in entries:
        bases = {split_fraction(a)[0] for a in dim.atoms}
        if bases - known and str(dim) not in known:
            known.add(str(dim))
            steps.append(Step(str(dim), name, axis, Dim.of(0), Dim.of(1)))
    return tuple(steps)


def _linear(name: str, axis: int, dim: Dim, known: set[str]) -> Step | None:
    """The step that solves the one unknown name of a size, where it stands in one term to the first power."""
    unknown = {a for a in dim.atoms if split_fraction(a)[0] not in known}
    if len(unknown) != 1:
        return None
    atom = unknown.pop()
    with_it = [(m, f) for m, f in dim.terms if any(atom in (a if isinstance(a, str) else a.left.atoms | a.right.atoms)
                                                   if not isinstance(a, str) else a == atom for a in m)]
    if len(with_it) != 1 or with_it[0][0].count(atom) != 1 or any(not isinstance(a, str) for a in with_it[0][0]):
        return None
    monomial, factor = with_it[0]
    base, divisor = split_fraction(atom)
    others = Dim.of(factor)
    for other in monomial:
        if other != atom:
            others = others * Dim.atom(other)
    rest = Dim(tuple((m, f) for m, f in dim.terms if m != monomial))
    return Step(base, name, axis, rest, others, divisor)


# -- checking a launch ------------------------------------------------------------------------------


def shape_of(parameter: Parameter, tensor: torch.Tensor) -> tuple[int, ...]:
    """A tensor's shape in elements: a packed int4 tensor has two to a byte along the last axis."""
    shape = tuple(tensor.shape)
    if parameter.dtype == int4 and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    return shape


def check_launch(signature: Signature, arguments: Mapping[str, Any]) -> None:
    """Find what is wrong with the arguments of a launch; returns when nothing is.

    Raises:
        LaunchError: naming the argument, what was given and what was expected.
    """
    prefix = f"kernel {signature.name}: "
    shapes: dict[str, tuple[int, ...]] = {}
    for p in signature.parameters:
        value = arguments[p.name]
        if p.kind == "tile":
            _check_tensor(prefix, p, value, signature.dims[p.name])
            shapes[p.name] = shape_of(p, value)
        elif p.kind in ("float", "int"):
            scalar_argument(signature.name, p, value)
    _check_sizes(prefix, signature, shapes)
    tensors = [(p.name, arguments[p.name]) for p in signature.tiles]
    for name, tensor in tensors[1:]:
        if tensor.device != tensors[0][1].device:
            raise LaunchError(f"{prefix}{tensors[0][0]} is on {tensors[0][1].device} but {name} is on {tensor.device}")


def scalar_argument(kernel: str, parameter: Parameter, value: Any) -> int | float:
    """A run-time scalar as a Python number.

    Raises:
        LaunchError: it is not a number of the annotated kind.
    """
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.device.type == "cpu":
        value = value.item()
    if parameter.kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if parameter.kind == "int" and not isinstance(value, bool) and hasattr(value, "__index__"):
        number = int(value.__index__())
        if -2**63 <= number < 2**63:
            return number
    raise LaunchError(f"kernel {kernel}: {parameter.name}={_brief(value)} given; expected {parameter.kind}")


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _check_tensor(prefix: str, p: Parameter, value: Any, dims: Sequence[Dim]) -> None:
    expected = f"{p.dtype or 'any dtype'}{_text(dims)}"
    if not isinstance(value, torch.Tensor):
        raise LaunchError(f"{prefix}{p.name}={_brief(value)} given; expected a tensor {expected}")
    if value.layout != torch.strided:
        raise LaunchError(f"{prefix}{p.name} has the layout {value.layout}; expected a dense tensor {expected}")
    try:
        dtype = dtype_of(value.dtype)
    except InputError:
        raise LaunchError(f"{prefix}{p.name} is {value.dtype}; expected {expected}") from None
    if p.dtype is not None and value.dtype != p.dtype.torch:
        raise LaunchError(f"{prefix}{p.name} is {dtype}; the signature says {expected}")
    if value.ndim != len(dims):
        raise LaunchError(f"{prefix}{p.name} has {value.ndim} axes, shape {list(value.shape)}; expected {expected}")


def _check_sizes(prefix: str, signature: Signature, shapes: Mapping[str, Sequence[int]]) -> None:
    sizes = signature.solve(shapes)
    for p in signature.tiles:
        for axis, (n, dim) in enumerate(zip(shapes[p.name], signature.dims[p.name])):
            want = dim.value(sizes)
            if n == want and all(sizes[base] >= 0 for base in map(_base, dim.atoms)):
                continue
            if dim.const is not None:
                raise LaunchError(f"{prefix}{p.name} has {n} on axis {axis}; expected {dim}")
            raise LaunchError(prefix + _conflict(signature, shapes, sizes, p.name, n, dim))
    for base, divisor in signature.divisors.items():
        if sizes[base] % divisor:
            raise LaunchError(f"{prefix}{base}={sizes[base]} is not a multiple of {divisor}, "
                              f"as {base}/{divisor} in the signature says")


def _base(atom: str) -> str:
    return split_fraction(atom)[0]


def _conflict(signature: Signature, shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, int], name: str, n: int,
              dim: Dim) -> str:
    """x has S=7 but output has S=9."""
    sources = [s for s in signature.steps if s.name in {_base(a) for a in dim.atoms}]
    others = [s for s in sources if s.parameter != name] or sources
    if not others or (len(sources) == 1 and sources[0].parameter == name and str(dim) != sources[0].name):
        return f"{name} has {dim}={n}, which no {', '.join(sorted(map(_base, dim.atoms)))} fits"
    if len(others) == 1 and str(dim) == others[0].name:
        return f"{others[0].parameter} has {dim}={sizes[others[0].name]} but {name} has {dim}={n}"
    known = " and ".join(f"{s.parameter} has {s.name}={sizes[s.name]}" for s in dict.fromkeys(others))
    return f"{known} but {name} has {dim}={n}"
