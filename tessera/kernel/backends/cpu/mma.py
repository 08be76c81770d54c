"""Matrix products, blocked for the caches and packed for the registers.

In: two operands that can be read a vector at a time (`Source`), or packed weights (`Panels`), and a row-major block C
of f32 or int32. Out: instructions that compute the product into C. Called by `matmul.py`.

The contract that the bitwise guarantees stand on: an element of C is one chain of sums with k ascending, from 0 or
from what stood in C; a step takes what one unit holds (`mma_dot.py`), for f32 acc = fma(a_k, w_k, acc). Which kernel
computes it, how K is blocked and how work is split changes where the chain is computed, never its order: every row
has the same bits at any M.

The loops, from the outside: columns of C that share packed W (`width`); its rows, as many as fit a chunk of A in the
second-level cache (`mc`); blocks of k (`kc`); the register tiles of `mma_micro.py`. W is packed once, while the first
rows are computed, A a chunk at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tessera.kernel.backends.cpu.emit import F32, I1, I32, I64, Builder, Val, const, vec
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.backends.cpu.mma_dot import Dot, shifted_sums
from tessera.kernel.backends.cpu.mma_micro import FEW, Kernel, block_kernel
from tessera.kernel.backends.cpu.mma_pack import UNIT, Source, pack_panels, pack_rows
from tessera.kernel.dims import Dim

PACKED_BYTES = 32 << 20  # at most, of packed W; a deeper K makes the columns fewer
_GROUP = 64  # columns that are handed on while they are in the cache; a multiple of any NR
_UNITS = 16  # blocks of k are so many units, or a multiple
_SHALLOW = 256  # units of a panel that is used once or twice
_PAD = 16  # units behind a row of packed A: rows a power of two apart would share cache sets

Done = Callable[[Val, Val, Val, Val, Val], None]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Register and cache blocking, in 32-bit units and lanes.

    `mr` * `nr` sums, one row of W and one unit of A fill the vector registers; a W panel of `kc` x `nr` stays in the
    caches next to the core while `mc` rows of A pass, which take about half of the second level; at most `nc`
    columns of W are packed at once.
    """

    lanes: int
    mr: int
    nr: int
    mc: int
    kc: int
    nc: int

    @property
    def vectors(self) -> int:
        """Vectors in a row of a panel."""
        return self.nr // self.lanes


