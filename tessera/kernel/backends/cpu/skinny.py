"""Products of few rows, bound by the reading of the right operand: it is read once and goes straight to registers.

In: an `mma` that has one row when the kernel runs, two where W has elements of 8 or 4 bits, or up to ROWS where W
[K, N] is read along its rows. Out: loops that add each product to its element of C in one ascending chain, the same
that the packed kernels of `mma.py` compute (`mma_dot.py`). Called by `matmul.py`. More rows are better off with packed
W: of wide elements transposing is what takes the time, and sums of three rows take the registers that dequantizing
needs.

The lanes are columns. Each step of k takes one vector of W for a panel of columns (`weights.py`) and multiplies it with
one broadcast element of each row of A. A is copied to scratch first, which costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.context import ZERO, Context
from tessera.kernel.backends.cpu.elements import Point, element
from tessera.kernel.backends.cpu.emit import F32, I1, I32, I64, Val
from tessera.kernel.backends.cpu.loops import run_lanes
from tessera.kernel.backends.cpu.mma_dot import Dot, multiply_add, shifted_sums
from tessera.kernel.backends.cpu.operands import packable
from tessera.kernel.backends.cpu.weights import LARGEST_BLOCK, Weights, lanes
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Value

ROWS = 4  # that W [K, N] is multiplied with at once
DEPTH = 1024  # steps of k for which A lies in scratch and the sums in registers
ALONG_DEPTH = 16  # the same for W [K, N], whose rows are read along: the prefetcher follows that many streams
_PAIR = 2  # rows that narrow elements are multiplied with at once: the second one costs a tenth of the first
_PAGE = 4096  # bytes: rows of memory this far apart share a set of the first-level cache


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product as the loops need it: operands, sizes (i64) and where C lies."""

    a: Value
    w: Weights
    dot: Dot
    batch: tuple[Val, ...]
    m: Val
    n: Val
    k: Val
    c: Val
    ldc: Val
    accumulate: bool


def most_rows(w: Weights) -> int:
    """The rows for which this is the way to multiply."""
    if not w.transposes:
        return ROWS
    return _PAIR if w.bits <= 8 else 1


def _pitch(w: Weights) -> int:
    """Elements from row to row of A in scratch: the vector that copying may write too much lies behind each row."""
    return (DEPTH if w.transposes else LARGEST_BLOCK) + 64


def scratch_bytes() -> Dim:
    """What `multiply` needs."""
    return Dim.of(max(_PAIR * (DEPTH + 64), ROWS * (LARGEST_BLOCK + 64)) * 4)


def multiply(ctx: Context, product: Product, scratch: Val) -> None:
    """C[m, n] = A @ W, or C += with `accumulate`, for m <= `most_rows` and k > 0.

    Args:
        scratch: `scratch_bytes`, 64-byte aligned.
    """
    b, p = ctx.b, product
    depth = (DEPTH if p.w.transposes else max(ALONG_DEPTH, p.w.block)) // p.w.block * p.w.block
    with b.for_(0, p.k, depth) as block, ctx.scope():
        steps = b.min(b.sub(p.k, block.i), depth)
        with b.for_(0, most_rows(p.w)) as row, ctx.scope():
            _copy_row(ctx, p, row.i, b.gep(scratch, b.mul(row.i, _pitch(p.w)), p.dot.element), block.i, steps)
        going = b.or_(emit.const(int(p.accumulate), I1), b.cmp("gt", block.i, 0))
        _Strip(ctx, p, x=scratch, start=block.i, steps=steps, going=going).emit()


def _copy_row(ctx: Context, p: Product, row: Val, to: Val, start: Val, steps: Val) -> None:
    """A row of A as the kernels multiply it; the last one also stands for those that only fill a kernel up."""
    b, width = ctx.b, 2 * lanes(ctx)
    row, k_axis = b.min(row, b.sub(p.m, 1)), p.a.type.rank - 1

    def put(k: Val, mask: Val | None) -> None:
        x = element(ctx, p.a, Point((*p.batch, row, b.add(start, k)), k_axis, width, mask))
        x = x if emit.lanes(x.ty) else b.splat(x, width)
        if mask is not None:
            x = b.select(mask, x, 0)
        # Behind the last step there is room for a whole vector.
        b.store(packable(ctx, x, p.dot, p.dot.shift), b.gep(to, k, p.dot.element))

    run_lanes(ctx, steps, width, put)


