"""Normalisation over the last dim.

In: activations [..., D]. Out: the same shape and dtype; statistics are taken in f32. nn.RMSNorm and
nn.LayerNorm call them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tessera.ops import invariant


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (RMSNorm, arXiv:1910.07467).

    Args:
        x: [..., D].
        weight: [D], or None for ones.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype, rounded once.
    """
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if invariant.is_invariant():
        weight = x.new_ones(x.shape[-1:]) if weight is None else weight
        return invariant.rms_norm(x, weight, eps, lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, eps))
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv:1607.06450).

    Args:
        x: [..., D].
        weight, bias: [D], or None for ones and zeros.
        eps: added to the (biased) variance.

    Returns:
        [..., D] in x's dtype, rounded once.
    """
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if invariant.is_invariant():
        weight = x.new_ones(x.shape[-1:]) if weight is None else weight
        bias = x.new_zeros(x.shape[-1:]) if bias is None else bias
        return invariant.layer_norm(
            x, weight, bias, eps, lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, eps))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
