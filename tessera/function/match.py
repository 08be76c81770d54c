"""Checks values against a signature, and says what does not fit.

In: a `Signature` and a call's arguments, or its result as well. Out: the sizes by name, or a ShapeError that names
both values, both dims, both sizes and the line of the call. This is the meaning of the annotations; `generate`
writes code that decides the usual cases faster, and asks here when they do not fit.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tessera.errors import ShapeError
from tessera.function.annotations import (
    MappingSpec,
    SequenceSpec,
    Signature,
    TensorSpec,
    TupleSpec,
    UnionSpec,
)
from tessera.kernel.dims import Dim, split_fraction
from tessera.kernel.signature import solve
from tessera.types import int4

NO_RESULT = object()
_PACKAGE = Path(__file__).parent
_OPERATIONS = str(_PACKAGE.parent / "ops")
GENERATED = "<checks of "  # how the file names of generated code begin
_MOST_READINGS = 64  # of a call with several unions


class _Misfit(Exception):
    """A value does not fit; the text says how, without function and call site."""


@dataclass(frozen=True)
class _Leaf:
    """One tensor of a call: where it stands ("x", "batch['labels']", "result[0]") and what is asked of it."""

    path: str
    spec: TensorSpec
    shape: tuple[int, ...]
    dtype: torch.dtype


def match(signature: Signature, values: Mapping[str, Any], result: Any = NO_RESULT) -> dict[str, int]:
    """Check a call.

    Args:
        values: arguments by name; `*args` as a tuple and `**kwargs` as a dict under their names.
        result: what the function returned, when it is to be checked as well.

    Returns:
        The sizes by name.

    Raises:
        ShapeError: a rank, a dim, a dtype or a device does not fit.
    """
    wanted = [(p.name, p.spec, values[p.name]) for p in _expanded(signature, values)]
    if result is not NO_RESULT:
        wanted.append(("result", signature.result, result))
    first: _Misfit | None = None
    try:
        numbers = _numbers(signature, values)
        choices = [list(_readings(path, spec, value)) for path, spec, value in wanted if spec is not None]
        for reading in itertools.islice(itertools.product(*choices), _MOST_READINGS):
            try:
                return _sizes(list(itertools.chain(*reading)), numbers)
            except _Misfit as misfit:
                first = first or misfit
    except _Misfit as misfit:
        first = misfit
    raise ShapeError(f"{signature.name}: {first}{_call_site()}")


def _numbers(signature: Signature, values: Mapping[str, Any]) -> dict[str, int]:
    """The arguments that are sizes; one that is None is not known."""
    for name in signature.sizes:
        if values[name] is not None and not isinstance(values[name], (int, torch.SymInt)):
            raise _Misfit(f"the argument {name} is {_described(values[name])}; expected an int, a size")
    return {name: values[name] for name in signature.sizes if values[name] is not None}


def _expanded(signature: Signature, values: Mapping[str, Any]) -> Iterator[Any]:
    """Parameters with something asked of them; the annotation of *args and **kwargs is that of each member."""
    for p in signature.parameters:
        if p.spec is None:
            continue
        if p.kind in (p.kind.VAR_POSITIONAL, p.kind.VAR_KEYWORD):
            kind = SequenceSpec if p.kind is p.kind.VAR_POSITIONAL else MappingSpec
            yield type(p)(p.name, p.kind, kind(p.spec), p.default, p.annotation)
        else:
            yield p


def _readings(path: str, spec: Any, value: Any) -> Iterator[list[_Leaf]]:
    """The ways to read a value, by rank, dtype and device; more than one only where a union leaves it open.

    Raises:
        _Misfit: there is none.
    """
    if isinstance(spec, TensorSpec):
        yield [_leaf(path, spec, value)]
    elif isinstance(spec, UnionSpec):
        yield from _union_readings(path, spec, value)
    else:
        items = _items(path, spec, value)
        parts = [list(_readings(p, s, v)) for p, s, v in items if s is not None]
        for reading in itertools.islice(itertools.product(*parts), _MOST_READINGS):
            yield list(itertools.chain(*reading))


def _union_readings(path: str, spec: UnionSpec, value: Any) -> Iterator[list[_Leaf]]:
    found, problems = False, []
    for member in spec.members:
        if member is None or isinstance(member, type):
            if value is None if member is None else isinstance(value, member):
                found = True
                yield []
            continue
        try:
            for reading in _readings(path, member, value):
                found = True
                yield reading
        except _Misfit as misfit:
            problems.append(misfit)
    if not found:
        # With one kind of tensor what is wrong with it says more than the list of what could be given.
        raise problems[0] if len(problems) == 1 else _Misfit(f"{path} is {_described(value)}; expected {spec}")


def _items(path: str, spec: Any, value: Any) -> list[tuple[str, Any, Any]]:
    """(path, spec, value) of a container's members."""
    if isinstance(spec, MappingSpec) and isinstance(value, Mapping):
        return [(f"{path}[{key!r}]", spec.member, item) for key, item in value.items()]
    if isinstance(spec, SequenceSpec) and isinstance(value, (list, tuple)):
        return [(f"{path}[{i}]", spec.member, item) for i, item in enumerate(value)]
    if isinstance(spec, TupleSpec) and isinstance(value, (list, tuple)) and len(value) == len(spec.members):
        return [(f"{path}[{i}]", s, item) for i, (s, item) in enumerate(zip(spec.members, value))]
    raise _Misfit(f"{path} is {_described(value)}; expected {spec}")


