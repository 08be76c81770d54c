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
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tessera.function.annotations import Parameter, Signature, TensorSpec, TupleSpec, UnionSpec, tensor_specs
from tessera.function.match import GENERATED, broadcasts, match
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
    space: dict[str, Any] = {"_ts_call": call, "_ts_Tensor": torch.Tensor, "_ts_broadcasts": broadcasts}
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


@dataclass(frozen=True)
class _Known:
    """What the code knows at some line: the variables that hold sizes, and expressions for the rest.

    `shapes` are shapes that were checked against dims (with the place of "..."), `middle` is what "..." stands for,
    and `dtypes` are the dtypes of named groups.
    """

    sizes: Mapping[str, str]
    shapes: Mapping[tuple[Any, ...], str] = field(default_factory=dict)
    middle: str | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)


class _Writer:
    """Writes the checks of one signature; every name of its own begins with _ts_."""

    def __init__(self, signature: Signature, space: dict[str, Any]) -> None:
        self.signature, self.space = signature, space
        self.counter = itertools.count()
        specs = [s for p in signature.parameters for s in tensor_specs(p.spec)] + list(tensor_specs(signature.result))
        self.solvable = {split_fraction(a)[0] for s in specs for d in s.solved_dims for a in d.atoms}
        self.solvable |= {"..."} if any(s.ellipsis is not None and -1 not in s.broadcast for s in specs) else set()

    def lines(self, call: str, values: str) -> list[str]:
        """The body: checks, call, checks of the result; every way out of the usual one ends in `match`.

        Raises:
            _TooHard: there is no straight-line code for it.
        """
        checks, known = self._arguments(_Known({name: name for name in self.signature.sizes}))
        checks += [f"if not isinstance({name}, int): raise TypeError" for name in self.signature.sizes]
        after = self._result(known)
        body = ["try:", *_indent(checks or ["pass"]), "except Exception:", f"    _ts_match({values})"]
        if not checks:
            body = []
        body.append(f"_ts_r = {call}")
        if after:
            body += ["try:", *_indent(after), "except Exception:", f"    _ts_match({values}, _ts_r)"]
        return [*body, "return _ts_r"]

    def _arguments(self, known: _Known) -> tuple[list[str], _Known]:
        required: dict[str, TensorSpec] = {}
        unions: dict[str, UnionSpec] = {}
        for p in self.signature.parameters:
            if p.spec is None:
                continue
            if p.kind in (p.kind.VAR_POSITIONAL, p.kind.VAR_KEYWORD):
                raise _TooHard
            if isinstance(p.spec, TensorSpec):
                required[p.name] = p.spec
            elif isinstance(p.spec, UnionSpec):
                unions[p.name] = p.spec
            else:
                raise _TooHard
        lines, known = self._group(required, known)
        local: set[str] = set()
        for name, union in unions.items():
            checks, known = self._union(name, union, known, local)
            lines += checks
        if local & _names_of(self.signature.result):  # what only some calls know
            raise _TooHard
        return lines, known

    def _result(self, known: _Known) -> list[str]:
        spec = self.signature.result
        if spec is None:
            return []
        if not isinstance(spec, TupleSpec):
            return self._values({"_ts_r": spec}, known)
        members = {f"_ts_r{i}": m for i, m in enumerate(spec.members)}
        lines = ["if not isinstance(_ts_r, (tuple, list)): raise TypeError",
                 f"{''.join(f'{m}, ' for m in members)}= _ts_r"]
        return lines + self._values({name: m for name, m in members.items() if m is not None}, known)

    def _values(self, specs: Mapping[str, Any], known: _Known) -> list[str]:
        """Checks of results: tensors, and unions of them."""
        if not all(isinstance(s, (TensorSpec, UnionSpec)) for s in specs.values()):
            raise _TooHard
        lines, known = self._group({v: s for v, s in specs.items() if isinstance(s, TensorSpec)}, known)
        local: set[str] = set()
        for value, union in ((v, s) for v, s in specs.items() if isinstance(s, UnionSpec)):
            checks, known = self._union(value, union, known, local)
            lines += checks
        return lines

    def _union(self, value: str, spec: UnionSpec, known: _Known, local: set[str]) -> tuple[list[str], _Known]:
        """Branches by None, class and rank; the sizes known after it are those that every branch finds."""
        tensors = [m for m in spec.members if isinstance(m, TensorSpec)]
        classes = tuple(m for m in spec.members if isinstance(m, type))
        if len(tensors) + len(classes) + (None in spec.members) < len(spec.members):
            raise _TooHard
        if any(_names_of(m) & local for m in tensors):
            raise _TooHard
        ranks = [len(m.dims) if m.dims is not None and m.ellipsis is None else None for m in tensors]
        if len(set(ranks)) != len(tensors) or None in ranks[:-1]:
            raise _TooHard
        heads = [f"if {value} is None: pass"] if None in spec.members else []
        if classes:
            classes_name = f"_ts_classes_{next(self.counter)}"
            self.space[classes_name] = classes
            heads.append(f"{'elif' if heads else 'if'} isinstance({value}, {classes_name}): pass")
        branches = [self._group({value: m}, known) for m in tensors]
        everywhere = set.intersection(*(set(f.sizes) - set(known.sizes) for _, f in branches)) if not heads else set()
        shared = {name: f"_ts_{next(self.counter)}_{name}" for name in sorted(everywhere)}
        local |= set().union(*map(_names_of, tensors)) - known.sizes.keys() - everywhere - _names_of_known(known)
        lines = list(heads)
        for rank, (checks, found) in zip(ranks, branches):
            test = f"{'elif' if lines else 'if'} {value}.ndim == {rank}:" if rank is not None else (
                "else:" if lines else "if True:")
            lines += [test, *_indent(checks), *_indent(f"{shared[n]} = {found.sizes[n]}" for n in shared)]
        if None not in ranks:
            lines.append("else: raise TypeError")
        return lines, replace(known, sizes={**known.sizes, **shared})

    def _group(self, specs: Mapping[str, TensorSpec], known: _Known) -> tuple[list[str], _Known]:
        """Checks of tensors that are all there, and what is known after them."""
        if not specs:
            return [], known
        tag = next(self.counter)
        lines = [f"if not ({' and '.join(f'isinstance({v}, _ts_Tensor)' for v in specs)}): raise TypeError"]
        conditions: list[str] = []
        shapes, middle = dict(known.shapes), known.middle
        axes: dict[tuple[str, int], str] = {}
        loose: list[str] = []
        for n, (v, spec) in enumerate(specs.items()):
            if spec.dims is None:
                continue
            layout = (spec.dims, spec.ellipsis, spec.broadcast)
            if layout in shapes and not spec.broadcast:
                conditions.append(f"{v}.shape != {shapes[layout]}")
                continue
            shape = shapes[layout] = f"_ts_{tag}_{n}_shape"
            lines.append(f"{shape} = {v}.shape")
            here = [f"_ts_{tag}_{n}_{i}" for i in range(len(spec.dims))]
            axes.update({(v, i): name for i, name in enumerate(here)})
            lines += _unpack(shape, here, spec.ellipsis)
            if spec.ellipsis is not None:
                inner = _middle(shape, len(here), spec.ellipsis)
                if -1 in spec.broadcast:
                    loose.append(inner)
                    continue
                conditions += [f"{inner} != {middle}"] if middle is not None else []
                middle = middle or inner
        if loose and middle is None and "..." in self.solvable:
            raise _TooHard
        conditions += [f"{inner} != {middle} and not _ts_broadcasts({inner}, {middle})" for inner in loose if middle]
        sizes = self._solve(specs, known.sizes, axes, lines, conditions)
        dtypes = dict(known.dtypes)
        for v, spec in specs.items():
            conditions += self._types(v, spec, dtypes)
        if conditions:
            lines.append(f"if {' or '.join(conditions)}: raise ValueError")
        return lines, _Known(sizes, shapes, middle, dtypes)

    def _solve(self, specs: Mapping[str, TensorSpec], known: Mapping[str, str], axes: Mapping[tuple[str, int], str],
               lines: list[str], conditions: list[str]) -> dict[str, str]:
        """The variables of all sizes, from those that are known and the axes; appends what has to hold."""
        solved = {v: s.solved_dims for v, s in specs.items() if (v, 0) in axes}
        variables = dict(known)
        plain: set[tuple[str, int]] = set()
        for step in solve(solved, known):
            if not step.name.isidentifier():
                raise _TooHard
            axis = axes[step.parameter, step.axis]
            if step.is_plain:
                variables[step.name] = axis
                plain.add((step.parameter, step.axis))
            else:
                variables[step.name] = f"{axis}_solved"
                lines.append(f"{variables[step.name]} = {_solution(step, axis, variables)}")
                conditions.append(f"{variables[step.name]} < 0")
        dims = {(v, i): (dim, i in specs[v].broadcast) for v in solved for i, dim in enumerate(specs[v].dims or ())}
        for place, (dim, or_1) in dims.items():
            missing = {split_fraction(a)[0] for a in dim.atoms} - variables.keys()
            if missing & self.solvable:
                raise _TooHard  # a dim that may also be 1, of a size that some calls have and others have not
            if place not in plain and not missing:
                differs = f"{axes[place]} != {code(dim, variables)}"
                conditions.append(f"{axes[place]} != 1 and {differs}" if or_1 else differs)
        fractions = dict.fromkeys(split_fraction(a) for dim, _ in dims.values() for a in dim.atoms)
        conditions += [f"{variables[n]} % {divisor}" for n, divisor in fractions if divisor > 1 and n in variables]
        return variables

    def _types(self, value: str, spec: TensorSpec, dtypes: dict[str, str]) -> list[str]:
        found = []
        if spec.annotation is not None and spec.annotation.dtype is not None:
            if spec.annotation.dtype is int4:
                raise _TooHard
            name = f"_ts_{spec.annotation.dtype.name}"
            self.space[name] = spec.annotation.dtype.torch
            found.append(f"{value}.dtype is not {name}")
        group = spec.dtypes
        if group is not None and group.is_same and group.name in dtypes:
            found.append(f"{value}.dtype is not {dtypes[group.name]}")
        elif group is not None:
            name = f"_ts_group_{next(self.counter)}"
            self.space[name] = group.torch
            found.append(f"{value}.dtype not in {name}")
            if group.is_same:
                dtypes[group.name] = f"{value}.dtype"
        if spec.annotation is not None and spec.annotation.device is not None:
            found.append(f"{value}.device.type != {spec.annotation.device!r}")
        return found


