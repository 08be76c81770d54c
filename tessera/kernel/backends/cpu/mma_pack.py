"""Packing of matmul operands into panels, with fast transposes for operands that run along k.

In: a `Source`, an operand that is read a vector at a time. Out: panels [K][width], `width` lanes side by side for
each k, zero where a ragged panel has no lane. Called by `mma.py` and its siblings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tessera.kernel.backends.cpu.emit import F32, Builder, Val, const, elem, lanes, vec

Read = Callable[[Val, Val, int, bool], Val]


@dataclass(frozen=True, kw_only=True)
class Source:
    """An operand with `lanes` (rows of A, columns of W) and k.

    Attributes:
        read: read(lane, k, count, along_k) gives `count` elements that follow (lane, k) along k or along the lanes
            (a scalar when `count` is 0). It must not branch. Indices are i64 and in bounds.
        along_k: the direction that is contiguous in memory; reads of vectors go along it. None: only scalars.
        direct: (pointer, lane stride, k stride) in elements where the operand lies in memory in the type that the
            kernel takes, so that it may be read in place.
    """

    read: Read
    along_k: bool | None
    direct: tuple[Val, Val, Val] | None = None


def strided(b: Builder, pointer: Val, lane_stride: Val, k_stride: Val, ty: str = F32) -> Source:
    """An operand in memory."""

    def read(lane: Val, k: Val, count: int, along_k: bool) -> Val:
        at = b.add(b.mul(lane, lane_stride), b.mul(k, k_stride))
        return b.load(b.gep(pointer, at, ty), vec(count, ty))

    along_k = True if k_stride.const == 1 else False if lane_stride.const == 1 else None
    return Source(read=read, along_k=along_k, direct=(pointer, lane_stride, k_stride))


def pack_panel(b: Builder, source: Source, vector: int, width: int, lane: Val, count: Val, start: Val, depth: Val,
               out: Val, ty: str = F32) -> None:
    """Pack `count` <= `width` lanes from `lane` on and `depth` steps of k from `start` on into one panel.

    Up to `vector` elements behind the panel may be overwritten (they belong to a panel that is packed later).
    """
    with b.if_(b.cmp("eq", count, width), likely=True) as branch:
        if source.along_k is None:
            _pack_scalars(b, source, width, lane, const(width, "i64"), start, depth, out, ty)
        elif source.along_k:
            _pack_transposed(b, source, vector, width, lane, start, depth, out, ty)
        else:
            with b.for_(0, depth) as step:
                row = b.gep(out, b.mul(step.i, width), ty)
                for first, size in pieces(width, vector):
                    x = source.read(b.add(lane, first), b.add(start, step.i), size, False)
                    b.store(x, b.gep(row, first, ty))
    with branch.else_():
        _pack_scalars(b, source, width, lane, count, start, depth, out, ty)


def pack_panels(b: Builder, source: Source, vector: int, width: int, lane: Val, count: Val, start: Val, depth: Val,
                out: Val, ty: str = F32) -> None:
    """Pack `count` lanes into as many panels as they need, one behind the other.

    An operand that runs along its lanes is read row by row, over all panels: a panel at a time would touch a
    page of memory for every few bytes.
    """
    whole = b.mul(b.udiv(count, width), width) if source.along_k is False else const(0, "i64")
    if source.along_k is False:
        with b.for_(0, depth) as step:
            k, row = b.add(start, step.i), b.gep(out, b.mul(step.i, width), ty)
            with b.for_(0, whole, width) as panel:
                to = b.gep(row, b.mul(panel.i, depth), ty)
                for first, size in pieces(width, vector):
                    b.store(source.read(b.add(lane, b.add(panel.i, first)), k, size, False), b.gep(to, first, ty))
    with b.for_(whole, count, width) as panel:
        pack_panel(b, source, vector, width, b.add(lane, panel.i), b.min(b.sub(count, panel.i), width), start, depth,
                   b.gep(out, b.mul(panel.i, depth), ty), ty)


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


def _pack_scalars(b: Builder, source: Source, width: int, lane: Val, count: Val, start: Val, depth: Val, out: Val,
                  ty: str) -> None:
    with b.for_(0, depth) as step:
        row = b.gep(out, b.mul(step.i, width), ty)
        with b.for_(0, count) as j:
            b.store(source.read(b.add(lane, j.i), b.add(start, step.i), 0, False), b.gep(row, j.i, ty))
        with b.for_(count, width) as j:
            b.store(const(0, ty), b.gep(row, j.i, ty))


def _pack_transposed(b: Builder, source: Source, vector: int, width: int, lane: Val, start: Val, depth: Val, out: Val,
                     ty: str) -> None:
    """`vector` steps of k at a time: a vector along k for each lane, then square transposes."""
    whole = b.and_(depth, -vector)
    with b.for_(0, whole, vector) as block:
        base = b.gep(out, b.mul(block.i, width), ty)
        for first in range(0, width, vector):
            size = min(vector, width - first)
            k = b.add(start, block.i)
            rows = [source.read(b.add(lane, first + j), k, vector, True) for j in range(size)]
            rows += [rows[-1]] * (vector - size)
            for i, column in enumerate(transpose(b, rows)):
                b.store(column, b.gep(base, i * width + first, ty))
    with b.for_(whole, depth) as step:
        row = b.gep(out, b.mul(step.i, width), ty)
        with b.for_(0, width) as j:
            b.store(source.read(b.add(lane, j.i), b.add(start, step.i), 0, True), b.gep(row, j.i, ty))


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
