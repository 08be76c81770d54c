"""Products of bytes with rows of 8- and 4-bit weights [N, K], which are read once and go straight to registers.

In: the left operand, as bytes computed on demand, and the memory of the weights, whose rows run along k. Out: 32-bit
sums of products, exact, handed to the caller as vectors of columns: `grouped.py` for sums that are scaled group by
group, `matmul.py` for integer products of few rows.

The lanes are columns: 16 bytes of each row are loaded and transposed as 32-bit units (`columns.transpose_parts`),
taken apart into planes of bytes (`byte_dot.py`) and multiplied with four bytes of each row of x. STRIP rows of x lie
in scratch meanwhile, chunk by chunk, with what the weights' offset adds to the sums of each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.byte_dot import CHUNK, ByteDot
from tessera.kernel.backends.cpu.columns import LINE, UNITS, transpose_parts
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory
from tessera.kernel.backends.cpu.emit import I8, I32, I64, Val
from tessera.kernel.dims import Dim

STRIP = 8  # rows of x that lie in scratch together
_SHARES = CHUNK * STRIP  # where a block of x has the offset's shares
_BLOCK = _SHARES + 4 * STRIP  # bytes of a chunk of x: the rows' bytes, then the shares
_FEW = 4  # rows that are multiplied together where a strip has no more, or registers hold no more
_TAILS = CHUNK * 16  # bytes in front of x: what is left of the rows of weights of a panel


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A product that is summed step by step along k.

    Attributes:
        weights: [N, K], int8 or int4, K side by side.
        bytes: (row, step, chunk of the step, mask) -> CHUNK elements of x as i32.
        m, n, k: sizes.
        chunks: chunks of k in a step.
        start: what a row's totals are before the first step.
        prepare: (column, mask) is called before the steps of a panel of columns.
        step: (step, row, column, mask, total, sums of the step) -> the total after it.
        finish: (row, column, mask, total) takes what a row has come to.
        scratch: `scratch_bytes`.
    """

    weights: Memory
    bytes: Callable[[Val, Val, int, Val | None], Val]
    m: Val
    n: Val
    k: Val
    chunks: int = 1
    start: Val
    prepare: Callable[[Val, Val], None]
    step: Callable[[Val, Val, Val, Val, Val, Val], Val]
    finish: Callable[[Val, Val, Val, Val], None]
    scratch: Val


def scratch_bytes(depth: Dim) -> Dim:
    """What `multiply` needs for products of this k."""
    return depth.ceildiv(CHUNK) * _BLOCK + _TAILS


def lanes(ctx: Context) -> int:
    """Columns of a panel."""
    return ctx.target.lanes(32)


def multiply(ctx: Context, p: Rows) -> None:
    """Run the steps of all rows and columns; k may be ragged where a step is one chunk."""
    b, width = ctx.b, lanes(ctx)
    dot = ByteDot(ctx.target, p.weights.dtype, width)
    with b.for_(0, p.m, STRIP) as first, ctx.scope():
        rows = b.min(b.sub(p.m, first.i), STRIP)
        _copy(ctx, p, dot, first.i, rows)
        with b.for_(0, p.n, width) as column, ctx.scope():
            left = b.min(b.sub(p.n, column.i), width)
            mask = b.lane_mask(b.cast("trunc", left, I32), width)
            p.prepare(column.i, mask)
            panel = _Panel(ctx, p, dot, column.i, left, mask)
            most = STRIP if dot.sums == 1 or ctx.target.vector_registers > 16 else _FEW
            with b.for_(0, rows, most) as part, ctx.scope():
                _by_count(ctx, b.sub(rows, part.i), most, lambda count: panel.run(first.i, part.i, rows, count))


def _by_count(ctx: Context, rows: Val, most: int, run: Callable[[int], None]) -> None:
    """run(count) with the smallest count there is code for that holds the rows."""
    b = ctx.b
    with b.if_(b.cmp("eq", rows, 1)) as one, ctx.scope(), b.apart("row"):
        run(1)
    with one.else_(), ctx.scope():
        if most == _FEW:
            with b.apart("rows"):
                run(_FEW)
            return
        with b.if_(b.cmp("le", rows, _FEW)) as few, ctx.scope(), b.apart("rows"):
            run(_FEW)
        with few.else_(), ctx.scope(), b.apart("rows"):
            run(most)