def _names_of(spec: Any) -> set[str]:
    """What a spec names: sizes, "..." and groups of one dtype."""
    specs = list(tensor_specs(spec))
    sizes = {split_fraction(a)[0] for s in specs for dim in s.dims or () for a in dim.atoms}
    groups = {f"dtype {s.dtypes.name}" for s in specs if s.dtypes is not None and s.dtypes.is_same}
    return sizes | groups | ({"..."} if any(s.ellipsis is not None for s in specs) else set())


def _names_of_known(known: _Known) -> set[str]:
    return {f"dtype {name}" for name in known.dtypes} | ({"..."} if known.middle is not None else set())


def _unpack(shape: str, axes: list[str], ellipsis: int | None) -> list[str]:
    """Name the axes of a shape; raises at run time where it has not so many."""
    if ellipsis is None:
        return [f"{''.join(f'{a}, ' for a in axes) or '()'} = {shape}"]
    lines = [f"if len({shape}) < {len(axes)}: raise ValueError"] if 0 < ellipsis < len(axes) else []
    return lines + [f"{a} = {shape}[{i if i < ellipsis else i - len(axes)}]" for i, a in enumerate(axes)]


def _middle(shape: str, n_axes: int, ellipsis: int) -> str:
    """What "..." stands for."""
    first, last = str(ellipsis or ""), str(ellipsis - n_axes or "")
    return f"{shape}[{first}:{last}]" if first or last else shape


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _solution(step: Step, axis: str, variables: Mapping[str, str]) -> str:
    return f"({axis} - ({code(step.rest, variables)})) * {step.times} // ({code(step.factor, variables)})"
