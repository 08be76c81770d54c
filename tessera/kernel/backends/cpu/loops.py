"""Loop nests over a tile's elements: vectors along one axis, scalars along the others.

In: a tile type and a function that emits one point. Out: loops over the extents that count (a ragged
dim's valid part), the vector axis innermost, its remainder masked. What does not depend on the
innermost index is computed before the innermost loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.columns import aligned
from tessera.kernel.backends.cpu.context import Context, Memory
from tessera.kernel.backends.cpu.elements import ANY, Point, element, hoist, store
from tessera.kernel.backends.cpu.emit import I32, I64, Val
from tessera.kernel.ir import TileTy, Value

APART = 60  # instructions of a loop nest that becomes a function of its own

Body = Callable[[Point], None]


def vector_lanes(ctx: Context) -> int:
    """Lanes of one step: two registers of f32, so that two chains are in flight."""
    return 2 * ctx.target.vector_bits // 32


def sweep(ctx: Context, type_: TileTy, inputs: Sequence[Value], body: Body, lanes: int | None = None) -> None:
    """Call `body` at every point of a tile; `inputs` are the tiles of that shape that the body reads there."""
    axis = vector_axis(type_)
    extents = [ctx.size(type_.extent(i)) for i in range(type_.rank)]
    outer = [i for i in range(type_.rank) if i != axis]
    indices: list[Val] = [ANY] * type_.rank

    def nest(level: int) -> None:
        if level < len(outer):
            with each(ctx, extents[outer[level]]) as index:
                indices[outer[level]] = index
                nest(level + 1)
        elif axis is None:
            body(Point(tuple(indices)))
        else:
            for value in inputs:
                hoist(ctx, value, Point(tuple(indices), axis))
            width = lanes_for(ctx, type_.shape[axis].const, lanes or vector_lanes(ctx))
            run_lanes(ctx, extents[axis], width, lambda i, mask: body(_at(indices, axis, i, width, mask)))
            indices[axis] = ANY

    with ctx.scope(), ctx.b.apart("tile", least=APART):
        nest(0)


def _at(indices: list[Val], axis: int, index: Val, lanes: int, mask: Val | None) -> Point:
    indices[axis] = index
    return Point(tuple(indices), axis, lanes, mask)


def vector_axis(type_: TileTy) -> int | None:
    """The last axis that is longer than 1; None where there is none."""
    for axis in reversed(range(type_.rank)):
        if type_.shape[axis].const != 1:
            return axis
    return None


def lanes_for(ctx: Context, extent: int | None, lanes: int) -> int:
    """Fewer lanes where a constant extent needs no more."""
    if extent is None or extent >= lanes:
        return lanes
    return 1 << (max(extent, 1) - 1).bit_length() if extent > 1 else 2


@contextmanager
def each(ctx: Context, extent: Val) -> Iterator[Val]:
    """`with each(ctx, n) as i`: a loop of n iterations; none is emitted for n = 1."""
    if extent.const == 1:
        yield emit.const(0, I64)
    else:
        with ctx.b.for_(0, extent) as loop, ctx.scope():
            yield loop.i


def run_lanes(ctx: Context, extent: Val, lanes: int, body: Callable[[Val, Val | None], None]) -> None:
    """body(start, None) for each full vector of `extent` elements, body(start, mask) for the remainder."""
    b = ctx.b
    if extent.const is not None:
        full = extent.const - extent.const % lanes
        if full == lanes:
            body(emit.const(0, I64), None)
        elif full:
            with b.for_(0, full, lanes) as loop, ctx.scope():
                body(aligned(ctx, loop.i, lanes), None)
        if extent.const != full:
            with ctx.scope():
                body(emit.const(full, I64), b.lane_mask(emit.const(extent.const - full, I32), lanes))
        return
    whole = b.and_(extent, -lanes)
    with b.for_(0, whole, lanes) as loop, ctx.scope():
        body(aligned(ctx, loop.i, lanes), None)
    rest = b.sub(extent, whole)
    with b.if_(b.cmp("gt", rest, 0)), ctx.scope():
        body(aligned(ctx, whole, lanes), b.lane_mask(b.cast("trunc", rest, I32), lanes))


def write(ctx: Context, memory: Memory, value: Value, compute: Callable[[Point], Val] | None = None) -> None:
    """Store every element of a tile to memory of the same shape."""
    get = compute or (lambda point: element(ctx, value, point))
    sweep(ctx, value.type, [value], lambda point: store(ctx, memory, point, get(point)))
