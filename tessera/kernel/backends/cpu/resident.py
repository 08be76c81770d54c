"""f32 products inside a loop: the operands lie in the caches already, or are read once, and are taken where they are.

In: an `mma` inside a loop, as those of attention and of decoding. Out: calls of a routine that computes the product.
Called by `matmul.py`. An element of C is one chain acc = fma(a_k, w_k, acc), k ascending, as everywhere.

A packed product reads and writes each operand once more than it has to, which pays when the packed copy is used
many times. Here an operand is used once or a few times: the left one is read where it is, whichever way it runs, and
so is a right one whose lanes lie side by side. Only a right operand that runs along k is transposed, a panel of
columns at a time, so that the panel is still in the first-level cache when it is multiplied.

The routines are functions of their own, shared by the products of a kernel: one product inlined after the other
would make the loop that holds them so large that LLVM's loop passes take most of the time to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tessera.kernel.backends.cpu import mma
from tessera.kernel.backends.cpu.columns import UNITS, transpose_parts
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory, storage_type
from tessera.kernel.backends.cpu.emit import F32, I1, I32, I64, VOID, Builder, Function, Val, const, vec
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.backends.cpu.mma_dot import F32_CHAIN
from tessera.kernel.backends.cpu.mma_micro import copy_tile
from tessera.kernel.backends.cpu.mma_pack import Source, pack_panels
from tessera.kernel.backends.cpu.storage import from_storage, load_first
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Op
from tessera.types import DType, f32

MOST = 256  # elements along a side of a block
MOST_STRIDE = 256  # floats from k to k of a right operand read many times: further apart, its rows share cache sets
ROWS = 256  # of A that are taken together: with as many k they stay in the second-level cache
PANEL_FLOATS = 4096  # of a panel of W: half of the first-level cache
VECTORS = 4  # in a row of a panel
RUN = UNITS * 4  # bytes of a row that are transposed at a time
UNROLLED = 48  # multiply-adds in the body of the innermost loop; more, or longer ones, make LLVM spill sums
_DIRECT = ("f32", "bf16")  # dtypes whose elements become f32 in an instruction or two


def fits(op: Op) -> bool:
    """Whether two of the three sides of a product are blocks of at most MOST elements."""
    a, result = op.operands[0].type, op.result.type
    sides = (result.shape[-2].const, result.shape[-1].const, a.shape[-1].const)
    return sum(side is not None and side <= MOST for side in sides) >= 2


def scratch_bytes(ctx: Context, op: Op, *, in_memory: bool) -> Dim:
    """What `multiply` needs: a panel of a right operand in memory, or all of one that is computed while it is packed,
    and the vector that packing may write too much."""
    width = _Shape(ctx.target).width
    if in_memory:
        return Dim.of((PANEL_FLOATS + width) * 4)
    depth, columns = op.operands[0].type.shape[-1], op.result.type.shape[-1]
    return (columns.ceildiv(width) * width * depth + width) * 4


def multiply(ctx: Context, op: Op, a: Memory, w: Memory | Source, c: Memory, batch: tuple[Val, ...],
             sizes: tuple[Val, Val, Val], scratch: Val) -> None:
    """C[m, n] = A[m, k] @ W[k, n] at one batch index, or C += where the product has an accumulator.

    Args:
        a: the left operand in f32, with any strides.
        w: the right operand: memory of any float type and strides, or what is computed while it is packed.
        sizes: m, n, k.
        scratch: `scratch_bytes`, 64-byte aligned.
    """
    b, shape = ctx.b, _Shape(ctx.target)
    m, n, k = sizes
    if isinstance(w, Memory):
        layout = _Layout(w.dtype, "k" if w.strides[-2].const == 1 else "lanes" if w.strides[-1].const == 1 else "none")
        right = w.address(b, (*batch[:len(w.strides) - 2], ZERO, ZERO)), *w.strides[-2:], ZERO
    else:
        layout, width = _Layout(f32, "panels"), shape.width
        pack_panels(b, F32_CHAIN, w, shape.lanes, width, ZERO, n, ZERO, k, scratch, k)
        right = scratch, const(width, I64), const(1, I64), b.mul(k, width)
    routine = ctx.module.helper(f"product_{layout.name}", VOID, _PARAMS, lambda f: _Product(f, shape, layout).emit(),
                                inline=False)
    b.call(routine, a.address(b, (*batch[:len(a.strides) - 2], ZERO, ZERO)), *a.strides[-2:], *right,
           c.address(b, (*batch, ZERO, ZERO)), c.strides[-2], const(int(len(op.operands) == 3), I1), m, n, k, scratch)


@dataclass(frozen=True)
class _Layout:
    """How the right operand lies: its dtype, and what runs along its rows (k, lanes, none), or panels that are packed
    already."""

    dtype: DType
    along: str

    @property
    def name(self) -> str:
        return f"{self.dtype.name}_{self.along}"

    @property
    def direct(self) -> bool:
        """Whether the kernels can read it where it is."""
        return self.along == "panels" or (self.along == "lanes" and self.dtype.name in _DIRECT)


@dataclass(frozen=True)
class _Shape:
    """The registers that the kernels fill."""

    target: Target

    @property
    def lanes(self) -> int:
        return self.target.lanes(32)

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return VECTORS * self.lanes

    @property
    def depth(self) -> int:
        """k of a panel."""
        return PANEL_FLOATS // self.width

    @property
    def most(self) -> int:
        """Rows of the kernel that fills the registers with two vectors of each."""
        return mma.tiling(self.target).mr

    @property
    def small(self) -> list[int]:
        """Rows of the kernels that sum all vectors of a panel at once, the most first."""
        return [rows for rows in (4, 2, 1) if rows * VECTORS <= self.target.vector_registers // 2]

    def sizes(self, dtype: DType) -> list[int]:
        """The kernels that read W in this dtype, the one of most rows first."""
        return [self.most, *self.small] if dtype == f32 else self.small


_PARAMS = [("a", "ptr noalias readonly"), ("a_row", I64), ("a_k", I64),
           ("w", "ptr noalias readonly"), ("w_k", I64), ("w_lane", I64), ("w_panel", I64),
           ("c", "ptr noalias"), ("ldc", I64), ("keep", I1), ("m", I64), ("n", I64), ("k", I64),
           ("scratch", "ptr noalias")]


class _Product:
    """The routine for one layout: blocks of rows and of k, then panels of W, then rows."""

    def __init__(self, function: Function, shape: _Shape, layout: _Layout) -> None:
        self.b, self.shape, self.layout = function.builder, shape, layout
        (self.a, self.a_row, self.a_k, self.w, self.w_k, self.w_lane, self.w_panel, self.c, self.ldc, self.keep,
         self.m, self.n, self.k, self.scratch) = function.args
        self.tile = self.b.alloca(F32, shape.most * shape.width)  # of C, for columns that do not fill a panel

    def emit(self) -> None:
        b, shape = self.b, self.shape
        with b.for_(0, self.m, ROWS) as first:
            rows = b.min(b.sub(self.m, first.i), ROWS)
            with b.for_(0, b.max(self.k, 1), shape.depth) as start:  # once for k = 0: the kernels clear C
                steps = b.min(b.sub(self.k, start.i), shape.depth)
                keep = b.or_(self.keep, b.cmp("gt", start.i, 0))
                at = b.add(b.mul(first.i, self.a_row), b.mul(start.i, self.a_k))
                with b.for_(0, self.n, shape.width) as column:
                    columns = b.min(b.sub(self.n, column.i), shape.width)
                    c = b.gep(self.c, b.add(b.mul(first.i, self.ldc), column.i), F32)
                    self._panel(b.gep(self.a, at, F32), c, rows, start.i, steps, column.i, columns, keep)
        b.ret()

    def _panel(self, a: Val, c: Val, rows: Val, start: Val, steps: Val, column: Val, columns: Val, keep: Val) -> None:
        """All rows of one panel: it stays in the first-level cache meanwhile."""
        b, layout = self.b, self.layout
        if layout.along == "panels":
            place = b.mul(b.udiv(column, self.shape.width), self.w_panel)
        else:
            place = b.mul(column, self.w_lane)
        w = b.gep(self.w, b.add(place, b.mul(start, self.w_k)), storage_type(layout.dtype))
        if layout.along == "panels":
            self._rows(layout.dtype, a, w, self.w_k, c, rows, steps, columns, keep)
        elif not layout.direct:
            self._pack(w, steps, columns)
            self._rows(f32, a, self.scratch, const(self.shape.width, I64), c, rows, steps, columns, keep)
        else:
            few = b.cmp("le", rows, self.shape.most if layout.dtype == f32 else 2 * self.shape.small[0])
            if layout.dtype == f32:
                few = b.or_(few, b.cmp("le", self.w_k, MOST_STRIDE))
            with b.if_(b.and_(few, b.cmp("eq", columns, self.shape.width)), likely=True) as branch:
                self._rows(layout.dtype, a, w, self.w_k, c, rows, steps, None, keep)
            with branch.else_():
                self._pack(w, steps, columns)
                self._rows(f32, a, self.scratch, const(self.shape.width, I64), c, rows, steps, columns, keep)

    def _pack(self, w: Val, steps: Val, columns: Val) -> None:
        """One panel in f32; the columns that fill it up hold anything."""
        if self.layout.along == "lanes":
            self._pack_rows(w, steps, columns)
            return
        b = self.b
        whole, last = ZERO, b.sub(columns, 1)
        if self.layout.along == "k":
            run = RUN * 8 // self.layout.dtype.bits
            whole = b.mul(b.udiv(steps, run), run)
            with b.for_(0, columns, self.shape.lanes) as first:
                rows = [b.gep(w, b.mul(b.min(b.add(first.i, j), last), self.w_lane), storage_type(self.layout.dtype))
                        for j in range(self.shape.lanes)]
                with b.for_(0, whole, run) as step:
                    self._pack_run(rows, first.i, step.i)
        with b.for_(whole, steps) as step, b.for_(0, columns) as column:
            at = b.add(b.mul(step.i, self.w_k), b.mul(column.i, self.w_lane))
            x = b.load(b.gep(w, at, storage_type(self.layout.dtype)), storage_type(self.layout.dtype))
            b.store(from_storage(b, x, self.layout.dtype), self._place(step.i, column.i))

    def _pack_run(self, rows: list[Val], column: Val, step: Val) -> None:
        """RUN bytes of some rows of a right operand that runs along k: transposed as 32-bit units."""
        b, dtype, lanes = self.b, self.layout.dtype, self.shape.lanes
        storage, pack = storage_type(dtype), 32 // dtype.bits
        runs = [b.load(b.gep(row, step, storage), vec(UNITS, I32), align=1) for row in rows]
        # Part p of the vector i is row 4p + i, so that transposing inside the parts puts rows in order.
        units = transpose_parts(b, [b.concat(runs[i::UNITS]) for i in range(UNITS)])
        for number, unit in enumerate(units):
            for place in range(pack):
                raw = b.cast("trunc", b.lshr(unit, dtype.bits * place) if place else unit, f"i{dtype.bits}")
                x = from_storage(b, b.bitcast(raw, vec(lanes, storage)), dtype)
                b.store(x, self._place(b.add(step, number * pack + place), column))

    def _pack_rows(self, w: Val, steps: Val, columns: Val) -> None:
        b, lanes, dtype = self.b, self.shape.lanes, self.layout.dtype
        ty, by_words = vec(lanes, storage_type(dtype)), not self.shape.target.has_avx512

        def pack(column: Val, load: Callable[[Val], Val]) -> None:
            with b.for_(0, steps) as step:
                raw = load(b.gep(w, b.add(b.mul(step.i, self.w_k), column), storage_type(dtype)))
                b.store(from_storage(b, raw, dtype), self._place(step.i, column))

        whole = b.and_(columns, -lanes)
        with b.for_(0, whole, lanes) as vector:
            pack(vector.i, lambda at: b.load(at, ty))
        with b.if_(b.cmp("lt", whole, columns)):
            mask = b.lane_mask(b.cast("trunc", b.sub(columns, whole), I32), lanes)
            pack(whole, lambda at: load_first(b, at, ty, mask, by_words=by_words))

    def _place(self, k: Val, column: Val) -> Val:
        """Where the panel holds an element."""
        return self.b.gep(self.scratch, self.b.add(self.b.mul(k, self.shape.width), column), F32)

    def _rows(self, dtype: DType, a: Val, w: Val, w_k: Val, c: Val, rows: Val, steps: Val, columns: Val | None,
              keep: Val) -> None:
        """C[rows, columns] (+)= A @ a panel; `columns` None: all of a panel's."""
        b, most, width = self.b, self.shape.most, self.shape.width
        ladder = _ladder(b, self.shape, dtype)
        with b.for_(0, rows, most) as row:
            high = b.min(b.sub(rows, row.i), most)
            x, to = b.gep(a, b.mul(row.i, self.a_row), F32), b.gep(c, b.mul(row.i, self.ldc), F32)

            def run(out: Val, pitch: Val) -> None:
                b.call(ladder, x, self.a_row, self.a_k, w, w_k, out, pitch, steps, keep, high)

            if columns is None:
                run(to, self.ldc)
                return
            with b.if_(b.cmp("eq", columns, width), likely=True) as branch:
                run(to, self.ldc)
            with branch.else_():
                lanes = self.shape.lanes
                copy_tile(b, lanes, to, self.ldc, self.tile, const(width, I64), high, columns)
                run(self.tile, const(width, I64))
                copy_tile(b, lanes, self.tile, const(width, I64), to, self.ldc, high, columns)