def tiling(target: Target) -> Tiling:
    """The blocking for a processor."""
    lanes = target.lanes(32)
    mr = {512: 14, 256: 6}.get(target.vector_bits, 8 if target.vector_registers == 32 else 4)
    nr = 2 * lanes
    kc = min(512, 12288 // nr)
    mc = max(4 * mr, min(384, target.l2 // 2 // (UNIT * kc)) // mr * mr)
    return Tiling(lanes=lanes, mr=mr, nr=nr, mc=mc, kc=kc, nc=1024)


@dataclass(frozen=True, kw_only=True)
class Panels:
    """A right operand that is packed already: `pointer` to panels of NR lanes that are `depth` units deep."""

    pointer: Val
    depth: Val


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """How the scratch memory of a product is laid out, in bytes; each part starts at a multiple of 64.

    Attributes:
        width: columns of W that are packed at once, a multiple of NR.
        total: of A's chunk, the packed columns and their sums.
    """

    width: Dim
    total: Dim


def scratch(t: Tiling, dot: Dot, n: Dim, k: Dim) -> Scratch:
    """What a product of at most `n` columns and depth `k` needs."""
    units = k.ceildiv(dot.pack) + 1
    fits = ((Dim.of(PACKED_BYTES // UNIT) // units) // t.nr * t.nr).maximum(t.nr)
    width = (n.ceildiv(t.nr) * t.nr).maximum(t.nr).minimum(t.nc).minimum(fits)
    return Scratch(width=width, total=(width * units + width) * UNIT + _a_bytes(t))


def _a_bytes(t: Tiling) -> int:
    return t.mc * (t.kc + _PAD) * UNIT


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product C = A @ W, or C += with `accumulate`.

    Attributes:
        k: i64; zero leaves C, or clears it.
        a: the left operand; its lanes are rows.
        w: the right operand; its lanes are columns.
        memory, width: scratch memory as `scratch` says, 64-byte aligned.
        c, ldc: the destination (f32 or int32) and the distance of its rows in elements.
    """

    b: Builder
    target: Target
    dot: Dot
    k: Val
    a: Source
    w: Source | Panels
    memory: Val
    width: Val
    c: Val
    ldc: Val
    accumulate: bool = False

    @property
    def t(self) -> Tiling:
        return tiling(self.target)

    @property
    def _packed(self) -> Val:
        return self.b.gep(self.memory, _a_bytes(self.t), "i8")

    @property
    def _sums(self) -> Val:
        """What the dot's shift adds to each packed column."""
        return self.b.gep(self._packed, self.b.mul(self.width, self._pitch), F32)

    @property
    def _pitch(self) -> Val:
        """Units of a panel of packed W: odd, so that panels do not share cache sets."""
        return self.b.or_(self.b.ceil_div(self.k, self.dot.pack), 1)

    def sum_columns(self, first: Val, count: Val) -> None:
        """What has to be done with columns of W before the first rows: where sums are needed, all are packed."""
        if self.dot.shift:
            if not isinstance(self.w, Panels):
                self._pack(first, count, const(0, I64), self.k, self._packed, self._pitch)
            self._sum_packed(first, count)

    def _pack(self, first: Val, count: Val, start: Val, depth: Val, to: Val, pitch: Val) -> None:
        assert isinstance(self.w, Source)
        pack_panels(self.b, self.dot, self.w, self.t.lanes, self.t.nr, first, count, start, depth, to, pitch)

    def _panels(self, first: Val) -> tuple[Val, Val]:
        """Packed W from a column on, and the units from panel to panel."""
        b = self.b
        if isinstance(self.w, Panels):
            return b.gep(self.w.pointer, b.mul(first, self.w.depth), F32), b.mul(self.w.depth, self.t.nr)
        return self._packed, b.mul(self._pitch, self.t.nr)

    def _sum_packed(self, first: Val, count: Val) -> None:
        b, t = self.b, self.t
        panels, step = self._panels(first)
        ty = vec(t.lanes, I32)
        with b.for_(0, count, t.nr) as panel:
            at = b.gep(panels, b.mul(b.udiv(panel.i, t.nr), step), F32)
            with b.for_(0, b.ceil_div(self.k, self.dot.pack), carry=[const(0, ty)] * (t.nr // t.lanes)) as unit:
                row = b.gep(at, b.mul(unit.i, t.nr), F32)
                unit.next([shifted_sums(b, self.target, self.dot, b.load(b.gep(row, v * t.lanes, F32), ty), total)
                           for v, total in enumerate(unit.carry)])
            for v, total in enumerate(unit.results):
                b.store(total, b.gep(self._sums, b.add(panel.i, v * t.lanes), F32))

    def chunk(self, row: Val, rows: Val, column: Val, columns: Val, *, alone: Val, few: Val, whole: bool,
              done: Done | None) -> None:
        """C[rows, columns] from a row and a column on: blocks of k in order.

        The first rows pack W, some columns at a time, right before they use them.

        Args:
            alone: no other rows follow: packed W need not be kept.
            few: the rows are so few that packed W is used once or twice: it should not leave the first-level cache.
            whole: C is memory for all of the product, not for this chunk alone.
            done: called for some columns at a time, as soon as they are complete.
        """
        b, t, dot = self.b, self.t, self.dot
        c = b.gep(self.c, b.add(b.mul(row, self.ldc), column), F32) if whole else self.c
        pitch = 0 if self.a.along_k is False else t.kc + _PAD
        kernel = Kernel(target=self.target, dot=dot, lanes=t.lanes, mr=t.mr, nr=t.nr, pitch=pitch)
        block = block_kernel(b.module, kernel)
        panels, distance = self._panels(column)
        started = self._start(c, rows, columns)
        depth, wide_group = self._pieces(few)
        with b.for_(0, b.max(self.k, 1), depth) as start:  # once for k = 0: the kernels clear C
            steps = b.min(b.sub(self.k, start.i), depth)
            units = b.ceil_div(steps, dot.pack)
            if pitch:
                pack_rows(b, dot, self.a, t.lanes, row, rows, start.i, steps, self.memory, pitch)
                self._fill_up(rows, units, pitch)
            else:
                pack_panels(b, dot, self.a, t.lanes, t.mr, row, rows, start.i, steps, self.memory, units)
            keep = b.or_(started, b.cmp("gt", start.i, 0))
            with b.for_(0, columns, wide_group) as group:
                wide = b.min(b.sub(columns, group.i), wide_group)
                at = b.add(b.mul(b.udiv(group.i, t.nr), distance), b.mul(b.udiv(start.i, dot.pack), t.nr))
                w, step = b.gep(panels, at, F32), distance
                if not isinstance(self.w, Panels) and not dot.shift:
                    w, step = b.select(alone, panels, w), b.select(alone, b.mul(b.or_(units, 1), t.nr), distance)
                    with b.if_(b.cmp("eq", row, 0)):
                        self._pack(b.add(column, group.i), wide, start.i, steps, w, b.udiv(step, t.nr))
                b.call(block, self.memory, w, step, b.gep(c, group.i, F32), self.ldc, rows, wide, units, keep)
                if done:
                    with b.if_(b.cmp("ge", b.add(start.i, depth), self.k)):
                        done(row, column, group.i, rows, wide)

    def _fill_up(self, rows: Val, units: Val, pitch: int) -> None:
        """Zeros in the rows that only fill a kernel up: what lies there may be numbers that take long to multiply."""
        b, mr = self.b, self.t.mr
        with b.for_(rows, b.mul(b.ceil_div(rows, mr), mr)) as row:
            b.fill(b.gep(self.memory, b.mul(row.i, pitch * UNIT), "i8"), 0, b.mul(units, UNIT))

    def _pieces(self, few: Val) -> tuple[Val, Val]:
        """Steps of k, and columns, that are packed and multiplied at a time."""
        b, t, pack = self.b, self.t, self.dot.pack
        unit = _UNITS * pack
        if isinstance(self.w, Panels) or self.dot.shift:
            return _share(b, self.k, t.kc * pack, unit), const(_GROUP, I64)
        unit = math.lcm(unit, self.w.block)
        # Rows of W [K, N] are read along: the prefetcher follows so many streams.
        shallow, narrow = (_SHALLOW * pack, t.nr) if self.w.along_k else (unit, _GROUP)
        depths = [_share(b, self.k, most // unit * unit, unit) for most in (shallow, t.kc * pack)]
        return b.select(few, *depths), b.select(few, b.value(narrow, I64), _GROUP)

    def _start(self, c: Val, rows: Val, columns: Val) -> Val:
        """Give C what it starts from, where that is not the kernels' zero; returns whether they have to add to it."""
        b, lanes = self.b, self.t.lanes
        if self.dot.shift:
            with b.for_(0, rows) as row, b.for_(0, columns, lanes) as column:
                at = b.gep(c, b.add(b.mul(row.i, self.ldc), column.i), I32)
                mask = b.lane_mask(b.sub(columns, column.i), lanes)
                before = b.masked_load(at, vec(lanes, I32), mask) if self.accumulate else const(0, vec(lanes, I32))
                sums = b.load(b.gep(self._sums, column.i, I32), vec(lanes, I32))
                b.masked_store(b.sub(before, sums), at, mask)
        return const(int(self.accumulate or bool(self.dot.shift)), I1)


def matmul(b: Builder, products: Sequence[Product], *, m: Val, n: Val,
           few: tuple[Val, Callable[[], None]] | None = None, done: Done | None = None) -> None:
    """C[m, n] of each product; products side by side have the same `width`.

    Args:
        m, n: i64 sizes; any size, zero too.
        few: (condition, other code for the products): where the condition holds, that code computes all of C.
        done: called where some columns of each C are complete with (first row, first column of the chunk, columns
            of the chunk before them, rows, columns). C is then memory for one chunk only, `mc` rows of `width`
            columns or all that `few` computes; the next chunk takes its place.
    """
    t, width = products[0].t, products[0].width
    step = _share(b, m, t.mc, t.mr)
    alone, seldom = b.cmp("ge", step, m), b.cmp("le", m, max(2 * FEW, t.mr))
    if few:
        step, width = b.select(few[0], m, step), b.select(few[0], n, width)
    with b.for_(0, n, width) as column:
        columns = b.min(b.sub(n, column.i), width)
        with _unless(b, few and few[0]):
            for product in products:
                product.sum_columns(column.i, columns)
        with b.for_(0, m, step) as row:
            rows = b.min(b.sub(m, row.i), step)
            if few:
                with b.if_(few[0]):
                    few[1]()
                    if done:
                        done(row.i, column.i, const(0, I64), rows, columns)
            with _unless(b, few and few[0]):
                for product in products:
                    product.chunk(row.i, rows, column.i, columns, alone=alone, few=seldom, whole=done is None,
                                  done=done if product is products[-1] else None)


@contextmanager
def _unless(b: Builder, condition: Val | None) -> Iterator[None]:
    if condition is None:
        yield
    else:
        with b.if_(b.not_(condition)):
            yield


def _share(b: Builder, size: Val, most: int, unit: int) -> Val:
    """`size` cut into equal blocks of at most `most`, rounded up to a multiple of `unit` (a divisor of `most`)."""
    blocks = b.max(b.ceil_div(size, most), 1)
    each = b.udiv(b.add(size, b.sub(blocks, 1)), blocks)
    return b.max(b.mul(b.ceil_div(each, unit), unit), unit)
