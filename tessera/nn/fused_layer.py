"""A transformer layer made of fused operations: norm, attention and MLP in few launches.

In: the residual stream [B, S, D]. Out: the same shape. User code calls it; models.gpt has nn.Block, which also caches.

Dims: B batch, S tokens, D d_model, H heads, E d_model / H, F d_ffn.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tessera import ops
from tessera.errors import InputError, ShapeError
from tessera.nn.layers import RMSNorm
from tessera.nn.quantized import CastedLinear
from tessera.ops.mlp import gated_packed
from tessera.types import DType, dtype_of


class FusedTransformerLayer(nn.Module):
    """x + proj(attention(rope(qkv(norm1(x))))), then x + down(silu(gate) * up) of norm2(x), causal.

    Queries, keys and values come of one projection, gate and up of another; attention and the gated product are
    one kernel each.

    Args:
        dim: D.
        num_heads: H, which divides D into even widths.
        mlp_ratio: F / D.
        dropout: probability that an attention weight is dropped, in training.
        weight_dtype: int8, fp8_e4m3 or fp8_e5m2: frozen weights (nn.CastedLinear); f32, bf16 or f16: trainable ones.
        dtype: of the activations and, where weights are trainable, of norms.
        rope_theta, eps: base of the rotary frequencies; epsilon of the norms.

    Raises:
        InputError: the heads do not divide the width, or another option is out of its range.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0, *,
        weight_dtype: DType | torch.dtype | str = "int8", dtype: DType | torch.dtype | str = "bf16",
        rope_theta: float = 10000.0, eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % (2 * num_heads):
            raise InputError(f"num_heads: {num_heads} given for dim {dim}; expected heads of an even width")
        if not 0.0 <= dropout < 1.0 or not int(dim * mlp_ratio) > 0:
            raise InputError(f"dropout: {dropout}, mlp_ratio: {mlp_ratio} given; expected 0 <= dropout < 1 and a "
                             f"positive ratio")
        self.dim, self.num_heads, self.dropout = dim, num_heads, dropout
        self.mlp_dim, self.rope_theta = int(dim * mlp_ratio), rope_theta
        activation = dtype_of(dtype).torch
        if ops.is_quantized(dtype_of(weight_dtype).torch):
            linear = functools.partial(CastedLinear, bias=False, weight_dtype=weight_dtype, activation_dtype=dtype)
        else:
            linear = functools.partial(nn.Linear, bias=False, dtype=dtype_of(weight_dtype).torch)
        self.qkv, self.out_proj = linear(dim, 3 * dim), linear(dim, dim)
        self.mlp_gate_up, self.mlp_down = linear(dim, 2 * self.mlp_dim), linear(self.mlp_dim, dim)
        self.norm1, self.norm2 = (RMSNorm(dim, eps=eps, dtype=activation) for _ in range(2))

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: [B, S, D].
            position_ids: ints [B or 1, S], for the rotation; by default 0..S-1.
            attention_mask: [B, S, S]: bool, True where a query sees a key, or float, added to the scores. A query
                never sees the keys after it.

        Returns:
            [B, S, D] in x's dtype.

        Raises:
            ShapeError: x, position_ids or attention_mask do not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: {list(x.shape)} given; expected [B, S, {self.dim}]")
        x = x + self.attention_block(x, position_ids, attention_mask).to(x.dtype)
        return x + self.mlp_block(x).to(x.dtype)

    def attention_block(
        self, x: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None,
    ) -> Tensor:
        """norm1, qkv, rotation, attention and projection, without the residual; see `forward`."""
        batch, seq_len, _ = x.shape
        width = self.dim // self.num_heads
        mask = _head_mask(attention_mask, batch, seq_len)
        qkv_BSGE = self.qkv(self._cast(self.norm1(x), self.qkv)).view(batch, seq_len, 3 * self.num_heads, width)
        positions = range(seq_len) if position_ids is None else position_ids
        tables = ops.rope_tables(positions, width, self.rope_theta, seq_len=seq_len, device=x.device)
        turned_BSGE = ops.rotary(qkv_BSGE[:, :, :2 * self.num_heads], *tables)
        q_BHSE, k_BHSE = turned_BSGE.transpose(1, 2).chunk(2, 1)
        v_BHSE = qkv_BSGE[:, :, 2 * self.num_heads:].transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        out_BHSE = ops.attention(q_BHSE, k_BHSE, v_BHSE, mask, dropout, True)
        return self.out_proj(out_BHSE.transpose(1, 2).flatten(2))

    def mlp_block(self, x: Tensor) -> Tensor:
        """norm2, gate and up, their product, and down, without the residual."""
        return self.mlp_down(gated_packed(self.mlp_gate_up(self._cast(self.norm2(x), self.mlp_gate_up))))

    @staticmethod
    def _cast(x: Tensor, linear: nn.Module) -> Tensor:
        """x in the dtype that the layer reads: CastedLinear brings it there itself."""
        return x if isinstance(linear, CastedLinear) else x.to(linear.weight.dtype)


def _head_mask(attention_mask: Tensor | None, batch: int, seq_len: int) -> Tensor | None:
    """[B, S, S] as [B, 1, S, S], for all heads."""
    if attention_mask is None:
        return None
    if attention_mask.shape not in ((batch, seq_len, seq_len), (1, seq_len, seq_len)):
        raise ShapeError(
            f"attention_mask: {list(attention_mask.shape)} given; expected {[batch, seq_len, seq_len]}")
    return attention_mask.unsqueeze(1)
