"""An integer `mma` of few rows whose weights lie as rows [N, K] of 8 or 4 bits: all of k in 32-bit sums.

In: the operation and where C lies. Out: C, through `byte_rows.py`. Called by `matmul.py`.
"""

from __future__ import annotations

from dataclasses import replace

from tessera.kernel.backends.cpu import byte_rows, emit
from tessera.kernel.backends.cpu.byte_dot import CHUNK
from tessera.kernel.backends.cpu.context import Context, Memory
from tessera.kernel.backends.cpu.elements import Point, element
from tessera.kernel.backends.cpu.emit import I32, Val
from tessera.kernel.backends.cpu.operands import memory_of
from tessera.kernel.ir import Op


def multiplies(ctx: Context, op: Op) -> bool:
    """Whether an `mma` is int8 [M, K] times such weights."""
    return op.result.type.rank == 2 and op.operands[0].type.dtype.name == "int8" and \
        op.operands[1].type.dtype.name in ("int8", "int4") and _weights(ctx, op) is not None


def _weights(ctx: Context, op: Op) -> Memory | None:
    """The weights [N, K], where K lies side by side."""
    memory = memory_of(ctx, op.operands[1])
    if memory is None or memory.strides[0].const != 1 or not memory.starts_byte or memory.dtype.bits > 8:
        return None
    return replace(memory, strides=memory.strides[::-1])


def multiply(ctx: Context, op: Op, m: Val, n: Val, k: Val, c: Val, ldc: Val, scratch: Val) -> None:
    """C = A @ W, or C += for an `mma` with an accumulator.

    Args:
        m, n, k: sizes.
        c, ldc: where C lies, and the distance of its rows.
        scratch: `byte_rows.scratch_bytes`.
    """
    b, left = ctx.b, op.operands[0]
    weights = _weights(ctx, op)
    assert weights is not None
    ty = emit.vec(byte_rows.lanes(ctx), I32)

    def bytes_(row: Val, step: Val, chunk: int, mask: Val | None) -> Val:
        return element(ctx, left, Point((row, b.mul(step, CHUNK)), 1, CHUNK, mask))

    def finish(row: Val, column: Val, mask: Val, total: Val) -> None:
        at = b.gep(c, b.add(b.mul(row, ldc), column), I32)
        if len(op.operands) == 3:
            total = b.add(total, b.masked_load(at, ty, mask))
        b.masked_store(total, at, mask)

    byte_rows.multiply(ctx, byte_rows.Rows(
        weights=weights, bytes=bytes_, m=m, n=n, k=k, start=emit.const(0, ty), prepare=lambda column, mask: None,
        step=lambda step, row, column, mask, total, sums: b.add(total, sums), finish=finish, scratch=scratch))
