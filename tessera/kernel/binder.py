"""Generates the launch function of a signature: checks, sizes and look-up in a few microseconds.

In: a `Signature`. Out: a Python function with the kernel's own parameters and defaults, which reads each
tensor's shape once, checks every named size, builds the specialisation's key, finds the compiled kernel
and runs it. Whatever goes wrong leads to `slow`, which says what is wrong or compiles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tessera.kernel.dims import Dim, Term, split_fraction
from tessera.kernel.signature import EMPTY, Parameter, Signature, scalar_argument
from tessera.types import int4

# os.environ.get costs a microsecond for its encoding; the mapping under it holds what it would return.
_environment: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_BACKEND: Any = "TESSERA_BACKEND" if _environment is os.environ or os.name == "nt" else b"TESSERA_BACKEND"


def make_launcher(signature: Signature, table: Mapping[Any, Callable[..., None]], slow: Callable[..., Any],
                  empty: Callable[..., None]) -> Callable[..., None]:
    """The launch function.

    Args:
        table: specialisation key -> compiled kernel.
        slow: (arguments, key) -> compiled kernel; raises what is wrong, or compiles and fills the table.
        empty: (key, arguments, sizes) -> None, called when a size is 0.
    """
    space: dict[str, Any] = {"_table": table, "_slow": slow, "_empty": empty, "_environment": _environment.get}
    return _function(signature.name, source_text(signature, space), space)


def make_dispatcher(name: str, parameters: Sequence[Parameter],
                    make: Callable[[tuple[str, ...]], Callable[..., None]]) -> Callable[..., None]:
    """The launch function of a kernel with optional arguments: picks the variant by which of them are None.

    Args:
        make: (names of the arguments that are None) -> the variant's launch function; called once for each.
    """
    optional = [p.name for p in parameters if p.optional]
    table: dict[tuple[bool, ...], Callable[..., None]] = {}

    def add(pattern: tuple[bool, ...]) -> Callable[..., None]:
        table[pattern] = make(tuple(n for n, absent in zip(optional, pattern) if absent))
        return table[pattern]

    space: dict[str, Any] = {"_table": table, "_add": add}
    pattern = _tuple([f"{n} is None" for n in optional])
    text = (f"def launch({', '.join(_header(parameters, space))}):\n"
            f"    _pattern = {pattern}\n"
            f"    (_table.get(_pattern) or _add(_pattern))({', '.join(p.name for p in parameters)})\n")
    return _function(name, text, space)


def _function(name: str, text: str, space: dict[str, Any]) -> Callable[..., None]:
    exec(compile(text, f"<launch of {name}>", "exec"), space)
    launch = space["launch"]
    launch.__name__ = launch.__qualname__ = name  # what Python's own messages about arguments say
    return launch


def source_text(signature: Signature, space: dict[str, Any]) -> str:
    """The launch function's source; objects that it names are put into `space`."""
    tiles = signature.tiles
    variables = {name: f"_s{i}" for i, name in enumerate(signature.sizes)}
    header = ", ".join(_header(signature.parameters, space))
    lines = [f"def launch({header}):", "    _key = None", "    try:"]
    lines += [line for p in tiles for line in _shape_lines(p, len(signature.dims[p.name]))]
    for step in signature.steps:
        n = _axis(step.parameter, step.axis)
        if not step.is_plain:
            n = f"({n} - ({code(step.rest, variables)})) * {step.times} // ({code(step.factor, variables)})"
        lines.append(f"        {variables[step.name]} = {n}")
    lines += _check_lines(signature, variables)
    lines += _device_lines(tiles)
    for i, p in enumerate(signature.parameters):
        if p.kind in ("float", "int"):
            space[f"_p{i}"], space["_scalar"] = p, scalar_argument
            name = identifier(p.name)
            lines.append(f"        if {name}.__class__ is not {p.kind}: "
                         f"{name} = _scalar({signature.name!r}, _p{i}, {name})")
    run_time = _tuple([identifier(p.name) for p in signature.parameters if p.kind != "constant"])
    lines += [f"        _key = {_key(signature)}", "        _run = _table[_key]", "    except Exception:",
              f"        _run = _slow({_tuple([identifier(p.name) for p in signature.parameters])}, _key)",
              f"    _sizes = {_tuple(list(variables.values()))}"]
    if signature.sizes:
        lines += ["    if 0 in _sizes:", f"        return _empty(_key, {run_time}, _sizes)"]
    lines.append(f"    _run({run_time}, _sizes)")
    return "\n".join(lines) + "\n"


