"""Block sizes that the cpu backend chooses for kernels without a grid.

Rows are taken one at a time: a row's working set then stays in the innermost caches, and a grid item
costs a few instructions. The innermost stored dim is cut into runs of many vectors. Around a matmul the
blocks are as large as the second-level cache likes, because a block packs its operands once; where that
would leave threads without work they are smaller. No block size changes a result.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel import ir
from tessera.kernel.backends.cpu import mma
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Function
from tessera.kernel.passes.parallelize import THREADS, Cut, ParallelDim

ROW_RUN = 4096  # elements of an innermost parallel dim a block
MMA_ROWS, MMA_COLUMNS = 384, 512


def choose(function: Function, dims: Sequence[ParallelDim], target: Target) -> list[Cut | None]:
    """How to cut each parallel dim; None leaves it whole."""
    has_mma = any(op.name == "mma" for op in ir.walk(function.body))
    rows = next((dim.size for dim in dims if dim.mma_rows), Dim.of(1))
    columns = next((dim.size for dim in dims if dim.mma_columns), Dim.of(1))
    row_cut, column_cut = _mma_blocks(rows, columns, mma.tiling(target))
    return [_cut(function, dim, has_mma, row_cut, column_cut) for dim in dims]


def _cut(function: Function, dim: ParallelDim, has_mma: bool, row_cut: Cut, column_cut: Cut) -> Cut | None:
    if dim.mma_rows:
        return Cut(most=function.schedule["BM"]) if "BM" in function.schedule else row_cut
    if dim.mma_columns:
        return Cut(most=function.schedule["BN"]) if "BN" in function.schedule else column_cut
    return Cut(most=ROW_RUN if dim.innermost and not has_mma else 1)


def _mma_blocks(rows: Dim, columns: Dim, t: mma.Tiling) -> tuple[Cut, Cut]:
    """Multiples of the register tile, at most MMA_ROWS x MMA_COLUMNS, and at least a block a thread."""
    most_rows, most_columns = MMA_ROWS // t.mr * t.mr, MMA_COLUMNS // t.nr * t.nr
    small_blocks = rows.ceildiv(4 * t.mr).maximum(1)
    column_blocks = columns.ceildiv(most_columns).maximum(THREADS.ceildiv(small_blocks))
    row_blocks = rows.ceildiv(most_rows).maximum(THREADS.ceildiv(column_blocks))
    return (Cut(most=most_rows, step=_step(rows, row_blocks, t.mr)),
            Cut(most=most_columns, step=_step(columns, column_blocks, t.nr)))


def _step(size: Dim, blocks: Dim, unit: int) -> Dim:
    """The size divided into blocks, rounded up to a multiple of the unit."""
    return (size.ceildiv(blocks * unit) * unit).maximum(unit)
