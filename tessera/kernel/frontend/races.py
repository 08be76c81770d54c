"""Write races between the programs of a grid, where they are certain from the program alone."""

from __future__ import annotations

from tessera.errors import CompileError
from tessera.kernel.diagnostics import compile_error
from tessera.kernel.ir import Block, Location, Value

_WRITES = ("store", "scatter")


def check_race(block: Block) -> None:
    """Refuse a store that every program of a grid makes to the same place.

    A store is left alone when its place, or an `if` around it, depends on each index of the grid.

    Raises:
        CompileError: a store's place does not depend on one of the indices.
    """
    for index in block.args:
        _check(block, {id(index)}, False, index)


def _check(block: Block, depends: set[int], guarded: bool, index: Value) -> None:
    for op in block.ops:
        touched = any(id(v) in depends for v in op.operands)
        if op.name in _WRITES and not guarded:
            place = op.operands[:1] if op.name == "store" else op.operands[:2]
            if not any(id(v) in depends for v in place):
                raise _race(op.operands[0], index, op.loc)
        # A loop's variables and its number of iterations may depend on what goes into it.
        for region in op.regions:
            if touched:
                depends.update(id(argument) for argument in region.args)
            _check(region, depends, guarded or touched, index)
            touched = touched or any(id(v) in depends for v in (region.ops[-1].operands if region.ops else ()))
        if touched:
            depends.update(id(result) for result in op.results)


def _race(view: Value, index: Value, loc: Location | None) -> CompileError:
    root = view
    while root.op is not None and root.op.name == "view":
        root = root.op.operands[0]
    name = index.hint or "the grid index"
    target = repr(root.hint) if root.hint else "a parameter"
    return compile_error(f"write race: every program of the grid writes the same place of {target}, which does not "
                         f"depend on {name!r}", loc, [root])
