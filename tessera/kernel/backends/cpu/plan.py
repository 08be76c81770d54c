"""Decides which tiles of a function lie in memory and which are computed where they are used.

In: a function after the passes. Out: the names of the values to materialise. A tile is kept when an
operation needs random access to it, when it is costly (exp, div, ...) and used more than once or
repeated by a loop or a broadcast (but not where all uses are in one loop, which keeps it in registers), or when
memory it reads is written later. Also: which concatenations
are stored part by part.
"""

from __future__ import annotations

from collections import Counter

from tessera.kernel import ir
from tessera.kernel.backends.cpu.elements import COSTLY, lazy_reshape_suffix
from tessera.kernel.backends.cpu.loops import vector_axis
from tessera.kernel.backends.cpu.stores import read_in_one_loop, store_groups
from tessera.kernel.ir import Block, Function, Op, Value

BUFFERED = frozenset("mma scan sort insert concat".split())  # and reduce of rank >= 1
_LAZY = frozenset(ir.ELEMENTWISE | set("broadcast transpose reshape slice full iota load gather rand".split()))


def plan(function: Function) -> set[str]:
    """Names of lazy values that must be written to scratch where they are defined."""
    uses: Counter[str] = Counter()
    depth: dict[str, int] = {}
    _count(function.body, 0, uses, depth)
    kept = _left_operands(function.body, depth)
    costs = _Costs(kept)
    written = {ir.param_of(op.operands[0]) for op in ir.walk(function.body)
               if op.name in ("store", "scatter", "atomic_add")}
    weights, in_registers = _weights(function.body), read_in_one_loop(function, store_groups(function))
    for op in ir.walk(function.body):
        if op.name == "reshape" and not _keeps_vectors(op) and op.result.name not in weights:
            kept |= _in_memory(op.operands[0])
        elif op.name == "extract":
            kept |= _in_memory(op.operands[0]) if op.operands[0].op is not None and costs.is_costly(op.operands[0]) \
                else set()
        elif op.name in ("load", "gather") and op.result.type.rank and ir.param_of(op.operands[0]) in written:
            kept.add(op.result.name)
        for result in op.results:
            if op.name in _LAZY and result.type.rank and costs.is_costly(result) and (
                    (uses[result.name] > 1 and result.name not in in_registers) or _repeated(result, function)):
                kept.add(result.name)
    return kept


def _left_operands(body: Block, depth: dict[str, int]) -> set[str]:
    """Left operands of matmuls in a loop that are made before it and would be computed again in each iteration."""
    found: set[str] = set()
    for op in ir.walk(body):
        if op.name != "mma":
            continue
        value = op.operands[0]
        while value.op is not None and value.op.name == "transpose":
            value = value.op.operands[0]
        in_place = value.op is not None and value.op.name == "load" and value.type.dtype.name == "f32"
        if value.op is not None and value.op.name in _LAZY and not in_place and value.type.shape[0].const is not None \
                and depth.get(value.name, 0) < depth.get(op.result.name, 0):
            found.add(value.name)
    return found


def joined(function: Function) -> set[str]:
    """Names of concatenations that a store alone reads: it computes all equal parts in one loop.

    A part is stored only after all parts of its point have been read, so that `x` may be rotated in place.
    """
    uses: Counter[str] = Counter()
    _count(function.body, 0, uses, {})
    found: set[str] = set()
    for op in ir.walk(function.body):
        if op.name == "store":
            made = stored_value(op).op
            if made is not None and made.name == "concat" and uses[made.result.name] == 1 and \
                    uses[op.operands[1].name] == 1 and op.operands[0].type.valid[made.attrs["axis"]] is None and \
                    made.result.type.valid[made.attrs["axis"]] is None and _has_equal_parts(made):
                found.add(made.result.name)
    return found


def _has_equal_parts(concat: Op) -> bool:
    """Whether the parts are equal, but for a last one that only copies: the entries that a rotation leaves alone."""
    *parts, last = concat.operands
    if parts and last.type != parts[0].type:
        while last.op is not None and last.op.name in ("cast", "slice"):
            last = last.op.operands[0]
        if last.op is None or last.op.name != "load":
            return False
    return all(part.type == parts[0].type for part in parts)


def _weights(body: Block) -> set[str]:
    """Values that only right operands of matmuls outside loops are computed from: those read them across rows."""
    users: dict[str, list[tuple[Op, int, bool]]] = {}

    def visit(block: Block, in_loop: bool) -> None:
        for op in block.ops:
            for place, operand in enumerate(op.operands):
                users.setdefault(operand.name, []).append((op, place, in_loop))
            for region in op.regions:
                visit(region, in_loop or op.name in ("for", "while"))

    visit(body, False)
    found: set[str] = set()
    for op in reversed(list(ir.walk(body))):
        if op.results and users.get(op.result.name) and all(
                (user.name == "mma" and place == 1 and not in_loop) or
                (user.name in _LAZY and user.result.name in found) for user, place, in_loop in users[op.result.name]):
            found.add(op.result.name)
    return found


def stored_value(store: Op) -> Value:
    """What a store has to compute: it rounds by itself, so that a cast from f32 to its dtype falls away."""
    value = store.operands[1]
    made = value.op
    if made is not None and made.name == "cast" and value.type.dtype.is_float and value.type.dtype.bits < 32 and \
            made.operands[0].type.dtype.name == "f32":
        return made.operands[0]
    return value


def _keeps_vectors(op: Op) -> bool:
    """Whether a reshape leaves the axis that loops vectorize alone."""
    axis = vector_axis(op.result.type)
    return lazy_reshape_suffix(op) > 0 and (axis is None or axis >= op.result.type.rank - lazy_reshape_suffix(op))


def _count(block: Block, level: int, uses: Counter[str], depth: dict[str, int]) -> None:
    """Uses of each value; a use in a deeper loop than the definition counts twice."""
    for arg in block.args:
        depth[arg.name] = level
    for op in block.ops:
        for operand in op.operands:
            uses[operand.name] += 2 if level > depth.get(operand.name, 0) else 1
        for result in op.results:
            depth[result.name] = level
        for region in op.regions:
            _count(region, level + (op.name in ("for", "while", "grid")), uses, depth)


def _in_memory(value: Value) -> set[str]:
    if value.op is None or value.op.name in BUFFERED or value.op.name in ir.CONTROL:
        return set()
    return {value.name} if value.op.name != "reduce" else set()


class _Costs:
    """Which tiles take more than a few cheap instructions an element; remembered for as long as `kept` stays."""

    def __init__(self, kept: set[str]) -> None:
        self.kept, self._count = kept, len(kept)
        self._known: dict[str, bool] = {}

    def is_costly(self, value: Value) -> bool:
        """Whether computing an element of a tile is costly."""
        if len(self.kept) != self._count:
            self._known, self._count = {}, len(self.kept)
        found = self._known.get(value.name)
        if found is None:
            found = self._known[value.name] = self._find(value)
        return found

    def _find(self, value: Value) -> bool:
        op = value.op
        if op is None or op.name not in _LAZY or not value.type.rank:
            return False
        return op.name in COSTLY or any(x.name not in self.kept and self.is_costly(x) for x in op.operands)


def _repeated(value: Value, function: Function) -> bool:
    """Whether a broadcast would compute the value again for each element of a new or expanded axis."""
    for user in ir.walk(function.body):
        if user.name == "broadcast" and user.operands[0] is value:
            size = user.result.type.shape
            for axis, origin in enumerate(user.attrs["axes"]):
                if size[axis].const != 1 and (origin is None or value.type.shape[origin].const == 1):
                    return True
    return False

