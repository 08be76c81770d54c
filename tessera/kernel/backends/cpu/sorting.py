"""Stable sort of rows: a bottom-up merge sort of (key, index) pairs, O(n log n), NaN as the largest key."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.context import Context, Memory
from tessera.kernel.backends.cpu.control import loop_while
from tessera.kernel.backends.cpu.elements import Point, element, load, store
from tessera.kernel.backends.cpu.emit import I64, Builder, Val
from tessera.kernel.backends.cpu.loops import each
from tessera.kernel.ir import Op
from tessera.types import int32


def sort(ctx: Context, op: Op) -> None:
    """Fill the buffers of sorted values and of their indices."""
    source, axis = op.operands[0], op.attrs["axis"]
    values, indices = (ctx.buffer(result) for result in op.results)
    length = source.type.shape[axis]
    rows = [(ctx.buffer_of((length,), values.dtype), ctx.buffer_of((length,), int32)) for _ in range(2)]
    extent = ctx.size(source.type.extent(axis))

    def nest(at: int, point: list[Val]) -> None:
        if at == source.type.rank:
            _sort_row(ctx, op, point, extent, rows, (values, indices))
        elif at == axis:
            nest(at + 1, [*point, emit.const(0, I64)])
        else:
            with each(ctx, ctx.size(source.type.extent(at))) as index:
                nest(at + 1, [*point, index])

    nest(0, [])
    for result, memory in zip(op.results, (values, indices)):
        ctx.memory[result.name] = memory


def _sort_row(ctx: Context, op: Op, point: list[Val], extent: Val, rows: list[tuple[Memory, Memory]],
              out: tuple[Memory, Memory]) -> None:
    b, axis = ctx.b, op.attrs["axis"]
    (keys, places), (other_keys, other_places) = rows

    def along(index: Val) -> Point:
        return Point((*point[:axis], index, *point[axis + 1:]))

    with b.for_(0, extent) as loop, ctx.scope():
        store(ctx, keys, Point((loop.i,)), element(ctx, op.operands[0], along(loop.i)))
        store(ctx, places, Point((loop.i,)), b.cast("trunc", loop.i, emit.I32))
    start = [emit.const(1, I64), keys.pointer, places.pointer, other_keys.pointer, other_places.pointer]

    def once(state: Sequence[Val]) -> list[Val]:
        width, from_keys, from_places, to_keys, to_places = state
        run = b.mul(width, 2)
        with b.for_(0, extent, run) as loop, ctx.scope():
            middle = b.min(b.add(loop.i, width), extent)
            _merge(ctx, op, _Pair(keys, from_keys, from_places), _Pair(keys, to_keys, to_places),
                   loop.i, middle, b.min(b.add(loop.i, run), extent))
        return [run, to_keys, to_places, from_keys, from_places]

    final = loop_while(ctx, start, lambda state: b.cmp("lt", state[0], extent), once)
    done = _Pair(keys, final[1], final[2])
    with b.for_(0, extent) as loop, ctx.scope():
        key, place = done.read(ctx, loop.i)
        store(ctx, out[0], along(loop.i), key)
        store(ctx, out[1], along(loop.i), place)


class _Pair:
    """Keys and their places, side by side."""

    def __init__(self, like: Memory, keys: Val, places: Val) -> None:
        one = (emit.const(1, I64),)
        self.keys, self.places = Memory(keys, one, like.dtype), Memory(places, one, int32)

    def read(self, ctx: Context, index: Val) -> tuple[Val, Val]:
        """Key and place at an index."""
        return load(ctx, self.keys, Point((index,))), load(ctx, self.places, Point((index,)))

    def write(self, ctx: Context, index: Val, item: tuple[Val, Val]) -> None:
        """Set key and place at an index."""
        store(ctx, self.keys, Point((index,)), item[0])
        store(ctx, self.places, Point((index,)), item[1])


def _merge(ctx: Context, op: Op, source: _Pair, target: _Pair, low: Val, middle: Val, high: Val) -> None:
    """Merge [low, middle) and [middle, high); the left run wins ties, which keeps the sort stable."""
    b = ctx.b

    def once(state: Sequence[Val]) -> list[Val]:
        left, right, to = state
        right_ended = b.cmp("ge", right, high)
        # An ended run is read at a place that exists; its value is not used.
        left_item = source.read(ctx, b.min(left, b.sub(middle, 1)))
        right_item = source.read(ctx, b.select(right_ended, low, right))
        first, second = (right_item[0], left_item[0]) if not op.attrs["descending"] else (left_item[0], right_item[0])
        take_right = b.and_(_less(b, first, second), b.not_(right_ended))
        take_right = b.or_(take_right, b.cmp("ge", left, middle))
        key, place = (b.select(take_right, r, x) for x, r in zip(left_item, right_item))
        target.write(ctx, to, (key, place))
        one = b.cast("zext", take_right, I64)
        return [b.add(left, b.sub(1, one)), b.add(right, one), b.add(to, 1)]

    loop_while(ctx, [low, middle, low], lambda state: b.cmp("lt", state[2], high), once)


def _less(b: Builder, x: Val, y: Val) -> Val:
    """x < y with NaN above everything."""
    if emit.elem(x.ty) == emit.I1:
        return b.cmp("ult", x, y)
    less = b.cmp("lt", x, y)
    if emit.is_float(x.ty):
        less = b.or_(less, b.and_(b.cmp("uno", y, y), b.cmp("ord", x, x)))
    return less


