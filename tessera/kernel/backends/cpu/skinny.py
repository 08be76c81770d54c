"""Products of few rows, bound by the reading of the right operand: it is read once and goes straight to registers.

In: an `mma` whose rows are few when the kernel runs, at most ROWS. Out: loops that add each product to its element
of C in one ascending chain, the same that the packed kernels of `mma.py` compute (`mma_dot.py`). Called by `matmul.py`.

The lanes are columns. Each step of k takes one vector of W for a panel of columns, wherever it comes from: a row of
[K, N], rows of [N, K] transposed in registers (`columns.py`), and whatever the program computes from them
(dequantization, say), and multiplies it with one broadcast element of each row of A. A is copied to scratch first,
which costs next to nothing: it is small against W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.columns import run_elements, step
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory
from tessera.kernel.backends.cpu.elements import ANY, Point, element, hoist, operand_points
from tessera.kernel.backends.cpu.emit import F32, I1, I32, I64, Builder, Val
from tessera.kernel.backends.cpu.loops import run_lanes
from tessera.kernel.backends.cpu.mma_dot import Dot, multiply_add, shifted_sums
from tessera.kernel.backends.cpu.operands import packable
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Value

ROWS = 16  # from more rows on, packing W pays
DEPTH = 1024  # steps of k for which A lies in scratch and the sums in registers
ALONG_DEPTH = 16  # the same for W [K, N], whose rows are read along: the prefetcher follows that many streams
PITCH = DEPTH + 16  # elements from row to row of A: not a power of two, whose addresses would share a cache set
BLOCK = 16  # steps of k whose code is laid out one after the other, at least
_LARGEST_BLOCK = 64
_MOST, _FAST = 8, 4  # rows that are computed together: five and more, two to four; one has a kernel of its own
_PAGE = 4096  # bytes: rows of memory this far apart share a set of the first-level cache


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product as the loops need it: operands, sizes (i64) and where C lies."""

    a: Value
    w: Value
    dot: Dot
    batch: tuple[Val, ...]
    m: Val
    n: Val
    k: Val
    c: Val
    ldc: Val
    accumulate: bool
    most_rows: int  # what is known of m

    @property
    def w_batch(self) -> tuple[Val, ...]:
        return self.batch if self.w.type.rank > 2 else ()


def scratch_bytes() -> Dim:
    """What `multiply` needs."""
    return Dim.of(ROWS * PITCH * 4)


def multiply(ctx: Context, product: Product, scratch: Val) -> None:
    """C[m, n] = A @ W, or C += with `accumulate`, for m <= ROWS and k > 0.

    Args:
        scratch: `scratch_bytes`, 64-byte aligned.
    """
    b, p = ctx.b, product
    reading = _Reading(ctx, p)
    with b.for_(0, p.k, reading.depth) as block, ctx.scope():
        steps = b.min(b.sub(p.k, block.i), reading.depth)
        _copy_rows(ctx, p, scratch, block.i, steps)
        going = b.or_(emit.const(int(p.accumulate), I1), b.cmp("gt", block.i, 0))
        with b.for_(0, p.m, _MOST) as first, ctx.scope():
            rows = b.min(b.sub(p.m, first.i), _MOST)
            x = b.gep(scratch, b.mul(first.i, PITCH), p.dot.element)
            c = b.gep(p.c, b.mul(first.i, p.ldc), F32)
            _Strip(ctx, p, reading, x=x, c=c, rows=rows, start=block.i, steps=steps, going=going).emit()


def lanes(ctx: Context) -> int:
    """Columns of a panel."""
    return ctx.target.lanes(32)


