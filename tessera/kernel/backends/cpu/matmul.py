"""mma on tiles of any dtype: the general path. (`mma.py` has the register-blocked kernels.)

Each output element is one chain acc = fma(a_k, b_k, acc), k ascending, from 0 or from the accumulator.
"""

from __future__ import annotations

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.context import Context, register_type
from tessera.kernel.backends.cpu.elements import Point, element, store
from tessera.kernel.backends.cpu.emit import Val
from tessera.kernel.backends.cpu.loops import sweep, vector_lanes, write
from tessera.kernel.ir import Op


def lower_mma(ctx: Context, op: Op) -> None:
    """Fill the result's buffer; `ctx.memory` is set."""
    result = op.result
    memory = ctx.destinations.get(result.name) or ctx.buffer(result)
    if len(op.operands) == 3:
        write(ctx, memory, result, lambda point: element(ctx, op.operands[2], point))
    ctx.memory[result.name] = memory
    sweep(ctx, result.type, [], lambda point: _dot(ctx, op, point), 2 * vector_lanes(ctx))


def _dot(ctx: Context, op: Op, point: Point) -> None:
    b, (a, w) = ctx.b, op.operands[:2]
    ty = register_type(op.result.type.dtype)
    rank = op.result.type.rank
    batch, (row, column) = point.indices[:-2], point.indices[-2:]
    lanes = point.lanes if point.axis is not None else 0
    if len(op.operands) == 3:
        start = element(ctx, op.result, point)
    else:
        start = emit.const(0, emit.vec(lanes, ty))
    extent = inner_extent(ctx, op)
    w_batch = batch if w.type.rank > 2 else ()
    on_columns = point.axis == rank - 1
    with b.for_(0, extent, carry=[b.value(start, emit.vec(lanes, ty))]) as loop, ctx.scope():
        a_at = Point((*batch, row, loop.i), None) if on_columns or point.axis is None else \
            point.pick((*batch, row, loop.i), point.axis)
        w_axis = len(w_batch) + 1 if on_columns else None
        if point.axis is not None and not on_columns and point.axis < rank - 2 and w_batch:
            w_axis = point.axis
        w_at = point.pick((*w_batch, loop.i, column), w_axis)
        x, y = (_as(ctx, element(ctx, v, at), ty) for v, at in ((a, a_at), (w, w_at)))
        loop.next([_multiply_add(ctx, x, y, loop.carry[0])])
    store(ctx, ctx.memory[op.result.name], point, loop.results[0])


def inner_extent(ctx: Context, op: Op) -> Val:
    """How many k count: what is valid of both operands."""
    a, w = op.operands[0].type, op.operands[1].type
    left, right = a.extent(a.rank - 1), w.extent(w.rank - 2)
    return ctx.size(left if w.valid[-2] is None else right if a.valid[-1] is None else left.minimum(right))


def _as(ctx: Context, x: Val, ty: str) -> Val:
    return x if emit.elem(x.ty) == ty else ctx.b.cast("trunc" if ty == emit.I32 else "sext", x, ty)


def _multiply_add(ctx: Context, x: Val, y: Val, total: Val) -> Val:
    if emit.is_float(total.ty):
        return ctx.b.fma(x, y, total)
    return ctx.b.add(ctx.b.mul(x, y), total)
