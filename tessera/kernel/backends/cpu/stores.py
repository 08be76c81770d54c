"""Finds stores that run in one loop, and tiles that such a loop alone reads.

In: a function after the passes. Out: groups of stores of one shape, to different parameters, with nothing but
elementwise work between them; and the values that only one group's stores are computed from, point by point. The loop
computes such a value once and keeps it in registers: a gradient of two inputs needs no scratch memory for what both
share, and reads what both read once.
"""

from __future__ import annotations

from collections.abc import Iterator

from tessera.kernel import ir
from tessera.kernel.ir import Block, Function, Op, Value

_LAZY = ir.ELEMENTWISE | set("broadcast transpose reshape slice full iota load gather".split())
_BETWEEN = _LAZY | {"view", "const", "dim"}
MAX_TOGETHER = 4  # more would want more registers than there are


def store_groups(function: Function) -> dict[Op, list[Op]]:
    """All stores of tiles, in groups, by the last store of each: where all that the group reads is there."""
    groups: dict[Op, list[Op]] = {}
    for block in _blocks(function.body):
        for group in _groups_of(block):
            groups[group[-1]] = group
    return groups


def _blocks(block: Block) -> Iterator[Block]:
    yield block
    for op in block.ops:
        for region in op.regions:
            yield from _blocks(region)


def _groups_of(block: Block) -> Iterator[list[Op]]:
    group: list[Op] = []
    for op in block.ops:
        is_tile = op.name == "store" and op.operands[1].type.rank > 0
        if group and not (_joins(op, group) if is_tile else _passes(op, group)):
            yield group
            group = []
        if is_tile:
            group.append(op)
    if group:
        yield group


def _joins(op: Op, group: list[Op]) -> bool:
    """Whether a store can run in the loop of a group: the same points, and memory that no other of them writes."""
    (view, value), (first_view, first_value) = op.operands, group[0].operands
    return (len(group) < MAX_TOGETHER and view.type.rank == value.type.rank
            and (view.type.valid, value.type.shape, value.type.valid)
            == (first_view.type.valid, first_value.type.shape, first_value.type.valid)
            and ir.param_of(view) not in {ir.param_of(other.operands[0]) for other in group}
            and all(_is_plain(each) for each in (op, *group)))


def _is_plain(op: Op) -> bool:
    """Not a store that may have a loop of its own: of a product, of what is computed from one, of a concatenation."""
    pending = [op.operands[1]]
    while pending:
        made = pending.pop().op
        if made is not None and made.name in ("mma", "concat"):
            return False
        if made is not None and made.name in ir.ELEMENTWISE:
            pending += made.operands
    return True


def _passes(op: Op, group: list[Op]) -> bool:
    """Whether the stores before an operation may as well run after it."""
    if op.name not in _BETWEEN:
        return False
    return op.name not in ("load", "gather") or \
        ir.param_of(op.operands[0]) not in {ir.param_of(store.operands[0]) for store in group}


def read_in_one_loop(function: Function, groups: dict[Op, list[Op]]) -> set[str]:
    """Values that are read by the stores of one group alone, through elementwise operations: at the same points."""
    last = {op: end for end, group in groups.items() for op in group}
    found: set[str] = set()
    for block in _blocks(function.body):
        users = ir.users(block.ops)
        outside = ir.users(inner for op in block.ops for region in op.regions for inner in ir.walk(region))
        loop: dict[str, Op | None] = {}  # of a value: the group that reads it

        def reader(user: Op, value: Value, loop: dict[str, Op | None] = loop) -> Op | None:
            if user.name == "store":
                return last.get(user) if user.operands[1] is value else None
            is_same = user.name in ir.ELEMENTWISE and user.result.type.shape == value.type.shape
            return loop.get(user.result.name) if is_same else None

        for op in reversed(block.ops):
            for value in op.results:
                readers = {reader(user, value) for user in users[value.name]}
                single = readers.pop() if len(readers) == 1 and value.name not in outside else None
                loop[value.name] = single
                if single is not None:
                    found.add(value.name)
    return found