_TILE_PARAMS = [("a", "ptr noalias readonly"), ("a_row", I64), ("a_k", I64), ("w", "ptr noalias readonly"),
                ("w_k", I64), ("c", "ptr noalias"), ("ldc", I64), ("k", I64), ("keep", I1)]


def _ladder(b: Builder, shape: _Shape, dtype: DType) -> Function:
    """The function for any number of rows up to the most that there is a kernel for."""
    return b.module.helper(f"product_rows_{dtype.name}", VOID, [*_TILE_PARAMS, ("rows", I64)],
                           lambda function: _emit_ladder(function, shape, dtype), inline=False)


def _emit_ladder(function: Function, shape: _Shape, dtype: DType) -> None:
    b = function.builder
    a, a_row, a_k, w, w_k, c, ldc, k, keep, rows = function.args
    done: Val = ZERO
    for size in shape.sizes(dtype):
        kernel = _kernel(b, shape, dtype, size)
        last = b.sub(rows, b.urem(b.sub(rows, done), size)) if size > 1 else rows
        with b.for_(done, last, size) as row:
            x, out = b.gep(a, b.mul(row.i, a_row), F32), b.gep(c, b.mul(row.i, ldc), F32)
            b.call(kernel, x, a_row, a_k, w, w_k, out, ldc, k, keep)
        done = last
    b.ret()


