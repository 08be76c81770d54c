"""Linear maps.

In: activations [..., I] and a weight [O, I] in any storage type. Out: [..., O] in the activations'
dtype. nn.Linear calls `linear`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.kernel.recording import is_recording
from tessera.ops.invariant import block_products, is_invariant, tree_sum
from tessera.ops.kernels import linear_kernel
from tessera.ops.quantize import dequantize_rows

MAX_FEW_ROWS = 16  # up to here a product on the CPU is bound by the reading of the weight


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None,
    blocks: tuple[int, ...] | None = None,
) -> Tensor:
    """x @ weight^T + bias, with sums in f32.

    Args:
        x: [..., I], f32, bf16 or f16.
        weight: [O, I] of any storage type; it is brought to x's dtype first.
        bias: [O] or None.
        scale: [O] f32, for a weight of an 8-bit type.
        blocks: sizes of the parts of I whose sums are added in a tree in the invariant mode; None for one.

    Returns:
        [..., O] in x's dtype.
    """
    if scale is not None:
        weight = dequantize_rows(weight, scale, x.dtype)
    elif weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if is_invariant():
        out = tree_sum(block_products(x, weight, blocks or (x.shape[-1],))).to(x.dtype)
        return out if bias is None else out + bias
    if is_recording():
        return _linear_kernel(x, weight, bias)
    if x.dtype is torch.float32 and x.is_cpu and not torch.is_grad_enabled():
        n_rows = x.numel() // max(x.shape[-1], 1)
        if 0 < n_rows <= MAX_FEW_ROWS:
            out = _linear_few_rows(x.reshape(n_rows, -1), weight)
            out = out if bias is None else out.add_(bias)
            return out.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _linear_kernel(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    out = torch.empty(*x.shape[:-1], weight_OI.shape[0], dtype=x.dtype, device=x.device)
    linear_kernel(x.view(-1, x.shape[-1]), weight_OI, out.view(-1, out.shape[-1]), bias_O)
    return out


def _linear_few_rows(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight^T for the few rows of a decode step, bound by the reading of the weight.

    torch's product of one row runs on one thread, and of a few rows at a third of the memory's speed. Read as
    a batch of slices of the weight, or with the weight on the left, it runs at 0.8 of it (measured: one row
    15 -> 29 GB/s, four rows 6.5 -> 22 GB/s, of 35).
    """
    n_rows, d_in = x_NI.shape
    if n_rows > 1:
        return (weight_OI @ x_NI.t()).t().contiguous()
    d_out = weight_OI.shape[0]
    n_slices = math.gcd(d_out, 1 << (torch.get_num_threads() - 1).bit_length())
    if n_slices == 1 or not weight_OI.is_contiguous():
        return F.linear(x_NI, weight_OI)
    slices = weight_OI.view(n_slices, d_out // n_slices, d_in)
    return torch.bmm(slices, x_NI.t().expand(n_slices, d_in, 1)).view(1, d_out)
