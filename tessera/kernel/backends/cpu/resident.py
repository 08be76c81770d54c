"""f32 products of blocks that a loop works on: the operands lie in the caches already and are read in place.

In: an `mma` inside a loop whose block sizes bound it, as those of attention. Out: calls of a routine that computes
the product. Called by `matmul.py`. An element of C is one chain acc = fma(a_k, w_k, acc), k ascending, as everywhere.

A packed product reads and writes each operand once more than it has to, which pays when the packed copy is used
many times. Here a block is used once or a few times: the left operand is read where it is, whichever way it runs,
and so is a right operand whose lanes lie side by side. Only a right operand that runs along k is transposed.

The routines are functions of their own, shared by the products of a kernel: one product inlined after the other
would make the loop that holds them so large that LLVM's loop passes take most of the time to compile.
"""

from __future__ import annotations

from dataclasses import replace

from tessera.kernel.backends.cpu import mma
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory, storage_type
from tessera.kernel.backends.cpu.emit import F32, I1, I64, VOID, Builder, Function, Val, const, vec
from tessera.kernel.backends.cpu.mma_dot import F32_CHAIN
from tessera.kernel.backends.cpu.mma_micro import ladder
from tessera.kernel.backends.cpu.mma_pack import Source, pack_panels, strided
from tessera.kernel.backends.cpu.storage import from_storage
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Op

MOST = 256  # elements along a side of a block
MOST_STRIDE = 256  # floats from k to k of a right operand read in place: further apart, its rows share cache sets
UNROLLED = 48  # multiply-adds in the body of the innermost loop; more, or longer ones, make LLVM spill sums


def fits(op: Op) -> bool:
    """Whether two of the three sides of a product are blocks of at most MOST elements."""
    a, result = op.operands[0].type, op.result.type
    sides = (result.shape[-2].const, result.shape[-1].const, a.shape[-1].const)
    return sum(side is not None and side <= MOST for side in sides) >= 2


def scratch_bytes(ctx: Context, op: Op) -> Dim:
    """What `multiply` needs: the panels of the right operand, and the vector that packing may write too much."""
    t = mma.tiling(ctx.target)
    depth, columns = op.operands[0].type.shape[-1], op.result.type.shape[-1]
    return (columns.ceildiv(t.nr) * t.nr * depth + t.nr) * 4


def multiply(ctx: Context, op: Op, a: Memory, w: Memory | Source, c: Memory, batch: tuple[Val, ...],
             sizes: tuple[Val, Val, Val], scratch: Val) -> None:
    """C[m, n] = A[m, k] @ W[k, n] at one batch index, or C += where the product has an accumulator.

    Args:
        a: the left operand in f32, with any strides.
        w: the right operand: memory of any float type and strides, or what is computed while it is packed.
        sizes: m, n, k.
        scratch: `scratch_bytes`, 64-byte aligned.
    """
    b, t = ctx.b, mma.tiling(ctx.target)
    m, n, k = sizes
    if isinstance(w, Memory):
        at_w = w.address(b, (*batch[:len(w.strides) - 2], ZERO, ZERO))
        pointer, w_k, w_panel = _right(b, t, at_w, w, n, k, scratch)
    else:
        pack_panels(b, F32_CHAIN, w, t.lanes, t.nr, ZERO, n, ZERO, k, scratch, k)
        pointer, w_k, w_panel = scratch, const(t.nr, I64), b.mul(k, t.nr)
    at_a = a.address(b, (*batch[:len(a.strides) - 2], ZERO, ZERO))
    rows = op.result.type.shape[-2].const or 0
    routine = ctx.module.helper(
        f"product_{rows % t.mr}", VOID, _PARAMS, lambda function: _product(function, t, rows % t.mr), inline=False)
    b.call(routine, at_a, a.strides[-2], a.strides[-1], pointer, w_k, w_panel, c.address(b, (*batch, ZERO, ZERO)),
           c.strides[-2], k, const(int(len(op.operands) == 3), I1), m, n)


def _right(b: Builder, t: mma.Tiling, at: Val, w: Memory, n: Val, k: Val, scratch: Val) -> tuple[Val, ...]:
    """Where the panels of a right operand in memory are: (pointer, stride of k, stride of panels)."""
    w_k, w_lane = w.strides[-2:]
    along = "k" if w_k.const == 1 else "lanes" if w_lane.const == 1 else "none"
    routine = b.module.helper(
        f"pack_{w.dtype.name}_{along}", VOID, _PACK_PARAMS, lambda function: _pack(function, t, w, along), inline=False)
    packed = scratch, const(t.nr, I64), b.mul(k, t.nr)
    if along != "lanes" or w.dtype.name != "f32":
        b.call(routine, at, w_lane, w_k, n, k, scratch)
        return packed
    with b.if_(b.cmp("gt", w_k, MOST_STRIDE)) as branch:
        b.call(routine, at, w_lane, w_k, n, k, scratch)
        branch.give(packed)
    with branch.else_():
        branch.give([at, w_k, const(t.nr, I64)])
    return tuple(branch.results)


_PACK_PARAMS = [("w", "ptr noalias readonly"), ("w_lane", I64), ("w_k", I64), ("n", I64), ("k", I64),
                ("out", "ptr noalias")]


