"""Matrix products whose sums are taken in a stated type.

In: two tensors. Out: their product, rounded once. User code and nn call them; models' linear maps go through
`ops.linear`.

On a CPU, products of 16-bit types are tile kernels (torch's own convert one element at a time where the processor
has no instructions for them); those of wider types are torch's, which run at the machine's peak.
"""

from __future__ import annotations

from typing import Any

import torch

from tessera.errors import ShapeError, UnsupportedError
from tessera.function.decorator import function
from tessera.function.precision import active_precision
from tessera.ops.kernels.gemm import batched_gemm_kernel, gemm_kernel, gemm_transposed_kernel, linear_kernel
from tessera.ops.registration import Operation
from tessera.types import DType, Tensor, dtype_of

_HALVES = (torch.bfloat16, torch.float16)


def matmul(
    a: Tensor, b: Tensor, accumulate_dtype: DType | torch.dtype | str | None = None,
    out_dtype: DType | torch.dtype | str | None = None,
) -> Tensor:
    """a @ b with the sums in `accumulate_dtype`, rounded once to `out_dtype`.

    Args:
        a: [..., M, K] or [K].
        b: [..., K, N] or [K]; leading dims broadcast. Of two float dtypes the wider one is taken for both.
        accumulate_dtype: f32 or f64, at least as wide as the inputs; int32 for int8 inputs. By default what
            `ts.precision` says, else f32 (f64 for f64, int32 for int8).
        out_dtype: by default the inputs' (wider) dtype; int32 for int8.

    Returns:
        [..., M, N].

    Raises:
        ShapeError: the shapes do not fit, or the dtypes differ and are not floats.
        UnsupportedError: sums in a narrower type were asked for.
    """
    if a.dim() == 0 or b.dim() == 0 or a.shape[-1] != b.shape[-2 if b.dim() > 1 else 0]:
        raise ShapeError(f"b: {list(b.shape)} given for a {list(a.shape)}; expected [..., "
                         f"{a.shape[-1] if a.dim() else 'K'}, N]")
    if a.dtype is not b.dtype:
        if not (a.is_floating_point() and b.is_floating_point()) or min(a.itemsize, b.itemsize) < 2:
            raise ShapeError(f"b: {b.dtype} given for a {a.dtype}; expected one dtype, or floats of 16 bits or more")
        wider = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wider), b.to(wider)
    active = active_precision()
    if active is not None and a.is_floating_point():
        a, b = a.to(active.compute), b.to(active.compute)
    sums = _sums_in(a.dtype, accumulate_dtype or (active.accumulate if active else None))
    result = a.dtype if out_dtype is None else dtype_of(out_dtype).torch
    if a.dtype is torch.int8:
        return torch.matmul(a.int(), b.int()).to(torch.int32 if out_dtype is None else result)
    if a.dtype in _HALVES and sums is torch.float32 and a.dim() > 1 and b.dim() > 1 and result in (a.dtype, sums):
        return _broadcast(a, b, result)
    if sums is a.dtype:
        return torch.matmul(a, b).to(result)
    return torch.matmul(a.to(sums), b.to(sums)).to(result)


@function
def gemm(a: Tensor["...", "K"], b: Tensor["K", "N"]) -> Tensor["...", "N"]:
    """a @ b of [..., K] and a matrix [K, N], with sums in f32 (f64 for f64, int32 for int8); see `matmul`.

    Raises:
        ShapeError: b is no matrix that fits.
    """
    return matmul(a, b)


def _sums_in(dtype: torch.dtype, wanted: DType | torch.dtype | str | None) -> torch.dtype:
    """The type of the sums of products of `dtype`, as asked for."""
    natural = {torch.float64: torch.float64, torch.int8: torch.int32}.get(dtype, torch.float32)
    if wanted is None:
        return natural
    sums = dtype_of(wanted)
    allowed = (torch.float32, torch.float64) if natural is torch.float32 else (natural,)
    if sums.torch not in allowed:
        names = " or ".join(repr(dtype_of(each)) for each in allowed)
        raise UnsupportedError(f"accumulate_dtype: {sums} given for {dtype} inputs; expected {names}")
    return sums.torch


def has_products_of(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for matrix products of a 16-bit float type; True for wider types."""
    return dtype not in _EMULATED


def _emulated() -> frozenset[torch.dtype]:
    """The 16-bit types whose products torch emulates here, at a hundredth of the speed of f32."""
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fphp")}
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    return frozenset(dtype for dtype in names if not any(has.get(name, False) for name in names[dtype]))


_EMULATED = _emulated()  # not when it is asked for: torch.compile traces the question


def _broadcast(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The broadcast batches of a and b as one, through the operation, and back."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if b.dim() == 2:  # one matrix for all rows
        return matmul_op(a.reshape(-1, a.shape[-1]), b, dtype).view(*a.shape[:-1], b.shape[-1])
    a_BMK = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    b_BKN = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    return matmul_op(a_BMK, b_BKN, dtype).view(*batch, a.shape[-2], b.shape[-1])


def _fake(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=dtype)


def _run(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if not a.is_cpu or not a.numel() or not b.numel():
        return _reference(a, b, dtype)
    if a.dim() == 2 and has_products_of(a.dtype) and has_products_of(b.dtype):
        low = a.dtype if a.dtype.itemsize < b.dtype.itemsize else b.dtype
        if dtype is low:  # a wider result would be one of torch's rounded twice
            return a.to(low) @ b.to(low)
    out = _fake(a, b, dtype)
    if a.dim() == 3:
        batched_gemm_kernel(a, b, out)
    elif _is_transposed(b):
        linear_kernel(a, b.t(), out)
    elif _is_transposed(a):
        gemm_transposed_kernel(a.t(), b, out)
    else:
        gemm_kernel(a, b, out)
    return out


def _is_transposed(x: Tensor) -> bool:
    """Whether a matrix lies in memory column by column: kernels read along what is contiguous."""
    return x.stride(0) == 1 and x.stride(1) != 1


def _reference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    sums = torch.float64 if a.dtype is torch.float64 else torch.float32
    return torch.matmul(a.to(sums), b.to(sums)).to(dtype)


def _backward(saved: list[Any], grad: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b = saved
    return matmul_op(grad, b.mT, a.dtype), matmul_op(a.mT, grad, b.dtype), None


# (a, b, dtype) -> a @ b of two matrices [M, K] and [K, N], or of a batch of each; sums in f32, rounded once to dtype.
# The operands' dtypes may differ.
matmul_op = Operation(
    "matmul(Tensor a, Tensor b, ScalarType dtype) -> Tensor", kernel=_run, reference=_reference, fake=_fake,
    save=lambda inputs, output: (inputs[0], inputs[1]), backward=_backward)
