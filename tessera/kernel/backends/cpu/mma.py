"""f32 matrix products: register-blocked kernels, and a blocked product built from them.

In: two operands as the lowering has them (in memory, lazily computed, or packed weights) and a row-major f32
block C. Out: instructions that add the product to C. Called by the lowering of `mma` and by `gemm.py`.

The contract that the bitwise guarantees stand on: an element of C is one chain acc = fma(a_k, w_k, acc) with k
ascending, from 0 or from what stood in C. Which kernel computes it (full, edge, skinny), how K is blocked and how
work is split changes where the chain is computed, never its order: every row has the same bits at any M.

Layouts (in elements; `width` is MR for the left operand, NR for the right one):
    panels      [ceil(lanes / width)][K][width], zero where a panel has no lane
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tessera.kernel.backends.cpu.emit import F32, I1, I64, VOID, Builder, Function, Module, Val, const, vec
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.backends.cpu.mma_pack import Source, pack_panel, pack_panels

STREAM_DEPTH = 16  # rows of a row-major W that are read side by side: the prefetcher follows that many streams


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Register and cache blocking: C is computed in `mr` x `nr` tiles, `kc` steps of k at a time.

    `mr` * `nr` accumulators, one row of W and one element of A fill the vector registers; a W panel of `kc` x `nr`
    takes half of the first-level cache, `nc` columns of W half of the second.
    """

    lanes: int
    mr: int
    nr: int
    kc: int
    nc: int

    @property
    def w_floats(self) -> int:
        """Scratch for packed W: a chunk of a blocked product, or the panels of a skinny one."""
        return self.kc * max(self.nc, self.nr * self.panels(1)) + self.nr

    @property
    def vectors(self) -> int:
        """Vectors in a row of a panel."""
        return self.nr // self.lanes

    def panels(self, rows: int) -> int:
        """How many W panels a kernel with few rows takes at once, to have enough independent chains."""
        return max(1, min(4, 8 // (rows * self.vectors)))


def tiling(target: Target) -> Tiling:
    """The blocking for a processor."""
    lanes = target.lanes(32)
    mr = {512: 14, 256: 6}.get(target.vector_bits, 8 if target.vector_registers == 32 else 4)
    nr = 2 * lanes
    kc = max(128, min(512, target.l1 // 2 // (4 * nr) // 64 * 64))
    nc = max(nr, min(512, target.l2 // 2 // (4 * kc) // nr * nr))
    return Tiling(lanes=lanes, mr=mr, nr=nr, kc=kc, nc=nc)


@dataclass(frozen=True, kw_only=True)
class Panels:
    """A right operand that is packed already: `pointer` to panels of NR lanes that are `depth` deep."""

    pointer: Val
    depth: Val


def scratch_floats(target: Target, b: Builder, m: Val) -> Val:
    """How many f32 of 64-byte aligned scratch `matmul` needs for `m` rows."""
    t = tiling(target)
    rows = b.mul(b.ceil_div(m, t.mr), t.mr)
    return b.add(b.mul(rows, t.kc), t.w_floats)


def matmul(b: Builder, target: Target, *, m: Val, n: Val, k: Val, a: Source, w: Source | Panels, c: Val, ldc: Val,
           scratch: Val, accumulate: bool = False) -> None:
    """C[m, n] = A[m, k] @ W[k, n], or C += with `accumulate`.

    Args:
        m, n, k: i64 sizes; any size, zero too (k = 0 leaves C, or clears it).
        a: the left operand; its lanes are rows.
        w: the right operand; its lanes are columns.
        c, ldc: f32 destination and the distance of its rows in elements.
        scratch: `scratch_floats` f32.
    """
    t = tiling(target)
    keep = const(int(accumulate), I1)
    with b.if_(b.cmp("le", k, 0)):
        if not accumulate:
            with b.for_(0, m) as row:
                b.fill(b.gep(c, b.mul(row.i, ldc), F32), 0, b.mul(n, 4))
    skinny = b.cmp("le", m, t.mr if a.direct else 0)
    with b.if_(b.and_(b.cmp("gt", k, 0), skinny)):
        if a.direct:
            _skinny(b, t, m, n, k, a, w, c, ldc, scratch, keep)
    with b.if_(b.and_(b.cmp("gt", k, 0), b.not_(skinny))):
        _blocked(b, t, m, n, k, a, w, c, ldc, scratch, keep)


def _blocked(b: Builder, t: Tiling, m: Val, n: Val, k: Val, a: Source, w: Source | Panels, c: Val, ldc: Val,
             scratch: Val, keep: Val) -> None:
    """k blocks outside; A (all rows) and W (`nc` columns) are packed once a block and stay in the L2 cache."""
    w_scratch = scratch
    a_scratch = b.gep(scratch, t.w_floats, F32)
    with b.for_(0, k, t.kc) as block:
        depth = b.min(b.sub(k, block.i), t.kc)
        going = b.or_(keep, b.cmp("gt", block.i, 0))
        with b.for_(0, m, t.mr) as row:
            pack_panel(b, a, t.lanes, t.mr, row.i, b.min(b.sub(m, row.i), t.mr), block.i, depth,
                       b.gep(a_scratch, b.mul(row.i, depth), F32))
        with b.for_(0, n, t.nc) as chunk:
            wide = b.min(b.sub(n, chunk.i), t.nc)
            if isinstance(w, Panels):
                panels, pitch = _packed_at(b, t, w, chunk.i, block.i), w.depth
            else:
                pack_panels(b, w, t.lanes, t.nr, chunk.i, wide, block.i, depth, w_scratch)
                panels, pitch = w_scratch, depth
            with b.for_(0, wide, t.nr) as column:
                columns = b.min(b.sub(wide, column.i), t.nr)
                panel = b.gep(panels, b.mul(column.i, pitch), F32)
                at_c = b.gep(c, b.add(chunk.i, column.i), F32)
                with b.for_(0, m, t.mr) as row:
                    _tile(b, t, b.min(b.sub(m, row.i), t.mr), columns, panel,
                          b.gep(a_scratch, b.mul(row.i, depth), F32),
                          b.gep(at_c, b.mul(row.i, ldc), F32), ldc, depth, going)


def _packed_at(b: Builder, t: Tiling, w: Panels, column: Val, start: Val) -> Val:
    """The address of packed W from a column (a multiple of NR) and a k on."""
    return b.gep(w.pointer, b.add(b.mul(column, w.depth), b.mul(start, t.nr)), F32)


def _tile(b: Builder, t: Tiling, rows: Val, columns: Val, panel: Val, a: Val, c: Val, ldc: Val, depth: Val,
          keep: Val) -> None:
    """One MR x NR tile; ragged rows are computed as a power-of-two ladder of smaller kernels."""
    module = b.module
    full = b.and_(b.cmp("eq", rows, t.mr), b.cmp("eq", columns, t.nr))
    with b.if_(full, likely=True) as branch:
        kernel = micro_kernel(module, t, t.mr, 1, packed=True, edge=False)
        b.call(kernel, a, 1, t.mr, panel, t.nr, 0, c, ldc, depth, keep, t.nr)
    with branch.else_():
        _ladder(b, t, rows, lambda size, row: b.call(
            micro_kernel(module, t, size, 1, packed=False, edge=True),
            b.gep(a, row, F32), 1, t.mr, panel, t.nr, 0, b.gep(c, b.mul(row, ldc), F32), ldc, depth, keep, columns))


def _ladder(b: Builder, t: Tiling, rows: Val, run: Callable[[int, Val], object]) -> None:
    """Cover `rows` <= MR rows with kernels of MR, ..., 4, 2, 1 rows: run(size, first row)."""
    done = const(0, I64)
    for size in ladder(t.mr):
        fits = b.cmp("ge", b.sub(rows, done), size)
        with b.if_(fits) as branch:
            run(size, done)
            branch.give([b.add(done, size)])
        with branch.else_():
            branch.give([done])
        done = branch.results[0]


def ladder(mr: int) -> list[int]:
    """The row counts there are kernels for: MR, and the powers of two below it."""
    return [mr, *(size for size in (8, 4, 2, 1) if size < mr)]


def _skinny(b: Builder, t: Tiling, m: Val, n: Val, k: Val, a: Source, w: Source | Panels, c: Val, ldc: Val,
            scratch: Val, keep: Val) -> None:
    """Few rows: A is read in place and W is streamed once, in groups of panels that all rows use."""
    assert a.direct is not None
    a_pointer, a_row, a_k = a.direct
    in_place = not isinstance(w, Panels) and w.direct is not None and w.direct[1].const == 1
    group = t.panels(1) * t.nr
    loops = [(n, group), (k, t.kc)]
    if in_place:  # rows of W in memory are read along, a few at a time
        loops = [(k, STREAM_DEPTH), (n, group)]
    with b.for_(0, *loops[0]) as outer, b.for_(0, *loops[1]) as inner:
        column, start = (inner.i, outer.i) if in_place else (outer.i, inner.i)
        columns, depth = b.min(b.sub(n, column), group), b.min(b.sub(k, start), loops[0 if in_place else 1][1])
        going = b.or_(keep, b.cmp("gt", start, 0))
        pointer, w_k, w_panel = _panel_group(b, t, w, column, columns, start, depth, scratch)

        def rows_kernel(size: int, row: Val) -> None:
            a_at = b.gep(a_pointer, b.add(b.mul(row, a_row), b.mul(start, a_k)), F32)
            _group_rows(b, t, size, columns, (a_at, a_row, a_k, pointer, w_k, w_panel),
                        b.gep(c, b.add(b.mul(row, ldc), column), F32), (ldc, depth, going))

        _ladder(b, t, m, rows_kernel)


def _panel_group(b: Builder, t: Tiling, w: Source | Panels, column: Val, columns: Val, start: Val, depth: Val,
                 scratch: Val) -> tuple[Val, Val, Val]:
    """Some adjacent panels of W: (pointer, stride of k, stride of panels)."""
    if isinstance(w, Panels):
        return _packed_at(b, t, w, column, start), const(t.nr, I64), b.mul(w.depth, t.nr)
    if w.direct and w.direct[1].const == 1:
        pointer, _, w_k = w.direct
        return b.gep(pointer, b.add(column, b.mul(start, w_k)), F32), w_k, const(t.nr, I64)
    with b.for_(0, columns, t.nr) as first:
        pack_panel(b, w, t.lanes, t.nr, b.add(column, first.i), b.min(b.sub(columns, first.i), t.nr), start, depth,
                   b.gep(scratch, b.mul(first.i, t.kc), F32))
    return scratch, const(t.nr, I64), const(t.nr * t.kc, I64)


def _group_rows(b: Builder, t: Tiling, size: int, columns: Val, operands: tuple[Val, ...], c: Val,
                rest: tuple[Val, ...]) -> None:
    """`size` rows by a group of panels: as many panels a call as keep enough chains going, then a ragged one."""
    a, a_row, a_k, pointer, w_k, w_panel = operands
    wide = t.panels(size)
    whole = b.mul(b.udiv(columns, wide * t.nr), wide * t.nr)
    for first, last, panels in ((const(0, I64), whole, wide), (whole, columns, 1)):
        kernel = micro_kernel(b.module, t, size, panels, packed=False, edge=last is columns)
        with b.for_(first, last, panels * t.nr) as at:
            w_at = b.gep(pointer, b.mul(b.udiv(at.i, t.nr), w_panel), F32)
            b.call(kernel, a, a_row, a_k, w_at, w_k, w_panel, b.gep(c, at.i, F32), *rest,
                   b.min(b.sub(columns, at.i), t.nr))


_PARAMS = [("a", "ptr noalias readonly"), ("a_row", I64), ("a_k", I64),
           ("w", "ptr noalias readonly"), ("w_k", I64), ("w_panel", I64),
           ("c", "ptr noalias"), ("ldc", I64), ("depth", I64), ("keep", I1), ("columns", I64)]


def micro_kernel(module: Module, t: Tiling, rows: int, panels: int, *, packed: bool, edge: bool) -> Function:
    """The kernel for C[rows, panels * NR] (+)= A[rows, depth] @ W[depth, ...].

    Args:
        packed: A is a panel (`a_row` 1, `a_k` MR); the strides are then constants of the code.
        edge: only `columns` columns exist: others are neither read nor written.
    """
    name = f"mma_f32_{rows}x{panels * t.nr}{'_packed' if packed else ''}{'_edge' if edge else ''}"

    def body(function: Function) -> None:
        _emit_micro(function, t, rows, panels, packed, edge)

    return module.helper(name, VOID, _PARAMS, body, inline=False)


def _emit_micro(function: Function, t: Tiling, rows: int, panels: int, packed: bool, edge: bool) -> None:
    b = function.builder
    a, a_row, a_k, w, w_k, w_panel, c, ldc, depth, keep, columns = function.args
    if packed:
        a_row, a_k = const(1, I64), const(t.mr, I64)
    ty = vec(t.lanes, F32)
    spots = [(p, v) for p in range(panels) for v in range(t.vectors)]
    masks = [b.lane_mask(b.sub(columns, v * t.lanes), t.lanes) for _, v in spots] if edge else []

    def read(pointer: Val, spot: int) -> Val:
        return b.masked_load(pointer, ty, masks[spot]) if edge else b.load(pointer, ty)

    outputs = [[b.gep(b.gep(c, b.mul(ldc, row), F32), p * t.nr + v * t.lanes, F32) for p, v in spots]
               for row in range(rows)]
    with b.if_(keep) as branch:
        branch.give([read(at, spot) for line in outputs for spot, at in enumerate(line)])
    with branch.else_():
        branch.give([const(0.0, ty)] * (rows * len(spots)))
    a_rows = [b.gep(a, b.mul(a_row, row), F32) for row in range(rows)]
    w_rows = [b.gep(b.gep(w, b.mul(w_panel, p), F32), v * t.lanes, F32) for p, v in spots]
    with b.for_(0, depth, carry=branch.results) as loop:
        at_a, at_w = b.mul(loop.i, a_k), b.mul(loop.i, w_k)
        ws = [read(b.gep(pointer, at_w, F32), spot) for spot, pointer in enumerate(w_rows)]
        sums: list[Val] = []
        for row in range(rows):
            x = b.splat(b.load(b.gep(a_rows[row], at_a, F32), F32), t.lanes)
            sums += [b.fma(x, y, loop.carry[row * len(spots) + spot]) for spot, y in enumerate(ws)]
        loop.next(sums)
    for i, total in enumerate(loop.results):
        row, spot = divmod(i, len(spots))
        if edge:
            b.masked_store(total, outputs[row][spot], masks[spot])
        else:
            b.store(total, outputs[row][spot])
    b.ret()
