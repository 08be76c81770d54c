"""Checks that IR keeps its own rules: after the frontend and after every pass.

In: a `Function`. Out: nothing, or an `InternalCompilerError` that names the operation. Checked: every
operand is defined before its use and in scope, names are unique, regions have the right number of blocks,
arguments and yields, and each result has the type that the operation's rule gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel import ir
from tessera.kernel.diagnostics import InternalCompilerError
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Op, TileTy, Value, ViewTy
from tessera.types import bool_

_REGIONS = {"grid": 1, "for": 1, "while": 2, "if": 2}
_ARITY: dict[str, tuple[int, int]] = {  # smallest and largest number of operands
    "const": (0, 0), "dim": (0, 0), "full": (1, 1), "iota": (0, 0), "cast": (1, 1), "where": (3, 3), "fma": (3, 3),
    "broadcast": (1, 1), "reshape": (1, 1), "transpose": (1, 1), "reduce": (1, 1), "scan": (1, 1), "sort": (1, 1),
    "mma": (2, 3), "rand": (2, 2), "load": (1, 1), "store": (2, 2), "gather": (2, 2), "scatter": (3, 3),
    "atomic_add": (2, 2), "assert": (1, 1), "if": (1, 1),
    **dict.fromkeys(ir.UNARY, (1, 1)), **dict.fromkeys(ir.BINARY, (2, 2)),
}
_MANY = frozenset("concat slice extract insert view print grid for while yield".split())


def verify(function: Function) -> None:
    """Check a function.

    Raises:
        InternalCompilerError: it breaks a rule of the IR; this is a bug of the compiler.
    """
    scope: set[int] = set()
    names: set[str] = set()
    checker = _Checker(function, scope, names)
    for param in function.params:
        checker.define(param.value, None)
    checker.block(function.body, terminated=False)


class _Checker:
    def __init__(self, function: Function, scope: set[int], names: set[str]) -> None:
        self.function = function
        self.scope = scope
        self.names = names

    def fail(self, op: Op | None, message: str) -> InternalCompilerError:
        where = f" in {op.name}({', '.join(v.name for v in op.operands)})" if op is not None else ""
        place = f" (from {op.loc})" if op is not None and op.loc is not None else ""
        return InternalCompilerError(f"kernel {self.function.name}: internal error{where}: {message}{place}")

    def define(self, value: Value, op: Op | None) -> None:
        if value.name in self.names:
            raise self.fail(op, f"{value.name} is defined twice")
        self.names.add(value.name)
        self.scope.add(id(value))

    def block(self, block: Block, terminated: bool) -> None:
        """Check a region; what it defines goes out of scope at its end."""
        outer = set(self.scope)
        for argument in block.args:
            self.define(argument, None)
        for position, op in enumerate(block.ops):
            last = position == len(block.ops) - 1
            if op.name == "yield" and not (terminated and last):
                raise self.fail(op, "a yield that does not end a region")
            self.op(op)
        if terminated and (not block.ops or block.ops[-1].name != "yield"):
            raise self.fail(None, "a region without a yield")
        self.scope.clear()
        self.scope.update(outer)

    def op(self, op: Op) -> None:
        """Check one operation and its regions."""
        low, high = _ARITY.get(op.name, (0, len(op.operands)) if op.name in _MANY else (-1, -1))
        if low < 0:
            raise self.fail(op, "no such operation")
        if not low <= len(op.operands) <= high:
            raise self.fail(op, f"{len(op.operands)} operands; expected {low} to {high}")
        for operand in op.operands:
            if id(operand) not in self.scope:
                raise self.fail(op, f"{operand.name} is used where it is not defined")
        if len(op.regions) != _REGIONS.get(op.name, 0):
            raise self.fail(op, f"{len(op.regions)} regions")
        self.types(op)
        for region in op.regions:
            self.block(region, terminated=op.name != "grid")
        self.control(op)
        for result in op.results:
            if result.op is not op:
                raise self.fail(op, f"{result.name} does not know its operation")
            self.define(result, op)

    def control(self, op: Op) -> None:
        """Region arguments, yields and results agree."""
        results = [r.type for r in op.results]
        if op.name == "grid":
            if op.results or len(op.regions[0].args) != len(op.operands):
                raise self.fail(op, "a grid has one index an extent and no results")
        elif op.name == "for":
            stop = 1 if op.attrs.get("early_exit") else 0
            region, initial = op.regions[0], op.operands[3:]
            self.same(op, "initial values", [v.type for v in initial], results)
            self.same(op, "region arguments", [a.type for a in region.args[1:]], results)
            self.same(op, "yields", [v.type for v in region.terminator.operands[stop:]], results)
            if stop and region.terminator.operands[0].type != TileTy((), bool_):
                raise self.fail(op, "the stop flag is not a bool")
        elif op.name == "while":
            for region in op.regions:
                self.same(op, "region arguments", [a.type for a in region.args], results)
            self.same(op, "condition", [v.type for v in op.regions[0].terminator.operands], [TileTy((), bool_)])
            self.same(op, "yields", [v.type for v in op.regions[1].terminator.operands], results)
        elif op.name == "if":
            self.same(op, "condition", [op.operands[0].type], [TileTy((), bool_)])
            for region in op.regions:
                self.same(op, "yields", [v.type for v in region.terminator.operands], results)

    def same(self, op: Op, what: str, have: Sequence[TileTy], want: Sequence[TileTy]) -> None:
        """Dtypes and shapes agree; a value may count more of its elements than its place asks for."""
        if len(have) != len(want) or any(h.shape != w.shape or h.dtype != w.dtype for h, w in zip(have, want)):
            raise self.fail(op, f"{what} {[str(t) for t in have]} do not fit {[str(t) for t in want]}")

    def types(self, op: Op) -> None:
        """Results have the shape and dtype that the operands give."""
        operands = [v.type for v in op.operands]
        results = [r.type for r in op.results]
        if op.name in ir.BINARY or op.name in ("where", "fma"):
            if any(t.shape != results[0].shape for t in operands):
                raise self.fail(op, f"operands of shapes {[str(t) for t in operands]}")
            if op.name in ir.ARITHMETIC and any(t.dtype != results[0].dtype for t in operands):
                raise self.fail(op, f"operands of dtypes {[str(t) for t in operands]}")
            if op.name in ir.COMPARE and results[0].dtype != bool_:
                raise self.fail(op, "a comparison that is not bool")
        elif op.name in ir.UNARY or op.name in ("cast", "scan"):
            if operands[0].shape != results[0].shape:
                raise self.fail(op, f"{operands[0]} gives {results[0]}")
        elif op.name == "mma":
            a, b = operands[:2]
            if a.shape[-1] != b.shape[-2] or results[0].shape[-2:] != (a.shape[-2], b.shape[-1]):
                raise self.fail(op, f"{a} x {b} gives {results[0]}")
        elif op.name in ("store", "atomic_add"):
            view, value = operands
            if not isinstance(view, ViewTy) or view.shape != value.shape or view.dtype != value.dtype:
                raise self.fail(op, f"{value} into {view}")
        elif op.name in ("load", "view", "gather") and not isinstance(operands[0], ViewTy):
            raise self.fail(op, f"{operands[0]} is not a view")
        elif op.name == "reduce" and results[0].shape != _without(operands[0].shape, op.attrs["axis"]):
            raise self.fail(op, f"{operands[0]} gives {results[0]}")
        elif op.name == "transpose":
            expected = tuple(operands[0].shape[p] for p in op.attrs["perm"])
            if results[0].shape != expected:
                raise self.fail(op, f"{operands[0]} gives {results[0]}; expected {list(expected)}")


def _without(shape: tuple[Dim, ...], axis: int) -> tuple[Dim, ...]:
    return shape[:axis] + shape[axis + 1:]