class _Strip:
    """One block of k."""

    def __init__(self, ctx: Context, product: Product, *, x: Val, start: Val, steps: Val, going: Val) -> None:
        self.ctx, self.p, self.w = ctx, product, product.w
        self.x, self.start, self.steps, self.going = x, start, steps, going
        self.extra = int(product.dot.shift > 0)
        self.narrow = product.w.transposes and product.w.bits <= 8
        self.ty = emit.vec(lanes(ctx), product.dot.total)

    def emit(self) -> None:
        """Whole blocks of k several panels at once; what is left with a careful kernel."""
        ctx, b, block = self.ctx, self.ctx.b, self.w.block
        whole = b.mul(b.udiv(self.steps, block), block)
        if self.narrow:
            self._by_rows(self.p.n, whole)
            self._careful(ZERO, self.p.n, whole, whole)
            return
        unit = lanes(ctx) * self._panels_at_once()
        columns = b.mul(b.udiv(self.p.n, unit), unit)
        if self.w.pitch is not None:
            # Rows of two panels that lie pages apart throw each other out of the first-level cache.
            crowded = b.cmp("eq", b.and_(self.w.pitch, _PAGE - 1), 0)
            columns = b.select(crowded, ZERO, columns)
        self._by_rows(columns, whole)
        with b.for_(0, 2) as part, ctx.scope():  # the steps that are left, then the columns that are left
            last = b.cmp("eq", part.i, 1)
            first, end = b.select(last, columns, 0), b.select(last, self.p.n, columns)
            self._careful(first, end, b.select(last, 0, whole), whole)

    def _by_rows(self, end: Val, whole: Val) -> None:
        rows = most_rows(self.w)
        if rows == 1:
            self._fast(1, self._panels_at_once(), end, whole)
            return
        with self.ctx.b.if_(self.ctx.b.cmp("gt", self.p.m, 1)) as more, self.ctx.scope():
            self._fast(rows, 2, end, whole)
        with more.else_(), self.ctx.scope():
            self._fast(1, self._panels_at_once(), end, whole)

    def _panels_at_once(self) -> int:
        """Panels of one row: several sums in flight hide the latency of an addition.

        Two panels of narrow elements fill 16 registers; where there are more, they need more to keep up with memory.
        """
        return 4 if not self.w.transposes or (self.w.bits <= 8 and self.ctx.target.vector_registers > 16) else 2

    def _fast(self, rows: int, panels: int, end: Val, whole: Val) -> None:
        """`rows` x `panels` sums in registers, for the columns up to `end` and `whole` steps.

        Narrow elements, of which unrolled code is long, have no other code for the last columns: theirs is masked.
        """
        ctx, b, block, width = self.ctx, self.ctx.b, self.w.block, lanes(self.ctx)
        with ctx.scope(), b.apart("fast"), b.for_(0, end, panels * width) as column, ctx.scope(), \
                ctx.reading_ahead(panels * width, self.steps):
            columns = [b.add(column.i, i * width) for i in range(panels)]
            masks: list[Val | None] = [None] * panels
            if self.narrow:
                masks = [b.lane_mask(b.cast("trunc", b.min(b.sub(end, at), width), I32), width) for at in columns]
                columns = [b.min(at, b.sub(end, 1)) for at in columns]
            for at, mask in zip(columns, masks):
                self.w.find(at, mask)
            sums = self._sums(rows, columns, self.going, masks)
            with b.for_(0, b.udiv(whole, block), carry=sums) as loop, ctx.scope():
                here = b.opaque(loop.i)
                root = b.add(here, b.udiv(self.start, block))
                totals = list(loop.carry)
                for i, offset in self._turns(panels):
                    w = self.w.unit(self.w.steps(root, offset), columns[i], masks[i])
                    totals[i::panels] = self._add(totals[i::panels], b.add(b.mul(here, block), offset), w)
                loop.next(totals)
            self._finish(rows, loop.results, columns, masks)

    def _turns(self, panels: int) -> Iterator[tuple[int, int]]:
        """(panel, k) in the order in which they are multiplied; of bytes, whose runs are long, each k by turns."""
        pack = self.p.dot.pack
        turn = self.w.block if self.w.bits > 8 else pack
        for first in range(0, self.w.block, turn):
            for panel in range(panels):
                yield from ((panel, k) for k in range(first, first + turn, pack))

    def _careful(self, first: Val, end: Val, begin: Val, whole: Val) -> None:
        """Columns first .. end, steps from `begin` on, with masks and one k at a time behind the whole blocks.

        Of narrow elements it takes what is behind them only.
        """
        ctx, b, block, width, pack = self.ctx, self.ctx.b, self.w.block, lanes(self.ctx), self.p.dot.pack
        rows = most_rows(self.w)
        going = b.or_(self.going, b.cmp("gt", begin, 0))
        end = b.select(b.cmp("lt", begin, self.steps), end, first)
        with ctx.scope(), b.apart("careful"), b.for_(first, end, width) as column, ctx.scope(), \
                ctx.reading_ahead(width, self.steps):
            mask = b.lane_mask(b.cast("trunc", b.min(b.sub(end, column.i), width), I32), width)
            self.w.find(column.i, mask)
            sums = self._sums(rows, [column.i], going, [mask])
            if not self.narrow:
                with b.for_(b.udiv(begin, block), b.udiv(whole, block), carry=sums) as loop, ctx.scope():
                    here = b.opaque(loop.i)
                    root = b.add(here, b.udiv(self.start, block))
                    totals = list(loop.carry)
                    for offset in range(0, block, pack):
                        w = self.w.unit(self.w.steps(root, offset), column.i, mask)
                        totals = self._add(totals, b.add(b.mul(here, block), offset), w)
                    loop.next(totals)
                sums = loop.results
            with b.for_(whole, self.steps, pack, carry=sums) as rest, ctx.scope():
                k = b.add(self.start, rest.i)
                w = self.w.unit(lambda j: b.add(k, j), column.i, mask, self.p.k)
                rest.next(self._add(rest.carry, rest.i, w))
            self._finish(rows, rest.results, [column.i], [mask])

    def _add(self, sums: Sequence[Val], k: Val, w: Val) -> list[Val]:
        """One step of the chains of a panel: one for each row, and behind them what the dot's shift adds to all."""
        b, dot, width = self.ctx.b, self.p.dot, lanes(self.ctx)
        at, totals = b.gep(self.x, k, dot.element), []
        for row, total in enumerate(sums):
            if row == len(sums) - self.extra:
                totals.append(shifted_sums(b, self.ctx.target, dot, w, total))
                continue
            place = b.gep(at, row * _pitch(self.w), dot.element)
            x = b.splat(b.load(place, dot.unit, align=emit.bits(dot.element) // 8), width)
            totals.append(multiply_add(b, self.ctx.target, dot, x, w, total))
        return totals

    def _sums(self, rows: int, columns: Sequence[Val], going: Val, masks: Sequence[Val | None]) -> list[Val]:
        """What the chains go on from."""
        b, ty = self.ctx.b, self.ty
        with b.if_(going) as branch:
            found = [(self._output(row, at), mask) for row in range(rows) for at, mask in zip(columns, masks)]
            branch.give([b.load(at, ty) if mask is None else b.masked_load(at, ty, mask) for at, mask in found])
        with branch.else_():
            branch.give([emit.const(0, ty)] * (rows * len(columns)))
        return branch.results + [emit.const(0, ty)] * (self.extra * len(columns))

    def _finish(self, rows: int, totals: Sequence[Val], columns: Sequence[Val], masks: Sequence[Val | None]) -> None:
        b, count = self.ctx.b, len(columns)
        for row in range(rows):
            for i, (column, mask) in enumerate(zip(columns, masks)):
                total, at = totals[row * count + i], self._output(row, column)
                if self.extra:
                    total = b.sub(total, totals[rows * count + i])
                if mask is None:
                    b.store(total, at)
                else:
                    b.masked_store(total, at, mask)

    def _output(self, row: int, column: Val) -> Val:
        """Where C has an element; a row that only fills the kernel up is the last one, and so are its sums."""
        b = self.ctx.b
        at = b.min(emit.const(row, I64), b.sub(self.p.m, 1)) if row else ZERO
        return b.gep(self.p.c, b.add(b.mul(at, self.p.ldc), column), F32)
