"""The right operand of a product, a vector of neighbouring columns at a time, wherever it comes from.

In: a value [K, N] or [B, K, N], read from memory or computed (dequantized, say). Out: units of consecutive k
(`mma_dot.py`) for a panel of columns. Where the memory behind it runs along k, rows of [N, K] are transposed in
registers (`columns.py`), which takes blocks of k whose code is laid out one step after the other. `skinny.py`
multiplies the units at once; the packing of `operands.py` stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.columns import run_elements, step
from tessera.kernel.backends.cpu.context import Context, Memory
from tessera.kernel.backends.cpu.elements import ANY, Point, element, hoist, operand_points
from tessera.kernel.backends.cpu.emit import F32, I32, Val
from tessera.kernel.backends.cpu.mma_dot import Dot
from tessera.kernel.ir import Value

BLOCK = 16  # steps of k whose code is laid out one after the other, at least
LARGEST_BLOCK = 64


class Weights:
    """One right operand at one batch index.

    Attributes:
        block: steps of k whose code is laid out: whole runs of every row that is transposed, whole groups of a reshape.
        transposes: memory runs along k; else along the columns.
        pitch: the distance of the rows that are transposed, in bytes.
        bits: of the narrowest elements that are transposed.
    """

    def __init__(self, ctx: Context, value: Value, batch: tuple[Val, ...], dot: Dot) -> None:
        self._ctx, self._value, self._dot = ctx, value, dot
        self._batch = batch if value.type.rank > 2 else ()
        rows, group = [], dot.pack
        for leaf, memory, axis in _leaves(ctx, value, self._point(ANY, ANY, None)):
            if memory is None:
                group = math.lcm(group, _group(leaf))
            elif axis is not None and memory.strides[axis].const not in (0, 1) and run_elements(memory):
                rows.append((memory, axis))
                group = math.lcm(group, run_elements(memory))
        self.bits = min((memory.dtype.bits for memory, _ in rows), default=32)
        self.block = math.lcm(group, BLOCK) if group <= LARGEST_BLOCK else BLOCK
        self.transposes, self.pitch = bool(rows), None
        if rows:
            memory, axis = max(rows, key=lambda row: row[0].dtype.bits)
            self.pitch = ctx.b.lshr(ctx.b.mul(memory.strides[axis], memory.dtype.bits), 3)

    def find(self, column: Val, mask: Val | None) -> None:
        """Compute what a panel needs whatever k: the addresses of its rows, a factor of each column."""
        hoist(self._ctx, self._value, self._point(ANY, column, mask))

    def steps(self, root: Val, offset: int) -> Callable[[int], Val]:
        """The index of the j-th step of k from an offset in a block on."""
        return lambda j: step(self._ctx, root, self.block, offset + j)

    def unit(self, k: Callable[[int], Val], column: Val, mask: Val | None, end: Val | None = None) -> Val:
        """A unit for each column of a panel: the steps k(0), k(1), ...; those from `end` on are zero."""
        b, dot, width = self._ctx.b, self._dot, lanes(self._ctx)
        found = []
        for place in range(dot.pack):
            at = k(place)
            exists = b.cmp("lt", at, end) if end is not None and place else None
            w = self._vector(at if exists is None else b.select(exists, at, k(0)), column, mask)
            found.append(w if exists is None else b.select(b.splat(exists, width), w, 0))
        if dot.pack == 1:
            return found[0]
        bits = 32 // dot.pack
        unit = None
        for place, w in enumerate(found):
            w = b.bitcast(w, emit.vec(width, I32))
            if dot.total == F32:  # bf16: the upper half of an f32
                w = b.lshr(w, bits)
            w = b.shl(b.and_(w, (1 << bits) - 1), bits * place) if place else b.and_(w, (1 << bits) - 1)
            unit = w if unit is None else b.or_(unit, w)
        assert unit is not None
        return unit

    def units(self, column: Val, left: Val, start: Val, depth: Val, put: Callable[[Val, Val], None]) -> None:
        """put(number, unit) for `depth` steps of k from `start`, a multiple of `block`, on.

        Args:
            left: how many columns there are from `column` on; where they are fewer than a panel's, the first one
                stands for those that are lacking.
        """
        ctx, b, width, pack = self._ctx, self._ctx.b, lanes(self._ctx), self._dot.pack
        mask = b.lane_mask(b.cast("trunc", b.min(left, width), I32), width)
        with ctx.scope(), ctx.reading_ahead(width, depth):
            self.find(column, mask)
            whole = b.udiv(depth, self.block)
            with b.for_(0, whole) as loop, ctx.scope():
                here = b.opaque(loop.i)
                root, first = b.add(here, b.udiv(start, self.block)), b.mul(here, self.block // pack)
                for offset in range(0, self.block, pack):
                    put(b.add(first, offset // pack), self.unit(self.steps(root, offset), column, mask))
            with b.for_(b.mul(whole, self.block), depth, pack) as rest, ctx.scope():
                k = b.add(start, rest.i)
                put(b.udiv(rest.i, pack),
                    self.unit(lambda j: b.add(k, j), column, mask, b.add(start, depth)))

    def _point(self, k: Val, column: Val, mask: Val | None) -> Point:
        return Point((*self._batch, k, column), len(self._batch) + 1, lanes(self._ctx), mask)

    def _vector(self, k: Val, column: Val, mask: Val | None) -> Val:
        w = element(self._ctx, self._value, self._point(k, column, mask))
        return w if emit.lanes(w.ty) else self._ctx.b.splat(w, lanes(self._ctx))


def lanes(ctx: Context) -> int:
    """Columns of a panel."""
    return ctx.target.lanes(32)


def _leaves(ctx: Context, value: Value, point: Point) -> Iterator[tuple[Value, Memory | None, int | None]]:
    """What a lazy value is computed from: (value, memory, axis of the lanes); without memory for a reshape."""
    memory, op = ctx.memory.get(value.name), value.op
    if memory is None and op is not None and op.name in ("load", "gather"):
        memory = ctx.memory[op.operands[0].name] if op.name == "load" else None
    elif memory is None and op is not None and value.type.rank:
        if op.name == "reshape":
            yield from ((v, None, None) for v in (value, op.operands[0]))
        for operand, at in operand_points(ctx, op, point):
            yield from _leaves(ctx, operand, at)
    if memory is not None:
        yield value, memory, point.axis


def _group(value: Value) -> int:
    """The length of a last dim that may be a group of k, else 1."""
    size = value.type.shape[-1].const if value.type.rank else None
    return size if size is not None and 1 < size <= LARGEST_BLOCK else 1
