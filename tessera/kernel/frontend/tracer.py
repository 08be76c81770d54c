"""Statements of a kernel's body, and the tracer that walks it.

In: a parsed function and what its parameters are in one specialisation. Out: operations of the builder.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from tessera.kernel import lang
from tessera.kernel.build import Builder, TypeRuleError, show
from tessera.kernel.frontend import indexing
from tessera.kernel.frontend.expressions import CONSTRUCTS
from tessera.kernel.frontend.frame import Context, Exit, Frame
from tessera.kernel.frontend.liveness import jumps
from tessera.kernel.frontend.loops import Loops
from tessera.kernel.frontend.reads import Reads
from tessera.kernel.frontend.source import Source
from tessera.kernel.ir import Function, Location, Value, ViewTy
from tessera.kernel.lang.core import describe, tracing
from tessera.types import DType

_STATEMENTS = {
    "With": "with", "Try": "try", "Raise": "raise", "FunctionDef": "a nested function", "ClassDef": "a class",
    "Import": "import", "ImportFrom": "import", "Global": "global", "Nonlocal": "nonlocal", "Delete": "del",
    "Match": "match", "AsyncFor": "async for", "AsyncWith": "async with", "TryStar": "try",
}
_INSTEAD = {
    "FunctionDef": "; define it outside of the kernel", "Import": "; import outside of the kernel",
    "Raise": "; use assert or tile.static_assert", "Global": "; a kernel writes to its parameters only",
    "Nonlocal": "; a kernel writes to its parameters only",
}


class Tracer(Loops):
    """Traces one kernel into a function; builtins reach it through `lang.core.tracer`."""

    def __init__(self, function: Function, retypes: Mapping[DType, DType], reads: Reads) -> None:
        self.builder = Builder(function)
        self.frames: list[Frame] = []
        self.calls: list[Location] = []
        self.retypes = dict(retypes)
        self.reads = reads

    def context(self) -> Context:
        """What `tile.context()` returns."""
        return self.frame.context

    def trace(self, source: Source, env: dict[str, Any], context: Context) -> None:
        """Walk the kernel's body.

        Raises:
            CompileError: it cannot be compiled.
        """
        self.frames.append(Frame(source, env, self.liveness(), context))
        with tracing(self):
            exit = self.run_body(source.tree.body)
        if exit.returned is not None:
            raise self.error("a kernel returns nothing: it writes its results to parameters", source.tree)
        self.frames.pop()

    def run_body(self, statements: list[ast.stmt]) -> Exit:
        """Trace statements in order; how they end."""
        for position, statement in enumerate(statements):
            rest = statements[position + 1:]
            if isinstance(statement, ast.If):
                condition = self.condition(statement.test)
                if isinstance(condition, bool):
                    return self.run_body([*(statement.body if condition else statement.orelse), *rest])
                if jumps(statement.body) or jumps(statement.orelse):
                    return self.leaving_branch(statement, condition, rest)
                self.branch(statement, condition, rest)
                continue
            exit = self._statement(statement, rest)
            if exit is not None:
                return exit
        return Exit()

    def _statement(self, s: ast.stmt, rest: list[ast.stmt]) -> Exit | None:
        """One statement other than `if`; an Exit when it leaves the block."""
        if isinstance(s, ast.For):
            return self.loop(s, rest)
        if isinstance(s, ast.While):
            self.while_loop(s, rest)
        elif isinstance(s, ast.Assign):
            value = self.eval(s.value)
            for target in s.targets:
                self.assign(target, value)
        elif isinstance(s, ast.AnnAssign):
            if s.value is not None:
                self.assign(s.target, self.eval(s.value))
        elif isinstance(s, ast.AugAssign):
            self._augmented(s)
        elif isinstance(s, ast.Expr):
            self._expression(s)
        elif isinstance(s, ast.Assert):
            self._assert(s)
        elif isinstance(s, (ast.Break, ast.Continue)):
            return Exit(stop=isinstance(s, ast.Break))
        elif isinstance(s, ast.Return):
            return Exit(returned=None if s.value is None else self.eval(s.value), has_returned=True)
        elif not isinstance(s, ast.Pass):
            kind = type(s).__name__
            raise self.error(f"{_STATEMENTS.get(kind, kind)} cannot be compiled{_INSTEAD.get(kind, '')}", s)
        return None

    # -- assignment ---------------------------------------------------------------------------------

    def assign(self, target: ast.expr, value: Any) -> None:
        """Bind a name, unpack a tuple, or write an element or slice."""
        if isinstance(target, ast.Name):
            value = self.scalar_now(value)
            self.hint(value, target.id)
            self.frame.env[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target, value)
        elif isinstance(target, ast.Subscript):
            self._write(target, value)
        else:
            raise self.error(f"{CONSTRUCTS.get(type(target).__name__, 'an attribute')} cannot be assigned to", target)

    def _unpack(self, target: ast.Tuple | ast.List, value: Any) -> None:
        if not isinstance(value, (tuple, list)):
            raise self.error(f"{describe(value)} cannot be unpacked; expected a tuple of {len(target.elts)}", target,
                             *([value] if isinstance(value, Value) else []))
        parts, items = list(target.elts), list(value)
        star = next((i for i, part in enumerate(parts) if isinstance(part, ast.Starred)), None)
        if len(items) != len(parts) if star is None else len(items) < len(parts) - 1:
            raise self.error(f"{len(items)} values for {len(parts)} names", target)
        if star is not None:
            end = len(items) - (len(parts) - 1 - star)
            items[star:end] = [items[star:end]]
        for part, item in zip(parts, items):
            self.assign(part.value if isinstance(part, ast.Starred) else part, item)

    def _write(self, target: ast.Subscript, value: Any) -> None:
        base = self.eval(target.value)
        items = self.index_items(target.slice)
        with self.at(target):
            if not isinstance(base, Value):
                raise TypeRuleError(f"index: {describe(base)} cannot be written to; expected a parameter or a tile")
            if isinstance(base.type, ViewTy):
                indexing.write_view(base, items, value)
                return
            if not isinstance(target.value, (ast.Name, ast.Subscript)):
                raise TypeRuleError(f"index: {show(base)} has no name, so that nothing would be written; assign it "
                                    "to one first", base)
            written = indexing.write(base, items, value)
        self.assign(target.value, written)

    def _augmented(self, s: ast.AugAssign) -> None:
        current = self.eval(s.target)
        if isinstance(s.target, ast.Name) and isinstance(current, Value) and isinstance(current.type, ViewTy):
            raise self.error(f"{s.target.id!r} is a parameter; write {s.target.id}[...] or use tile.store", s, current)
        current = self.scalar_now(current)
        value = self.eval(s.value)
        with self.at(s):
            result = self.operate(s.op, current, value, s)
        self.assign(s.target, result)

    # -- statements without a target ----------------------------------------------------------------

    def _expression(self, s: ast.Expr) -> None:
        """A call statement; a builtin that changes an argument rebinds it."""
        if isinstance(s.value, ast.Constant):
            return
        change = self.destination(s.value) if isinstance(s.value, ast.Call) else None
        result = self.eval(s.value)
        if change is None or result is None:
            return
        target = change[0]
        if isinstance(target, (ast.Name, ast.Subscript)):
            self.assign(target, result)
        else:
            called = getattr(s.value.func, "attr", "") if isinstance(s.value, ast.Call) else ""
            raise self.error(f"{called or 'destination'}: this has no name, so that nothing would be written; "
                             "expected a parameter, a variable or a slice of one", target)

    def _assert(self, s: ast.Assert) -> None:
        condition = self.condition(s.test)
        message = self.eval(s.msg) if s.msg is not None else ""
        with self.at(s.test):
            if isinstance(condition, Value):
                lang.device_assert(condition, str(message))
            else:
                lang.static_assert(condition, str(message))



