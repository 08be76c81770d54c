"""Loops of a kernel's body: parallel grids, loops in order that carry variables, while, unrolled loops.

A variable is carried around a loop when it exists before and is read again, in the next iteration or
after. Its type is the same in every iteration: Python numbers take the dtype that the body gives them,
and a dim that becomes ragged in the body is ragged from the start, if its end is known outside the loop.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.errors import CompileError
from tessera.kernel.build import TypeRuleError, show
from tessera.kernel.dims import Dim
from tessera.kernel.frontend.branches import Branches
from tessera.kernel.frontend.frame import Exit, Scope, Undefined
from tessera.kernel.frontend.liveness import Exits, Names, reads
from tessera.kernel.frontend.merge import (
    Mismatch,
    is_mergeable,
    join_types,
    leaf_type,
    leaves,
    materialise,
    names_inside,
    rebuild,
    same_constant,
    same_structure,
)
from tessera.kernel.frontend.races import check_race
from tessera.kernel.ir import Block, TileTy, Value
from tessera.kernel.lang.core import describe, int_of, is_number, tile_of
from tessera.kernel.lang.program import LoopRange
from tessera.types import bool_, int64

_MAX_UNROLL = 1024
_MAX_BREAKS = 64  # iterations that nest in each other, as each may end the unrolled loop
_MAX_ROUNDS = 6
_LEFT = "the iterations left"


@dataclass
class Carried:
    """The variables that a loop carries: their structure before it and the type of each leaf."""

    initial: dict[str, Any]
    types: list[TileTy]

    @property
    def values(self) -> list[Any]:
        """The leaves before the loop."""
        return [leaf for value in self.initial.values() for leaf in leaves(value)]

    def bind(self, values: Sequence[Value]) -> dict[str, Any]:
        """Each variable rebuilt from values for its leaves."""
        supply = iter(values)
        return {name: rebuild(like, lambda: next(supply)) for name, like in self.initial.items()}


class Loops(Branches):
    """Traces for and while."""

    def loop(self, s: ast.For, rest: list[ast.stmt]) -> Exit | None:
        """Trace a `for`; an Exit when it leaves the enclosing block."""
        if s.orelse:
            raise self.error("else of a loop cannot be compiled", s.orelse[0])
        space = self.eval(s.iter)
        after = self.live_after(rest)
        if isinstance(space, (tuple, list, range)):
            return self._unrolled(s, list(space), rest)
        if not isinstance(space, LoopRange):
            raise self.error(f"for: {describe(space)} given; expected tile.grid, tile.range, range or a tuple", s.iter)
        if space.kind == "static":
            with self.at(s.iter):
                start, stop, step = (int_of(b, "static_range") for b in space.bounds)
                if not step:
                    raise TypeRuleError("static_range: the step is 0")
            return self._unrolled(s, list(range(start, stop, step)), rest)
        nested = any(frame.scope.kind in ("loop", "grid") for frame in self.frames)
        if space.kind in ("grid", "thread") and not nested:
            self._grid(s, space, after)
        elif space.kind == "grid" and len(space.bounds) > 1:
            raise self.error("a tile.grid of several axes inside a loop; put it outermost", s.iter)
        else:
            bounds = space.bounds if space.kind == "range" else (0, space.bounds[0], 1)
            self._sequential(s, bounds, after)
        return None

    # -- unrolled -----------------------------------------------------------------------------------

    def _unrolled(self, s: ast.For, items: list[Any], rest: list[ast.stmt]) -> Exit | None:
        if len(items) > _MAX_UNROLL:
            raise self.error(f"for: {len(items)} iterations to unroll; use tile.range", s.iter)
        after = self.live_after(rest)
        head = self.frame.liveness.loop_entry(s.body, after)
        names = tuple(n for n in self.frame.liveness.assigned(s.body) if n in head | after)
        outer = self.frame.scope
        self.frame.scope = Scope("unrolled", Exits(head | after, after, head | after), names)
        try:
            for done, item in enumerate(items, 1):
                self.assign(s.target, item)
                exit = self.run_body(s.body)
                if isinstance(exit.stop, Value):
                    self.frame.scope = outer
                    self._unless_stopped(s, exit.stop, items[done:], rest)
                    return None
                if exit.has_returned:
                    return exit
                if exit.stop:
                    break
        finally:
            self.frame.scope = outer
        return None

    def _unless_stopped(self, s: ast.For, stop: Value, items: list[Any], rest: list[ast.stmt]) -> None:
        """The iterations that are left after one that may have met a `break`: an `if` around them."""
        if not items:
            return
        if len(items) > _MAX_BREAKS:
            raise self.error(f"break on a run-time condition with {len(items)} iterations left to unroll; use "
                             "tile.range", s)
        self.frame.env[_LEFT] = tuple(items)
        iterations = ast.copy_location(ast.Name(_LEFT, ast.Load()), s.iter)
        left = ast.copy_location(ast.For(s.target, iterations, s.body, []), s)
        self.branch(ast.copy_location(ast.If(s.iter, [ast.copy_location(ast.Pass(), s)], [left]), s), stop, rest)

    # -- parallel -----------------------------------------------------------------------------------

    def _grid(self, s: ast.For, space: LoopRange, after: Names) -> None:
        with self.at(s.iter):
            if not space.bounds:
                raise TypeRuleError("grid: no extent given; expected tile.grid(n) or tile.grid(n, m)")
            extents = [self._int_scalar(e, "grid") for e in space.bounds]
        self._check_shared(s, after)
        block = Block([self.builder.argument(TileTy((), int64)) for _ in extents])
        env = dict(self.frame.env)
        outer = self.frame.scope
        self.frame.scope = Scope("grid", Exits())
        self.frame.context.grids.append((block.args, list(space.bounds)))
        try:
            with self.builder.inside(block):
                self.assign(s.target, block.args[0] if len(extents) == 1 else tuple(block.args))
                exit = self.run_body(s.body)
        finally:
            self.frame.scope = outer
            self.frame.context.grids.pop()
        if exit.stop is not False:
            raise self.error("break in a parallel loop: its programs run at the same time; use tile.range", s)
        with self.at(s.iter):
            self.builder.emit("grid", extents, [], [block])
            check_race(block)
        self._leave(s, env, {}, "parallel loop")

    def _check_shared(self, s: ast.For, after: Names) -> None:
        """Refuse variables that programs of a grid would hand to each other."""
        head = self.frame.liveness.loop_entry(s.body, after)
        for name in self.frame.liveness.assigned(s.body):
            before = self.frame.env.get(name)
            if before is None or isinstance(before, Undefined) or name not in head | after:
                continue
            operands = [before] if isinstance(before, Value) else []
            raise self.error(f"{name!r} is changed in a parallel loop: its programs run at the same time; "
                             "use tile.range, or tile.atomic_add to a parameter", s, *operands)

    # -- in order -----------------------------------------------------------------------------------

    def _sequential(self, s: ast.For, bounds: Sequence[Any], after: Names) -> None:
        with self.at(s.iter):
            low, high, step = (self._int_scalar(b, "range") for b in bounds)
            index = None
            if step.expr is not None and step.expr.const is not None and step.expr.const <= 0:
                if not step.expr.const:
                    raise TypeRuleError("range: step 0 given; expected another int")
                low, high, step, index = self._downwards(low, high, step)
        head = self.frame.liveness.loop_entry(s.body, after)
        carried, env = self._carried(s.body, head | after - self._targets(s.target)), dict(self.frame.env)
        scope = Scope("loop", Exits(head | after, after, head | after), tuple(carried.initial))
        for _ in range(_MAX_ROUNDS):
            block = Block([self.builder.argument(TileTy((), int64))])
            self.frame.env = dict(env)
            exit, changed = self._iteration(s, block, carried, scope, index or (lambda counter: counter))
            if not changed:
                break
        else:
            raise self.error("the types of the loop's variables do not settle", s)
        early = exit.stop is not False
        with self.at(s):
            operands = [low, high, step, *self._initial(carried)]
            with self.builder.inside(block):
                stop = [exit.stop if isinstance(exit.stop, Value) else self.builder.const(exit.stop)] if early else []
                self.builder.emit("yield", [*stop, *self._finals(carried)])
            op = self.builder.emit("for", operands, carried.types, [block], early_exit=early or None)
        self._leave(s, env, carried.bind(op.results), "loop")

    def _downwards(self, low: Value, high: Value, step: Value) -> tuple[Value, Value, Value, Callable[[Value], Value]]:
        """The bounds of a loop that counts the iterations of one with a negative step, and its variable."""
        make = self.builder
        size = make.unary("neg", step)
        gap = make.binary("add", make.binary("sub", low, high), make.binary("sub", size, make.const(1)))
        count = make.binary("floordiv", gap, size)
        return make.const(0), count, make.const(1), lambda k: make.binary("add", low, make.binary("mul", k, step))

    def while_loop(self, s: ast.While, rest: list[ast.stmt]) -> None:
        """Trace a `while`: at run time, or iteration by iteration where only that compiles."""
        if s.orelse:
            raise self.error("else of a loop cannot be compiled", s.orelse[0])
        after = self.live_after(rest) | reads(s.test)
        env, ops = dict(self.frame.env), len(self.builder.block.ops)
        try:
            self._while_at_run_time(s, after)
        except CompileError:
            # Its tiles may change their shapes: numbers that are known decide how often it runs.
            failed, self.frame.env = self.frame.env, env
            del self.builder.block.ops[ops:]
            if not self._unrolled_while(s, after):
                self.frame.env = failed
                raise

    def _unrolled_while(self, s: ast.While, after: Names) -> bool:
        """Trace a `while` iteration by iteration; False where that cannot be done."""
        head = self.frame.liveness.loop_entry(s.body, after)
        names = tuple(n for n in self.frame.liveness.assigned(s.body) if n in head | after)
        outer = self.frame.scope
        self.frame.scope = Scope("unrolled", Exits(head | after, after, head | after), names)
        try:
            for _ in range(_MAX_UNROLL):
                condition = self.condition(s.test)
                if isinstance(condition, Value):
                    return False
                if not condition:
                    return True
                exit = self.run_body(s.body)
                if exit.has_returned or isinstance(exit.stop, Value):
                    return False
                if exit.stop:
                    return True
        except CompileError:
            return False
        finally:
            self.frame.scope = outer
        return False

    def _while_at_run_time(self, s: ast.While, after: Names) -> None:
        head = self.frame.liveness.loop_entry(s.body, after)
        carried, env = self._carried(s.body, head | after), dict(self.frame.env)
        scope = Scope("loop", Exits(head | after, after, head | after), tuple(carried.initial))
        for _ in range(_MAX_ROUNDS):
            block = Block()
            self.frame.env = dict(env)
            exit, changed = self._iteration(s, block, carried, scope)
            if not changed:
                break
        else:
            raise self.error("the types of the loop's variables do not settle", s)
        with self.at(s):
            self._emit_while(s, env, carried, block, exit)

    def _emit_while(self, s: ast.While, env: dict[str, Any], carried: Carried, body: Block, exit: Exit) -> None:
        """A `break` becomes a flag that the condition asks first."""
        early = exit.stop is not False
        if not early and isinstance(s.test, ast.Constant) and s.test.value:
            raise self.error("while: the condition always holds and nothing breaks the loop", s.test)
        flag = [TileTy((), bool_)] if early else []
        finals = self.frame.env
        test = Block([self.builder.argument(t) for t in carried.types])
        self.frame.env = {**env, **carried.bind(test.args)}
        with self.builder.inside(test):
            condition = self.condition(s.test)
            value = self.builder.const(condition) if isinstance(condition, bool) else condition
            if early:
                test.args.append(self.builder.argument(flag[0]))
                value = self.builder.binary("and", test.args[-1], value)
            self.builder.emit("yield", [value])
        self.frame.env = finals
        with self.builder.inside(body):
            yields = self._finals(carried)
            if early:
                body.args.append(self.builder.argument(flag[0]))
                stop = exit.stop if isinstance(exit.stop, Value) else self.builder.const(exit.stop)
                yields.append(self.builder.unary("not", stop))
            self.builder.emit("yield", yields)
        initial = [*self._initial(carried), *([self.builder.const(True)] if early else [])]
        op = self.builder.emit("while", initial, [*carried.types, *flag], [test, body])
        self._leave(s, env, carried.bind(op.results[:len(carried.types)]), "loop")

    # -- carried variables --------------------------------------------------------------------------

    def _carried(self, body: list[ast.stmt], live: Names) -> Carried:
        initial = {}
        for name in self.frame.liveness.assigned(body):
            value = self.frame.env.get(name)
            if name in live and value is not None and is_mergeable(value):
                initial[name] = value
        carried = Carried(initial, [])
        carried.types = [leaf_type(leaf) for leaf in carried.values]
        return carried

    def _iteration(self, s: ast.For | ast.While, block: Block, carried: Carried, scope: Scope,
                   index: Callable[[Value], Value] | None = None) -> tuple[Exit, bool]:
        """Trace the body once; whether the carried types had to change (then it is to be traced again).

        `index` is what the loop's variable is, of the counter that the block begins with.
        """
        arguments = [self.builder.argument(t) for t in carried.types]
        block.args += arguments
        before = dict(self.frame.env)
        self.frame.env.update(carried.bind(arguments))
        for name in carried.initial:
            self.hint(self.frame.env[name], name)
        outer, self.frame.scope = self.frame.scope, scope
        try:
            with self.builder.inside(block):
                if index is not None and isinstance(s, ast.For):
                    with self.at(s.iter):
                        item = index(block.args[0])
                    self.assign(s.target, item)
                exit = self.run_body(s.body)
        finally:
            self.frame.scope = outer
        if exit.has_returned:
            raise self.error("return inside a loop; use break, or return after the loop", s)
        self._check_constants(s, before, carried)
        types = self._settle(s, carried, names_inside(block))
        changed = types != carried.types
        carried.types = types
        return exit, changed

    def _check_constants(self, s: ast.AST, before: dict[str, Any], carried: Carried) -> None:
        """A compile-time object that other iterations see cannot change in a loop."""
        exits = self.frame.liveness.assigned(s.body)  # type: ignore[attr-defined]
        live = self.frame.liveness.loop_entry(s.body, frozenset())  # type: ignore[attr-defined]
        for name in exits:
            old, new = before.get(name), self.frame.env.get(name)
            if name in carried.initial or name not in before or name not in live or isinstance(old, Undefined):
                continue
            if not same_constant(old, new):
                raise self.error(f"{name!r} is {describe(old)} before the loop and {describe(new)} after an iteration; "
                                 "only tiles and numbers can change in a loop", s)

    def _settle(self, s: ast.AST, carried: Carried, inside: frozenset[str]) -> list[TileTy]:
        """The types that hold before and after an iteration."""
        types: list[TileTy] = []
        supply = iter(carried.types)
        for name, initial in carried.initial.items():
            final = self.frame.env[name]
            if isinstance(final, Undefined):
                raise self.error(f"{name!r} is read in the next iteration: {final.reason}", s)
            if not is_mergeable(final) or not same_structure(initial, final):
                raise self.error(f"{name!r} is {describe(initial)} before the loop and {describe(final)} after an "
                                 "iteration", s, *[v for v in leaves(initial) if isinstance(v, Value)])
            for first, last in zip(leaves(initial), leaves(final)):
                types.append(self._settle_leaf(s, name, first, next(supply), last, inside))
        return types

    def _settle_leaf(self, s: ast.AST, name: str, first: Any, current: TileTy, last: Any,
                     inside: frozenset[str]) -> TileTy:
        try:
            # A number before the loop takes the dtype it has after an iteration.
            entry = first if not isinstance(first, Value) and not current.rank else Value("", current, hint=name)
            return join_types(entry, last, inside)
        except Mismatch as error:
            operands = [v for v in (first, last) if isinstance(v, Value)]
            raise self.error(f"{name!r} changes around the loop: {error}", s, *operands) from None

    def _initial(self, carried: Carried) -> list[Value]:
        return [materialise(self.builder, leaf, type_.dtype) for leaf, type_ in zip(carried.values, carried.types)]

    def _finals(self, carried: Carried) -> list[Value]:
        finals = [leaf for name in carried.initial for leaf in leaves(self.frame.env[name])]
        return [materialise(self.builder, leaf, type_.dtype) for leaf, type_ in zip(finals, carried.types)]

    # -- shared -------------------------------------------------------------------------------------

    def _int_scalar(self, x: Any, what: str) -> Value:
        value = tile_of(x, what=what)
        if value.type.rank or not value.type.dtype.is_int:
            raise TypeRuleError(f"{what}: {show(value) if not is_number(x) else x} given; expected an int", value)
        return self.builder.cast(value, int64) if not isinstance(x, (int, Dim)) else value

    def _targets(self, target: ast.expr) -> Names:
        return frozenset(n.id for n in ast.walk(target) if isinstance(n, ast.Name))

    def _leave(self, s: ast.For | ast.While, env: dict[str, Any], results: dict[str, Any], what: str) -> None:
        """The names after a loop: what it carried, what was there before, and the rest undefined."""
        names = set(self.frame.liveness.assigned(s.body))
        if isinstance(s, ast.For):
            names |= self._targets(s.target)
        line = self.frame.source.location(s).line
        for name in names - results.keys():
            if name not in env or not same_constant(env[name], self.frame.env.get(name)):
                env[name] = Undefined(f"{name!r} is assigned inside the {what} at line {line} and not defined after it")
        for name, value in results.items():
            self.hint(value, name)
        self.frame.env = {**env, **results}