def _leaf(path: str, spec: TensorSpec, value: Any) -> _Leaf:
    if not isinstance(value, torch.Tensor):
        raise _Misfit(f"{path} is {_described(value)}; expected a tensor{f' {spec}' if spec.annotation else ''}")
    shape = tuple(value.shape)
    if spec.annotation is None or spec.dims is None:
        return _Leaf(path, spec, shape, value.dtype)
    rank, dtype = len(spec.dims), spec.annotation.dtype
    if len(shape) < rank if spec.ellipsis is not None else len(shape) != rank:
        least = "at least " if spec.ellipsis is not None else ""
        raise _Misfit(f"{path} has {len(shape)} ax{'i' if len(shape) == 1 else 'e'}s, {list(shape)}; expected "
                      f"{least}{rank}: {spec}")
    if dtype is not None and value.dtype is not dtype.torch:
        raise _Misfit(f"{path} is {value.dtype}; expected {dtype.torch}: {spec}")
    if spec.dtypes is not None and value.dtype not in spec.dtypes.torch:
        names = ", ".join(str(member.torch) for member in spec.dtypes.members)
        raise _Misfit(f"{path} is {value.dtype}; expected one of {names}: {spec}")
    if spec.annotation.device is not None and value.device.type != spec.annotation.device:
        raise _Misfit(f"{path} is on {value.device}; expected {spec.annotation.device}: {spec}")
    if dtype is int4 and shape:
        shape = (*shape[:-1], shape[-1] * 2)  # two to a byte
    return _Leaf(path, spec, shape, value.dtype)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"of type {type(value).__module__}.{type(value).__name__}".replace(
        "builtins.", "")


# -- sizes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """One axis of one tensor; with `or_1`, its size may be 1 as well."""

    leaf: _Leaf
    index: int
    dim: Dim
    or_1: bool

    @property
    def size(self) -> int:
        return self.leaf.shape[self.index]

    def __str__(self) -> str:
        return f"{self.leaf.path} has {self.dim}={self.size} (axis {self.index} of {list(self.leaf.shape)})"


def _sizes(leaves: Sequence[_Leaf], numbers: Mapping[str, int]) -> dict[str, int]:
    """Solve the sizes of a call and check every axis against them."""
    _check_same_dtypes(leaves)
    quick = _plain_sizes(leaves, numbers)
    if quick is not None:
        return quick
    _check_ellipsis(leaves)
    axes = {leaf.path: _axes(leaf) for leaf in leaves if leaf.spec.dims is not None}
    dims = {leaf.path: leaf.spec.solved_dims for leaf in leaves if leaf.spec.dims is not None}
    sizes = dict(numbers)
    origins: dict[str, _Axis] = {}
    for step in solve(dims, numbers):
        axis = axes[step.parameter][step.axis]
        factor = step.factor.value(sizes)
        sizes[step.name] = (axis.size - step.rest.value(sizes)) * step.times // factor if factor else 0
        origins[step.name] = axis
    for axis in itertools.chain(*axes.values()):
        _check_axis(axis, sizes, origins)
    return sizes


def _plain_sizes(leaves: Sequence[_Leaf], numbers: Mapping[str, int]) -> dict[str, int] | None:
    """The sizes of leaves whose dims are names and numbers, when they fit: a tenth of the time of solving."""
    sizes = dict(numbers)
    for leaf in leaves:
        if leaf.spec.dims is None:
            continue
        dims = leaf.spec.plain_dims
        if dims is None:
            return None
        for dim, size in zip(dims, leaf.shape):
            if (dim if isinstance(dim, int) else sizes.setdefault(dim, size)) != size:
                return None
    return sizes


