"""Table look-up by token or position id: from float tables, 8-bit ones with scales, and block-sparse ones.

In: int ids and a table. Out: the table's rows. nn.Embedding and nn's casted embeddings call it.

Dims: V rows of the table, D their width, N ids; M stored blocks of R rows and C columns, G groups of R rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from tessera.errors import InputError
from tessera.function.decorator import function
from tessera.ops.kernels.embedding import (
    casted_embedding_kernel,
    embedding_backward_kernel,
    scaled_embedding_kernel,
    sparse_embedding_kernel,
)
from tessera.ops.quantize import is_quantized, quantize_rows
from tessera.ops.registration import Operation, is_readable, is_recording
from tessera.types import Tensor, floating, integer


@function
def embedding(
    ids: Tensor["...", integer], table_VD: Tensor["V", "D"], dtype: torch.dtype | None = None,
) -> Tensor["...", "D"]:
    """Rows of a table.

    Args:
        ids: integers in 0..V-1, any shape.
        table_VD: [V, D].
        dtype: of the result; default the table's.

    Returns:
        [*ids.shape, D]. The table's gradient is summed in f32, in the order of the ids.

    Raises:
        InputError: an id outside the table.
        ShapeError: the table has not two dims.
    """
    _check_ids(ids, table_VD.shape[0])
    return _EMBEDDING(table_VD, ids, dtype or table_VD.dtype)


@function
def casted_embedding(
    ids: Tensor["...", integer], table_VD: Tensor["V", "D"], scale: Tensor["#V"] | Tensor[()] | float | int = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor["...", "D"]:
    """Rows of a table in a narrow type, brought to a wider one: table[ids] * scale, rounded once.

    Args:
        ids: integers in 0..V-1, any shape.
        table_VD: [V, D], f32, bf16, f16, fp8 or int8; see `quantize_rows`.
        scale: of the table, or f32 [V], of each row.
        dtype: of the result.

    Returns:
        [*ids.shape, D].

    Raises:
        InputError: an id outside the table.
        ShapeError: the table has not two dims, or the scale is neither one number nor [V].
    """
    _check_ids(ids, table_VD.shape[0])
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((1,), scale, device=table_VD.device)
    return _CASTED(scale.reshape(-1).float(), table_VD, ids, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """A matrix of which only some blocks are stored, by rows of blocks (block-CSR); the others are zeros.

    Args:
        blocks_MRC: their values, in any float type or int8.
        pointers: int32 [G + 1]: blocks pointers[g] .. pointers[g + 1] - 1 are those of rows g R .. g R + R - 1.
        columns: int32 [M]: block m holds columns columns[m] C .. columns[m] C + C - 1.
        scales: f32 [M]: what each block's values are multiplied by.
        shape: (V, D) of the matrix; its last blocks may reach over it.
    """

    blocks_MRC: Tensor
    pointers: Tensor
    columns: Tensor
    scales: Tensor
    shape: tuple[int, int]

    def to_dense(self) -> Tensor:
        """The matrix, [V, D] f32."""
        _, rows, width = self.blocks_MRC.shape
        n_groups, n_columns = self.pointers.shape[0] - 1, -(-self.shape[1] // width)
        dense = self.blocks_MRC.new_zeros((n_groups, n_columns, rows, width), dtype=torch.float32)
        groups = torch.repeat_interleave(torch.arange(n_groups, device=dense.device), self.pointers.diff().long())
        dense[groups, self.columns.long()] = self.blocks_MRC.float() * self.scales[:, None, None]
        return dense.transpose(1, 2).reshape(n_groups * rows, -1)[:self.shape[0], :self.shape[1]]


@function
def to_block_sparse(
    table_VD: Tensor["V", "D", floating], sparsity: float, *, block_size: int = 16,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> BlockSparse:
    """Keep the blocks of a matrix that have the largest sums of squares, rounded to a narrow type.

    Args:
        table_VD: [V, D], any float dtype.
        sparsity: the share of the blocks that is dropped, in [0, 1]; blocks of zeros are always dropped.
        block_size: rows and columns of a block, >= 1.
        dtype: of the blocks; 8-bit types get a scale for each block.

    Returns:
        The sparse matrix. An entry of a dropped block is off by itself; one of a kept block by its rounding, which
        for int8 is at most scale / 2, for fp8_e4m3 max(|x| / 16, scale / 1024), for fp8_e5m2 max(|x| / 8,
        scale / 2^17).

    Raises:
        InputError: an option out of its range.
        ShapeError: the table has not two dims.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity: {sparsity} given; expected a number in [0, 1]")
    if block_size < 1:
        raise InputError(f"block_size: {block_size} given; expected at least 1")
    n_rows, width = table_VD.shape
    padded = F.pad(table_VD.detach().float(), (0, -width % block_size, 0, -n_rows % block_size))
    n_groups, n_columns = padded.shape[0] // block_size, padded.shape[1] // block_size
    grid = padded.view(n_groups, block_size, n_columns, block_size).transpose(1, 2)
    weights = grid.double().square().sum((-1, -2)).flatten()  # no square of an f32 leaves the range of f64
    n_kept = round(weights.numel() * (1 - sparsity))
    kept = weights.topk(n_kept).indices.sort().values
    kept = kept[weights[kept] > 0]
    groups = kept // n_columns
    values = grid.reshape(-1, block_size, block_size)[kept]
    scales = torch.ones(len(kept), device=table_VD.device)
    if is_quantized(dtype) and len(kept):
        flat, scales = quantize_rows(values.flatten(1), dtype)
        values = flat.view(values.shape)
    pointers = F.pad(torch.bincount(groups, minlength=n_groups).cumsum(0), (1, 0))
    return BlockSparse(blocks_MRC=values.to(dtype), pointers=pointers.int(), columns=(kept % n_columns).int(),
                       scales=scales, shape=(n_rows, width))


