"""What a method kernel takes from `self`: tensors become parameters, numbers become compile-time values.

In: the object and the kernel's source. Out: the dotted names that the source reads, with their values.
A kernel that takes tensors from `self` knows their sizes when it is compiled; dims of the signature that
stand only on last axes (the widths of a model, unlike its batch and sequence) are then known too, so that
they can meet the weights' dims.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from tessera.kernel.dims import Dim, split_fraction
from tessera.kernel.frontend.source import Source, source_of
from tessera.kernel.signature import Parameter
from tessera.types import DType

_CONSTANTS = (bool, int, float, str, DType, torch.dtype, type(None))


@dataclass(frozen=True)
class Member:
    """A dotted name under `self` and what it is now."""

    path: str
    value: Any

    @property
    def is_tensor(self) -> bool:
        """Whether it becomes a parameter."""
        return isinstance(self.value, torch.Tensor)

    @property
    def key(self) -> Any:
        """What of it a specialisation depends on."""
        return (self.path, tuple(self.value.shape)) if self.is_tensor else (self.path, self.value, type(self.value))


def members_of(instance: Any, source: Source) -> list[Member]:
    """The members of `self` that a kernel's source, and the methods that it calls, read."""
    found: dict[str, Member] = {}
    seen: set[Any] = set()

    def visit(paths: Sequence[tuple[str, ...]]) -> None:
        for path in paths:
            value, dotted = instance, "self"
            for name in path:
                if not hasattr(value, name):
                    break
                value, dotted = getattr(value, name), f"{dotted}.{name}"
                function = getattr(value, "__func__", None)
                if isinstance(function, types.FunctionType) and value.__self__ is instance and function not in seen:
                    seen.add(function)
                    visit(_paths(source_of(function).tree))
                if isinstance(value, (torch.Tensor, *_CONSTANTS)):
                    found[dotted] = Member(dotted, value)
                    break

    visit(_paths(source.tree))
    return list(found.values())


@lru_cache(maxsize=256)
def _paths(tree: ast.FunctionDef) -> tuple[tuple[str, ...], ...]:
    """The longest dotted names under `self` in a function."""
    found: dict[tuple[str, ...], None] = {}
    inner: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        names, at = [], node
        while isinstance(at, ast.Attribute):
            names.append(at.attr)
            inner.add(id(at))
            at = at.value  # type: ignore[assignment]
        if isinstance(at, ast.Name) and at.id == "self":
            found[tuple(reversed(names))] = None
    return tuple(found)


def width_axes(parameters: Sequence[Parameter]) -> list[tuple[int, str, int]]:
    """Where the sizes that are fixed are read: (parameter, name, divisor) for each last axis "D" or "D/2"."""
    widths = _width_names(parameters)
    found: dict[str, tuple[int, str, int]] = {}
    for position, p in enumerate(parameters):
        if p.kind == "tile" and p.dims:
            name, divisor = split_fraction(str(Dim.of(p.dims[-1])))
            if name in widths:
                found.setdefault(name, (position, name, divisor))
    return list(found.values())


def read_widths(axes: Sequence[tuple[int, str, int]], values: Sequence[Any]) -> dict[str, int]:
    """The fixed sizes of these arguments; what is no tensor is left to the launch's own checks."""
    return {name: values[position].shape[-1] * divisor for position, name, divisor in axes
            if isinstance(values[position], torch.Tensor) and values[position].ndim}


def fix_sizes(parameters: Sequence[Parameter], constants: dict[str, int],
              members: Sequence[Member]) -> list[Parameter]:
    """The parameters with these sizes as numbers, followed by the tensors of `self`."""
    fixed = [replace(p, dims=tuple(_fix(d, constants) for d in p.dims)) for p in parameters]
    return fixed + [Parameter(m.path, "tile", tuple(m.value.shape)) for m in members if m.is_tensor]


def _width_names(parameters: Sequence[Parameter]) -> set[str]:
    """Names that stand on last axes of matrices and nowhere else."""
    last: set[str] = set()
    other: set[str] = set()
    for p in parameters:
        for axis, text in enumerate(p.dims):
            names = {split_fraction(a)[0] for a in Dim.of(text).atoms}
            if axis < len(p.dims) - 1:
                other |= names
            elif len(p.dims) > 1:
                last |= names
    return last - other


def _fix(text: str | int, constants: dict[str, int]) -> str | int:
    dim = Dim.of(text)
    replace_by = {}
    for atom in dim.atoms:
        name, divisor = split_fraction(atom)
        if name in constants:
            replace_by[atom] = Dim.of(constants[name] // divisor)
    dim = dim.substitute(replace_by)
    return dim.const if dim.const is not None else str(dim)
