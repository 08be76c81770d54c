"""Register-blocked kernels for packed operands, and the loops that cover a block of C with them.

In: A in rows or panels, W in panels (`mma_pack.py`). Out: helper functions of the module that is generated; the
kernels of a module are shared by all its products. Called by `mma.py`.

A kernel holds `mr` x `nr` sums in registers, and for each unit of k reads one row of a W panel and one unit of each
row of A. Ragged rows are left to a kernel of few rows, ragged columns go through a whole tile of C; W panels are always
whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.kernel.backends.cpu.emit import F32, I1, I32, I64, VOID, Builder, Function, Module, Val, const, vec
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.backends.cpu.mma_dot import Dot, multiply_add


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What the kernels of a product have in common.

    Attributes:
        lanes: of a vector; mr x nr: rows and columns of the sums in registers.
        pitch: units from row to row of A; 0 where A lies in panels of `mr` rows.
    """

    target: Target
    dot: Dot
    lanes: int
    mr: int
    nr: int
    pitch: int

    @property
    def vectors(self) -> int:
        """Vectors in a row of a panel."""
        return self.nr // self.lanes

    @property
    def name(self) -> str:
        return f"mma_{self.dot.name}_{'rows' if self.pitch else 'panels'}"

    def a_strides(self) -> tuple[int, int]:
        """Units from row to row and from unit to unit of A."""
        return (self.pitch, 1) if self.pitch else (1, self.mr)


FEW = 4  # rows of the kernel for what is left; more would not be faster, its sums fill the pipelines
_LINE_UNITS = 16  # of a cache line
_TILE = [("a", "ptr noalias readonly"), ("w", "ptr noalias readonly"), ("c", "ptr noalias"), ("ldc", I64),
         ("units", I64), ("keep", I1)]
_FEW_TILE = [*_TILE, ("rows", I64)]
_EDGE = [*_TILE, ("columns", I64), ("rows", I64)]
_BLOCK = [("a", "ptr noalias readonly"), ("w", "ptr noalias readonly"), ("w_panel", I64), ("c", "ptr noalias"),
          ("ldc", I64), ("rows", I64), ("columns", I64), ("units", I64), ("keep", I1)]


def block_kernel(module: Module, kernel: Kernel) -> Function:
    """The function that computes C[rows, columns] (+)= A @ W over `units`, panel after panel of W.

    Its arguments: A, W, units from panel to panel of W, C, elements from row to row of C, rows, columns, units,
    whether to add to C.
    """
    return module.helper(f"{kernel.name}_block", VOID, _BLOCK, lambda f: _emit_block(f, kernel), inline=False)


def _emit_block(function: Function, kernel: Kernel) -> None:
    b, module = function.builder, function.module
    a, w, w_panel, c, ldc, rows, columns, units, keep = function.args
    full = tile_kernel(module, kernel)
    edge = module.helper(f"{kernel.name}_edge", VOID, _EDGE, lambda f: _emit_edge(f, kernel), inline=False)
    a_row = b.mul(units, 1) if not kernel.pitch else const(kernel.pitch, I64)
    share = b.mul(b.udiv(b.mul(units, kernel.nr), b.max(rows, 1)), kernel.mr)  # of the next panel, asked for by a tile
    step: Val = const(kernel.mr, I64)
    if kernel.pitch and kernel.mr < 2 * FEW:
        step = b.select(b.and_(b.cmp("gt", rows, kernel.mr), b.cmp("le", rows, 2 * FEW)), FEW, step)
    with b.for_(0, columns, kernel.nr) as column:
        panel = b.gep(w, b.mul(b.udiv(column.i, kernel.nr), w_panel), F32)
        wide, at = b.sub(columns, column.i), b.gep(c, column.i, F32)
        with b.for_(0, rows, step) as row:
            high = b.min(b.sub(rows, row.i), step)
            x, to = b.gep(a, b.mul(row.i, a_row), F32), b.gep(at, b.mul(row.i, ldc), F32)
            whole = b.and_(b.cmp("ge", high, kernel.mr), b.cmp("ge", wide, kernel.nr))
            with b.if_(whole, likely=True) as branch:
                ahead = b.gep(panel, b.add(w_panel, b.mul(b.udiv(row.i, kernel.mr), share)), F32)
                with b.for_(0, share, _LINE_UNITS) as line:
                    b.prefetch(b.gep(ahead, line.i, F32), locality=2)
                b.call(full, x, panel, to, ldc, units, keep)
            with branch.else_():
                b.call(edge, x, panel, to, ldc, units, keep, b.min(wide, kernel.nr), high)
    b.ret()


