"""How a function is split into launches, and a launch into programs.

A launch is a `grid`, or a run of stores that stand outside of any. Each program takes one iteration of the
grid and, of each tile that is stored, one block of the axes that can be computed apart; an axis that the
value is reduced along stays whole, or is looped over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tessera.errors import UnsupportedError
from tessera.kernel import ir
from tessera.kernel.backends.cuda.contract import by_blocks
from tessera.kernel.backends.cuda.control import has_effects, joined_pieces
from tessera.kernel.backends.cuda.emit import MAX_TILE, Emitter
from tessera.kernel.backends.cuda.values import next_power_of_2
from tessera.kernel.dims import Dim
from tessera.kernel.passes.axes import AxisClasses

ELEMENTS = 1024  # of an elementwise program
ROW_ELEMENTS = 2048  # of a program that reduces rows
OPEN_PROGRAMS = 1056  # for a grid of unknown size: 8 for each multiprocessor of an H200
FEW_ROWS = 16  # up to here a product is limited by reading its other side


@dataclass
class Segment:
    """One launch: the grids that give its programs, the block that holds its effects, and those effects.

    is_open: its effect is a grid whose size only the running kernel knows; a fixed number of programs share it.
    """

    grids: list[ir.Op]
    body: ir.Block
    effects: list[ir.Op]
    is_open: bool = False


def segments(function: ir.Function) -> list[Segment]:
    """The launches of a function, in order."""
    found: list[Segment] = []
    for op in function.body.ops:
        if op.name == "grid" and not all(launch_dim(count, _known_names(function)) for count in op.operands):
            found.append(Segment([], function.body, [op], is_open=True))
        elif op.name == "grid":
            found.append(_flattened(op, _known_names(function)))
        elif op.name in ir.WRITES or op.name in ("print", "assert") or (op.name in ir.CONTROL and has_effects(op)):
            last = found[-1] if found else None
            if last is not None and not last.grids and _share(function, last.effects, op):
                last.effects.append(op)
            else:
                found.append(Segment([], function.body, [op]))
    _check_order(function, found)
    return found


def _share(function: ir.Function, earlier: list[ir.Op], op: ir.Op) -> bool:
    """Whether the programs of a run of top-level stores can write one more: of what they have written it reads only
    the elements at its own places."""
    if not all(e.name == op.name == "store" and e.operands[1].type.shape == op.operands[1].type.shape for e in earlier):
        return False
    after = function.body.ops[function.body.ops.index(earlier[0]):]
    loads = {id(load) for load in ir.walk(ir.Block(ops=after)) if load.name in ir.READS}
    pairs = [(store, v.op) for store in earlier for v in sources([op]) if v.op is not None and id(v.op) in loads
             and ir.param_of(v.op.operands[0]) is ir.param_of(store.operands[0])]
    if not pairs:
        return True
    classes = AxisClasses(function)
    return all(load.result.type.shape == store.operands[1].type.shape
               and all(_is_same_place(store, load, axis, [*earlier, op], classes)
                       for axis in range(load.result.type.rank)) for store, load in pairs)


def _known_names(function: ir.Function) -> set[str]:
    return {*function.sizes, *(p.value.name for p in function.params if not p.is_view)}


def launch_dim(count: ir.Value, known: set[str]) -> bool:
    """Whether the host can work out a grid's size."""
    return count.expr is not None and {atom.partition("/")[0] for atom in count.expr.atoms} <= known


def _flattened(grid: ir.Op, known: set[str]) -> Segment:
    """A grid together with grids that are all that it holds."""
    grids, body = [grid], grid.regions[0]
    while True:
        effects = [op for op in body.ops if op.name in ir.EFFECTS or (op.name in ir.CONTROL and has_effects(op))]
        effects = [op for op in effects if op.name != "yield"]
        if len(effects) != 1 or effects[0].name != "grid" or not all(launch_dim(n, known) for n in effects[0].operands):
            return Segment(grids, body, effects)
        grids.append(effects[0])
        body = effects[0].regions[0]


def _check_order(function: ir.Function, found: list[Segment]) -> None:
    """A value that was loaded before another launch overwrites its memory cannot be loaded after it."""
    place = {id(op): number for number, op in enumerate(function.body.ops)}
    written: dict[ir.Value, int] = {}
    for segment in found:
        top = segment.grids[0] if segment.grids else segment.effects[0]
        for value in sources([*segment.grids, *segment.effects]):
            op = value.op
            if op is not None and op.name in ir.READS and id(op) in place:
                param = ir.param_of(op.operands[0])
                if written.get(param, -1) > place[id(op)]:
                    raise UnsupportedError(f"{op.loc or 'load'}: cuda: the tile is used after its memory was written")
        for op in ir.walk(ir.Block(ops=[*segment.grids[:1], *segment.effects])):
            if op.name in ir.WRITES:
                written[ir.param_of(op.operands[0])] = place[id(top)]


def sources(ops: list[ir.Op]) -> set[ir.Value]:
    """Every value that operations depend on."""
    seen: set[ir.Value] = set()
    stack = [v for op in ir.walk(ir.Block(ops=list(ops))) for v in op.operands]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op is not None:
            stack += [v for op in ir.walk(ir.Block(ops=[value.op])) for v in op.operands]
    return seen


# -- blocks of the stored axes -----------------------------------------------------------------------


