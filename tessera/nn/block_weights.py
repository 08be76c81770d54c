"""Linear and Embedding whose weights stay in the blocks of a GGUF file (Q8_0, Q4_0, Q4_1).

In: activations or ids. Out: activations, computed with the weight that the blocks stand for, which is dequantized in
registers. models.load puts them in the place of Linear and Embedding. `activations` "int8" rounds what is multiplied
with them, too (ops.block_linear).

Dims: O, I the weight's rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessera.ops.block_linear import block_embedding, block_linear, dequantize_blocks
from tessera.ops.kernels.quantized import from_blocks


class BlockWeight(nn.Module):
    """A frozen weight [O, I] in blocks of 32 along each row.

    Args:
        blocks: uint8 [O, bytes of a row], as they lie in the file.
        kind: Q8_0, Q4_0 or Q4_1.

    Attributes:
        activations: "int8", or None for activations as they are.
    """

    activations: str | None = None
    quants: Tensor
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, blocks: Tensor, kind: str) -> None:
        super().__init__()
        self.kind = kind
        for name, part in zip(("quants", "scale", "minimum"), from_blocks(blocks, kind)):
            self.register_buffer(name, part)

    @property
    def weight(self) -> Tensor:
        """The whole weight in f32, [O, I], made at each call."""
        return dequantize_blocks(self.quants, self.scale, self.minimum)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.quants.shape[0], self.scale.shape[1] * 32

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {self.kind}"


class BlockLinear(BlockWeight):
    """y = x @ weight^T + bias.

    Args:
        blocks, kind: see BlockWeight.
        bias: [O], or None.
        blocks_of_sums: as `blocks` of nn.Linear.
    """

    def __init__(
        self, blocks: Tensor, kind: str, bias: nn.Parameter | None = None,
        blocks_of_sums: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(blocks, kind)
        self.bias, self.blocks = bias, blocks_of_sums

    @property
    def d_out(self) -> int:
        """O."""
        return self.quants.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return block_linear(x, self.quants, self.scale, self.minimum, self.bias, self.blocks, self.activations)


class BlockEmbedding(BlockWeight):
    """Rows of the table by id, in out_dtype; `project` uses it as output projection."""

    def __init__(self, blocks: Tensor, kind: str, out_dtype: torch.dtype) -> None:
        super().__init__(blocks, kind)
        self.out_dtype = out_dtype

    def forward(self, ids: Tensor) -> Tensor:
        return block_embedding(ids, self.quants, self.scale, self.minimum, self.out_dtype)

    def project(self, x: Tensor) -> Tensor:
        """x @ table^T, [..., O]."""
        return block_linear(x, self.quants, self.scale, self.minimum, activations=self.activations)