def _emit_edge(function: Function, kernel: Kernel) -> None:
    """What is no whole tile: fewer rows, and columns that do not fill a panel, whose sums lie in a tile meanwhile."""
    b, nr = function.builder, kernel.nr
    a, w, c, ldc, units, keep, columns, rows = function.args
    ragged = b.cmp("lt", columns, nr)
    tile = b.alloca(F32, kernel.mr * nr)
    with b.if_(ragged) as branch:
        copy_tile(b, kernel.lanes, c, ldc, tile, const(nr, I64), rows, columns)
        branch.give([tile, const(nr, I64)])
    with branch.else_():
        branch.give([c, ldc])
    to, pitch = branch.results
    with b.if_(b.cmp("eq", rows, kernel.mr)) as branch:
        b.call(tile_kernel(function.module, kernel), a, w, to, pitch, units, keep)
    with branch.else_(), b.for_(0, rows, FEW) as row:
        b.call(tile_kernel(function.module, kernel, few=True), b.gep(a, b.mul(row.i, kernel.a_strides()[0]), F32), w,
               b.gep(to, b.mul(row.i, pitch), F32), pitch, units, keep, b.min(b.sub(rows, row.i), FEW))
    with b.if_(ragged):
        copy_tile(b, kernel.lanes, tile, const(nr, I64), c, ldc, rows, columns)
    b.ret()


def copy_tile(b: Builder, lanes: int, source: Val, pitch: Val, to: Val, to_pitch: Val, rows: Val, columns: Val) -> None:
    """Copy f32 rows to another place."""
    with b.for_(0, rows) as row, b.for_(0, columns, lanes) as at:
        mask = b.lane_mask(b.cast("trunc", b.min(b.sub(columns, at.i), lanes), I32), lanes)
        x = b.masked_load(b.gep(source, b.add(b.mul(row.i, pitch), at.i), F32), vec(lanes, F32), mask)
        b.masked_store(x, b.gep(to, b.add(b.mul(row.i, to_pitch), at.i), F32), mask)


def tile_kernel(module: Module, kernel: Kernel, *, few: bool = False) -> Function:
    """The kernel for C[rows, nr] (+)= A[rows] @ one panel of W: for `mr` rows, or `few`, of FEW and told how many rows
    there are, at least one."""
    name = f"{kernel.name}_{'few' if few else kernel.mr}x{kernel.nr}"
    return module.helper(name, VOID, _FEW_TILE if few else _TILE, lambda f: _emit_tile(f, kernel), inline=False)


def _emit_tile(function: Function, kernel: Kernel) -> None:
    b = function.builder
    a, w, c, ldc, units, keep, *count = function.args
    rows = FEW if count else kernel.mr
    a_row, a_unit = kernel.a_strides()
    lanes, vectors, dot = kernel.lanes, kernel.vectors, kernel.dot
    ty = vec(lanes, dot.total)
    numbers: list[Val] = [const(row, I64) for row in range(rows)]
    if count:  # a row that only fills the kernel up is written where the last one is, before it
        numbers[1:] = [b.min(row, b.sub(count[0], 1)) for row in numbers[1:]]
    lines = [b.gep(c, b.mul(ldc, row), F32) for row in numbers]
    spots = [b.gep(line, v * lanes, F32) for line in lines for v in range(vectors)]
    if not count:
        for row in range(rows):  # of the tile below, which comes next
            b.prefetch(b.gep(c, b.mul(ldc, rows + row), F32), write=True)
    with b.if_(keep) as branch:
        branch.give([b.load(at, ty) for at in spots])
    with branch.else_():
        branch.give([const(0, ty)] * len(spots))
    with b.for_(0, units, carry=branch.results) as loop:
        at_a, at_w = b.gep(a, b.mul(loop.i, a_unit), F32), b.gep(w, b.mul(loop.i, kernel.nr), F32)
        ws = [b.load(b.gep(at_w, v * lanes, F32), vec(lanes, dot.unit)) for v in range(vectors)]
        sums: list[Val] = []
        for row in range(rows):
            x = b.splat(b.load(b.gep(at_a, row * a_row, F32), dot.unit), lanes)
            sums += [multiply_add(b, kernel.target, dot, x, y, loop.carry[row * vectors + v])
                     for v, y in enumerate(ws)]
        loop.next(sums)
    for at, total in reversed(list(zip(spots, loop.results))):
        b.store(total, at)
    b.ret()
