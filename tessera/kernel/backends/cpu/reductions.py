"""Reductions and scans, in the order that the language fixes.

A sum along the last axis keeps 64 lanes (element i goes to lane i % 64) and folds them in halves; along
any other axis each output adds its elements in ascending order. Neither depends on the machine's vector
width, on the block sizes or on the thread count, so the bits do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.context import Context, register_type
from tessera.kernel.backends.cpu.elements import ANY, Point, element, hoist, store
from tessera.kernel.backends.cpu.emit import I32, I64, Val
from tessera.kernel.backends.cpu.loops import APART, each, lanes_for, sweep, vector_axis, vector_lanes
from tessera.kernel.ir import Op, Value

LANES = 64

State = list[Val]  # one vector for most kinds; value and index for argmax and argmin


def reduce(ctx: Context, op: Op) -> Val | None:
    """Lower a reduce: the scalar for a rank-0 result; else its buffer is filled (`ctx.memory` is set)."""
    source, axis, result = op.operands[0], op.attrs["axis"], op.result
    if not result.type.rank:
        return _reduce_row(ctx, op, ())
    memory = ctx.buffer(result)
    if axis == source.type.rank - 1 or vector_axis(result.type) is None:
        def row(indices: tuple[Val, ...]) -> None:
            store(ctx, memory, Point(indices), _reduce_row(ctx, op, indices))
        _rows(ctx, result, row)
    else:
        lanes = lanes_for(ctx, result.type.shape[-1].const, 2 * vector_lanes(ctx))
        sweep(ctx, result.type, [], lambda point: store(ctx, memory, point, _reduce_column(ctx, op, point)), lanes)
    ctx.memory[result.name] = memory
    return None


def _rows(ctx: Context, value: Value, body: Callable[[tuple[Val, ...]], None]) -> None:
    def nest(indices: tuple[Val, ...]) -> None:
        if len(indices) == value.type.rank:
            body(indices)
        else:
            with each(ctx, ctx.size(value.type.extent(len(indices)))) as index:
                nest((*indices, index))

    with ctx.scope(), ctx.b.apart("rows", least=APART):
        nest(())


def _reduce_row(ctx: Context, op: Op, indices: tuple[Val, ...]) -> Val:
    """All elements along the reduced axis at fixed other indices."""
    b, source, axis = ctx.b, op.operands[0], op.attrs["axis"]
    kind, extent = op.attrs["kind"], ctx.size(source.type.extent(axis))
    lanes = min(LANES, vector_lanes(ctx))
    rule = _Rule(ctx, op)

    def at(index: Val, mask: Val | None) -> Point:
        return Point((*indices[:axis], index, *indices[axis:]), axis, lanes, mask)

    hoist(ctx, source, Point((*indices[:axis], ANY, *indices[axis:]), axis))
    pieces = LANES // lanes
    start = [state for _ in range(pieces) for state in rule.start(lanes)]
    whole = b.and_(extent, -LANES) if extent.const is None else emit.const(extent.const & -LANES, I64)
    if extent.const is not None and extent.const < LANES and extent.const % lanes == 0:
        states = _grouped(start, rule.width)
        for piece in range(extent.const // lanes):
            index = emit.const(piece * lanes, I64)
            states[piece] = rule.take(states[piece], element(ctx, source, at(index, None)), index, None)
    else:
        states = _whole_blocks(ctx, rule, source, at, start, whole, pieces, lanes)
        states = _remainder(ctx, rule, source, at, states, whole, extent, lanes)
    while len(states) > 1:
        half = len(states) // 2
        states = [rule.combine(x, y) for x, y in zip(states[:half], states[half:])]
    total = rule.fold(states[0], lanes)
    return _finish(ctx, kind, total, extent)


def _whole_blocks(ctx: Context, rule: _Rule, source: Value, at: Callable, start: list[Val], whole: Val,
                  pieces: int, lanes: int) -> list[State]:
    width = rule.width
    if whole.const == 0:
        return _grouped(start, width)
    with ctx.b.for_(0, whole, LANES, carry=start) as loop, ctx.scope():
        states = _grouped(loop.carry, width)
        for piece in range(pieces):
            index = ctx.b.add(loop.i, piece * lanes)
            states[piece] = rule.take(states[piece], element(ctx, source, at(index, None)), index, None)
        loop.next([v for state in states for v in state])
    return _grouped(loop.results, width)


def _remainder(ctx: Context, rule: _Rule, source: Value, at: Callable, states: list[State], whole: Val,
               extent: Val, lanes: int) -> list[State]:
    """Fewer than 64 elements: each still goes to its own lane; the lanes lie on the stack meanwhile."""
    b = ctx.b
    if extent.const is not None and extent.const == whole.const:
        return states
    slots = [b.alloca(emit.elem(v.ty), LANES) for v in states[0]]
    for piece, state in enumerate(states):
        for slot, v in zip(slots, state):
            b.store(v, b.gep(slot, piece * lanes, emit.elem(v.ty)))
    with b.for_(whole, extent, lanes) as loop, ctx.scope():
        mask = b.lane_mask(b.cast("trunc", b.sub(extent, loop.i), I32), lanes)
        places = [b.gep(slot, b.sub(loop.i, whole), emit.elem(v.ty)) for slot, v in zip(slots, states[0])]
        old = [b.load(place, v.ty) for place, v in zip(places, states[0])]
        new = rule.take(old, element(ctx, source, at(loop.i, mask)), loop.i, mask)
        for v, place in zip(new, places):
            b.store(v, place)
    return [[b.load(b.gep(slot, piece * lanes, emit.elem(v.ty)), v.ty) for slot, v in zip(slots, state)]
            for piece, state in enumerate(states)]


def _reduce_column(ctx: Context, op: Op, point: Point) -> Val:
    """Ascending order along an axis that is not the vector axis."""
    source, axis = op.operands[0], op.attrs["axis"]
    rule, extent = _Rule(ctx, op), ctx.size(source.type.extent(axis))
    start = rule.start(point.lanes if point.axis is not None else 0)
    moved = None if point.axis is None else point.axis + (point.axis >= axis)
    with ctx.b.for_(0, extent, carry=start) as loop, ctx.scope():
        indices = (*point.indices[:axis], loop.i, *point.indices[axis:])
        at = Point(indices) if moved is None else Point(indices, moved, point.lanes, point.mask)
        x = element(ctx, source, at)
        loop.next(rule.take(loop.carry, x, loop.i, None, stepwise=True))
    return _finish(ctx, op.attrs["kind"], rule.result(loop.results), extent)


def _finish(ctx: Context, kind: str, total: Val, extent: Val) -> Val:
    b = ctx.b
    if kind == "mean":
        return b.div(total, b.cast("sitofp", extent, total.ty))
    if kind in ("any", "all"):
        return b.cmp("ne", total, 0)
    return total


def _grouped(values: Sequence[Val], width: int) -> list[State]:
    return [list(values[i:i + width]) for i in range(0, len(values), width)]


class _Rule:
    """How one kind of reduction starts, takes an element and combines two states."""

    def __init__(self, ctx: Context, op: Op) -> None:
        self.b, self.kind = ctx.b, op.attrs["kind"]
        dtype = op.operands[0].type.dtype
        self.ty = I32 if self.kind in ("any", "all") else register_type(dtype)
        self.arg = self.kind in ("argmax", "argmin")
        self.width = 2 if self.arg else 1

    def start(self, lanes: int) -> State:
        """The state before any element."""
        if self.arg:
            return [emit.const(self._worst(), emit.vec(lanes, self.ty)), emit.const(2**31 - 1, emit.vec(lanes, I32))]
        value = {"sum": 0, "mean": 0, "any": 0, "all": 1}.get(self.kind)
        return [emit.const(self._worst() if value is None else value, emit.vec(lanes, self.ty))]

    def _worst(self) -> float | int:
        low = self.kind in ("max", "argmax")
        if emit.is_float(self.ty):
            return float("-inf") if low else float("inf")
        bits = emit.bits(self.ty)
        return -(1 << (bits - 1)) if low else (1 << (bits - 1)) - 1

    def take(self, state: State, x: Val, index: Val, mask: Val | None, stepwise: bool = False) -> State:
        """Fold in one vector of elements; `stepwise`: all lanes are at the same index."""
        b = self.b
        if not emit.lanes(x.ty) and emit.lanes(state[0].ty):
            x = b.splat(x, emit.lanes(state[0].ty))
        if self.kind in ("any", "all"):
            x = b.cast("zext", x, I32)
        fresh = [x]
        if self.arg:
            position = b.cast("trunc", index, I32)
            lanes = emit.lanes(x.ty)
            fresh.append(position if not lanes else b.splat(position, lanes) if stepwise
                         else b.add(position, b.iota(lanes, I32)))
        new = self.combine(state, fresh)
        return new if mask is None else [b.select(mask, n, o) for n, o in zip(new, state)]

    def combine(self, x: State, y: State) -> State:
        """Two states into one."""
        b = self.b
        if self.arg:
            return self._better(x, y)
        a, c = x[0], y[0]
        if self.kind in ("sum", "mean"):
            return [b.add(a, c, contract=False)]
        if self.kind in ("max", "min"):
            return [(b.max if self.kind == "max" else b.min)(a, c, signed_zeros=False)]
        return [(b.or_ if self.kind == "any" else b.and_)(a, c)]

    def _better(self, x: State, y: State) -> State:
        """The larger (smaller) value, a NaN before all, the first index among equals."""
        b = self.b
        wins = b.cmp("gt" if self.kind == "argmax" else "lt", y[0], x[0])
        ties = b.cmp("eq", y[0], x[0])
        if emit.is_float(self.ty):
            x_nan, y_nan = b.cmp("uno", x[0], x[0]), b.cmp("uno", y[0], y[0])
            wins = b.or_(wins, b.and_(y_nan, b.not_(x_nan)))
            ties = b.or_(ties, b.and_(y_nan, x_nan))
        wins = b.or_(wins, b.and_(ties, b.cmp("lt", y[1], x[1])))
        return [b.select(wins, y[0], x[0]), b.select(wins, y[1], x[1])]

    def fold(self, state: State, lanes: int) -> Val:
        """The lanes of one vector, folded in halves."""
        while lanes > 1:
            lanes //= 2
            halves = [[self.b.slice(v, at, lanes) for v in state] for at in (0, lanes)]
            state = self.combine(*halves)
        return self.b.extract(self.result(state), 0)

    def result(self, state: State) -> Val:
        """What the reduction gives: the value, or for argmax and argmin the index."""
        return state[-1]


def scan(ctx: Context, op: Op) -> None:
    """cumsum and cummax: one ascending chain along the axis for every other index."""
    source, axis, result = op.operands[0], op.attrs["axis"], op.result
    memory = ctx.buffer(result)
    b = ctx.b
    ty = register_type(source.type.dtype)
    start: float | int = 0
    if op.attrs["kind"] == "cummax":
        start = float("-inf") if emit.is_float(ty) else -(1 << (emit.bits(ty) - 1))

    def nest(indices: list[Val], at: int) -> None:
        if at == source.type.rank:
            with b.for_(0, ctx.size(source.type.extent(axis)), carry=[emit.const(start, ty)]) as loop, ctx.scope():
                indices[axis] = loop.i
                point = Point(tuple(indices))
                x = element(ctx, source, point)
                total = (b.add(loop.carry[0], x, contract=False) if emit.is_float(ty) else b.add(loop.carry[0], x)) \
                    if op.attrs["kind"] == "cumsum" else b.max(loop.carry[0], x)
                store(ctx, memory, point, total)
                loop.next([total])
        elif at == axis:
            nest(indices, at + 1)
        else:
            with each(ctx, ctx.size(source.type.extent(at))) as index:
                indices[at] = index
                nest(indices, at + 1)

    nest([ANY] * source.type.rank, 0)
    ctx.memory[result.name] = memory