@function
def casted_sparse_embedding(
    ids: Tensor["...", integer], table: BlockSparse, weights: Tensor["...", floating] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor["...", "D"]:
    """Rows of a block-sparse table, brought to a wider type.

    Args:
        ids: integers in 0..V-1, any shape.
        table: from `to_block_sparse`.
        weights: one for each id, multiplied into its row; None for ones.
        dtype: of the result.

    Returns:
        [*ids.shape, D].

    Raises:
        InputError: an id outside the table.
        ShapeError: weights has not the shape of ids.
    """
    _check_ids(ids, table.shape[0])
    rows = _SPARSE(table.scales, table.blocks_MRC, table.pointers, table.columns, ids, table.shape[1], dtype)
    return rows if weights is None else (rows * weights.unsqueeze(-1)).to(dtype)


def _check_ids(ids: Tensor, n_rows: int) -> None:
    """Kernels do not look at what they are told to read. Ids that cannot be read here were checked by the caller."""
    if not is_readable(ids) or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= n_rows:
        raise InputError(f"ids: {low if low < 0 else high} given; expected 0..{n_rows - 1}, the rows of the table")


def _new(ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*ids.shape, width, dtype=dtype, device=ids.device)


def _kernel(table_VD: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == table_VD.dtype and not is_recording():
        return F.embedding(ids, table_VD)
    out = _new(ids, table_VD.shape[1], dtype)
    casted_embedding_kernel(ids.reshape(-1), table_VD, out.view(-1, out.shape[-1]), 1.0)
    return out


def _backward_kernel(grad: Tensor, ids: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    width, ids_N = grad.shape[-1], ids.reshape(-1)
    if dtype.itemsize == 2 and grad.is_cpu and 2 * len(ids_N) <= n_rows and not is_recording():
        # f32 sums of the rows that were looked up alone: the whole table's would be most of the work.
        rows_U, places_N = ids_N.unique(return_inverse=True)
        sums_UD = torch.zeros(len(rows_U), width)
        embedding_backward_kernel(grad.reshape(-1, width), places_N, sums_UD)
        return torch.zeros(n_rows, width, dtype=dtype).index_copy_(0, rows_U.long(), sums_UD.to(dtype))
    grad_table_VD = torch.zeros(n_rows, width, device=grad.device)
    embedding_backward_kernel(grad.reshape(-1, width), ids_N, grad_table_VD)
    return grad_table_VD.to(dtype)


def _backward_reference(grad: Tensor, ids: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    grad = grad.flatten(0, -2)
    wide = grad if grad.dtype == torch.float64 else grad.float()
    return wide.new_zeros(n_rows, wide.shape[1]).index_add(0, ids.reshape(-1), wide).to(dtype)


def _casted_kernel(scale: Tensor, table_VD: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    out = _new(ids, table_VD.shape[1], dtype)
    scaled_embedding_kernel(ids.reshape(-1), table_VD, scale, out.view(-1, out.shape[-1]))
    return out


def _casted_reference(scale: Tensor, table_VD: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    rows = table_VD[ids]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows * (scale if scale.shape[0] == 1 else scale[ids].unsqueeze(-1))).to(dtype)


def _sparse_kernel(
    scales: Tensor, blocks_MRC: Tensor, pointers: Tensor, columns: Tensor, ids: Tensor, width: int, dtype: torch.dtype,
) -> Tensor:
    out = _new(ids, width, dtype)
    if not blocks_MRC.shape[0]:
        return out.zero_()
    sparse_embedding_kernel(ids.reshape(-1), blocks_MRC, pointers, columns, scales, out.view(-1, width))
    return out


def _sparse_reference(
    scales: Tensor, blocks_MRC: Tensor, pointers: Tensor, columns: Tensor, ids: Tensor, width: int, dtype: torch.dtype,
) -> Tensor:
    shape = ((pointers.shape[0] - 1) * blocks_MRC.shape[1], width)
    table = BlockSparse(blocks_MRC=blocks_MRC, pointers=pointers, columns=columns, scales=scales, shape=shape)
    return table.to_dense()[ids].to(dtype)


def _backward(saved: Any, grad: Tensor) -> tuple[Any, ...]:
    return _EMBEDDING_BACKWARD(grad, *saved), None, None


_EMBEDDING_BACKWARD = Operation(
    "embedding_backward(Tensor grad, Tensor ids, int n_rows, ScalarType dtype) -> Tensor",
    kernel=_backward_kernel, reference=_backward_reference,
    fake=lambda grad, ids, n_rows, dtype: grad.new_empty((n_rows, grad.shape[-1]), dtype=dtype))

_EMBEDDING = Operation(
    "embedding(Tensor table, Tensor ids, ScalarType dtype) -> Tensor",
    kernel=_kernel, reference=lambda table, ids, dtype: table[ids].to(dtype),
    fake=lambda table, ids, dtype: table.new_empty((*ids.shape, table.shape[1]), dtype=dtype),
    save=lambda inputs, output: (inputs[1], inputs[0].shape[0], inputs[0].dtype), backward=_backward)

_CASTED = Operation(
    "casted_embedding(Tensor scale, Tensor table, Tensor ids, ScalarType dtype) -> Tensor",
    kernel=_casted_kernel, reference=_casted_reference,
    fake=lambda scale, table, ids, dtype: table.new_empty((*ids.shape, table.shape[1]), dtype=dtype))

_SPARSE = Operation(
    "casted_sparse_embedding(Tensor scales, Tensor blocks, Tensor pointers, Tensor columns, Tensor ids, int width, "
    "ScalarType dtype) -> Tensor",
    kernel=_sparse_kernel, reference=_sparse_reference,
    fake=lambda scales, blocks, pointers, columns, ids, width, dtype: _new(ids, width, dtype))
