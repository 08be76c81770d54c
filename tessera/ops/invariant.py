"""The invariant mode: operations whose bits do not depend on the batch, the chunking or the mesh.

In: tensors, as the ordinary operations take them. Out: the same values, each row computed as if it stood alone,
and sums in an order that depends on the configuration alone. `dist.deterministic` turns the mode on; the
operations of this layer take this way while it is.

torch's own matmuls choose their order of sums by the shape, and its elementwise functions compute the ends of
a tensor by other means than its middle. The tile language does neither: `mma` is one fused chain for each
element, and lanes all run the same code.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.errors import InputError
from tessera.kernel import lang as tile
from tessera.kernel.launch import kernel
from tessera.types import Tile, f32

N_BLOCKS = 8

_INVARIANT: contextvars.ContextVar[bool] = contextvars.ContextVar("tessera_invariant", default=False)


def is_invariant() -> bool:
    """Whether operations must give each row the same bits whatever stands beside it."""
    return _INVARIANT.get()


@contextlib.contextmanager
def invariant() -> Iterator[None]:
    """Turn the mode on for the calls inside."""
    token = _INVARIANT.set(True)
    try:
        yield
    finally:
        _INVARIANT.reset(token)


def even_blocks(whole: int) -> tuple[int, ...]:
    """`whole` cut into 8 parts (fewer when it is smaller) that differ by at most one, the larger first.

    1, 2, 4 or 8 ranks can each take whole subtrees of the tree over them.
    """
    small, n_larger = divmod(whole, N_BLOCKS)
    return tuple(size for size in (small + (i < n_larger) for i in range(N_BLOCKS)) if size)


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the terms in a fixed binary tree: the first half (the larger), plus the second, each likewise.

    Raises:
        InputError: no terms.
    """
    if not terms:
        raise InputError("terms: none given; expected at least one")
    if len(terms) == 1:
        return terms[0]
    middle = (len(terms) + 1) // 2
    return tree_sum(terms[:middle]) + tree_sum(terms[middle:])


def block_products(x: Tensor, weight: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """x[..., block] @ weight[:, block]^T for each block of the inner dim: the leaves of a linear map's sums.

    Args:
        x: [..., I], f32 or bf16.
        weight: [O, I], the same dtype.
        blocks: sizes that sum to I.

    Returns:
        A tensor [..., O] f32 for each block, each element one chain of fused multiply-adds over the block.
    """
    return [product(x_block, weight_block) for x_block, weight_block in
            zip(x.split(list(blocks), -1), weight.split(list(blocks), -1))]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in f32, [..., I] and [O, I] -> [..., O]; every element one chain, in the order of I."""
    out = _Product.apply(x.reshape(-1, x.shape[-1]), weight)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return _product(x_MK, weight_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MK, weight_NK = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = _product(grad_MN, weight_NK.t().float()).to(x_MK.dtype) if wants_x else None
        grad_weight = _product(grad_MN.t(), x_MK.t().float()).to(weight_NK.dtype) if wants_weight else None
        return grad_x, grad_weight


def _product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    out_MN = torch.empty(x_MK.shape[0], weight_NK.shape[0], device=x_MK.device)
    product_kernel(x_MK.contiguous(), weight_NK.contiguous(), out_MN)
    return out_MN


@kernel
def product_kernel(x: Tile["M", "K"], weight: Tile["N", "K"], out: Tile["M", "N", f32]):  # type: ignore[no-untyped-def]
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(weight))))
