"""The feed-forward half of a block.

In: normed activations [..., d_model]. Out: the same shape. nn.Block calls it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tessera import ops
from tessera.nn.layers import Linear


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) when gated, else down(act(up(x))).

    Args:
        d_model, d_ffn: widths.
        is_gated: whether there is a gate projection.
        activation: a name of ops.ACTIVATIONS.
        bias: whether the projections have biases.
        dtype, bias_dtype: storage of weights and biases.
    """

    def __init__(
        self, d_model: int, d_ffn: int, *, is_gated: bool, activation: str, bias: bool,
        dtype: torch.dtype, bias_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation = activation
        linear = functools.partial(Linear, bias=bias, dtype=dtype, bias_dtype=bias_dtype)
        self.gate_proj = linear(d_model, d_ffn) if is_gated else None
        self.up_proj = linear(d_model, d_ffn)
        self.down_proj = linear(d_ffn, d_model, blocks=ops.even_blocks(d_ffn))

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(ops.ACTIVATIONS[self.activation](self.up_proj(x)))
        return self.down_proj(ops.gated(self.gate_proj(x), self.up_proj(x), self.activation))
