"""Linear maps and look-ups with weights in the blocks of a GGUF file: 8 or 4 bits, a scale for each 32 of a row.

In: activations or ids, and a weight as `ops.kernels.quantized.from_blocks` gives it. Out: activations. The weight is
dequantized in registers, on its way into the product. nn.BlockLinear and nn.BlockEmbedding call them.

Dims: O, I the weight's rows and columns, G = I / 32 groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import InputError
from tessera.ops.invariant import is_invariant
from tessera.ops.kernels.quantized import (
    GROUP,
    int4_embedding_kernel,
    int4_linear_kernel,
    int4_product_kernel,
    int8_group_embedding_kernel,
    int8_group_linear_kernel,
    int8_group_product_kernel,
)
from tessera.ops.linear import linear
from tessera.ops.registration import is_plain, is_recording, launches


def block_linear(
    x: Tensor, quants: Tensor, scale_OG: Tensor, minimum_OG: Tensor | None, bias_O: Tensor | None = None,
    blocks: tuple[int, ...] | None = None, activations: str | None = None,
) -> Tensor:
    """x @ weight^T + bias, with weight = quants * scale + minimum by groups, and sums in f32.

    With int8 activations x is rounded as well, by the same groups of a row, to multiples of s = max|x| / 127: products
    of integers, which take a fraction of the time. Against f32 activations
    |error| <= sum over the groups of max|x| / 254 * sum|weight|, beside the rounding of f32 sums. The result has the
    same bits for a row in any batch and with any number of threads.

    Args:
        x: [..., I], f32, bf16 or f16.
        quants: int8 [O, I], or int4 packed as uint8 [O, I/2].
        scale_OG, minimum_OG: f32 or f16; no minimum for None.
        bias_O: None for none.
        blocks: as for `linear`.
        activations: "int8", or None for x as it is.

    Returns:
        [..., O] in x's dtype. Gradients go to x (straight through its rounding) and the bias, not to the weight.

    Raises:
        InputError: other activations.
    """
    if activations not in (None, "int8"):
        raise InputError(f"activations: {activations!r} given; expected 'int8' or None")
    has_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias_O is not None and bias_O.requires_grad))
    in_int8 = activations is not None
    if has_gradient or is_invariant() or not launches(x) or (in_int8 and not x.is_cpu):
        x = _rounded(x) if in_int8 else x
        return linear(x, dequantize_blocks(quants, scale_OG, minimum_OG).to(x.dtype), bias_O, blocks=blocks)
    out = torch.empty(*x.shape[:-1], len(quants), dtype=x.dtype, device=x.device)
    x_NI, out_NO = x.reshape(-1, x.shape[-1]), out.view(-1, len(quants))
    if quants.dtype is torch.int8:
        (int8_group_product_kernel if in_int8 else int8_group_linear_kernel)(x_NI, quants, scale_OG, out_NO, bias_O)
    else:
        (int4_product_kernel if in_int8 else int4_linear_kernel)(x_NI, quants, scale_OG, minimum_OG, out_NO, bias_O)
    return out


def _rounded(x: Tensor) -> Tensor:
    """x as int8 activations stand for it, by groups; gradients pass straight through."""
    groups = x.detach().unflatten(-1, (-1, GROUP)).float()
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return x + (((groups * (1 / step)).round() * step).flatten(-2).to(x.dtype) - x.detach())


def dequantize_blocks(quants: Tensor, scale_OG: Tensor, minimum_OG: Tensor | None) -> Tensor:
    """The weight, [O, I] f32: quants * scale + minimum, each rounded once."""
    if quants.dtype is not torch.int8:
        # Nibbles are two's complement: shifted to the top of a byte, the sign comes along.
        signed = quants.view(torch.int8)
        quants = torch.stack(((signed << 4) >> 4, signed >> 4), -1).flatten(-2)
    weight_OGW = quants.unflatten(-1, (-1, GROUP)).float() * scale_OG.float().unsqueeze(-1)
    if minimum_OG is not None:
        weight_OGW = weight_OGW + minimum_OG.float().unsqueeze(-1)
    return weight_OGW.flatten(-2)


def block_embedding(
    ids: Tensor, quants: Tensor, scale_VG: Tensor, minimum_VG: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    """Rows of a table in blocks, [*ids.shape, D] in dtype; ids in 0..V-1, V the rows of `quants`."""
    is_int8 = quants.dtype is torch.int8
    if not is_recording() and not is_plain(ids):
        return dequantize_blocks(quants[ids], scale_VG[ids], None if minimum_VG is None else minimum_VG[ids]).to(dtype)
    out = torch.empty(*ids.shape, quants.shape[-1] * (1 if is_int8 else 2), dtype=dtype, device=ids.device)
    ids_N, out_ND = ids.reshape(-1), out.view(-1, out.shape[-1])
    if is_int8:
        int8_group_embedding_kernel(ids_N, quants, scale_VG, out_ND)
    else:
        int4_embedding_kernel(ids_N, quants, scale_VG, minimum_VG, out_ND)
    return out
