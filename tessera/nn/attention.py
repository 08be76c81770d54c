"""Self-attention: projections, head norms, rotation, cache.

In: normed activations [B, S, d_model] with the forward pass's rotary tables, mask and cache. Out: the same
shape. nn.Block calls it.

Dims: B batch, S new tokens, T all tokens, H query heads, K key/value heads, D head_dim, M d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessera import ops
from tessera.nn.kv_cache import KVCache, StepCache
from tessera.nn.layers import Linear, RMSNorm


class Attention(nn.Module):
    """Causal grouped-query self-attention.

    Args:
        d_model, n_heads, n_kv_heads, d_head: shape.
        qkv_bias, out_bias: which projections have biases.
        qk_norm_eps: RMSNorm of each query and key head before rotation, with this epsilon; None for none.
        scale, softcap: factor on the scores, and their cap.
        use_flash: attention in blocks.
        dtype, bias_dtype: storage of weights; of biases and norms.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, *, qkv_bias: bool, out_bias: bool,
        qk_norm_eps: float | None, scale: float, softcap: float | None, use_flash: bool,
        dtype: torch.dtype, bias_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.d_head, self.scale, self.softcap, self.use_flash = d_head, scale, softcap, use_flash
        q_width, kv_width = n_heads * d_head, n_kv_heads * d_head
        self.q_proj = Linear(d_model, q_width, bias=qkv_bias, dtype=dtype, bias_dtype=bias_dtype)
        self.k_proj = Linear(d_model, kv_width, bias=qkv_bias, dtype=dtype, bias_dtype=bias_dtype)
        self.v_proj = Linear(d_model, kv_width, bias=qkv_bias, dtype=dtype, bias_dtype=bias_dtype)
        self.o_proj = Linear(
            q_width, d_model, bias=out_bias, dtype=dtype, bias_dtype=bias_dtype, blocks=(d_head,) * n_heads)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(d_head, eps=qk_norm_eps, dtype=bias_dtype)
            self.k_norm = RMSNorm(d_head, eps=qk_norm_eps, dtype=bias_dtype)

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads that this module computes and caches."""
        return self.k_proj.d_out // self.d_head

    def forward(
        self, x_BSM: Tensor, mask: ops.Mask, rope: ops.RopeTables | None = None,
        cache: KVCache | StepCache | None = None, layer: int = 0,
    ) -> Tensor:
        heads = (*x_BSM.shape[:2], -1, self.d_head)
        q_BSHD = self.q_proj(x_BSM).view(heads)
        k_BSKD = self.k_proj(x_BSM).view(heads)
        v_BSKD = self.v_proj(x_BSM).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSKD = self.q_norm(q_BSHD), self.k_norm(k_BSKD)
        if rope is not None:
            q_BSHD, k_BSKD = ops.rotary(q_BSHD, *rope), ops.rotary(k_BSKD, *rope)
        k_BKTD, v_BKTD = k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
        if cache is not None:
            k_BKTD, v_BKTD = cache.update(layer, k_BKTD, v_BKTD)
        out_BHSD = ops.attention(
            q_BSHD.transpose(1, 2), k_BKTD, v_BKTD, mask, scale=self.scale, softcap=self.softcap, flash=self.use_flash)
        return self.o_proj(out_BHSD.transpose(1, 2).flatten(2))