def _copy_rows(ctx: Context, p: Product, scratch: Val, start: Val, steps: Val) -> None:
    """A's rows as the kernels multiply them; rows that only fill a kernel up are zero."""
    b, ty = ctx.b, p.dot.element
    width = 2 * lanes(ctx)
    filled = b.min(b.and_(b.add(p.m, _MOST - 1), -_MOST), ROWS)
    k_axis = p.a.type.rank - 1
    with b.for_(0, p.m) as row, ctx.scope():
        to = b.gep(scratch, b.mul(row.i, PITCH), ty)
        hoist(ctx, p.a, Point((*p.batch, row.i, ANY), k_axis))

        def put(k: Val, mask: Val | None) -> None:
            x = element(ctx, p.a, Point((*p.batch, row.i, b.add(start, k)), k_axis, width, mask))
            x = x if emit.lanes(x.ty) else b.splat(x, width)
            if mask is not None:
                x = b.select(mask, x, 0)
            # Behind the last step there is room for a whole vector.
            b.store(packable(ctx, x, p.dot, p.dot.shift), b.gep(to, k, ty))

        run_lanes(ctx, steps, width, put)
    with b.for_(p.m, filled) as row:
        b.fill(b.gep(scratch, b.mul(row.i, PITCH), ty), 0, b.mul(steps, emit.bits(ty) // 8))


class _Reading:
    """How W is best read: what memory it is computed from, and which way that runs.

    Attributes:
        block: steps of k whose code is laid out: whole runs of every row that is transposed, whole groups of a reshape.
        depth: steps of k before the next columns are read.
        pitch: the distance of W's rows in bytes, where they are transposed.
        turn: steps of k of one panel before it is the next one's turn.
    """

    def __init__(self, ctx: Context, product: Product) -> None:
        b, rows, group = ctx.b, [], product.dot.pack
        indices = (*product.w_batch, ANY, ANY)
        for value, memory, axis in _leaves(ctx, product.w, Point(indices, len(indices) - 1, lanes(ctx))):
            if memory is None:
                group = math.lcm(group, _group(value))
            elif axis is not None and memory.strides[axis].const not in (0, 1) and run_elements(memory):
                rows.append((memory, axis))
                group = math.lcm(group, run_elements(memory))
        narrow = min((memory.dtype.bits for memory, _ in rows), default=32)
        self.block = math.lcm(group, BLOCK) if group <= _LARGEST_BLOCK else BLOCK
        self.depth = (DEPTH if rows else max(ALONG_DEPTH, self.block)) // self.block * self.block
        self.turn = self.block if narrow > 8 else product.dot.pack
        # Narrow elements need more panels to keep up with memory; in groups, two of them fill 16 registers.
        ample = self.block == BLOCK or ctx.target.vector_registers > 16
        self._single = 4 if not rows or (narrow <= 8 and ample) else 2
        self.pitch = None
        if rows:
            memory, axis = max(rows, key=lambda row: row[0].dtype.bits)
            self.pitch = b.lshr(b.mul(memory.strides[axis], memory.dtype.bits), 3)

    def panels(self, rows: int) -> int:
        """Panels at once: several sums in flight hide the latency of an addition."""
        return self._single if rows == 1 else _MOST // rows


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
    return size if size is not None and 1 < size <= _LARGEST_BLOCK else 1


def _steps(ctx: Context, root: Val, block: int, offset: int) -> Callable[[int], Val]:
    """The index of the j-th step of k from an offset in a block on."""
    return lambda j: step(ctx, root, block, offset + j)


def _opaque(b: Builder, index: Val) -> Val:
    """The same number, but nothing that LLVM knows how to count: its search for the best addresses of some dozens of
    rows would take longer than all the rest of its work, and finds nothing."""
    return b.emit(f'call i64 asm "", "=r,0"({index})', I64)


class _Strip:
    """Up to eight rows of C for one block of k."""

    def __init__(self, ctx: Context, product: Product, reading: _Reading, *, x: Val, c: Val, rows: Val, start: Val,
                 steps: Val, going: Val) -> None:
        self.ctx, self.p, self.reading = ctx, product, reading
        self.x, self.c, self.rows = x, c, rows
        self.start, self.steps, self.going = start, steps, going
        self.extra = int(product.dot.shift > 0)
        self.ty = emit.vec(lanes(ctx), product.dot.total)

    def emit(self) -> None:
        """Whole panels by whole blocks of k with fast kernels; what is left, and many rows, with a careful one."""
        b, block = self.ctx.b, self.reading.block
        whole = b.mul(b.udiv(self.steps, block), block)
        unit = lanes(self.ctx) * max(self.reading.panels(rows) for rows in (1, _FAST))
        columns = b.mul(b.udiv(self.p.n, unit), unit)
        if self.p.most_rows > 1:
            begin = self._fast(columns, whole)
        else:
            self._one_row(columns, whole)
            begin = whole
        with b.for_(0, 2) as part, self.ctx.scope():  # the steps that are left, then the columns that are left
            last = b.cmp("eq", part.i, 1)
            first, end = b.select(last, columns, 0), b.select(last, self.p.n, columns)
            self._careful(first, end, b.select(last, 0, begin), whole)

    def _fast(self, columns: Val, whole: Val) -> Val:
        """The step up to which the columns are done: 0 for more rows than there is a fast kernel for."""
        b, ctx = self.ctx.b, self.ctx
        many = b.cmp("gt", self.rows, _FAST)
        if self.reading.pitch is not None:
            many = b.or_(many, b.and_(self._crowded(), b.cmp("gt", self.rows, 1)))
        with b.if_(many) as branch:
            branch.give([emit.const(0, I64)])
        with branch.else_(), ctx.scope():
            with b.if_(b.cmp("gt", self.rows, 1)) as rows, ctx.scope():
                self._panels(_FAST, self.reading.panels(_FAST), columns, whole)
            with rows.else_(), ctx.scope():
                self._one_row(columns, whole)
            branch.give([whole])
        return branch.results[0]

    def _one_row(self, columns: Val, whole: Val) -> None:
        panels = self.reading.panels(1)
        if self.reading.pitch is None:
            self._panels(1, panels, columns, whole)
            return
        with self.ctx.b.if_(self._crowded()) as branch, self.ctx.scope():
            self._panels(1, 1, columns, whole)
        with branch.else_(), self.ctx.scope():
            self._panels(1, panels, columns, whole)

    def _crowded(self) -> Val:
        """Whether the rows of two panels throw each other out of the first-level cache."""
        assert self.reading.pitch is not None
        return self.ctx.b.cmp("eq", self.ctx.b.and_(self.reading.pitch, _PAGE - 1), 0)

    # -- kernels ------------------------------------------------------------------------------------------

    def _panels(self, rows: int, panels: int, end: Val, whole: Val) -> None:
        """`rows` x `panels` sums in registers, for the columns up to `end` and `whole` steps."""
        ctx, b, block, width = self.ctx, self.ctx.b, self.reading.block, lanes(self.ctx)
        with b.for_(0, end, panels * width) as column, ctx.scope(), ctx.reading_ahead(panels * width):
            columns = [b.add(column.i, i * width) for i in range(panels)]
            for at in columns:
                hoist(ctx, self.p.w, self._point(ANY, at, None))
            with b.for_(0, b.udiv(whole, block), carry=self._start(rows, columns, self.going, None)) as loop, \
                    ctx.scope():
                here = _opaque(b, loop.i)
                root = b.add(here, b.udiv(self.start, block))
                sums = list(loop.carry)
                for i, offset in self._turns(panels):
                    w = self._weights(_steps(ctx, root, block, offset), columns[i], None)
                    sums[i::panels] = self._add(sums[i::panels], b.add(b.mul(here, block), offset), w)
                loop.next(sums)
            self._finish(loop.results, columns, None)

    def _turns(self, panels: int) -> Iterator[tuple[int, int]]:
        """(panel, k) in the order in which they are multiplied."""
        turn, pack = self.reading.turn, self.p.dot.pack
        for first in range(0, self.reading.block, turn):
            for panel in range(panels):
                yield from ((panel, k) for k in range(first, first + turn, pack))

    def _careful(self, first: Val, end: Val, begin: Val, whole: Val) -> None:
        """Columns first .. end, steps from `begin` on, with masks and one k at a time behind the whole blocks."""
        rows = _MOST if self.p.most_rows > _FAST else _FAST if self.p.most_rows > 1 else 1
        ctx, b, block, width, pack = self.ctx, self.ctx.b, self.reading.block, lanes(self.ctx), self.p.dot.pack
        going = b.or_(self.going, b.cmp("gt", begin, 0))
        end = b.select(b.cmp("lt", begin, self.steps), end, first)
        with b.for_(first, end, width) as column, ctx.scope(), ctx.reading_ahead(width):
            mask = b.lane_mask(b.cast("trunc", b.min(b.sub(end, column.i), width), I32), width)
            hoist(ctx, self.p.w, self._point(ANY, column.i, mask))
            sums = self._start(rows, [column.i], going, mask)
            with b.for_(b.udiv(begin, block), b.udiv(whole, block), carry=sums) as loop, ctx.scope():
                here = _opaque(b, loop.i)
                root = b.add(here, b.udiv(self.start, block))
                totals = list(loop.carry)
                for offset in range(0, block, pack):
                    w = self._weights(_steps(ctx, root, block, offset), column.i, mask)
                    totals = self._add(totals, b.add(b.mul(here, block), offset), w)
                loop.next(totals)
            with b.for_(whole, self.steps, pack, carry=loop.results) as rest, ctx.scope():
                k = b.add(self.start, rest.i)
                w = self._weights(lambda j: b.add(k, j), column.i, mask, self.p.k)
                rest.next(self._add(rest.carry, rest.i, w))
            self._finish(rest.results, [column.i], mask)

    def _point(self, k: Val, column: Val, mask: Val | None) -> Point:
        batch = self.p.w_batch
        return Point((*batch, k, column), len(batch) + 1, lanes(self.ctx), mask)

    def _weights(self, k: Callable[[int], Val], column: Val, mask: Val | None, end: Val | None = None) -> Val:
        """A unit of W for each column of a panel: the steps k(0), k(1), ...; those from `end` on are zero."""
        b, dot = self.ctx.b, self.p.dot
        found = []
        for place in range(dot.pack):
            at = k(place)
            exists = b.cmp("lt", at, end) if end is not None and place else None
            w = self._vector(at if exists is None else b.select(exists, at, k(0)), column, mask)
            found.append(w if exists is None else b.select(b.splat(exists, lanes(self.ctx)), w, 0))
        if dot.pack == 1:
            return found[0]
        bits = 32 // dot.pack
        unit = None
        for place, w in enumerate(found):
            w = b.bitcast(w, emit.vec(lanes(self.ctx), I32))
            if dot.total == F32:  # bf16: the upper half of an f32
                w = b.lshr(w, bits)
            w = b.shl(b.and_(w, (1 << bits) - 1), bits * place) if place else b.and_(w, (1 << bits) - 1)
            unit = w if unit is None else b.or_(unit, w)
        assert unit is not None
        return unit

    def _vector(self, k: Val, column: Val, mask: Val | None) -> Val:
        w = element(self.ctx, self.p.w, self._point(k, column, mask))
        return w if emit.lanes(w.ty) else self.ctx.b.splat(w, lanes(self.ctx))

    def _add(self, sums: Sequence[Val], k: Val, w: Val) -> list[Val]:
        """One step of the chains of a panel: one for each row, and behind them what the dot's shift adds to all."""
        b, dot, width = self.ctx.b, self.p.dot, lanes(self.ctx)
        at = b.gep(self.x, k, dot.element)
        totals = []
        for row, total in enumerate(sums):
            if row == len(sums) - self.extra:
                totals.append(shifted_sums(b, self.ctx.target, dot, w, total))
                continue
            x = b.splat(b.load(b.gep(at, row * PITCH, dot.element), dot.unit, align=emit.bits(dot.element) // 8), width)
            totals.append(multiply_add(b, self.ctx.target, dot, x, w, total))
        return totals

    def _start(self, rows: int, columns: Sequence[Val], going: Val, mask: Val | None) -> list[Val]:
        b, ty = self.ctx.b, self.ty
        last = b.sub(self.rows, 1)
        with b.if_(going) as branch:
            # A row that only fills the kernel up stands for the last row there is.
            found = [self._output(b.min(emit.const(row, I64), last) if row else ZERO, at)
                     for row in range(rows) for at in columns]
            branch.give([b.load(at, ty) if mask is None else b.masked_load(at, ty, mask) for at in found])
        with branch.else_():
            branch.give([emit.const(0, ty)] * (rows * len(columns)))
        return branch.results + [emit.const(0, ty)] * (self.extra * len(columns))

    def _output(self, row: Val, column: Val) -> Val:
        return self.ctx.b.gep(self.c, self.ctx.b.add(self.ctx.b.mul(row, self.p.ldc), column), F32)

    def _finish(self, totals: Sequence[Val], columns: Sequence[Val], mask: Val | None) -> None:
        b, count = self.ctx.b, len(columns)
        rows = len(totals) // count - self.extra
        for row in range(rows):
            with b.if_(b.cmp("gt", self.rows, row)):
                for i, column in enumerate(columns):
                    total = totals[row * count + i]
                    if self.extra:
                        total = b.sub(total, totals[rows * count + i])
                    at = self._output(emit.const(row, I64), column)
                    if mask is None:
                        b.store(total, at)
                    else:
                        b.masked_store(total, at, mask)