def program_blocks(emitter: Emitter, segment: Segment) -> list[int]:
    """For each axis of the stored tiles, the elements that a program takes; 0: all of them."""
    first = segment.effects[0]
    if any(op.name not in ir.WRITES or op.operands[-1].type.shape != first.operands[-1].type.shape
           or op.operands[-1].type.valid != first.operands[-1].type.valid for op in segment.effects):
        return []
    x = first.operands[-1]
    rank = x.type.rank
    values = sources(segment.effects)
    free = [all(by_blocks(emitter, op.operands[-1], axis) for op in segment.effects) for axis in range(rank)]
    matrices = has_products(values)
    if matrices and segment.grids:  # tiles of the program's own making fit its matrices
        free = [can and x.type.shape[axis].const is None for axis, can in enumerate(free)]
    reduced = {v.op.operands[0].type.shape[v.op.attrs["axis"]] for v in values
               if v.op is not None and v.op.name in ("reduce", "scan", "sort")}
    # The pieces of a concatenation are written one by one, each over all of its axis.
    joined = {op.operands[-1].type.shape[pieces[0]] for op in segment.effects
              if op.name == "store" and (pieces := joined_pieces(op.operands[-1]))}
    reduced |= joined
    sizes = _matrix_blocks(emitter, x, reduced) if matrices else _row_blocks(emitter, x, reduced)
    blocks = [size if can else 0 for size, can in zip(sizes, free)]
    _check_places(emitter, segment, values, blocks)
    return blocks


def _check_places(emitter: Emitter, segment: Segment, values: Iterable[ir.Value], blocks: list[int]) -> None:
    """Programs run at the same time: what one of them writes, no other may read.

    Raises:
        UnsupportedError: a parameter is read at other places of an axis that programs share than it is written.
    """
    pairs = [(store, v.op) for store in segment.effects for v in values
             if v.op is not None and v.op.name in ir.READS
             and ir.param_of(v.op.operands[0]) is ir.param_of(store.operands[0])]
    if not pairs:
        return
    classes = AxisClasses(emitter.function)
    for axis, block in enumerate(blocks):
        size = emitter.bound(segment.effects[0].operands[-1].type.shape[axis]) if block else 1
        if size is not None and size <= max(block, 1):
            continue  # one program
        for store, load in pairs:
            if not _is_same_place(store, load, axis, segment.effects, classes):
                name = ir.param_of(store.operands[0]).hint
                raise UnsupportedError(
                    f"{store.loc or 'store'}: cuda: {name} is written where other programs, which run at the same "
                    f"time, read it ({load.loc or 'load'}); write to another tensor, or take blocks with tile.grid")


def _is_same_place(store: ir.Op, load: ir.Op, axis: int, effects: list[ir.Op], classes: AxisClasses) -> bool:
    """Whether a program's block of an axis of what all effects write is also the block that it loads."""
    together = {classes.find(effect.operands[-1], axis) for effect in effects}
    found = [i for i in range(load.result.type.rank) if classes.find(load.result, i) in together]
    if load.name == "gather" or store.name == "scatter" or len(found) != 1:
        return False
    return _place(store.operands[0], axis) == _place(load.operands[0], found[0])


def _place(view: ir.Value, axis: int) -> tuple[object, ...]:
    """The axis of the parameter behind an axis of a view, and the ranges that lead from one to the other."""
    ranges: list[object] = []
    while view.op is not None:
        spec = view.op.attrs["spec"]
        axis = [i for i, entry in enumerate(spec) if entry[0] != "at"][axis]
        if spec[axis][0] == "range":
            start = view.op.operands[spec[axis][1]]
            ranges.append((id(start) if start.expr is None else start.expr, *spec[axis][2:]))
        view = view.op.operands[0]
    return axis, *ranges


def has_products(values: Iterable[ir.Value]) -> bool:
    """Whether a matrix product is among the values."""
    return any(v.op is not None and v.op.name == "mma" for v in values)


def _matrix_blocks(emitter: Emitter, x: ir.Value, reduced: set[Dim]) -> list[int]:
    """Tiles of BM x BN; fewer rows than a tile take a smaller one, so that more programs share the columns."""
    schedule, shape = emitter.function.schedule, x.type.shape
    if len(shape) < 2 or shape[-1] in reduced:
        return [*([1] * (len(shape) - 2)), *([16, 0][-len(shape):])]
    rows = emitter.bound(shape[-2]) or 128
    bm = int(schedule.get("BM", max(16, min(rows, 128))))
    if rows <= FEW_ROWS:  # memory is the limit: every multiprocessor shall read
        bn = 32 if (emitter.bound(shape[-1]) or 0) > 2048 else 16
    else:
        bn = 128 if bm >= 64 else 64
    return [*([1] * (len(shape) - 2)), next_power_of_2(bm), next_power_of_2(int(schedule.get("BN", bn)))]


def _row_blocks(emitter: Emitter, x: ir.Value, reduced: set[Dim]) -> list[int]:
    """Inner axes first, up to the elements of a program; reduced axes stay whole and take their share of it."""
    room = ROW_ELEMENTS if reduced else ELEMENTS
    for dim in reduced:
        room //= min(emitter.bound(dim) or MAX_TILE, MAX_TILE)
    blocks = [0] * x.type.rank
    for axis in range(x.type.rank - 1, -1, -1):
        if x.type.shape[axis] in reduced:
            continue
        # How many rows a program takes must not depend on how many there are: neither do their sums then.
        size = emitter.bound(x.type.shape[axis]) if room > 1 and (axis or not reduced) else None
        blocks[axis] = max(1, min(room, size or room))
        room //= blocks[axis]
    return blocks
