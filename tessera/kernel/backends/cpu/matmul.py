"""Lowers `mma`: packed and register-blocked (`mma.py`), straight from memory for one row (`skinny.py`), or loops.

Each output element is one chain acc = fma(a_k, b_k, acc), k ascending, from 0 or from the accumulator, on every
path (pairs of bf16 where the processor adds pairs: `mma_dot.py`). Operands that are computed on demand (a norm
before, a dequantized weight) are evaluated while they are packed, and where a store alone uses the result, it is
computed chunk by chunk: neither makes a trip through memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tessera.kernel import ir
from tessera.kernel.backends.cpu import byte_few, byte_rows, emit, mma, resident, skinny
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory, register_type
from tessera.kernel.backends.cpu.elements import ANY, Point, element, hoist, store
from tessera.kernel.backends.cpu.emit import F32, I64, Val
from tessera.kernel.backends.cpu.loops import each, run_lanes, sweep, vector_lanes, write
from tessera.kernel.backends.cpu.mma_dot import F32_CHAIN, Dot, dot_unit
from tessera.kernel.backends.cpu.mma_pack import UNIT
from tessera.kernel.backends.cpu.operands import memory_of, packing_source
from tessera.kernel.backends.cpu.plan import stored_value
from tessera.kernel.backends.cpu.weights import Weights
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Op, TileTy, Value
from tessera.types import DType, f32, int32

_FEW_BYTES = 16  # rows of a product of bytes; from more on, packing pays


def lower_mma(ctx: Context, op: Op) -> None:
    """Fill the result's buffer; `ctx.memory` is set. A product that a store computes is left to it."""
    result = op.result
    if any(op in products for products in ctx.fused.values()):
        return
    memory = ctx.destinations.get(result.name) or ctx.buffer(result)
    if len(op.operands) == 3:
        start = op.operands[2]
        sweep(ctx, result.type, [start], lambda point: store(ctx, memory, point, element(ctx, start, point)))
    ctx.memory[result.name] = memory
    if _dot_of(ctx, op) is None:
        sweep(ctx, result.type, [], lambda point: _chain(ctx, op, point), 2 * vector_lanes(ctx))
        return
    if _in_loop(ctx, op) and register_type(result.type.dtype) == F32 and (
            resident.fits(op) or memory_of(ctx, op.operands[1]) is not None):
        _resident(ctx, op, memory)
    else:
        _multiply_into(ctx, op, memory, result.type)


def _multiply_into(ctx: Context, op: Op, memory: Memory, type_: TileTy) -> None:
    operands = _Operands(ctx, op)

    def multiply(batch: tuple[Val, ...]) -> None:
        _matmul(ctx, [(operands, memory.address(ctx.b, (*batch, ZERO, ZERO)), memory.strides[-2])], batch, type_, None)

    _each_batch(ctx, type_, multiply)


def store_products(ctx: Context, op: Op, products: Sequence[Op], type_: TileTy) -> None:
    """A store that computes products and what follows them chunk by chunk; `type_` says what of the tile counts."""
    memory, source = ctx.memory[op.operands[0].name], stored_value(op)
    if source is products[0].result and memory.dtype == _sum_type(products[0]) and memory.strides[-1].const == 1:
        _multiply_into(ctx, products[0], memory, type_)
        return
    parts = [_Operands(ctx, mma_op) for mma_op in products]
    t = mma.tiling(ctx.target)
    width = ctx.size(_width(parts))
    most = (Dim.of(t.mc) * _width(parts)).maximum(min(part.most_few(ctx) for part in parts) * type_.shape[-1])
    chunks = [ctx.scratch(most * UNIT) for _ in parts]
    few = _few_rows(ctx, parts, type_)
    pitch = width if few is None else ctx.b.select(few, ctx.size(type_.shape[-1]), width)

    def multiply(batch: tuple[Val, ...]) -> None:
        def done(row: Val, column: Val, first: Val, rows: Val, columns: Val) -> None:
            for mma_op, chunk in zip(products, chunks):
                origin = ctx.b.sub(0, ctx.b.add(ctx.b.mul(row, pitch), column))
                strides = (*[ZERO] * len(batch), pitch, emit.const(1, I64))
                ctx.memory[mma_op.result.name] = Memory(chunk, strides, _sum_type(mma_op), origin)
            _sweep_chunk(ctx, batch, row, ctx.b.add(column, first), rows, columns,
                         lambda point: store(ctx, memory, point, element(ctx, source, point)), source)

        _matmul(ctx, [(part, chunk, pitch) for part, chunk in zip(parts, chunks)], batch, type_, done)

    _each_batch(ctx, type_, multiply)


