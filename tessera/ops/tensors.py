"""Tensors made, cast and taken apart, with Tessera's dtypes where torch's functions know only its own.

In: sizes, values and dtypes (ts.f32, "bf16", torch.int8, ...). Out: torch tensors. User code calls them as ts.zeros,
ts.cast, ...; names whose meaning is torch's own, such as ts.exp, are torch's functions.
"""

from __future__ import annotations

from typing import Any

import torch

from tessera.errors import ShapeError
from tessera.function.decorator import function
from tessera.ops.quantized_linear import saturate
from tessera.types import DType, Tensor, dtype_of

AnyDType = DType | torch.dtype | str | type | None


def _torch_dtype(dtype: AnyDType) -> torch.dtype | None:
    return None if dtype is None else dtype_of(dtype).torch


def _made(make: Any, args: tuple[Any, ...], dtype: AnyDType, options: dict[str, Any], drawn: bool = False) -> Tensor:
    """make(*args) in a dtype: through f32 where torch cannot make it, or draw it, in that dtype."""
    wanted = _torch_dtype(dtype)
    if wanted is None or wanted.itemsize > 1 or not (drawn or wanted.is_floating_point):
        return make(*args, dtype=wanted, **options)
    return cast(make(*args, dtype=torch.float32, **options), wanted)


def zeros(*size: Any, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.zeros with any dtype."""
    return _made(torch.zeros, size, dtype, options)


def ones(*size: Any, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.ones with any dtype."""
    return _made(torch.ones, size, dtype, options)


def full(size: Any, fill_value: Any, *, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.full with any dtype."""
    return _made(torch.full, (size, fill_value), dtype, options)


def eye(n: int, m: int | None = None, *, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.eye with any dtype."""
    return _made(torch.eye, (n, n if m is None else m), dtype, options)


def arange(*bounds: Any, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.arange with any dtype."""
    return _made(torch.arange, bounds, dtype, options)


def tensor(data: Any, *, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.tensor with any dtype; a tensor is copied, without its graph."""
    if isinstance(data, torch.Tensor):
        return cast(data.detach().clone(), dtype or data.dtype)
    return _made(torch.tensor, (data,), dtype, options)


def rand(*size: Any, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.rand; 8-bit types are drawn in f32 and rounded."""
    return _made(torch.rand, size, dtype, options, drawn=True)


def randn(*size: Any, dtype: AnyDType = None, **options: Any) -> Tensor:
    """torch.randn; 8-bit types are drawn in f32 and rounded."""
    return _made(torch.randn, size, dtype, options, drawn=True)


@function
def cast(x: Tensor["..."], dtype: DType | torch.dtype | str | type) -> Tensor["..."]:
    """x in another dtype, rounded to nearest; for 8-bit types, what is too large becomes the largest number."""
    wanted = dtype_of(dtype).torch
    if wanted.itemsize == 1 and x.is_floating_point() and wanted not in (torch.bool, torch.uint8):
        return x if x.dtype is wanted else saturate(x if x.dtype is torch.float64 else x.float(), wanted)
    return x.to(wanted)


def gather(x: Tensor, index: Tensor, dim: int | None = None) -> Tensor:
    """torch.gather along `dim`; without it, the rows x[index], [*index.shape, *x.shape[1:]]."""
    return x[index] if dim is None else torch.gather(x, dim, index)


@function
def split_heads(
    qkv: Tensor["B", "S", "E"], num_heads: int, head_dim: int, num_kv_heads: int | None = None,
) -> tuple[Tensor["B", "num_heads", "S", "head_dim"], Tensor["B", "K", "S", "head_dim"],
           Tensor["B", "K", "S", "head_dim"]]:
    """Queries, keys and values of a fused projection, each as heads; views of it.

    Args:
        qkv: [B, S, (num_heads + 2 * num_kv_heads) * head_dim]: all queries, then all keys, then all values.
        num_heads, head_dim: H and D of the queries.
        num_kv_heads: K; by default H.

    Returns:
        q [B, H, S, D], k and v [B, K, S, D].

    Raises:
        ShapeError: the last dim is another.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    width = (num_heads + 2 * kv_heads) * head_dim
    if qkv.shape[-1] != width:
        raise ShapeError(f"qkv: {list(qkv.shape)} given; expected [B, S, {width}]")
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2).split([num_heads, kv_heads, kv_heads], 1)
    return q, k, v


@function
def merge_heads(x_BHSD: Tensor["B", "H", "S", "D"]) -> Tensor["B", "S", "H*D"]:
    """The heads of each token side by side, [B, S, H * D]: what an output projection reads after attention."""
    return x_BHSD.transpose(1, 2).flatten(2)
