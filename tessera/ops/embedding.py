"""Table look-up by token or position id.

In: int64 ids and a table. Out: the table's rows. nn.Embedding calls it; ids have been checked before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, table_VD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a table.

    Args:
        ids: integers in 0..V-1, any shape.
        table_VD: [V, D].
        dtype: of the result; default the table's.

    Returns:
        [*ids.shape, D].
    """
    rows = F.embedding(ids, table_VD)
    return rows if dtype is None or rows.dtype == dtype else rows.to(dtype)