def identifier(name: str) -> str:
    """A parameter's name in the generated code: tensors of `self` have dots in theirs."""
    return name.replace(".", "__")


def code(dim: Dim, variables: Mapping[str, str]) -> str:
    """Python source of a size."""

    def atom(a: str | Term) -> str:
        if isinstance(a, Term):
            left, right = code(a.left, variables), code(a.right, variables)
            return f"{a.op}({left}, {right})" if a.op in ("min", "max") else f"(({left}) {a.op} ({right}))"
        name, divisor = (a, 1) if a in variables else split_fraction(a)
        return variables[name] if divisor == 1 else f"({variables[name]} // {divisor})"

    parts = []
    for monomial, factor in dim.terms:
        names = [atom(a) for a in monomial]
        parts.append(" * ".join(names if factor == 1 and names else [str(factor), *names]))
    return " + ".join(parts) or "0"


def _header(parameters: Sequence[Parameter], space: dict[str, Any]) -> list[str]:
    """Parameters with defaults; a variant that appends tensors of `self` gets every argument, and needs none."""
    if any(p.default is not EMPTY for p in parameters) and parameters[-1].default is EMPTY:
        return [identifier(p.name) for p in parameters]
    space.update({f"_default_{p.name}": p.default for p in parameters})
    return [identifier(p.name) if p.default is EMPTY else f"{p.name}=_default_{p.name}" for p in parameters]


def _axis(parameter: str, axis: int) -> str:
    return f"_{identifier(parameter)}_{axis}"


def _tuple(items: list[str]) -> str:
    return "(" + "".join(f"{item}, " for item in items) + ")"


def _shape_lines(p: Parameter, rank: int) -> list[str]:
    targets = "".join(f"{_axis(p.name, axis)}, " for axis in range(rank)) or "() "
    lines = [f"        {targets.rstrip()} = {identifier(p.name)}.shape"]
    if p.dtype == int4:
        lines.append(f"        {_axis(p.name, rank - 1)} *= 2")
    return lines


def _check_lines(signature: Signature, variables: Mapping[str, str]) -> list[str]:
    trivial = {(s.parameter, s.axis) for s in signature.steps if s.is_plain}
    checks = [f"{_axis(p.name, axis)} != {code(dim, variables)}" for p in signature.tiles
              for axis, dim in enumerate(signature.dims[p.name]) if (p.name, axis) not in trivial]
    checks += [f"{variables[base]} % {divisor}" for base, divisor in signature.divisors.items()]
    checks += [f"{variables[s.name]} < 0" for s in signature.steps if s.rest.terms]
    return [f"        if {' or '.join(checks)}: raise ValueError"] if checks else []


def _device_lines(tiles: list[Parameter]) -> list[str]:
    first, *others = [identifier(p.name) for p in tiles]
    lines = [f"        _device = {first}.is_cpu or {first}.device"]
    if others:
        same_cpu = " and ".join(f"{name}.is_cpu" for name in others)
        same_device = " and ".join(f"{name}.device == _device" for name in others)
        lines.append(f"        if not ({same_cpu} if _device is True else {same_device}): raise ValueError")
    return lines


def _key(signature: Signature) -> str:
    parts = []
    for p in signature.parameters:
        name = identifier(p.name)
        if p.kind == "tile":
            parts.append(f"{name}.dtype")
            if signature.dims[p.name]:
                parts.append(f"{name}.is_contiguous() or {name}.stride(-1) == 1")
        elif p.kind == "constant":
            parts += [name, f"{name}.__class__"]
    return _tuple([*parts, "_device", f"_environment({_BACKEND!r})"])
