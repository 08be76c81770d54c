"""From Python source to tile IR.

In: a parsed function (`Source`), its signature, and what each parameter is in one specialisation. Out: a
verified `ir.Function`. `kernel.launch` calls `trace`; nothing else does.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.kernel.build import Builder
from tessera.kernel.diagnostics import compile_error
from tessera.kernel.dims import Dim
from tessera.kernel.frontend.frame import Context, SelfObject
from tessera.kernel.frontend.reads import Reads
from tessera.kernel.frontend.source import Source
from tessera.kernel.frontend.tracer import Tracer
from tessera.kernel.ir import EFFECTS, WRITES, Block, Function, Location, Param, TileTy, Value, ViewTy, param_of, walk
from tessera.kernel.verify import verify
from tessera.types import DType, f32, f64, int64


@dataclass(frozen=True)
class Argument:
    """What one parameter is in a specialisation.

    kind: "tile" (with shape, dtype, unit_stride), "float", "int" or "constant" (with its value). A name with
    dots ("self.weight") is a tensor reached from `self`.
    """

    name: str
    kind: str
    shape: tuple[Dim, ...] = ()
    dtype: DType | None = None
    unit_stride: bool = True
    value: Any = None


def trace(source: Source, name: str, arguments: Sequence[Argument], sizes: Sequence[str], named: Mapping[str, Dim],
          schedule: Mapping[str, Any], blocks: Mapping[str, int], retypes: Mapping[DType, DType],
          self_object: Any = None, reads: Reads | None = None) -> Function:
    """Trace a kernel's body into IR.

    Args:
        sizes: the named sizes that a launch binds.
        named: what `tile.context()` can ask for.
        blocks: the block sizes that the schedule leaves open.
        reads: takes note of what is looked up outside of the kernel.

    Raises:
        CompileError: with file, line and caret.
    """
    function = Function(name, [], list(sizes), Block(), dict(schedule))
    builder = Builder(function)
    scalar = f64 if any(a.dtype == f64 for a in arguments) else f32
    places = {p.arg: source.location(p) for p in source.parameters}
    env: dict[str, Any] = {}
    tensors: dict[str, Value] = {}
    for argument in arguments:
        if argument.kind == "constant":
            env[argument.name] = argument.value
            continue
        value = _parameter(builder, argument, scalar, places.get(argument.name))
        function.params.append(Param(argument.name, value, unit_stride=argument.unit_stride))
        (tensors if "." in argument.name else env)[argument.name] = value
    if self_object is not None:
        env["self"] = SelfObject(self_object, "self", tensors)
    Tracer(function, retypes, reads or Reads(source.function)).trace(source, env, Context(named, schedule, blocks))
    _mark_outputs(function)
    _check_effects(function, source)
    verify(function)
    return function


def _parameter(builder: Builder, argument: Argument, scalar: DType, loc: Location | None) -> Value:
    if argument.kind == "tile":
        assert argument.dtype is not None
        value = builder.argument(ViewTy(argument.shape, argument.dtype), argument.name)
        value.expr = None
    else:
        value = builder.argument(TileTy((), scalar if argument.kind == "float" else int64), argument.name)
    value.loc = loc
    return value


def _check_effects(function: Function, source: Source) -> None:
    """Refuse a kernel that neither writes, prints nor asserts: nobody could tell that it ran.

    Raises:
        CompileError: at its `def`, with the line that gives a parameter's name another value, if there is one.
    """
    if any(op.name in EFFECTS - {"grid", "yield"} for op in walk(function.body)):
        return
    names = {p.name for p in function.params if p.is_view}
    notes = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id in names and not _reads(node.value, target.id):
                loc = source.location(node)
                notes.append(f"line {loc.line} gives the name {target.id!r} another value: {loc.text.strip()}; "
                             f"{target.id}[:] = ... writes to the parameter")
    raise compile_error(f"kernel {function.name} writes nothing: give its result to tile.store(out, ...) or "
                        "out[:] = ...", source.location(source.tree), notes=notes)


def _reads(node: ast.expr, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _mark_outputs(function: Function) -> None:
    params = {id(p.value): p for p in function.params}
    for op in walk(function.body):
        if op.name in WRITES:
            params[id(param_of(op.operands[0]))].is_output = True
