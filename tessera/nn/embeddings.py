"""Embeddings in other forms: learned positions, tables in narrow types, block-sparse tables.

In: ids. Out: rows in the compute dtype. They are frozen but for the learned one: `from_float` converts a trained table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessera import ops
from tessera.types import DType, bf16, dtype_of, fp8_e4m3

_STEP = {torch.float8_e4m3fn: (2**-4, 2**-10), torch.float8_e5m2: (2**-3, 2**-17), torch.int8: (0.0, 0.5),
         torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-25), torch.float32: (0.0, 0.0)}
_SAFETY = 1 + 2**-20  # the division by the scale and the product with it round, too


class LearnedPositionalEmbedding(nn.Module):
    """A trained row for each position.

    Args:
        max_seq_len: positions.
        dim: width of the rows, drawn from N(0, 0.02).
    """

    def __init__(self, max_seq_len: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len, dim).normal_(0, 0.02))

    def forward(self, position_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, dim]."""
        return ops.embedding(position_ids, self.weight)


class CastedEmbedding(nn.Module):
    """A table in a narrow type with a scale a row, read in a wider one.

    Args:
        vocab_size, embedding_dim: of the table, drawn from N(0, scale_factor).
        storage_dtype: fp8_e4m3, fp8_e5m2, int8, bf16, f16 or f32.
        compute_dtype: of the rows that come out.
        scale_factor: standard deviation of a new table.
    """

    weight: Tensor
    scale: Tensor
    max_error: Tensor

    def __init__(
        self, vocab_size: int, embedding_dim: int, storage_dtype: DType | str = fp8_e4m3,
        compute_dtype: DType | str = bf16, scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.storage, self.compute = dtype_of(storage_dtype).torch, dtype_of(compute_dtype).torch
        self.register_buffer("weight", torch.empty(vocab_size, embedding_dim, dtype=self.storage))
        self.register_buffer("scale", torch.ones(vocab_size))
        self.register_buffer("max_error", torch.zeros(()))
        self.set_weight(torch.randn(vocab_size, embedding_dim) * scale_factor)

    @classmethod
    def from_float(cls, table: Tensor | nn.Module, **options: Any) -> CastedEmbedding:
        """Convert a float table [V, D], or a module whose `weight` is one; options as for the class."""
        weight = _weight(table)
        result = cls(0, weight.shape[1], **options)
        result.set_weight(weight)
        return result.to(weight.device)

    @torch.no_grad()
    def set_weight(self, table_VD: Tensor) -> None:
        """Store a float table."""
        weight = table_VD.detach().float()
        if ops.is_quantized(self.storage):
            self.weight, self.scale = ops.quantize_rows(weight, self.storage)
        else:
            self.weight, self.scale = weight.to(self.storage), torch.ones(weight.shape[0], device=weight.device)
        self.max_error = _largest(_rounding_bound(weight, self.scale[:, None], self.storage))

    def error_bound(self) -> float:
        """No entry of the stored table is further than this from the float table's."""
        return float(self.max_error)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] ints -> [..., embedding_dim] in the compute dtype."""
        return ops.casted_embedding(input_ids, self.weight, self.scale, self.compute)


class CastedSparseEmbedding(nn.Module):
    """A table of which only the largest blocks are kept (block-CSR), in a narrow type with a scale a block.

    Args:
        num_embeddings, embedding_dim: of the table, drawn from N(0, 1).
        sparsity: the share of the blocks that is dropped.
        storage_dtype, compute_dtype: as for `CastedEmbedding`.
        block_size: rows and columns of a block.
    """

    block_data: Tensor
    block_ptr: Tensor
    block_indices: Tensor
    block_scales: Tensor
    max_error: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, sparsity: float = 0.9, storage_dtype: DType | str = fp8_e4m3,
        compute_dtype: DType | str = bf16, block_size: int = 16,
    ) -> None:
        super().__init__()
        self._configure(sparsity, storage_dtype, compute_dtype, block_size)
        self.set_weight(torch.randn(num_embeddings, embedding_dim))

    def _configure(
        self, sparsity: float, storage_dtype: DType | str, compute_dtype: DType | str, block_size: int,
    ) -> None:
        self.storage, self.compute = dtype_of(storage_dtype).torch, dtype_of(compute_dtype).torch
        self.sparsity, self.block_size = sparsity, block_size

    @classmethod
    def from_float(
        cls, table: Tensor | nn.Module, sparsity: float = 0.9, storage_dtype: DType | str = fp8_e4m3,
        compute_dtype: DType | str = bf16, block_size: int = 16,
    ) -> CastedSparseEmbedding:
        """Convert a float table [V, D], or a module whose `weight` is one: blocks of small norm become zeros."""
        result = cls.__new__(cls)
        nn.Module.__init__(result)
        result._configure(sparsity, storage_dtype, compute_dtype, block_size)
        result.set_weight(_weight(table))
        return result

    @torch.no_grad()
    def set_weight(self, table_VD: Tensor) -> None:
        """Store a float table."""
        weight = table_VD.detach().float()
        table = ops.to_block_sparse(weight, self.sparsity, block_size=self.block_size, dtype=self.storage)
        self.shape = table.shape
        for name, value in (("block_data", table.blocks_MRC), ("block_ptr", table.pointers),
                            ("block_indices", table.columns), ("block_scales", table.scales)):
            self.register_buffer(name, value)
        # Where a block was dropped the table's scale is 0, and so is the bound of its rounding: the entry is lost.
        ones = ops.BlockSparse(
            blocks_MRC=torch.ones_like(table.blocks_MRC, dtype=torch.float32), pointers=table.pointers,
            columns=table.columns, scales=table.scales, shape=table.shape)
        scales = ones.to_dense()
        bound = torch.where(scales > 0, _rounding_bound(weight, scales, self.storage), weight.abs())
        self.register_buffer("max_error", _largest(bound))

    @property
    def table(self) -> ops.BlockSparse:
        """What is stored."""
        return ops.BlockSparse(blocks_MRC=self.block_data, pointers=self.block_ptr, columns=self.block_indices,
                               scales=self.block_scales, shape=self.shape)

    def error_bound(self) -> float:
        """No entry of the stored table is further than this from the float table's."""
        return float(self.max_error)

    def forward(self, indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """[...] ints -> [..., embedding_dim] in the compute dtype; each row times its weight, if there are any."""
        return ops.casted_sparse_embedding(indices, self.table, weights, self.compute)


def _weight(table: Tensor | nn.Module) -> Tensor:
    weight = table if isinstance(table, Tensor) else table.weight
    assert isinstance(weight, Tensor)
    return weight


def _largest(bound: Tensor) -> Tensor:
    return bound.amax() if bound.numel() else bound.new_zeros(())


def _rounding_bound(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """How far an entry stored as round(entry / scale) * scale may be off: a share of itself, or of the scale."""
    relative, absolute = _STEP[dtype]
    return torch.maximum(weight.abs() * relative, scale * absolute) * _SAFETY
