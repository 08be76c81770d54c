"""Lowers `mma`: chooses a register-blocked kernel where there is one, else plain loops.

Each output element is one chain acc = fma(a_k, b_k, acc), k ascending, from 0 or from the accumulator, on
either path. Operands that are computed on demand (a norm before, a dequantized weight) are evaluated while
they are packed, so they never make a trip through memory of their own.
"""

from __future__ import annotations

from dataclasses import replace

from tessera.kernel import ir
from tessera.kernel.backends.cpu import emit, mma, resident, skinny
from tessera.kernel.backends.cpu.columns import aligned
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory, register_type
from tessera.kernel.backends.cpu.elements import Point, element, store
from tessera.kernel.backends.cpu.emit import F32, Val
from tessera.kernel.backends.cpu.loops import each, sweep, vector_lanes, write
from tessera.kernel.backends.cpu.mma_dot import dot_unit
from tessera.kernel.backends.cpu.mma_pack import Source, strided
from tessera.kernel.dims import Dim
from tessera.kernel.ir import ELEMENTWISE, Op, Value
from tessera.types import f32


def lower_mma(ctx: Context, op: Op) -> None:
    """Fill the result's buffer; `ctx.memory` is set."""
    result = op.result
    memory = ctx.destinations.get(result.name) or ctx.buffer(result)
    if len(op.operands) == 3:
        write(ctx, memory, result, lambda point: element(ctx, op.operands[2], point))
    ctx.memory[result.name] = memory
    if register_type(result.type.dtype) == F32:
        (_resident if resident.fits(op) and _in_loop(ctx, op) else _blocked)(ctx, op, memory)
    else:
        sweep(ctx, result.type, [], lambda point: _dot(ctx, op, point), 2 * vector_lanes(ctx))


def inner_extent(ctx: Context, op: Op) -> Val:
    """How many k count: what is valid of both operands."""
    a, w = op.operands[0].type, op.operands[1].type
    left, right = a.extent(a.rank - 1), w.extent(w.rank - 2)
    return ctx.size(left if w.valid[-2] is None else right if a.valid[-1] is None else left.minimum(right))


# -- f32 through the register-blocked kernels ---------------------------------------------------------


def _blocked(ctx: Context, op: Op, memory: Memory) -> None:
    type_ = op.result.type
    m, n, k = ctx.size(type_.extent(type_.rank - 2)), ctx.size(type_.extent(type_.rank - 1)), inner_extent(ctx, op)
    scratch = ctx.scratch(_scratch_bytes(ctx, type_.shape[-2]))
    dot = dot_unit(op.operands[0].type.dtype, op.operands[1].type.dtype, ctx.target)
    # The products of a loop have no weights that few rows share: their blocks are packed anyway.
    few = ctx.scratch(skinny.scratch_bytes()) if dot is not None and not _in_loop(ctx, op) else None

    def nest(batch: tuple[Val, ...]) -> None:
        if len(batch) < type_.rank - 2:
            with each(ctx, ctx.size(type_.extent(len(batch)))) as index:
                nest((*batch, index))
            return
        if few is None or dot is None:
            blocked(batch)
            return
        with ctx.b.if_(ctx.b.and_(ctx.b.cmp("le", m, skinny.ROWS), ctx.b.cmp("gt", k, 0))) as branch, ctx.scope():
            skinny.multiply(ctx, skinny.Product(
                a=op.operands[0], w=op.operands[1], dot=dot, batch=batch, m=m, n=n, k=k,
                c=memory.address(ctx.b, (*batch, ZERO, ZERO)), ldc=memory.strides[-2],
                accumulate=len(op.operands) == 3, most_rows=type_.shape[-2].const or skinny.ROWS), few)
        with branch.else_(), ctx.scope():
            blocked(batch)

    def blocked(batch: tuple[Val, ...]) -> None:
        a = _source(ctx, op.operands[0], batch, lanes_axis=0)
        w = _source(ctx, op.operands[1], batch if op.operands[1].type.rank > 2 else (), lanes_axis=1)
        mma.matmul(ctx.b, ctx.target, m=m, n=n, k=k, a=a, w=w, c=memory.address(ctx.b, (*batch, ZERO, ZERO)),
                   ldc=memory.strides[-2], scratch=scratch, accumulate=len(op.operands) == 3)

    nest(())


