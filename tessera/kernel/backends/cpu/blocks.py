"""Block sizes that the cpu backend chooses for kernels without a grid.

Rows are taken one at a time: a row's working set then stays in the innermost caches, and a grid item
costs a few instructions. The innermost stored dim is cut into runs of many vectors. Around a matmul,
rows come in panels that amortise reading the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel import ir
from tessera.kernel.ir import Function
from tessera.kernel.passes.parallelize import ParallelDim

ROW_RUN = 4096  # elements of an innermost parallel dim a block
MMA_ROWS, MMA_COLUMNS = 64, 256


def choose(function: Function, dims: Sequence[ParallelDim]) -> list[int | None]:
    """A block size for each parallel dim; None leaves it whole."""
    has_mma = any(op.name == "mma" for op in ir.walk(function.body))
    return [_block(function, dim, has_mma) for dim in dims]


def _block(function: Function, dim: ParallelDim, has_mma: bool) -> int | None:
    if dim.mma_rows:
        return function.schedule.get("BM", MMA_ROWS)
    if dim.mma_columns:
        return function.schedule.get("BN", MMA_COLUMNS)
    if dim.innermost and not has_mma:
        return ROW_RUN
    return 1
