"""RMSNorm over a mesh equals the local one, with its gradients."""

import pytest
import torch

import tessera as ts
from tests.dist import norm_ranks


@pytest.mark.parametrize("n", [2, 4])
def test_distributed_equals_local(n):
    parts = ts.dist.spawn(norm_ranks.norm, n)
    y, x_grad, weight_grad = (torch.cat(part, -1) for part in zip(*parts))
    x, weight, grad = (t.double() for t in norm_ranks.tensors(n))
    expected = ts.ops.rms_norm(x.requires_grad_(), weight.requires_grad_(), 1e-6)
    expected.backward(grad)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight_grad.double(), weight.grad, rtol=1e-5, atol=1e-5)
    usual = torch.ones(3, 4, dtype=torch.bool)
    usual[2, 3] = False  # a row of zeros has gradients of a thousand
    torch.testing.assert_close(x_grad[usual].double(), x.grad[usual], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_grad[~usual].double(), x.grad[~usual], rtol=1e-5, atol=1e-3)