def _in_loop(ctx: Context, op: Op) -> bool:
    return any(inner is op for loop in ir.walk(ctx.function.body) if loop.name in ("for", "while")
               for region in loop.regions for inner in ir.walk(region))


def _resident(ctx: Context, op: Op, memory: Memory) -> None:
    """Blocks that a loop works on."""
    a, w, type_ = op.operands[0], op.operands[1], op.result.type
    sizes = ctx.size(type_.extent(type_.rank - 2)), ctx.size(type_.extent(type_.rank - 1)), inner_extent(ctx, op)
    scratch = ctx.scratch(resident.scratch_bytes(ctx, op))
    left = _in_f32(ctx, a)

    def nest(batch: tuple[Val, ...]) -> None:
        if len(batch) < type_.rank - 2:
            with each(ctx, ctx.size(type_.extent(len(batch)))) as index:
                nest((*batch, index))
            return
        right = _source(ctx, w, batch if w.type.rank > 2 else (), lanes_axis=1)
        resident.multiply(ctx, op, left, right, memory, batch, sizes, scratch)

    nest(())


def _in_f32(ctx: Context, value: Value) -> Memory:
    """A value as f32 in memory: where it is, or written to scratch first."""
    memory = _as_memory(ctx, value)
    if memory is not None and memory.dtype.name == "f32":
        return memory
    if value.op is not None and value.op.name == "transpose":
        source = _in_f32(ctx, value.op.operands[0])
        return replace(source, strides=tuple(source.strides[p] for p in value.op.attrs["perm"]))
    memory = ctx.buffer(value, f32)
    write(ctx, memory, value)
    return memory


def _scratch_bytes(ctx: Context, rows: Dim) -> Dim:
    """What `mma.scratch_floats` asks for, as a symbolic size."""
    t = mma.tiling(ctx.target)
    return (rows.ceildiv(t.mr) * (t.mr * t.kc) + t.w_floats) * 4


def _source(ctx: Context, value: Value, batch: tuple[Val, ...], lanes_axis: int) -> Source:
    """An operand for packing: its last two axes, the one of the lanes and the one of k."""
    memory = _as_memory(ctx, value)
    lane, k = (len(batch) + lanes_axis, len(batch) + 1 - lanes_axis)
    if memory is not None and memory.dtype.name == "f32":
        pointer = memory.address(ctx.b, (*batch, ZERO, ZERO))
        return strided(ctx.b, pointer, memory.strides[lane], memory.strides[k])
    axis = _unit_axis(ctx, value)

    def read(at_lane: Val, at_k: Val, count: int, along_k: bool) -> Val:
        indices = [*batch, ZERO, ZERO]
        # Vectors along k start at multiples of their length.
        indices[lane], indices[k] = at_lane, aligned(ctx, at_k, count) if count and along_k else at_k
        with ctx.scope():
            point = Point(tuple(indices), (k if along_k else lane) if count else None, count)
            x = element(ctx, value, point)
        return x if emit.lanes(x.ty) == count else ctx.b.splat(x, count)

    return Source(read=read, along_k=axis == k)


def _as_memory(ctx: Context, value: Value) -> Memory | None:
    """The memory behind a value that is only moved: loaded, transposed."""
    if value.name in ctx.memory:
        return ctx.memory[value.name]
    if value.op is None:
        return None
    if value.op.name == "load":
        return ctx.memory[value.op.operands[0].name]
    if value.op.name == "transpose":
        source = _as_memory(ctx, value.op.operands[0])
        if source is not None:
            return replace(source, strides=tuple(source.strides[p] for p in value.op.attrs["perm"]))
    return None


def _unit_axis(ctx: Context, value: Value) -> int:
    """The axis along which a value's elements lie side by side in memory; the last where nothing tells."""
    memory = _as_memory(ctx, value)
    if memory is not None:
        return next((axis for axis, stride in enumerate(memory.strides) if stride.const == 1), value.type.rank - 1)
    op = value.op
    if op is not None and op.name == "transpose":
        return op.attrs["perm"].index(_unit_axis(ctx, op.operands[0]))
    if op is not None and op.name in ELEMENTWISE:
        widest = max(op.operands, key=lambda v: v.type.rank)
        return _unit_axis(ctx, widest)
    return value.type.rank - 1


# -- every other dtype --------------------------------------------------------------------------------


def _dot(ctx: Context, op: Op, point: Point) -> None:
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