def _whole(ctx: Context, p: Rows) -> Val:
    """Steps that are whole."""
    return ctx.b.udiv(p.k, p.chunks * CHUNK)


def _rest(ctx: Context, p: Rows) -> Val:
    """Elements along k that the last chunk has, where it is not whole."""
    return ctx.b.sub(p.k, ctx.b.mul(_whole(ctx, p), p.chunks * CHUNK))


def _copy(ctx: Context, p: Rows, dot: ByteDot, first: Val, rows: Val) -> None:
    """Rows of x as the products want them, and the shares of the weights' offset."""
    b = ctx.b
    order = [8 * i + place for i in range(CHUNK // 8) for place in dot.order]

    def put(row: Val, step: Val, mask: Val | None) -> None:
        for chunk in range(p.chunks):
            values = p.bytes(b.add(first, row), step, chunk, mask)
            values = values if mask is None else b.select(mask, values, 0)
            block = _block(ctx, p, step, chunk)
            b.store(b.shuffle(b.cast("trunc", values, I8), None, order), b.gep(block, b.mul(row, CHUNK), I8), align=1)
            share = b.mul(b.intrinsic("llvm.vector.reduce.add", [values], I32, [values.ty]), dot.offset)
            b.store(share, b.gep(b.gep(block, _SHARES, I8), row, I32))

    with b.for_(0, rows) as row, ctx.scope():
        with b.for_(0, _whole(ctx, p)) as step, ctx.scope():
            put(row.i, step.i, None)
        if p.chunks == 1:
            rest = _rest(ctx, p)
            with b.if_(b.cmp("gt", rest, 0)), ctx.scope():
                put(row.i, _whole(ctx, p), b.lane_mask(b.cast("trunc", rest, I32), CHUNK))


def _block(ctx: Context, p: Rows, step: Val, chunk: int) -> Val:
    """Where a chunk of x lies."""
    b = ctx.b
    return b.gep(p.scratch, b.add(b.mul(step, p.chunks * _BLOCK), _TAILS + chunk * _BLOCK), I8)


class _Panel:
    """Neighbouring columns, as many as a vector has lanes; the last column stands for those that are lacking."""

    def __init__(self, ctx: Context, p: Rows, dot: ByteDot, column: Val, left: Val, mask: Val) -> None:
        self.ctx, self.p, self.dot, self.column, self.mask = ctx, p, dot, column, mask
        b, weights = ctx.b, p.weights
        self.size = CHUNK * weights.dtype.bits // 8  # bytes of a chunk of a row
        self.pitch = self._bytes(weights.strides[0])
        start = b.gep(weights.pointer, self._bytes(b.add(weights.offset, b.mul(column, weights.strides[0]))), I8)
        last = b.sub(left, 1)
        self.rows = [b.gep(start, b.mul(b.min(emit.const(lane, I64), last), self.pitch), I8) if lane else start
                     for lane in range(lanes(ctx))]
        self.tails = self._copy_tails() if p.chunks == 1 else None

    def _bytes(self, elements: Val) -> Val:
        return self.ctx.b.lshr(elements, 1) if self.p.weights.dtype.bits == 4 else elements

    def _copy_tails(self) -> list[Val]:
        """What each row has behind its whole chunks, in scratch; where a row would start that ends there.

        x is zero behind k, so that it does not matter what lies there in scratch.
        """
        ctx, b = self.ctx, self.ctx.b
        done = b.mul(_whole(ctx, self.p), self.size)
        rest = self._bytes(b.add(_rest(ctx, self.p), 8 // self.p.weights.dtype.bits - 1))
        tails = [b.gep(self.p.scratch, lane * self.size, I8) for lane in range(len(self.rows))]
        with b.if_(b.cmp("gt", rest, 0)):
            for tail, row in zip(tails, self.rows):
                b.copy(tail, b.gep(row, done, I8), rest)
        return [b.gep(tail, b.sub(0, done), I8) for tail in tails]

    def run(self, first: Val, part: Val, rows: Val, count: int) -> None:
        """All steps of `count` rows of the strip from row `part` on; only those below `rows` exist."""
        ctx, b, p = self.ctx, self.ctx.b, self.p
        x = b.gep(p.scratch, b.add(b.mul(part, CHUNK), _TAILS), I8)
        shares = b.gep(b.gep(p.scratch, _TAILS + _SHARES, I8), part, I32)
        last = b.sub(b.add(first, rows), 1)
        numbers = [b.min(b.add(b.add(first, part), row), last) if count > 1 else b.add(first, part)
                   for row in range(count)]
        totals, whole = [p.start] * count, _whole(ctx, p)
        if self.tails is None:
            totals = self._steps(ZERO, whole, self.rows, x, shares, numbers, totals)
        else:
            with b.for_(0, 2, carry=totals) as turn, ctx.scope():  # whole chunks, then the one that is left
                tail = b.cmp("eq", turn.i, 1)
                end = b.select(tail, b.ceil_div(p.k, CHUNK), whole)
                pointers = [b.select(tail, at, row) for at, row in zip(self.tails, self.rows)]
                turn.next(self._steps(b.select(tail, whole, ZERO), end, pointers, x, shares, numbers, turn.carry))
            totals = turn.results
        for row, total in enumerate(totals):
            with b.if_(b.cmp("lt", b.add(part, row), rows)), ctx.scope():
                p.finish(b.add(b.add(first, part), row), self.column, self.mask, total)

    def _steps(self, begin: Val, end: Val, pointers: Sequence[Val], x: Val, shares: Val, numbers: Sequence[Val],
               totals: Sequence[Val]) -> list[Val]:
        ctx, b, p = self.ctx, self.ctx.b, self.p
        with b.for_(begin, end, carry=totals) as loop, ctx.scope():
            step = b.opaque(loop.i)
            self._read_ahead(step)
            sums = [emit.const(0, emit.vec(lanes(ctx), I32))] * len(totals)
            for chunk in range(p.chunks):
                at = b.mul(b.add(b.mul(step, p.chunks), chunk), self.size)
                block = b.add(b.mul(step, p.chunks * _BLOCK), chunk * _BLOCK)
                sums = self._chunk([b.gep(row, at, I8) for row in pointers], b.gep(x, block, I8),
                                   b.gep(shares, block, I8), sums)
            loop.next([p.step(step, number, self.column, self.mask, total, part)
                       for number, total, part in zip(numbers, loop.carry, sums)])
        return loop.results

    def _chunk(self, weights: Sequence[Val], x: Val, shares: Val, totals: Sequence[Val]) -> list[Val]:
        """totals + the products of a chunk, for each row of x."""
        b, dot, width = self.ctx.b, self.dot, lanes(self.ctx)
        sums = [dot.start() for _ in totals]
        quad = 0
        for run in range(0, self.size, 4 * UNITS):
            loaded = [b.load(b.gep(row, run, I8), emit.vec(UNITS, I32), align=1) for row in weights]
            groups = range(width // UNITS)
            for unit in transpose_parts(b, [b.concat([loaded[UNITS * g + i] for g in groups]) for i in range(UNITS)]):
                for number, plane in enumerate(dot.planes(b, unit)):
                    for row in range(len(sums)):
                        at = b.gep(x, CHUNK * row + 4 * (quad + dot.quads[number]), I8)
                        sums[row] = dot.add(b, sums[row], number, plane, b.splat(b.load(at, I32, align=1), width))
                quad += dot.quads[-1] + 1
        return [b.sub(b.add(total, dot.total(b, part)), b.splat(b.load(b.gep(shares, row, I32), I32), width))
                for row, (total, part) in enumerate(zip(totals, sums))]

    def _read_ahead(self, step: Val) -> None:
        """Ask for a part of the next panel, as much as this one takes in a step: in the order of memory, which is a
        tenth faster than a line of each row, where rows follow each other; else so."""
        b, width, size = self.ctx.b, lanes(self.ctx), self.size * self.p.chunks
        turns = max(1, LINE // size)  # steps that share the lines of a place
        in_order = b.cmp("eq", self.pitch, self._bytes(self.p.k))
        onward = b.select(in_order, emit.const(width * size, I64), size)
        row, line = b.select(in_order, 0, self.pitch), b.select(in_order, LINE, b.mul(self.pitch, turns))
        place = b.add(b.mul(self.pitch, width), b.add(b.mul(step, onward), b.mul(row, b.and_(step, turns - 1))))
        for number in range(width * max(size, LINE) // (LINE * turns)):
            b.prefetch(b.gep(self.rows[0], b.add(place, b.mul(line, number)), I8), locality=2)
