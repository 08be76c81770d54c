"""Operands of matrix products as the packing reads them.

In: a tile value, in memory or computed on demand. Out: a `Source` that gives vectors of packable elements, along the
lanes or along k, whichever way the memory behind it runs; columns whose rows run along k are transposed in registers
(`weights.py`). Called by `matmul.py`.
"""

from __future__ import annotations

from dataclasses import replace

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.columns import aligned
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory, storage_type
from tessera.kernel.backends.cpu.elements import Point, element
from tessera.kernel.backends.cpu.emit import F32, I16, I32, Val
from tessera.kernel.backends.cpu.mma_dot import Dot
from tessera.kernel.backends.cpu.mma_pack import Source, strided
from tessera.kernel.backends.cpu.storage import from_storage
from tessera.kernel.backends.cpu.weights import Weights
from tessera.kernel.ir import ELEMENTWISE, Value


def packing_source(ctx: Context, value: Value, batch: tuple[Val, ...], dot: Dot, lanes_axis: int) -> Source:
    """An operand for packing: its last two axes, the one of the lanes and the one of k."""
    source = _source(ctx, value, batch, dot, lanes_axis)
    if lanes_axis == 1:
        weights = Weights(ctx, value, batch, dot)
        if weights.transposes:
            return replace(source, units=weights.units, block=weights.block)
    return source


def _source(ctx: Context, value: Value, batch: tuple[Val, ...], dot: Dot, lanes_axis: int) -> Source:
    b, memory = ctx.b, memory_of(ctx, value)
    lane, k = (len(batch) + lanes_axis, len(batch) + 1 - lanes_axis)
    shift = dot.shift if lanes_axis == 0 else 0
    if memory is not None and memory.dtype.name != "int4":
        dtype = memory.dtype
        pointer = memory.address(b, (*batch, ZERO, ZERO))
        plain = strided(b, pointer, memory.strides[lane], memory.strides[k], storage_type(dtype))
        if storage_type(dtype) == dot.element and not shift:
            return plain
        return replace(plain, direct=None,
                       read=lambda *at: packable(ctx, from_storage(b, plain.read(*at), dtype), dot, shift))
    axis = unit_axis(ctx, value)

    def read(at_lane: Val, at_k: Val, count: int, along_k: bool) -> Val:
        indices = [*batch, ZERO, ZERO]
        # Vectors along k start at multiples of their length.
        indices[lane], indices[k] = at_lane, aligned(ctx, at_k, count) if count and along_k else at_k
        with ctx.scope():
            point = Point(tuple(indices), (k if along_k else lane) if count else None, count)
            x = element(ctx, value, point)
        return packable(ctx, x if emit.lanes(x.ty) == count else b.splat(x, count), dot, shift)

    return Source(read=read, along_k=axis == k)


def packable(ctx: Context, x: Val, dot: Dot, shift: int) -> Val:
    """A register value as the dot's packed element."""
    b = ctx.b
    if dot.element == F32:
        return x
    if dot.total == F32:  # bf16: the upper half of the f32 that holds it
        return b.cast("trunc", b.lshr(b.bitcast(x, emit.vec(emit.lanes(x.ty), I32)), 16), I16)
    x = b.cast("trunc", x, dot.element)
    return b.add(x, -shift) if shift else x


def memory_of(ctx: Context, value: Value) -> Memory | None:
    """The memory behind a value that is only moved: loaded, transposed, held as f32."""
    if value.name in ctx.memory:
        return ctx.memory[value.name]
    if value.op is None:
        return None
    if value.op.name == "load":
        return ctx.memory[value.op.operands[0].name]
    if _widens(value):
        return memory_of(ctx, value.op.operands[0])
    if value.op.name == "transpose":
        source = memory_of(ctx, value.op.operands[0])
        if source is not None:
            return replace(source, strides=tuple(source.strides[p] for p in value.op.attrs["perm"]))
    return None


def _widens(value: Value) -> bool:
    """Whether a value is a cast to f32 that rounds nothing: registers hold narrower floats as f32 anyway."""
    if value.op is None or value.op.name != "cast" or value.type.dtype.name != "f32":
        return False
    source = value.op.operands[0].type.dtype
    return source.is_float and source.bits <= 32


def unit_axis(ctx: Context, value: Value) -> int:
    """The axis along which a value's elements lie side by side in memory; the last where nothing tells."""
    memory = memory_of(ctx, value)
    if memory is not None:
        return next((axis for axis, stride in enumerate(memory.strides) if stride.const == 1), value.type.rank - 1)
    op = value.op
    if op is not None and op.name == "transpose":
        return op.attrs["perm"].index(unit_axis(ctx, op.operands[0]))
    if op is not None and op.name in ELEMENTWISE:
        widest = max(op.operands, key=lambda v: v.type.rank)
        return unit_axis(ctx, widest)
    return value.type.rank - 1
