"""What the ranks of test_norm.py run; kept apart from the test, since ranks import it."""

from __future__ import annotations

import torch
from torch import Tensor

import tessera as ts
from tessera.dist.norm import distributed_rms_norm


def tensors(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, one of which overflows f32 when squared, a weight, and a gradient."""
    generator = torch.Generator().manual_seed(n)
    x, grad = (torch.randn(3, 4, 6 * n, generator=generator) for _ in range(2))
    x[0, 1] *= 1e30
    x[2, 3] = 0
    return x, torch.randn(6 * n, generator=generator), grad


def norm() -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of the result and of both gradients."""
    ts.init(timeout=60)
    mesh, rank, n = ts.dist.mesh(), ts.dist.get_rank(), ts.dist.get_world_size()
    part = slice(6 * rank, 6 * rank + 6)
    x, weight, grad = (t[..., part].clone() for t in tensors(n))
    y = distributed_rms_norm(x.requires_grad_(), weight.requires_grad_(), mesh)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad
