"""Vectors across rows of memory: runs of a row are loaded whole and transposed in registers.

A vector of weights [N, K] for neighbouring n and one k would be a gather. Where a loop walks along k in blocks, it
indexes with `step`: a position whose place in its block is known while the code is generated. A load at such an index
then reads 16 bytes of each row, transposes them as 32-bit units, and hands out one k after the other: about one
shuffle for each vector of f32, a quarter of one for int8, an eighth for 4-bit elements.

In: memory and indices, from `elements.load` and reshapes. Out: registers. The loops are in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.context import Context, Memory, storage_type
from tessera.kernel.backends.cpu.emit import I8, I32, I64, Builder, Val
from tessera.kernel.backends.cpu.storage import from_storage
from tessera.types import int4

LINE = 64  # bytes of a cache line
ANY = Val("?", I64)  # an index not known yet: `elements.hoist` computes what does not depend on it
UNITS = 4  # 32-bit units in a run: 16 bytes, which the lanes of every processor hold whole


class Step(Val):
    """The index root * factor + offset, root being the number of a block of a loop."""

    __slots__ = ("factor", "offset", "root")

    def __init__(self, value: Val, root: Val, factor: int, offset: int) -> None:
        super().__init__(value.name, value.ty, value.const)
        self.root, self.factor, self.offset = root, factor, offset


def step(ctx: Context, root: Val, factor: int, offset: int) -> Val:
    """root * factor + offset; equal indices of a scope have equal names."""
    if not factor:
        return emit.const(offset, I64)
    key = ("step", root.name, factor, offset)
    known = ctx.lookup(key)
    if known is None:
        known = Step(ctx.b.add(ctx.b.mul(root, factor), offset), root, factor, offset)
        ctx.remember(key, known)
    return known


def aligned(ctx: Context, value: Val, factor: int) -> Val:
    """An index that is known to be a multiple of `factor`."""
    return value if value.const is not None else Step(value, ctx.b.udiv(value, factor), factor, 0)


def is_aligned(index: Val, lanes: int) -> bool:
    """Whether an index is known to be a multiple of `lanes`."""
    if isinstance(index, Step):
        return index.factor % lanes == 0 and index.offset % lanes == 0
    return index.const is not None and index.const % lanes == 0


def merge_index(ctx: Context, position: Val, size: Val, index: Val) -> Val:
    """position * size + index, where possible as a step."""
    if position.const == 0:
        return index
    if isinstance(position, Step) and size.const is not None and index.const is not None:
        return step(ctx, position.root, position.factor * size.const, position.offset * size.const + index.const)
    merged = ctx.b.add(ctx.b.mul(position, size), index)
    if isinstance(index, Step) and size.const is not None and size.const % index.factor == index.offset == 0:
        return aligned(ctx, merged, index.factor)
    return merged


def split_index(ctx: Context, position: Val, size: Val) -> tuple[Val, Val]:
    """(position // size, position % size) of a position that is not negative, where possible as steps."""
    if size.const == 1:
        return position, emit.const(0, I64)
    if isinstance(position, Step) and size.const and position.factor % size.const == 0:
        whole, rest = divmod(position.offset, size.const)
        # The rest is a step as well: of the one block 0, as long as the dim.
        return (step(ctx, position.root, position.factor // size.const, whole),
                step(ctx, emit.const(0, I64), size.const, rest))
    quotient, remainder = ctx.b.udiv(position, size), ctx.b.urem(position, size)
    if isinstance(position, Step) and size.const and size.const % position.factor == position.offset == 0:
        remainder = aligned(ctx, remainder, position.factor)
    return quotient, remainder


def run_elements(memory: Memory) -> int:
    """How many elements lie in a run; 0 for memory that is not read in runs."""
    if memory.dtype.bits == 64 or memory.dtype.name == "bool" or not memory.starts_byte:
        return 0
    return UNITS * 32 // memory.dtype.bits


def load_across(ctx: Context, memory: Memory, indices: Sequence[Val], axis: int, lanes: int,
                mask: Val | None) -> Val | None:
    """Elements of `lanes` neighbouring rows along `axis`, as registers; None where a gather has to do.

    Args:
        mask: selects the first rows; others are not read.
    """
    size, run = run_elements(memory), _unit_axis(memory, axis)
    if run is None or not size or lanes % UNITS:
        return None
    at, key = indices[run], _row_key(memory, indices, run, axis, lanes, mask)
    if not isinstance(at, Step) or at.factor % size:
        return _one_by_one(ctx, memory, at, key, lanes) if memory.dtype != int4 else None
    offset = at.offset % size
    start = step(ctx, at.root, at.factor, at.offset - offset)
    key = ("run", *key, start.name)
    if ctx.lookup((*key, 0)) is None:
        rows = _rows(ctx, memory, indices, run, axis, lanes, mask)
        if ctx.rows_ahead and (at.offset - offset) * memory.dtype.bits // 8 % LINE == 0:
            _read_ahead(ctx, memory, rows, at, start, memory.strides[axis])
        for number, unit in enumerate(_units(ctx, memory, rows, start)):
            ctx.remember((*key, number), unit)
    found = ctx.lookup((*key, offset * UNITS // size))
    assert found is not None
    return _element(ctx.b, found, memory, offset % (size // UNITS))


def _one_by_one(ctx: Context, memory: Memory, at: Val, key: tuple, lanes: int) -> Val | None:
    """A vector put together from rows whose addresses are known, else None."""
    b, ty = ctx.b, storage_type(memory.dtype)
    rows = [ctx.lookup(("rows", *key, lane)) for lane in range(lanes)]
    vector = Val("poison", emit.vec(lanes, ty))
    for lane, row in enumerate(rows):
        if row is None:
            return None
        vector = b.insert(vector, b.load(_behind(b, row, at, memory), ty), lane)
    return from_storage(b, vector, memory.dtype)


def find_rows(ctx: Context, memory: Memory, indices: Sequence[Val], axis: int, lanes: int, mask: Val | None) -> None:
    """Compute the addresses that `load_across` will need, before the loop along the rows.

    They are known when nothing but the place in a row is ANY.
    """
    run = _unit_axis(memory, axis)
    known = all(index is not ANY for i, index in enumerate(indices) if i != run)
    if run is not None and known and run_elements(memory) and lanes and lanes % UNITS == 0:
        _rows(ctx, memory, indices, run, axis, lanes, mask)


def _unit_axis(memory: Memory, axis: int) -> int | None:
    return next((i for i, stride in enumerate(memory.strides) if i != axis and stride.const == 1), None)


def _row_key(memory: Memory, indices: Sequence[Val], run: int, axis: int, lanes: int, mask: Val | None) -> tuple:
    return (memory.pointer.name, *(index.name for i, index in enumerate(indices) if i != run), axis, lanes,
            mask and mask.name)


def _rows(ctx: Context, memory: Memory, indices: Sequence[Val], run: int, axis: int, lanes: int,
          mask: Val | None) -> list[Val]:
    """The addresses of the starts of `lanes` rows; rows that the mask leaves out stand for the first one."""
    b, key = ctx.b, ("rows", *_row_key(memory, indices, run, axis, lanes, mask))
    if ctx.lookup((*key, 0)) is None:
        first = _address(ctx, memory, [*indices[:run], emit.const(0, I64), *indices[run + 1:]])
        for lane in range(lanes):
            row: Val = emit.const(lane, I64)
            if mask is not None and lane:
                row = b.select(b.extract(mask, lane), row, 0)
            pointer = _behind(b, first, b.mul(row, memory.strides[axis]), memory)
            ctx.remember((*key, lane), pointer)
    found = [ctx.lookup((*key, lane)) for lane in range(lanes)]
    return [pointer for pointer in found if pointer is not None]


def _read_ahead(ctx: Context, memory: Memory, rows: Sequence[Val], at: Step, start: Val, stride: Val) -> None:
    """Ask for a part of the rows that come next: a line of each, or, of whole rows that follow each other, as many
    lines in the order of memory, which is a third faster for 8 and 16 bits. Blocks that share a line each ask for some.
    """
    b, bits, count = ctx.b, memory.dtype.bits, len(rows)
    turns = min(count, max(1, LINE * 8 // (at.factor * bits)))
    in_order = b.cmp("eq", stride, ctx.run_along if bits < 32 else -1)
    row, line = b.select(in_order, 0, stride), b.select(in_order, LINE * 8 // bits, b.mul(stride, turns))
    place = b.add(b.mul(stride, ctx.rows_ahead), b.mul(start, b.select(in_order, emit.const(count, I64), 1)))
    if turns > 1:
        place = b.add(place, b.mul(row, b.and_(at.root, turns - 1)))
    for number in range(count // turns):
        b.prefetch(_behind(b, rows[0], b.add(place, b.mul(line, number)), memory), locality=2)


def _units(ctx: Context, memory: Memory, rows: Sequence[Val], start: Val) -> list[Val]:
    """Runs of rows as UNITS vectors of i32: vector u has unit u of each row."""
    b = ctx.b
    runs = [b.load(_behind(b, row, start, memory), emit.vec(UNITS, I32), align=1) for row in rows]
    parts = range(len(rows) // UNITS)
    # Part p of the vector i is row 4p + i, so that transposing inside the parts puts rows in order.
    return transpose_parts(b, [b.concat([runs[UNITS * p + i] for p in parts]) for i in range(UNITS)])


def transpose_parts(b: Builder, rows: Sequence[Val]) -> list[Val]:
    """Transpose 4 vectors of 32-bit lanes as 4 x 4 matrices, one in each 128-bit part; a step is one instruction."""
    n = emit.lanes(rows[0].ty)
    parts = range(0, n, UNITS)

    def interleave(x: Val, y: Val, offset: int) -> Val:
        return b.shuffle(x, y, [i for q in parts for j in (0, 1) for i in (q + offset + j, n + q + offset + j)])

    def join(x: Val, y: Val, offset: int) -> Val:
        return b.shuffle(x, y, [i for q in parts for i in (q + offset, q + offset + 1,
                                                           n + q + offset, n + q + offset + 1)])

    low = [interleave(rows[i], rows[i + 1], 0) for i in (0, 2)]
    high = [interleave(rows[i], rows[i + 1], 2) for i in (0, 2)]
    return [join(x, y, offset) for x, y in (low, high) for offset in (0, 2)]


def _address(ctx: Context, memory: Memory, indices: Sequence[Val]) -> Val:
    """The address of an element that starts a byte."""
    if memory.dtype != int4:
        return memory.address(ctx.b, indices)
    offset = memory.offset
    for index, stride in zip(indices, memory.strides):
        offset = ctx.b.add(offset, ctx.b.mul(index, stride))
    return ctx.b.gep(memory.pointer, ctx.b.lshr(offset, 1), I8)


def _behind(b: Builder, pointer: Val, distance: Val, memory: Memory) -> Val:
    if memory.dtype == int4:
        return b.gep(pointer, b.lshr(distance, 1), I8)
    return b.gep(pointer, distance, storage_type(memory.dtype))


def _element(b: Builder, unit: Val, memory: Memory, place: int) -> Val:
    """The register value of the element that stands at a place of each 32-bit unit."""
    bits, n = memory.dtype.bits, emit.lanes(unit.ty)
    if memory.dtype == int4:
        return b.ashr(b.shl(unit, 28 - 4 * place), 28)
    if bits == 32:
        return b.bitcast(unit, emit.vec(n, storage_type(memory.dtype)))
    raw = b.cast("trunc", b.lshr(unit, bits * place) if place else unit, f"i{bits}")
    return from_storage(b, b.bitcast(raw, emit.vec(n, storage_type(memory.dtype))), memory.dtype)
