"""Packing of matmul operands, with fast transposes for operands that run along k.

In: a `Source`, an operand that is read a vector at a time. Out, in 32-bit units (`mma_dot.py`) of some k each:
    panels      [ceil(lanes / width)][pitch][width]: `width` lanes side by side for each unit
    rows        [lanes][pitch]: each lane's units one after the other
Behind the last k a unit is filled up with zeros. Lanes that fill up the last panel hold anything: nobody reads what
is computed from them. Called by `mma.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from tessera.kernel.backends.cpu.emit import F32, I64, Builder, Val, bits, const, elem, lanes, vec
from tessera.kernel.backends.cpu.mma_dot import Dot

Read = Callable[[Val, Val, int, bool], Val]
UNIT = 4  # bytes
_LINE = 64  # bytes of the cache


@dataclass(frozen=True, kw_only=True)
class Source:
    """An operand with `lanes` (rows of A, columns of W) and k.

    Attributes:
        read: read(lane, k, count, along_k) gives `count` elements that follow (lane, k) along k or along the lanes
            (a scalar when `count` is 0), as the dot's `element`. It must not branch. Indices are i64 and in bounds.
        along_k: the direction that is contiguous in memory; reads of vectors go along it. None: only scalars.
        direct: (pointer, lane stride, k stride) in elements where the operand lies in memory as the dot's elements.
        units: units(lane, left, start, depth, put) gives units for a vector of lanes, of which `left` exist, as
            put(number, unit), from `start` on, a multiple of `block`: a faster way than `read` along k, where set.
    """

    read: Read
    along_k: bool | None
    direct: tuple[Val, Val, Val] | None = None
    units: Callable[[Val, Val, Val, Val, Callable[[Val, Val], None]], None] | None = None
    block: int = 1


def strided(b: Builder, pointer: Val, lane_stride: Val, k_stride: Val, ty: str = F32) -> Source:
    """An operand in memory."""

    def read(lane: Val, k: Val, count: int, along_k: bool) -> Val:
        at = b.add(b.mul(lane, lane_stride), b.mul(k, k_stride))
        return b.load(b.gep(pointer, at, ty), vec(count, ty))

    along_k = True if k_stride.const == 1 else False if lane_stride.const == 1 else None
    return Source(read=read, along_k=along_k, direct=(pointer, lane_stride, k_stride))


def pack_rows(b: Builder, dot: Dot, source: Source, vector: int, lane: Val, count: Val, start: Val, depth: Val,
              out: Val, pitch: int) -> None:
    """`count` lanes from `lane` on, `depth` steps of k from `start` on, as rows; `vector` units at a time."""
    with b.for_(0, count) as row:
        to, at = b.gep(out, b.mul(row.i, pitch * UNIT), "i8"), b.add(lane, row.i)
        whole: Val = const(0, I64)
        if source.along_k:
            whole = b.and_(depth, -vector * dot.pack)
            with b.for_(0, whole, vector * dot.pack) as step:
                x = source.read(at, b.add(start, step.i), vector * dot.pack, True)
                b.store(x, b.gep(to, step.i, dot.element))
        with b.for_(whole, depth) as step:
            b.store(source.read(at, b.add(start, step.i), 0, True), b.gep(to, step.i, dot.element))
        _fill_up(b, dot, depth, lambda k: b.gep(to, k, dot.element))


def pack_panels(b: Builder, dot: Dot, source: Source, vector: int, width: int, lane: Val, count: Val, start: Val,
                depth: Val, out: Val, pitch: Val) -> None:
    """`count` lanes from `lane` on, `depth` steps of k from `start` on, as panels of `width` lanes by `pitch` units.

    An operand that runs along its lanes is read row by row, over all panels: a panel at a time would touch a
    page of memory for every few bytes.
    """
    panels = _Panels(b, dot, source, vector, width, lane, start, depth, out, pitch)
    if source.units is not None:
        panels.given(count)
        return
    if source.along_k:
        with b.for_(0, count, width) as panel:
            panels.transposed(panel.i, b.min(b.sub(count, panel.i), width))
        return
    whole: Val = const(0, I64)
    if source.along_k is False:
        whole = b.mul(b.udiv(count, width), width)
        panels.interleaved(whole)
    with b.for_(whole, count, width) as panel:
        b.fill(panels.at(panel.i, const(0, I64)), 0, b.mul(b.ceil_div(depth, dot.pack), width * UNIT))
        panels.scalars(panel.i, b.min(b.sub(count, panel.i), width), const(0, I64))


@dataclass(frozen=True)
class _Panels:
    b: Builder
    dot: Dot
    source: Source
    vector: int
    width: int
    lane: Val
    start: Val
    depth: Val
    out: Val
    pitch: Val

    def at(self, panel: Val, unit: Val) -> Val:
        """The address of a unit's first lane; `panel` is the first lane of a panel."""
        b = self.b
        return b.gep(self.out, b.add(b.mul(panel, self.pitch), b.mul(unit, self.width)), F32)

    def given(self, count: Val) -> None:
        """The source's own units, a vector of lanes at a time; a missing lane repeats another one."""
        b = self.b
        with b.for_(0, b.mul(b.ceil_div(count, self.width), self.width), self.vector) as first:
            lane = b.min(first.i, b.sub(count, 1))
            to = b.gep(self.at(b.mul(b.udiv(first.i, self.width), self.width), const(0, I64)),
                       b.urem(first.i, self.width), F32)
            assert self.source.units is not None
            self.source.units(b.add(self.lane, lane), b.sub(count, lane), self.start, self.depth,
                              lambda number, unit: b.store(unit, b.gep(to, b.mul(number, self.width), F32)))

    def transposed(self, panel: Val, count: Val) -> None:
        """A cache line of each lane at a time, `vector` lanes after each other; a missing lane repeats the last one.

        Lanes that lie a power of two apart share cache sets: a line that is not used up at once is read again.
        """
        b, vector, width = self.b, self.vector, self.width
        run, last = vector * self.dot.pack, b.sub(count, 1)
        lines = max(1, _LINE // (vector * UNIT))
        whole = b.and_(self.depth, -run * lines)
        with b.for_(0, whole, run * lines) as block:
            to = self.at(panel, b.udiv(block.i, self.dot.pack))
            for first, line in product(range(0, width, vector), range(lines)):
                k = b.add(self.start, b.add(block.i, line * run))
                rows = [self._read_units(b.add(self.lane, b.add(panel, b.min(const(first + j, I64), last))), k)
                        for j in range(vector)]
                for i, column in enumerate(transpose(b, rows)):
                    b.store(column, b.gep(to, (line * vector + i) * width + first, F32))
        self.scalars(panel, count, whole)

    def interleaved(self, count: Val) -> None:
        """`count` lanes (whole panels) of an operand that runs along them: a unit takes `pack` of its rows."""
        b, dot = self.b, self.dot
        with b.for_(0, b.udiv(self.depth, dot.pack)) as unit:
            k = b.add(self.start, b.mul(unit.i, dot.pack))
            with b.for_(0, count, self.width) as panel:
                to = self.at(panel.i, unit.i)
                for first, size in pieces(self.width, self.vector):
                    at = b.add(self.lane, b.add(panel.i, first))
                    rows = [self.source.read(at, b.add(k, j), size, False) for j in range(dot.pack)]
                    b.store(interleave(b, rows), b.gep(to, first, F32))
        if dot.pack > 1:
            with b.for_(0, count, self.width) as panel:
                self.scalars(panel.i, const(self.width, I64), b.and_(self.depth, -dot.pack))

    def scalars(self, panel: Val, count: Val, first: Val) -> None:
        """One element at a time, from k = `first` (a multiple of `pack`) on."""
        b, dot = self.b, self.dot

        def place(k: Val, lane: Val) -> Val:
            unit = b.gep(self.at(panel, b.udiv(k, dot.pack)), lane, F32)
            return b.gep(unit, b.urem(k, dot.pack), dot.element) if dot.pack > 1 else unit

        with b.for_(first, self.depth) as step, b.for_(0, count) as j:
            x = self.source.read(b.add(self.lane, b.add(panel, j.i)), b.add(self.start, step.i), 0, True)
            b.store(x, place(step.i, j.i))
        if dot.pack > 1:
            with b.for_(0, count) as j:
                _fill_up(b, dot, self.depth, lambda k: place(k, j.i))

    def _read_units(self, lane: Val, k: Val) -> Val:
        x = self.source.read(lane, k, self.vector * self.dot.pack, True)
        return self.b.bitcast(x, vec(self.vector, self.dot.unit))


def _fill_up(b: Builder, dot: Dot, depth: Val, place: Callable[[Val], Val]) -> None:
    """Zeros behind the last k, to the end of its unit."""
    if dot.pack > 1:
        with b.for_(depth, b.mul(b.ceil_div(depth, dot.pack), dot.pack)) as k:
            b.store(const(0, dot.element), place(k.i))


def pieces(width: int, vector: int) -> list[tuple[int, int]]:
    """Cut `width` lanes into (first, size) pieces: whole vectors, then powers of two."""
    found, first = [], 0
    while first < width:
        size = vector
        while size > width - first:
            size //= 2
        found.append((first, size))
        first += size
    return found


def interleave(b: Builder, rows: Sequence[Val]) -> Val:
    """Element 0 of each row, then element 1 of each row, ...: one, two or four rows of the same type."""
    if len(rows) == 1:
        return rows[0]
    if len(rows) == 4:
        rows = [_as_pairs(b, interleave(b, rows[:2])), _as_pairs(b, interleave(b, rows[2:]))]
    n = lanes(rows[0].ty)
    return b.shuffle(rows[0], rows[1], [i for j in range(n) for i in (j, n + j)])


def _as_pairs(b: Builder, x: Val) -> Val:
    return b.bitcast(x, vec(lanes(x.ty) // 2, f"i{2 * bits(x.ty)}"))


def transpose(b: Builder, rows: Sequence[Val]) -> list[Val]:
    """The transpose of a square matrix given as its rows: n vectors of n 32-bit lanes, n a multiple of 4.

    First 4 x 4 blocks inside the 128-bit parts of the vectors, then whole parts: each step is one instruction.
    """
    n = len(rows)
    if any(lanes(row.ty) != n for row in rows) or n % 4:
        raise ValueError(f"transpose takes n vectors of n lanes, got {n} of {rows[0].ty} ({elem(rows[0].ty)})")
    low = [4 * q + i for q in range(n // 4) for i in (0, 1)]
    high = [i + 2 for i in low]

    def zip_parts(x: Val, y: Val, offset: int) -> Val:
        picks = [q + offset + j for q in range(0, n, 4) for j in (0, 1)]
        return b.shuffle(x, y, [i for p in picks for i in (p, n + p)])

    def join_parts(x: Val, y: Val, picks: list[int]) -> Val:
        return b.shuffle(x, y, [i for q in range(0, n, 4) for i in
                                ([p for p in picks if q <= p < q + 4] + [n + p for p in picks if q <= p < q + 4])])

    blocks: list[Val] = []
    for g in range(0, n, 4):
        t0, t1 = (zip_parts(rows[g], rows[g + 1], offset) for offset in (0, 2))
        t2, t3 = (zip_parts(rows[g + 2], rows[g + 3], offset) for offset in (0, 2))
        blocks += [join_parts(t0, t2, low), join_parts(t0, t2, high), join_parts(t1, t3, low), join_parts(t1, t3, high)]
    columns: list[Val] = [rows[0]] * n
    for c in range(4):
        for q, column in enumerate(_transpose_parts(b, blocks[c::4])):
            columns[4 * q + c] = column
    return columns


def _transpose_parts(b: Builder, rows: list[Val]) -> list[Val]:
    """Transpose a square matrix of 128-bit parts: rows of len(rows) parts each."""
    count, distance = len(rows), 1
    while distance < count:
        for i in range(count):
            if not i & distance:
                x, y = rows[i], rows[i + distance]
                for target, offset in ((i, 0), (i + distance, distance)):
                    parts = [(q & ~distance) + offset + (count if q & distance else 0)
                             for q in range(count)]
                    rows[target] = b.shuffle(x, y, [4 * part + lane for part in parts for lane in range(4)])
        distance *= 2
    return rows
