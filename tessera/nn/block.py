"""One transformer block: attention and MLP around the residual stream.

In: the residual stream [B, S, d_model]. Out: the same shape. models.gpt stacks blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from tessera import ops
from tessera.nn.attention import Attention
from tessera.nn.kv_cache import KVCache, StepCache
from tessera.nn.layers import LayerNorm, RMSNorm
from tessera.nn.mlp import MLP


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); or one of the variants below.

    Args:
        attn, mlp: the two halves.
        attn_norm: norm of the attention's input.
        mlp_norm: norm of the MLP's input; None for the parallel form x + attn(norm(x)) + mlp(norm(x)),
            where both read attn_norm's output (GPT-J, PaLM).
        post_norm: the norms stand behind attention and MLP instead: x + norm(attn(x)) (OLMo 2).
    """

    def __init__(
        self, attn: Attention, mlp: MLP, attn_norm: RMSNorm | LayerNorm, mlp_norm: RMSNorm | LayerNorm | None,
        *, post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attn_norm, self.attn, self.mlp_norm, self.mlp = attn_norm, attn, mlp_norm, mlp
        self.post_norm = post_norm

    def forward(
        self, x: Tensor, mask: ops.Mask, rope: ops.RopeTables | None = None,
        cache: KVCache | StepCache | None = None, layer: int = 0,
    ) -> Tensor:
        if self.mlp_norm is None:
            normed = self.attn_norm(x)
            return ops.add(ops.add(x, self.attn(normed, mask, rope, cache, layer)), self.mlp(normed))
        if self.post_norm:
            x = ops.add(x, self.attn_norm(self.attn(x, mask, rope, cache, layer)))
            return ops.add(x, self.mlp_norm(self.mlp(x)))
        normed, x = self.mlp_norm.add(self.attn(self.attn_norm(x), mask, rope, cache, layer), x)
        return ops.add(x, self.mlp(normed))