def _axes(leaf: _Leaf) -> list[_Axis]:
    """The named axes: those before "..." counted from the front, those after it from the back."""
    assert leaf.spec.dims is not None
    rank, front = len(leaf.spec.dims), leaf.spec.ellipsis
    skip = len(leaf.shape) - rank
    return [_Axis(leaf, i if front is None or i < front else i + skip, dim, i in leaf.spec.broadcast)
            for i, dim in enumerate(leaf.spec.dims)]


def _check_same_dtypes(leaves: Sequence[_Leaf]) -> None:
    """Tensors of a named group have one dtype."""
    first: dict[str, _Leaf] = {}
    for leaf in leaves:
        group = leaf.spec.dtypes
        if group is not None and group.is_same:
            other = first.setdefault(group.name, leaf)
            if other.dtype is not leaf.dtype:
                raise _Misfit(f"{leaf.path} is {leaf.dtype} but {other.path} is {other.dtype}; expected one dtype")


def _check_ellipsis(leaves: Sequence[_Leaf]) -> None:
    """ "..." stands for the same axes wherever it is written, and "#..." for what broadcasts to them."""
    middles = []
    for leaf in leaves:
        if leaf.spec.ellipsis is not None and leaf.spec.dims is not None:
            start = leaf.spec.ellipsis
            middles.append((leaf, leaf.shape[start:start + len(leaf.shape) - len(leaf.spec.dims)]))
    whole = [(leaf, middle) for leaf, middle in middles if -1 not in leaf.spec.broadcast]
    for leaf, middle in middles if whole else ():
        first, wanted = whole[0]
        is_loose = -1 in leaf.spec.broadcast
        if not (broadcasts(middle, wanted) if is_loose else middle == wanted):
            raise _Misfit(f'{leaf.path} has {list(middle)} for "{"#" * is_loose}..." but {first.path} has '
                          f"{list(wanted)}")


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be expanded to the target."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(target)))


def _check_axis(axis: _Axis, sizes: Mapping[str, int], origins: Mapping[str, _Axis]) -> None:
    if axis.or_1 and (axis.size == 1 or any(split_fraction(a)[0] not in sizes for a in axis.dim.atoms)):
        return  # of a size that nothing else has, nothing is known
    if str(axis.dim) in origins and str(axis.dim) not in axis.dim.atoms:
        expected = sizes[str(axis.dim)]  # a product that is one size, as none of its names is known
    else:
        for atom in axis.dim.atoms:
            name, divisor = split_fraction(atom)
            if sizes[name] % divisor:
                raise _Misfit(f"{_said(name, sizes, origins)}, which {divisor} does not divide; "
                              f"{axis.leaf.path} is annotated {axis.leaf.spec}")
            if sizes[name] < 0:
                raise _Misfit(f"{axis}, so {name} would be {sizes[name]}")
        expected = axis.dim.value(sizes)
    if expected == axis.size:
        return
    if axis.dim.const is not None:
        raise _Misfit(f"{axis.leaf.path} has {axis.size} (axis {axis.index} of {list(axis.leaf.shape)}); "
                      f"expected {expected}: {axis.leaf.spec}")
    names = sorted({split_fraction(a)[0] for a in axis.dim.atoms}) if str(axis.dim) not in sizes else [str(axis.dim)]
    own = [name for name in names if origins.get(name) == axis]
    others = " and ".join(_said(name, sizes, origins) for name in names if name not in own)
    if own:  # solved from this very axis
        raise _Misfit(f"{axis}{' but ' if others else ''}{others}, and there is no {own[0]} to that")
    so = "" if str(axis.dim) in names else f", so {axis.dim} is {expected}"
    so += "; 1 would fit as well" if axis.or_1 else ""
    raise _Misfit(f"{axis} but {others}{so}")


def _said(name: str, sizes: Mapping[str, int], origins: Mapping[str, _Axis]) -> str:
    """Where a size comes from."""
    return str(origins[name]) if name in origins else f"the argument {name} is {sizes[name]}"


# -- where the call stands --------------------------------------------------------------------------


def caller_frame(*also: str) -> FrameType | None:
    """The innermost frame that is neither this package's nor torch's, nor in one of the folders `also`."""
    ours = (str(_PACKAGE), str(_PACKAGE.parent / "callable.py"), str(Path(torch.__file__).parent), GENERATED, *also)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(ours):
            return frame
        frame = frame.f_back
    return None


def _call_site() -> str:
    if torch.compiler.is_compiling():  # torch.compile, which traces this too, cannot look at frames
        return ""
    frame = caller_frame(_OPERATIONS)  # which call each other: the line that is meant is their caller's
    return "" if frame is None else f"; called at {frame.f_code.co_filename}:{frame.f_lineno}"