def inner_extent(ctx: Context, op: Op) -> Val:
    """How many k count: what is valid of both operands."""
    a, w = op.operands[0].type, op.operands[1].type
    left, right = a.extent(a.rank - 1), w.extent(w.rank - 2)
    return ctx.size(left if w.valid[-2] is None else right if a.valid[-1] is None else left.minimum(right))


def _each_batch(ctx: Context, type_: TileTy, body: Callable[[tuple[Val, ...]], None]) -> None:
    """Loops over all dims but the last two."""

    def nest(batch: tuple[Val, ...]) -> None:
        if len(batch) == type_.rank - 2:
            body(batch)
        else:
            with each(ctx, ctx.size(type_.extent(len(batch)))) as index:
                nest((*batch, index))

    nest(())


def _sweep_chunk(ctx: Context, batch: tuple[Val, ...], row: Val, column: Val, rows: Val, columns: Val,
                 body: Callable[[Point], None], source: Value) -> None:
    """`body` at every point of a chunk, vectors along the columns."""
    b, axis = ctx.b, len(batch) + 1
    with ctx.scope(), b.for_(0, rows) as line, ctx.scope():
        at = b.add(row, line.i)
        hoist(ctx, source, Point((*batch, at, ANY), axis))
        width = vector_lanes(ctx)
        run_lanes(ctx, columns, width, lambda i, mask: body(
            Point((*batch, at, b.add(column, i)), axis, width, mask)))


# -- packed products ----------------------------------------------------------------------------------


class _Operands:
    """The operands of one mma, and the scratch memory that its product takes."""

    def __init__(self, ctx: Context, op: Op) -> None:
        dot = _dot_of(ctx, op)
        assert dot is not None
        self.op, self.dot = op, dot
        self.left, self.right = op.operands[:2]
        w = self.right.type
        self.scratch = mma.scratch(mma.tiling(ctx.target), dot, w.shape[-1], w.shape[-2])
        self.memory = ctx.scratch(self.scratch.total)
        self.in_bytes = byte_few.multiplies(ctx, op)
        # The products of a loop have no weights that few rows share: their blocks are packed anyway.
        self.few = None if _in_loop(ctx, op) else ctx.scratch(
            byte_rows.scratch_bytes(w.shape[-2]) if self.in_bytes else skinny.scratch_bytes())

    def product(self, ctx: Context, batch: tuple[Val, ...], width: Val, c: Val, ldc: Val) -> mma.Product:
        """What `mma.matmul` takes."""
        w_batch = batch if self.right.type.rank > 2 else ()
        return mma.Product(
            b=ctx.b, target=ctx.target, dot=self.dot, k=inner_extent(ctx, self.op),
            a=packing_source(ctx, self.left, batch, self.dot, lanes_axis=0),
            w=packing_source(ctx, self.right, w_batch, self.dot, lanes_axis=1),
            memory=self.memory, width=width, c=c, ldc=ldc, accumulate=len(self.op.operands) == 3)

    def most_few(self, ctx: Context) -> int:
        """The most rows that `multiply_few` takes."""
        if self.in_bytes:
            return _FEW_BYTES
        batch = (ZERO,) * (self.op.result.type.rank - 2)
        return skinny.most_rows(Weights(ctx, self.right, batch, self.dot))

    def multiply_few(self, ctx: Context, batch: tuple[Val, ...], m: Val, n: Val, c: Val, ldc: Val) -> None:
        """The product of at most `most_few` rows."""
        assert self.few is not None
        if self.in_bytes:
            byte_few.multiply(ctx, self.op, m, n, inner_extent(ctx, self.op), c, ldc, self.few)
            return
        skinny.multiply(ctx, skinny.Product(
            a=self.left, w=Weights(ctx, self.right, batch, self.dot), dot=self.dot, batch=batch, m=m, n=n,
            k=inner_extent(ctx, self.op), c=c, ldc=ldc, accumulate=len(self.op.operands) == 3), self.few)


def _matmul(ctx: Context, parts: Sequence[tuple[_Operands, Val, Val]], batch: tuple[Val, ...], type_: TileTy,
            done: mma.Done | None) -> None:
    """Products (operands, C, distance of its rows) of the same shape, side by side."""
    m, n = (ctx.size(type_.extent(type_.rank - axis)) for axis in (2, 1))
    width = ctx.size(_width([part for part, _, _ in parts]))
    products = [part.product(ctx, batch, width, c, ldc) for part, c, ldc in parts]
    when = _few_rows(ctx, [part for part, _, _ in parts], type_)

    def few() -> None:
        for part, c, ldc in parts:
            with ctx.b.apart("few"), ctx.scope():
                part.multiply_few(ctx, batch, m, n, c, ldc)

    mma.matmul(ctx.b, products, m=m, n=n, few=None if when is None else (when, few), done=done)


