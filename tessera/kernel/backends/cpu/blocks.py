"""Block sizes that the cpu backend chooses for kernels without a grid.

Rows are taken one at a time: a row's working set then stays in the innermost caches, and a grid item
costs a few instructions. The innermost stored dim is cut into runs of many vectors; a transpose goes block by
block. Around a matmul blocks are large, because a block packs its operands once, but there are as many for each
thread; where a tile of the block's rows lies in memory they are as the second-level cache likes. No block size changes
a result. A schedule's BM and BN stand in for these choices: rows and columns of a product's block, else rows and
elements of a run.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel import ir
from tessera.kernel.backends.cpu import mma, plan
from tessera.kernel.backends.cpu.fusion import fused_products
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Function
from tessera.kernel.passes.parallelize import THREADS, Cut, ParallelDim

ROW_RUN = 4096  # elements of an innermost parallel dim a block
_CROSSED_BLOCK = (128, 16)  # rows and columns where a tile is stored across: lines are then read and written whole
_FULL_COLUMNS = 256
_FUSED_BLOCK = (16384, 1024)  # most rows and columns of products that go chunk by chunk into a store
_STORED_BLOCK = (384, 512)  # the same where a tile of a block lies in memory
_FEW_ROWS = 16  # of which a block is narrow: a row of W is then read on before other rows come between


def choose(function: Function, dims: Sequence[ParallelDim], target: Target) -> list[Cut | None]:
    """How to cut each parallel dim; None leaves it whole."""
    has_mma = any(op.name == "mma" for op in ir.walk(function.body))
    rows = next((dim.size for dim in dims if dim.mma_rows), Dim.of(1))
    columns = next((dim.size for dim in dims if dim.mma_columns), Dim.of(1))
    most = _FUSED_BLOCK if has_mma and _only_fused(function, target) else _STORED_BLOCK
    row_cut, column_cut = _mma_blocks(rows, columns, mma.tiling(target), *most)
    runs = _CROSSED_BLOCK if any(dim.crossed for dim in dims) else (1, ROW_RUN)
    return [_cut(function, dim, has_mma, row_cut, column_cut, runs) for dim in dims]


def _only_fused(function: Function, target: Target) -> bool:
    """Whether no tile of a block's size lies in memory: all products go into stores."""
    kept = plan.plan(function)
    fused = {op for products in fused_products(function, kept, target).values() for op in products}
    in_memory = [op for op in ir.walk(function.body) if op.name in plan.BUFFERED or any(
        result.name in kept and result.type.rank > 1 for result in op.results)]
    return all(op in fused for op in in_memory)


def _cut(function: Function, dim: ParallelDim, has_mma: bool, row_cut: Cut, column_cut: Cut,
         runs: tuple[int, int]) -> Cut | None:
    if dim.mma_rows:
        return Cut(most=function.schedule["BM"]) if "BM" in function.schedule else row_cut
    if dim.mma_columns:
        return Cut(most=function.schedule["BN"]) if "BN" in function.schedule else column_cut
    if has_mma:
        return Cut(most=1)
    if dim.innermost:
        return Cut(most=function.schedule.get("BN", runs[1]))
    return Cut(most=function.schedule.get("BM", runs[0] if dim.crossed else 1))


def _mma_blocks(rows: Dim, columns: Dim, t: mma.Tiling, most_rows: int, most_columns: int) -> tuple[Cut, Cut]:
    """Multiples of the register tile and at least a block a thread, cut along the columns first.

    A block packs its columns of W and its rows of A. Columns cost more, so that rows are not cut before blocks have
    as many columns as rows, up to _FULL_COLUMNS. Blocks of columns that are more than threads come in multiples.
    """
    most_rows, most_columns = most_rows // t.mr * t.mr, most_columns // t.nr * t.nr
    narrowest = rows.minimum(_FULL_COLUMNS).maximum(2 * t.nr)
    are_few = (Dim.of(_FEW_ROWS) // rows.maximum(1)).minimum(1)
    column_blocks = columns.ceildiv(most_columns).maximum(are_few * columns.ceildiv(_FULL_COLUMNS))
    column_blocks = column_blocks.maximum(THREADS.minimum(columns.ceildiv(narrowest)))
    rounds = column_blocks // THREADS  # none where there are fewer blocks than threads
    column_blocks = column_blocks.maximum((column_blocks.ceildiv(THREADS) * THREADS).minimum(rounds * columns))
    row_blocks = rows.ceildiv(most_rows).maximum(THREADS.ceildiv(column_blocks).minimum(rows.ceildiv(4 * t.mr)))
    return (Cut(most=most_rows, step=_step(rows, row_blocks, t.mr)),
            Cut(most=most_columns, step=_step(columns, column_blocks, t.nr)))


def _step(size: Dim, blocks: Dim, unit: int) -> Dim:
    """The size divided into blocks, rounded up to a multiple of the unit."""
    return (size.ceildiv(blocks * unit) * unit).maximum(unit)
