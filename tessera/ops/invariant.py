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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.errors import InputError, UnsupportedError
from tessera.kernel import lang as tile
from tessera.kernel.launch import kernel
from tessera.kernel.signature import constexpr
from tessera.types import Tile, bool_, f32

N_BLOCKS = 8

_INVARIANT: contextvars.ContextVar[bool] = contextvars.ContextVar("tessera_invariant", default=False)
_n_active = 0  # contexts that are in the mode: torch.compile can read a number, but no context variable


def is_invariant() -> bool:
    """Whether operations must give each row the same bits whatever stands beside it.

    Raises:
        UnsupportedError: torch.compile is tracing in the mode; what it generates has other bits.
    """
    if not _n_active:
        return False
    if torch.compiler.is_compiling():
        raise UnsupportedError("dist.deterministic: torch.compile given; the mode runs eager operations only")
    return _INVARIANT.get()


@contextlib.contextmanager
def invariant() -> Iterator[None]:
    """Turn the mode on for the calls inside."""
    global _n_active
    token = _INVARIANT.set(True)
    _n_active += 1
    try:
        yield
    finally:
        _n_active -= 1
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


@torch.compiler.disable
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
    product_kernel(x_MK, weight_NK, out_MN)
    return out_MN


@torch.compiler.disable
def pointwise(name: str, x: Tensor, reference: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of every element: "silu", "gelu", "gelu_tanh", "tanh", "cos" or "sin".

    Args:
        name: which.
        x: any shape and float dtype.
        reference: torch's function, for the gradient.

    Returns:
        The shape and dtype of x, rounded once from f32.
    """
    def run(x: Tensor) -> Tensor:
        out = torch.empty(x.numel(), device=x.device)
        _POINTWISE[name](x.reshape(-1), out)
        return out.view(x.shape).to(x.dtype)

    return _Recomputed.apply(run, reference, x)


@torch.compiler.disable
def rms_norm(x: Tensor, weight: Tensor, eps: float, reference: Callable[..., Tensor]) -> Tensor:
    """See ops.rms_norm, which is the reference (of x and weight) for the gradient."""
    def run(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(x.numel() // x.shape[-1], x.shape[-1], device=x.device)
        rms_norm_kernel(x.reshape(out.shape), weight, out, eps)
        return out.view(x.shape).to(x.dtype)

    return _Recomputed.apply(run, reference, x, weight)


@torch.compiler.disable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, reference: Callable[..., Tensor]) -> Tensor:
    """See ops.layer_norm, which is the reference (of x, weight and bias) for the gradient."""
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty(x.numel() // x.shape[-1], x.shape[-1], device=x.device)
        layer_norm_kernel(x.reshape(out.shape), weight, bias, out, eps)
        return out.view(x.shape).to(x.dtype)

    return _Recomputed.apply(run, reference, x, weight, bias)


@torch.compiler.disable
def attention(
    q_BSHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, allowed_BST: Tensor, scale: float, softcap: float | None,
    reference: Callable[..., Tensor],
) -> Tensor:
    """See ops.attention, which is the reference (of q, k and v) for the gradient.

    Sums over keys are chains in the order of the keys; a hidden key adds an exact zero, so that neither padding
    nor the keys behind a query change a bit.
    """
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, device=q.device)
        attention_kernel(q, k, v, allowed_BST, out, scale, softcap)
        return out.to(q.dtype)

    return _Recomputed.apply(run, reference, q_BSHD, k_BKTD, v_BKTD)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Recomputed(torch.autograd.Function):
    """run(*tensors), with the gradient of reference(*tensors): torch's, on one thread, since its sums are cut by
    the number of threads. It is invariant to everything but the shapes: a sample's gradient is the same in any
    batch when the sample is computed alone (dist.GradientTree)."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], reference: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.reference = reference
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad(), _one_thread():
            grads = iter(torch.autograd.grad(ctx.reference(*leaves), wanted, grad))
        return None, None, *(next(grads) if need else None for need in needed)


# mypy and ruff read the names of dims as names of types.

@kernel
def product_kernel(x: Tile["M", "K"], weight: Tile["N", "K"], out: Tile["M", "N", f32]):  # type: ignore
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(weight))))


@kernel
def attention_kernel(  # type: ignore
    q: Tile["B", "S", "H", "D"], k: Tile["B", "KV", "T", "D"], v: Tile["B", "KV", "T", "D"],
    allowed: Tile["B", "S", "T", bool_], out: Tile["B", "S", "H", "D", f32], scale: float, softcap: constexpr,
):
    ctx = tile.context()
    group = ctx.H // ctx.KV
    for b, h in tile.grid(ctx.B, ctx.H):
        scores = tile.mma(q[b, :, h, :], tile.transpose(k[b, h // group])) * scale
        if softcap is not None:
            scores = softcap * tile.tanh(scores / softcap)
        scores = tile.where(allowed[b], scores, -float("inf"))
        weights = tile.exp(scores - tile.reduce_max(scores, axis=-1, keepdim=True))
        total = tile.mma(weights, tile.full((ctx.T, 1), 1.0, f32))
        values = tile.cast(v[b, h // group], f32)
        tile.store(out[b, :, h, :], tile.mma(weights, values) / total)


@kernel
def rms_norm_kernel(x: Tile["M", "D"], weight: Tile["D"], out: Tile["M", "D", f32], eps: float):  # type: ignore
    row = tile.cast(tile.load(x), f32)
    scale = tile.rsqrt(tile.reduce_mean(row * row, axis=-1, keepdim=True) + eps)
    tile.store(out, row * scale * tile.cast(tile.load(weight), f32))


@kernel
def layer_norm_kernel(  # type: ignore
    x: Tile["M", "D"], weight: Tile["D"], bias: Tile["D"], out: Tile["M", "D", f32], eps: float,
):
    row = tile.cast(tile.load(x), f32)
    row = row - tile.reduce_mean(row, axis=-1, keepdim=True)
    scale = tile.rsqrt(tile.reduce_mean(row * row, axis=-1, keepdim=True) + eps)
    tile.store(out, row * scale * tile.cast(tile.load(weight), f32) + tile.cast(tile.load(bias), f32))


@kernel
def silu_kernel(x: Tile["N"], out: Tile["N", f32]):  # type: ignore
    value = tile.cast(tile.load(x), f32)
    tile.store(out, tile.silu(value))


@kernel
def gelu_kernel(x: Tile["N"], out: Tile["N", f32]):  # type: ignore
    value = tile.cast(tile.load(x), f32)
    tile.store(out, tile.gelu(value))


@kernel
def gelu_tanh_kernel(x: Tile["N"], out: Tile["N", f32]):  # type: ignore
    value = tile.cast(tile.load(x), f32)
    tile.store(out, tile.gelu(value, approximate="tanh"))


@kernel
def tanh_kernel(x: Tile["N"], out: Tile["N", f32]):  # type: ignore
    tile.store(out, tile.tanh(tile.cast(tile.load(x), f32)))


@kernel
def cos_kernel(x: Tile["N"], out: Tile["N", f32]):  # type: ignore
    tile.store(out, tile.cos(tile.cast(tile.load(x), f32)))


@kernel
def sin_kernel(x: Tile["N"], out: Tile["N", f32]):  # type: ignore
    tile.store(out, tile.sin(tile.cast(tile.load(x), f32)))


_POINTWISE = {"silu": silu_kernel, "gelu": gelu_kernel, "gelu_tanh": gelu_tanh_kernel, "tanh": tanh_kernel,
              "cos": cos_kernel, "sin": sin_kernel}
