"""`if` on a run-time condition: both branches are traced, and what they hand on becomes results.

A branch that leaves its block (break, continue, return) takes the rest of the block along: the rest then
runs in the branch that falls through.
"""

from __future__ import annotations

import ast
from typing import Any

from tessera.kernel.frontend.calls import Calls
from tessera.kernel.frontend.frame import Exit, Undefined
from tessera.kernel.frontend.liveness import Names
from tessera.kernel.frontend.merge import (
    Mismatch,
    is_mergeable,
    join_types,
    leaves,
    materialise,
    rebuild,
    same_constant,
    same_structure,
)
from tessera.kernel.frontend.source import MISSING
from tessera.kernel.ir import Block, TileTy, Value

RETURNED = "return value"


class Branches(Calls):
    """Traces `if` statements."""

    def assign(self, target: ast.expr, value: Any) -> None:
        """Defined by `tracer`."""
        raise NotImplementedError

    def live_after(self, rest: list[ast.stmt]) -> Names:
        """Names that may be read from `rest` on."""
        return self.frame.liveness.live(rest, self.frame.scope.exits)

    def hint(self, value: Any, name: str) -> None:
        """Remember the user's name of a value, for messages and generated code."""
        if not isinstance(value, Value) or self.frame.library:
            return
        # A tile that was loaded has its parameter's name until the program gives it one.
        if not value.hint or (value.op is not None and value.op.name == "load"):
            value.hint = name

    def branch(self, s: ast.If, condition: Value, rest: list[ast.stmt]) -> None:
        """An `if` whose branches both fall through."""
        live = self.live_after(rest)
        assigned = self.frame.liveness.assigned([s])
        outer = self.frame.scope
        self.frame.scope = outer.ending_with(live)
        try:
            blocks, envs, _ = self._trace(s.body, s.orelse)
        finally:
            self.frame.scope = outer
        names = [n for n in assigned if n in live]
        with self.at(s.test):
            merged = self._merge(s, condition, blocks, [{n: e.get(n, MISSING) for n in names} for e in envs])
        self.frame.env.update(merged)
        for name in assigned:
            if name not in live and name in envs[0].keys() | envs[1].keys():
                self.frame.env[name] = self._one_sided(s, name)

    def leaving_branch(self, s: ast.If, condition: Value, rest: list[ast.stmt]) -> Exit:
        """An `if` of which a branch leaves the enclosing block; it ends the block."""
        scope = self.frame.scope
        blocks, envs, exits = self._trace([*s.body, *rest], [*s.orelse, *rest])
        if any(e.has_returned for e in exits) and scope.kind in ("loop", "grid", "unrolled"):
            raise self.error("return inside a loop; use break or continue", s)
        slots = [{n: e.get(n, MISSING) for n in scope.names} for e in envs]
        stops = [e.stop for e in exits]
        run_time_stop = not (isinstance(stops[0], bool) and stops[0] is stops[1])
        for slot, exit in zip(slots, exits):
            slot[RETURNED] = exit.returned
            if run_time_stop:
                slot["stop"] = exit.stop
        with self.at(s.test):
            merged = self._merge(s, condition, blocks, slots)
        returned = merged.pop(RETURNED)
        if isinstance(returned, Undefined):
            raise self.error(f"return: {returned.reason}", s)
        stop = merged.pop("stop") if run_time_stop else stops[0]
        self.frame.env.update(merged)
        return Exit(stop=stop, returned=returned, has_returned=any(e.has_returned for e in exits))

    def _trace(self, body: list[ast.stmt],
               orelse: list[ast.stmt]) -> tuple[list[Block], list[dict[str, Any]], list[Exit]]:
        """Both branches, each from the present names."""
        before = self.frame.env
        blocks, envs, exits = [Block(), Block()], [], []
        try:
            for block, statements in zip(blocks, (body, orelse)):
                self.frame.env = dict(before)
                with self.builder.inside(block):
                    exits.append(self.run_body(statements))
                envs.append(self.frame.env)
        finally:
            self.frame.env = before
        return blocks, envs, exits

    def _merge(self, s: ast.If, condition: Value, blocks: list[Block], slots: list[dict[str, Any]]) -> dict[str, Any]:
        """Emit the `if`; each name's value after it."""
        merged: dict[str, Any] = {}
        pending: dict[str, Any] = {}
        types: list[TileTy] = []
        yields: list[list[Value]] = [[], []]
        for name in slots[0]:
            first, second = slots[0][name], slots[1][name]
            if same_constant(first, second):
                merged[name] = first
                continue
            found = self._join(s, name, first, second)
            if isinstance(found, Undefined):
                merged[name] = found
                continue
            pending[name] = first
            types += found
            for block, value, out in zip(blocks, (first, second), yields):
                with self.builder.inside(block):
                    out += [materialise(self.builder, x, t.dtype) for x, t in zip(leaves(value), found)]
        for block, out in zip(blocks, yields):
            with self.builder.inside(block):
                self.builder.emit("yield", out)
        op = self.builder.emit("if", [condition], types, blocks)
        supply = iter(op.results)
        for name, like in pending.items():
            merged[name] = rebuild(like, lambda: next(supply))
            self.hint(merged[name], name)
        return {name: value for name, value in merged.items() if value is not MISSING}

    def _join(self, s: ast.If, name: str, first: Any, second: Any) -> list[TileTy] | Undefined:
        """The types of the leaves of a name that differs between the branches."""
        if MISSING in (first, second) or isinstance(first, Undefined) or isinstance(second, Undefined):
            return self._one_sided(s, name)
        line = self.frame.source.location(s).line
        if not (is_mergeable(first) and is_mergeable(second) and same_structure(first, second)):
            return Undefined(f"{name!r} is of two kinds after the if at line {line}")
        try:
            return [join_types(a, b) for a, b in zip(leaves(first), leaves(second))]
        except Mismatch as error:
            return Undefined(f"{name!r} differs between the branches of the if at line {line}: {error}")

    def _one_sided(self, s: ast.If, name: str) -> Undefined:
        line = self.frame.source.location(s).line
        return Undefined(f"{name!r} is assigned in only one branch of the if at line {line}; give it a value before")


