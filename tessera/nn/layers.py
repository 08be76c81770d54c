"""The small modules of a transformer: Linear, Embedding, RMSNorm, LayerNorm.

In: activations. Out: activations. nn.attention, nn.mlp, nn.block and models.gpt compose them. Parameters
are allocated and not filled (norms excepted); GPTModel.init_weights or a loader fills them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessera import ops
from tessera.types import DType, dtype_of


class Linear(nn.Module):
    """y = x @ weight^T + bias.

    An 8-bit weight is a frozen parameter with a buffer `weight_scale` [out] (f32); a wider weight that
    a state dict brings is quantized on the way in. `unfreeze` makes it trainable.

    Args:
        d_in, d_out: widths.
        bias: whether there is one.
        dtype: storage of the weight.
        bias_dtype: storage of the bias; default dtype.
        blocks: in the invariant mode, sums are taken over each of these parts of d_in and then added in a
            fixed tree (ops.invariant), so that a mesh may share the parts out; None for one.
    """

    weight_scale: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool = False, dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None, blocks: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.storage, self.blocks = dtype, blocks
        self.is_quantized = ops.is_quantized(dtype)
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtype), requires_grad=not self.is_quantized)
        scale = torch.empty(d_out, dtype=torch.float32) if self.is_quantized else None
        self.register_buffer("weight_scale", scale)
        self.bias = nn.Parameter(torch.empty(d_out, dtype=bias_dtype or dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_quantized:
            return ops.linear(x, self.weight, self.bias, blocks=self.blocks)
        if self.weight_scale is not None:
            return ops.linear(x, self.weight, self.bias, self.weight_scale, blocks=self.blocks)
        return ops.linear(x, ops.fake_quantize_rows(self.weight, self.storage), self.bias, blocks=self.blocks)

    @property
    def d_out(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the weight that `set_weight` takes."""
        return tuple(self.weight.shape)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Store a float weight [out, in], quantized when the storage is 8-bit."""
        if self.weight_scale is None:
            self.weight.copy_(weight)
        else:
            quantized, scale = ops.quantize_rows(weight, self.storage)
            self.weight.copy_(quantized)
            self.weight_scale.copy_(scale)

    def unfreeze(self) -> None:
        """Keep an 8-bit weight in f32 to train it; the forward pass still sees it rounded to 8 bits."""
        if self.weight_scale is not None:
            self.weight = nn.Parameter(ops.dequantize_rows(self.weight, self.weight_scale, torch.float32))
            self.weight_scale = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if self.weight_scale is not None and weight is not None and not ops.is_quantized(weight.dtype):
            quantized, scale = ops.quantize_rows(weight, self.storage)
            state_dict[prefix + "weight"], state_dict[prefix + "weight_scale"] = quantized, scale
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}, {self.storage}"


class Embedding(nn.Module):
    """Rows of a [n_rows, d_model] table by id; `project` uses it as output projection.

    Args:
        n_rows, d_model: of the table.
        dtype: storage of the table, which is then not filled; None: f32, drawn from N(0, 0.02).
        out_dtype: of the rows; default the table's.
    """

    def __init__(
        self, n_rows: int, d_model: int, *, dtype: DType | torch.dtype | str | None = None,
        out_dtype: DType | torch.dtype | str | None = None,
    ) -> None:
        super().__init__()
        storage = torch.float32 if dtype is None else dtype_of(dtype).torch
        self.out_dtype = storage if out_dtype is None else dtype_of(out_dtype).torch
        self.weight = nn.Parameter(torch.empty(n_rows, d_model, dtype=storage))
        if dtype is None:
            nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight, self.out_dtype)

    def project(self, x: Tensor) -> Tensor:
        """x @ table^T, [..., n_rows]: the logits of a model with tied embeddings."""
        return ops.linear(x, self.weight)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the table that `set_weight` takes."""
        return tuple(self.weight.shape)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Store a table [n_rows, d_model]."""
        self.weight.copy_(weight)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim, with a weight that starts at ones."""

    def __init__(self, dim: int, *, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm over the last dim, with a weight that starts at ones and a bias that starts at zeros."""

    def __init__(self, dim: int, *, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""
        total = ops.add(x, residual)
        return self(total), total
