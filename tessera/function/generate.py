"""Generates the function that stands before a checked function: its parameters, its checks, the call.

In: a `Signature` and the function under it. Out: a Python function with the same parameters and defaults, whose
checks are straight-line code on shapes: three tensors and the result take about a microsecond. What does not fit,
and annotations that straight-line code cannot decide (containers, unions of equal ranks), goes to `match`.

torch.compile traces the straight-line checks into its guards, so that a compiled call pays nothing for them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tessera.function.annotations import Parameter, Signature, TensorSpec, TupleSpec, UnionSpec, tensor_specs
from tessera.function.match import GENERATED, match
from tessera.kernel.binder import code
from tessera.kernel.dims import split_fraction
from tessera.kernel.signature import Step, solve
from tessera.types import int4


class _TooHard(Exception):
    """Straight-line code cannot decide this signature."""


def make_checked(signature: Signature, call: Callable[..., Any]) -> Callable[..., Any]:
    """The function that checks and calls.

    Args:
        call: what runs when the arguments fit; it takes them as the signature says.
    """
    space: dict[str, Any] = {"_ts_call": call, "_ts_Tensor": torch.Tensor}
    names = _arguments(signature.parameters)
    header = _header(signature.parameters, space)
    values = "{" + ", ".join(f"{p.name!r}: {p.name}" for p in signature.parameters) + "}"
    space["_ts_match"] = functools.partial(match, signature)
    try:
        body = _Writer(signature, space).lines(f"_ts_call({names})", values)
    except _TooHard:
        space["_ts_compiling"] = torch.compiler.is_compiling
        body = [f"if _ts_compiling(): return _ts_call({names})", f"_ts_match({values})", f"_ts_r = _ts_call({names})"]
        body += [f"_ts_match({values}, _ts_r)"] if signature.result is not None else []
        body += ["return _ts_r"]
    text = "\n    ".join([f"def checked({header}):", *body]) + "\n"
    exec(compile(text, f"{GENERATED}{signature.name}>", "exec"), space)
    return space["checked"]


def _header(parameters: Iterable[Parameter], space: dict[str, Any]) -> str:
    parts: list[str] = []
    kinds = [p.kind for p in parameters]
    for p in parameters:
        if p.kind is p.kind.KEYWORD_ONLY and "*" not in parts and p.kind.VAR_POSITIONAL not in kinds:
            parts.append("*")
        text = {p.kind.VAR_POSITIONAL: "*", p.kind.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if p.has_default:
            space[f"_ts_default_{p.name}"] = p.default
            text += f"=_ts_default_{p.name}"
        parts.append(text)
        if p.kind is p.kind.POSITIONAL_ONLY and kinds.count(p.kind) == len(parts):
            parts.append("/")
    return ", ".join(parts)


def _arguments(parameters: Iterable[Parameter]) -> str:
    prefix = {"VAR_POSITIONAL": "*{0}", "VAR_KEYWORD": "**{0}", "KEYWORD_ONLY": "{0}={0}"}
    return ", ".join(prefix.get(p.kind.name, "{0}").format(p.name) for p in parameters)


class _Writer:
    """Writes the checks of one signature; every name of its own begins with _ts_."""

    def __init__(self, signature: Signature, space: dict[str, Any]) -> None:
        self.signature, self.space = signature, space
        self.ellipsis: str | None = None
        self.counter = itertools.count()

    def lines(self, call: str, values: str) -> list[str]:
        """The body: checks, call, checks of the result; every way out of the usual one ends in `match`.

        Raises:
            _TooHard: there is no straight-line code for it.
        """
        known = {name: name for name in self.signature.sizes}
        checks, known = self._arguments(known)
        checks += [f"if not isinstance({name}, int): raise TypeError" for name in self.signature.sizes]
        after = self._result(known)
        body = ["try:", *_indent(checks or ["pass"]), "except Exception:", f"    _ts_match({values})"]
        if not checks:
            body = []
        body.append(f"_ts_r = {call}")
        if after:
            body += ["try:", *_indent(after), "except Exception:", f"    _ts_match({values}, _ts_r)"]
        return [*body, "return _ts_r"]

    def _arguments(self, known: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        required: dict[str, TensorSpec] = {}
        optional: dict[str, UnionSpec] = {}
        for p in self.signature.parameters:
            if p.spec is None:
                continue
            if p.kind in (p.kind.VAR_POSITIONAL, p.kind.VAR_KEYWORD):
                raise _TooHard
            if isinstance(p.spec, TensorSpec):
                required[p.name] = p.spec
            elif isinstance(p.spec, UnionSpec):
                optional[p.name] = p.spec
            else:
                raise _TooHard
        lines, known = self._group(required, known) if required else ([], known)
        local: set[str] = set()
        for name, union in optional.items():
            checks, known = self._union(name, union, known, local)
            lines += checks
        shared = local & self._names_of(self.signature.result)
        if shared:  # a size that only some calls know
            raise _TooHard
        return lines, known

    def _result(self, known: Mapping[str, str]) -> list[str]:
        spec = self.signature.result
        if spec is None:
            return []
        if isinstance(spec, TensorSpec):
            return self._group({"_ts_r": spec}, known)[0]
        if isinstance(spec, UnionSpec):
            return self._union("_ts_r", spec, known, set())[0]
        if isinstance(spec, TupleSpec) and all(m is None or isinstance(m, TensorSpec) for m in spec.members):
            members = {f"_ts_r{i}": m for i, m in enumerate(spec.members)}
            lines = ["if not isinstance(_ts_r, (tuple, list)): raise TypeError", f"{''.join(f'{m}, ' for m in members)}"
                     "= _ts_r"]
            return lines + self._group({name: m for name, m in members.items() if m is not None}, known)[0]
        raise _TooHard

    def _union(self, value: str, spec: UnionSpec, known: Mapping[str, str], local: set[str],
               ) -> tuple[list[str], dict[str, str]]:
        """Branches by None and by rank; the sizes known after it are those that every branch finds."""
        tensors = [m for m in spec.members if m is not None]
        optional = len(tensors) < len(spec.members)
        if not all(isinstance(m, TensorSpec) for m in tensors) or any(self._names_of(m) & local for m in tensors):
            raise _TooHard
        ranks = [len(m.dims) for m in tensors if m.dims is not None and m.ellipsis is None]
        if len(tensors) > 1 and len(set(ranks)) != len(tensors):
            raise _TooHard
        branches = [self._group({value: m}, known) for m in tensors]
        everywhere = set.intersection(*(set(found) - set(known) for _, found in branches)) if not optional else set()
        shared = {name: f"_ts_{next(self.counter)}_{name}" for name in sorted(everywhere)}
        local |= {name for _, found in branches for name in found} - known.keys() - everywhere
        lines = [f"if {value} is None: pass"] if optional else []
        for rank, (checks, found) in zip(ranks or [0], branches):
            word = "elif" if lines else "if"
            head = "else:" if len(tensors) == 1 and optional else f"{word} {value}.ndim == {rank}:"
            lines += [head, *_indent(checks), *_indent(f"{shared[n]} = {found[n]}" for n in shared)]
        return lines + ([] if head == "else:" else ["else: raise TypeError"]), {**known, **shared}

    @staticmethod
    def _names_of(spec: Any) -> set[str]:
        return {split_fraction(a)[0] for s in tensor_specs(spec) for dim in s.dims or () for a in dim.atoms}

    def _group(self, specs: Mapping[str, TensorSpec], known: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Checks of tensors that are all there; the sizes known after them."""
        tag = next(self.counter)
        lines = [f"if not ({' and '.join(f'isinstance({v}, _ts_Tensor)' for v in specs)}): raise TypeError"]
        conditions: list[str] = []
        dims = {v: s.dims for v, s in specs.items() if s.dims is not None}
        axes = {(v, i): f"_ts_{tag}_{n}_{i}" for n, v in enumerate(dims) for i in range(len(dims[v]))}
        for v in dims:
            lines.append(self._unpack(v, specs[v], [axes[v, i] for i in range(len(dims[v]))], conditions))
        variables = dict(known)
        plain: set[tuple[str, int]] = set()
        for step in solve(dims, known):
            if not step.name.isidentifier():
                raise _TooHard
            axis = axes[step.parameter, step.axis]
            if step.is_plain:
                variables[step.name] = axis
                plain.add((step.parameter, step.axis))
            else:
                variables[step.name] = f"_ts_{tag}_{len(variables)}"
                lines.append(f"{variables[step.name]} = {_solution(step, axis, variables)}")
                conditions.append(f"{variables[step.name]} < 0")
        conditions += [f"{axes[v, i]} != {code(dim, variables)}" for v, shape in dims.items()
                       for i, dim in enumerate(shape) if (v, i) not in plain]
        fractions = dict.fromkeys(split_fraction(a) for shape in dims.values() for d in shape for a in d.atoms)
        conditions += [f"{variables[name]} % {divisor}" for name, divisor in fractions if divisor > 1]
        for v, spec in specs.items():
            conditions += self._types(v, spec)
        if conditions:
            lines.append(f"if {' or '.join(conditions)}: raise ValueError")
        return lines, variables

    def _unpack(self, value: str, spec: TensorSpec, axes: list[str], conditions: list[str]) -> str:
        targets = list(axes)
        if spec.ellipsis is not None:
            middle = f"_ts_middle_{next(self.counter)}"
            targets.insert(spec.ellipsis, f"*{middle}")
            if self.ellipsis is None:
                self.ellipsis = middle
            else:
                conditions.append(f"{middle} != {self.ellipsis}")
        return f"{''.join(f'{t}, ' for t in targets) or '()'} = {value}.shape"

    def _types(self, value: str, spec: TensorSpec) -> list[str]:
        found = []
        if spec.annotation is not None and spec.annotation.dtype is not None:
            if spec.annotation.dtype is int4:
                raise _TooHard
            name = f"_ts_{spec.annotation.dtype.name}"
            self.space[name] = spec.annotation.dtype.torch
            found.append(f"{value}.dtype is not {name}")
        if spec.annotation is not None and spec.annotation.device is not None:
            found.append(f"{value}.device.type != {spec.annotation.device!r}")
        return found


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _solution(step: Step, axis: str, variables: Mapping[str, str]) -> str:
    return f"({axis} - ({code(step.rest, variables)})) * {step.times} // ({code(step.factor, variables)})"