def _width(parts: Sequence[_Operands]) -> Dim:
    """Columns that are packed at once: what suits all products."""
    width = parts[0].scratch.width
    for part in parts[1:]:
        width = width.minimum(part.scratch.width)
    return width


def _few_rows(ctx: Context, parts: Sequence[_Operands], type_: TileTy) -> Val | None:
    """Whether the rows are so few that the products are not packed; None where that is known not to be."""
    if any(part.few is None for part in parts):
        return None
    few = ctx.b.cmp("le", ctx.size(type_.extent(type_.rank - 2)), min(part.most_few(ctx) for part in parts))
    for part in parts:
        few = ctx.b.and_(few, ctx.b.cmp("gt", inner_extent(ctx, part.op), 0))
    return few


def _dot_of(ctx: Context, op: Op) -> Dot | None:
    return dot_unit(op.operands[0].type.dtype, op.operands[1].type.dtype, ctx.target)


def _sum_type(op: Op) -> DType:
    return f32 if register_type(op.result.type.dtype) == F32 else int32


# -- blocks of loops ----------------------------------------------------------------------------------


def _in_loop(ctx: Context, op: Op) -> bool:
    return op in ir.in_loops(ctx.function.body)


def _resident(ctx: Context, op: Op, memory: Memory) -> None:
    """Blocks that a loop works on."""
    a, w, type_ = op.operands[0], op.operands[1], op.result.type
    sizes = ctx.size(type_.extent(type_.rank - 2)), ctx.size(type_.extent(type_.rank - 1)), inner_extent(ctx, op)
    left, stored = _in_f32(ctx, a), memory_of(ctx, w)
    scratch = ctx.scratch(resident.scratch_bytes(ctx, op, in_memory=stored is not None))

    def nest(batch: tuple[Val, ...]) -> None:
        if len(batch) < type_.rank - 2:
            with each(ctx, ctx.size(type_.extent(len(batch)))) as index:
                nest((*batch, index))
            return
        right = stored or packing_source(ctx, w, batch if w.type.rank > 2 else (), F32_CHAIN, lanes_axis=1)
        resident.multiply(ctx, op, left, right, memory, batch, sizes, scratch)

    nest(())


def _in_f32(ctx: Context, value: Value) -> Memory:
    """A value as f32 in memory: where it is, or written to scratch first."""
    memory = memory_of(ctx, value)
    if memory is not None and memory.dtype.name == "f32":
        return memory
    if value.op is not None and value.op.name == "transpose":
        source = _in_f32(ctx, value.op.operands[0])
        return replace(source, strides=tuple(source.strides[p] for p in value.op.attrs["perm"]))
    memory = ctx.buffer(value, f32)
    write(ctx, memory, value)
    return memory


# -- every other dtype --------------------------------------------------------------------------------


def _chain(ctx: Context, op: Op, point: Point) -> None:
    b, (a, w) = ctx.b, op.operands[:2]
    ty = register_type(op.result.type.dtype)
    rank = op.result.type.rank
    batch, (row, column) = point.indices[:-2], point.indices[-2:]
    lanes = point.lanes if point.axis is not None else 0
    start = element(ctx, op.result, point) if len(op.operands) == 3 else emit.const(0, emit.vec(lanes, ty))
    w_batch = batch if w.type.rank > 2 else ()
    on_columns = point.axis == rank - 1
    with b.for_(0, inner_extent(ctx, op), carry=[b.value(start, emit.vec(lanes, ty))]) as loop, ctx.scope():
        a_at = point.pick((*batch, row, loop.i), None if on_columns else point.axis)
        w_axis = len(w_batch) + 1 if on_columns else None
        if point.axis is not None and point.axis < rank - 2 and w_batch:
            w_axis = point.axis
        w_at = point.pick((*w_batch, loop.i, column), w_axis)
        x, y = (_as(ctx, element(ctx, v, at), ty) for v, at in ((a, a_at), (w, w_at)))
        loop.next([_multiply_add(ctx, x, y, loop.carry[0])])
    store(ctx, ctx.memory[op.result.name], point, loop.results[0])


def _as(ctx: Context, x: Val, ty: str) -> Val:
    return x if emit.elem(x.ty) == ty else ctx.b.cast("trunc" if ty == emit.I32 else "sext", x, ty)


def _multiply_add(ctx: Context, x: Val, y: Val, total: Val) -> Val:
    if emit.is_float(total.ty):
        return ctx.b.fma(x, y, total)
    return ctx.b.add(ctx.b.mul(x, y), total)
