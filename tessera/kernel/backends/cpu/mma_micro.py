"""Register-blocked kernels for packed operands, and the loops that cover a block of C with them.

In: A in rows or panels, W in panels (`mma_pack.py`). Out: helper functions of the module that is generated; the
kernels of a module are shared by all its products. Called by `mma.py`.

A kernel holds `mr` x `nr` sums in registers, and for each unit of k reads one row of a W panel and one unit of each
row of A. Ragged rows are covered by a ladder of smaller kernels, ragged columns are masked where C is read and
written; W panels are always whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.kernel.backends.cpu.emit import F32, I1, I64, VOID, Function, Module, Val, const, vec
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


_LINE_UNITS = 16  # of a cache line
_TILE = [("a", "ptr noalias readonly"), ("w", "ptr noalias readonly"), ("c", "ptr noalias"), ("ldc", I64),
         ("units", I64), ("keep", I1), ("columns", I64)]
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
    full = tile_kernel(module, kernel, kernel.mr, edge=False)
    edge = module.helper(f"{kernel.name}_edge", VOID, [*_TILE, ("rows", I64)],
                         lambda f: _emit_edge(f, kernel), inline=False)
    a_row = b.mul(units, 1) if not kernel.pitch else const(kernel.pitch, I64)
    share = b.mul(b.udiv(b.mul(units, kernel.nr), b.max(rows, 1)), kernel.mr)  # of the next panel, asked for by a tile
    with b.for_(0, columns, kernel.nr) as column:
        panel = b.gep(w, b.mul(b.udiv(column.i, kernel.nr), w_panel), F32)
        wide, at = b.sub(columns, column.i), b.gep(c, column.i, F32)
        with b.for_(0, rows, kernel.mr) as row:
            high = b.sub(rows, row.i)
            x, to = b.gep(a, b.mul(row.i, a_row), F32), b.gep(at, b.mul(row.i, ldc), F32)
            ahead = b.gep(panel, b.add(w_panel, b.mul(b.udiv(row.i, kernel.mr), share)), F32)
            with b.for_(0, share, _LINE_UNITS) as line:
                b.prefetch(b.gep(ahead, line.i, F32), locality=2)
            whole = b.and_(b.cmp("ge", high, kernel.mr), b.cmp("ge", wide, kernel.nr))
            with b.if_(whole, likely=True) as branch:
                b.call(full, x, panel, to, ldc, units, keep, kernel.nr)
            with branch.else_():
                b.call(edge, x, panel, to, ldc, units, keep, b.min(wide, kernel.nr), b.min(high, kernel.mr))
    b.ret()


def _emit_edge(function: Function, kernel: Kernel) -> None:
    """Cover `rows` <= mr rows with kernels of mr, ..., 4, 2, 1 rows."""
    b = function.builder
    a, w, c, ldc, units, keep, columns, rows = function.args
    done: Val = const(0, I64)
    for size in ladder(kernel.mr):
        with b.if_(b.cmp("ge", b.sub(rows, done), size)) as branch:
            x = b.gep(a, b.mul(done, kernel.a_strides()[0]), F32)
            b.call(tile_kernel(function.module, kernel, size, edge=True),
                   x, w, b.gep(c, b.mul(done, ldc), F32), ldc, units, keep, columns)
            branch.give([b.add(done, size)])
        with branch.else_():
            branch.give([done])
        done = branch.results[0]
    b.ret()


def ladder(mr: int) -> list[int]:
    """The row counts there are kernels for: mr, and the powers of two below it."""
    return [mr, *(size for size in (8, 4, 2, 1) if size < mr)]


def tile_kernel(module: Module, kernel: Kernel, rows: int, *, edge: bool) -> Function:
    """The kernel for C[rows, nr] (+)= A[rows] @ one panel of W; with `edge` only `columns` of the columns exist."""
    name = f"{kernel.name}_{rows}x{kernel.nr}{'_edge' if edge else ''}"
    return module.helper(name, VOID, _TILE, lambda f: _emit_tile(f, kernel, rows, edge), inline=False)


def _emit_tile(function: Function, kernel: Kernel, rows: int, edge: bool) -> None:
    b = function.builder
    a, w, c, ldc, units, keep, columns = function.args
    a_row, a_unit = kernel.a_strides()
    lanes, vectors, dot = kernel.lanes, kernel.vectors, kernel.dot
    ty = vec(lanes, dot.total)
    masks = [b.lane_mask(b.sub(columns, v * lanes), lanes) for v in range(vectors)] if edge else []
    lines = [b.gep(c, b.mul(ldc, row), F32) for row in range(rows)]
    spots = [(b.gep(line, v * lanes, F32), v) for line in lines for v in range(vectors)]
    if not edge:
        for row in range(rows):  # of the tile below, which comes next
            b.prefetch(b.gep(c, b.mul(ldc, rows + row), F32), write=True)
    with b.if_(keep) as branch:
        branch.give([b.masked_load(at, ty, masks[v]) if edge else b.load(at, ty) for at, v in spots])
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
    for (at, v), total in zip(spots, loop.results):
        if edge:
            b.masked_store(total, at, masks[v])
        else:
            b.store(total, at)
    b.ret()
