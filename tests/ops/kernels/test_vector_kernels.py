"""The kernels of masked means and unit vectors, and of their gradients, on every backend against float64."""

from __future__ import annotations

import pytest
import torch

from tessera.ops.kernels import vectors
from tests.kernel.backends import BACKENDS, launch

pytestmark = [pytest.mark.parametrize("backend", BACKENDS),
              pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = (1e-5 if actual.dtype == torch.float32 else 2.0**-7) * max(1, expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def test_masked_means(backend, dtype):
    generator = torch.Generator().manual_seed(3)
    x, mask = torch.randn(2, 5, 300, generator=generator).to(dtype), torch.rand(2, 5, 300, generator=generator) > 0.6
    x[0, 0, ~mask[0, 0]], mask[1] = torch.nan, False
    expected = torch.where(mask, x.double(), 0.0)
    out, count, back = x.new_zeros(2), torch.zeros(2), torch.full_like(x, torch.nan)
    launch(vectors.masked_mean_kernel, backend, x, mask, torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int32), out,
           count)
    number = mask.sum((1, 2)).clamp(min=1)
    close(out, expected.sum((1, 2)) / number)
    launch(vectors.masked_mean_backward_kernel, backend, out, mask, count, back)
    close(back, torch.where(mask, (out / number)[:, None, None], 0.0))
    rows = mask[..., 0].contiguous()
    for whole, some in ((mask, None), (None, rows)):
        seen = mask if some is None else rows[..., None]
        x = x if some is None else x.nan_to_num()
        out, count = x.new_zeros(2, 300), torch.zeros(2, 300)
        launch(vectors.masked_mean_columns_kernel, backend, x, whole, some, out, count)
        number = seen.sum(1).clamp(min=1).expand(2, 300)
        close(out, torch.where(seen, x.double(), 0.0).sum(1) / number)
        launch(vectors.masked_mean_columns_backward_kernel, backend, out, whole, some, count, back)
        close(back, torch.where(seen, (out / number)[:, None], 0.0))


def test_unit_vectors(backend, dtype):
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(4)) * 10.0 ** torch.arange(-20, 21, 10)[:, None]
    x[4] = 0
    x, grad = x.to(dtype), torch.randn(5, 33, generator=torch.Generator().manual_seed(5)).to(dtype)
    wide, out, back = x.double().requires_grad_(), torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    expected = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-12)
    launch(vectors.l2_normalize_kernel, backend, x, out)
    close(out, expected)
    launch(vectors.l2_normalize_backward_kernel, backend, grad, x, back)
    wanted = torch.autograd.grad(expected, wide, grad.double())[0]
    size = wanted.abs().amax(1, keepdim=True)
    close((back.double() / size).to(dtype), wanted / size)