def _pack(function: Function, t: mma.Tiling, w: Memory, along: str) -> None:
    """All panels of a block."""
    b = function.builder
    pointer, w_lane, w_k, n, k, out = function.args
    w_lane, w_k = (const(1, I64) if along == axis else stride for axis, stride in (("lanes", w_lane), ("k", w_k)))
    plain = strided(b, pointer, w_lane, w_k, storage_type(w.dtype))
    source = replace(plain, read=lambda *at: from_storage(b, plain.read(*at), w.dtype))
    pack_panels(b, F32_CHAIN, source, t.lanes, t.nr, ZERO, n, ZERO, k, out, k)
    b.ret()


_PARAMS = [("a", "ptr noalias readonly"), ("a_row", I64), ("a_k", I64),
           ("w", "ptr noalias readonly"), ("w_k", I64), ("w_panel", I64),
           ("c", "ptr noalias"), ("ldc", I64), ("k", I64), ("keep", I1), ("m", I64), ("n", I64)]


def _product(function: Function, t: mma.Tiling, rest: int) -> None:
    """All rows of one panel of W, then the next panel: it stays in the first-level cache meanwhile.

    Args:
        rest: rows that kernels of `mr` rows usually leave over; there are kernels of whole panels for them too.
    """
    b = function.builder
    a, a_row, a_k, w, w_k, w_panel, c, ldc, k, keep, m, n = function.args
    whole = b.mul(b.udiv(m, t.mr), t.mr)
    with b.for_(0, n, t.nr) as column:
        panel = b.gep(w, b.mul(b.udiv(column.i, t.nr), w_panel), F32)
        columns = b.min(b.sub(n, column.i), t.nr)

        def run(size: int, row: Val) -> None:
            args = (b.gep(a, b.mul(row, a_row), F32), a_row, a_k, panel, w_k,
                    b.gep(b.gep(c, column.i, F32), b.mul(row, ldc), F32), ldc, k, keep, columns)
            if size != t.mr and not rest & size:
                b.call(_kernel(b, t, size, edge=True), *args)
                return
            with b.if_(b.cmp("eq", columns, t.nr), likely=True) as branch:
                b.call(_kernel(b, t, size, edge=False), *args)
            with branch.else_():
                b.call(_kernel(b, t, size, edge=True), *args)

        with b.for_(0, whole, t.mr) as row:
            run(t.mr, row.i)
        done = whole
        for size in ladder(t.mr)[1:]:
            with b.if_(b.cmp("ge", b.sub(m, done), size)) as branch:
                run(size, done)
                branch.give([b.add(done, size)])
            with branch.else_():
                branch.give([done])
            done = branch.results[0]
    b.ret()


_KERNEL_PARAMS = [*_PARAMS[:5], *_PARAMS[6:10], ("columns", I64)]


def _kernel(b: Builder, t: mma.Tiling, rows: int, *, edge: bool) -> Function:
    """C[rows, NR] (+)= A[rows, k] @ one panel of W; with `edge` only `columns` columns exist."""
    name = f"product_{rows}x{t.nr}{'_edge' if edge else ''}"
    return b.module.helper(name, VOID, _KERNEL_PARAMS, lambda function: _emit_kernel(function, t, rows, edge),
                           inline=False)


def _emit_kernel(function: Function, t: mma.Tiling, rows: int, edge: bool) -> None:
    b = function.builder
    a, a_row, a_k, w, w_k, c, ldc, k, keep, columns = function.args
    ty = vec(t.lanes, F32)
    masks = [b.lane_mask(b.sub(columns, v * t.lanes), t.lanes) if edge else None for v in range(t.vectors)]

    def read(at: Val, v: int) -> Val:
        mask = masks[v]
        return b.load(at, ty) if mask is None else b.masked_load(at, ty, mask)

    outputs = [b.gep(b.gep(c, b.mul(ldc, row), F32), v * t.lanes, F32) for row in range(rows) for v in range(t.vectors)]
    a_rows = [b.gep(a, b.mul(a_row, row), F32) for row in range(rows)]
    with b.if_(keep) as branch:
        branch.give([read(at, i % t.vectors) for i, at in enumerate(outputs)])
    with branch.else_():
        branch.give([const(0.0, ty)] * len(outputs))

    def step(at: Val, sums: list[Val]) -> list[Val]:
        panel = b.gep(w, b.mul(at, w_k), F32)
        ws = [read(b.gep(panel, v * t.lanes, F32), v) for v in range(t.vectors)]
        at_k = b.mul(at, a_k)
        done: list[Val] = []
        for row in a_rows:
            x = b.splat(b.load(b.gep(row, at_k, F32), F32), t.lanes)
            done += [b.fma(x, y, sums[len(done) + v]) for v, y in enumerate(ws)]
        return done

    sums = branch.results
    # The kernels of edges run seldom: they are kept small.
    unroll = 1 if edge else 1 << (max(1, UNROLLED // len(outputs)).bit_length() - 1)
    whole = b.and_(k, -unroll)
    for first, last, steps in ((ZERO, whole, unroll), (whole, k, 1))[:1 if unroll == 1 else 2]:
        with b.for_(first, last, steps, carry=sums) as loop:
            inner = loop.carry
            for offset in range(steps):
                inner = step(b.add(loop.i, offset), inner)
            loop.next(inner)
        sums = loop.results
    for i, (total, at) in enumerate(zip(sums, outputs)):
        mask = masks[i % t.vectors]
        if mask is None:
            b.store(total, at)
        else:
            b.masked_store(total, at, mask)
    b.ret()