def _kernel(b: Builder, shape: _Shape, dtype: DType, rows: int) -> Function:
    """The function for exactly so many rows."""
    return b.module.helper(f"product_{rows}_{dtype.name}", VOID, _TILE_PARAMS,
                           lambda function: _emit_kernel(function, shape, dtype, rows), inline=False)


def _emit_kernel(function: Function, shape: _Shape, dtype: DType, rows: int) -> None:
    """C[rows, width] (+)= A[rows, k] @ one panel of W, as many of its vectors at once as there are registers for."""
    b, lanes, vectors = function.builder, shape.lanes, VECTORS if rows in shape.small else VECTORS // 2
    a, a_row, a_k, w, w_k, c, ldc, k, keep = function.args
    ty, storage = vec(lanes, F32), storage_type(dtype)
    a_rows = [b.gep(a, b.mul(a_row, row), F32) for row in range(rows)]

    def step(at: Val, panel: Val, sums: list[Val]) -> list[Val]:
        ws = [from_storage(b, b.load(b.gep(panel, v * lanes, storage), vec(lanes, storage)), dtype)
              for v in range(vectors)]
        at_k = b.mul(at, a_k)
        done: list[Val] = []
        for row in a_rows:
            x = b.splat(b.load(b.gep(row, at_k, F32), F32), lanes)
            done += [b.fma(x, y, sums[len(done) + v]) for v, y in enumerate(ws)]
        return done

    with b.for_(0, shape.width, vectors * lanes) as part:
        at_c, at_w = b.gep(c, part.i, F32), b.gep(w, part.i, storage)
        outputs = [b.gep(b.gep(at_c, b.mul(ldc, row), F32), v * lanes, F32)
                   for row in range(rows) for v in range(vectors)]
        with b.if_(keep) as branch:
            branch.give([b.load(at, ty) for at in outputs])
        with branch.else_():
            branch.give([const(0.0, ty)] * len(outputs))
        sums = branch.results
        unroll = 1 << (max(1, UNROLLED // len(outputs)).bit_length() - 1)
        whole = b.and_(k, -unroll)
        for first, last, steps in ((ZERO, whole, unroll), (whole, k, 1)):
            with b.for_(first, last, steps, carry=sums) as loop:
                inner = loop.carry
                for offset in range(steps):
                    at = b.add(loop.i, offset)
                    inner = step(at, b.gep(at_w, b.mul(at, w_k), storage), inner)
                loop.next(inner)
            sums = loop.results
        for total, at in zip(sums, outputs):
            b.store(total, at)
    b.ret()
