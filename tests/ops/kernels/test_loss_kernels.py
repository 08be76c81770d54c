"""The kernels of losses, softmax and 8-bit products on every backend against the plain expressions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.ops.kernels import casted_linear as linears
from tessera.ops.kernels import cross_entropy as losses
from tessera.ops.kernels import metric_losses as metric
from tessera.ops.kernels.gemm import (
    batched_gemm_kernel,
    gemm_add_kernel,
    gemm_transposed_add_kernel,
    gemm_transposed_kernel,
)
from tessera.ops.kernels.softmax import (
    log_softmax_backward_kernel,
    log_softmax_kernel,
    softmax_backward_kernel,
    softmax_kernel,
)
from tessera.ops.losses import row_gradients, row_losses
from tessera.ops.quantize import quantize_rows
from tests.kernel.backends import BACKENDS, launch

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
SHAPES = pytest.mark.parametrize("rows, width", [(1, 1), (5, 33), (3, 200)])
INF = float("inf")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def classes(seed: int, rows: int, width: int) -> Tensor:
    targets = torch.randint(width, (rows,), generator=torch.Generator().manual_seed(seed))
    targets[rows // 2] = -100 if rows > 1 else 0
    return targets


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    bound = scale * (2e-6 if actual.dtype == torch.float32 else 2.0**-8)
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound * max(1.0, largest))


@DTYPES
@SHAPES
@pytest.mark.parametrize("smoothing, z_loss", [(None, None), (0.1, 0.01)])
def test_cross_entropy(rows, width, smoothing, z_loss, dtype, backend):
    x, targets, grad = normal(1, rows, width, dtype=dtype) * 4, classes(2, rows, width), normal(3, rows)
    options = (-100, smoothing, z_loss)
    plain = (-100, smoothing or 0.0, z_loss or 0.0)
    expected, top, spread = row_losses(x.double(), targets, *plain)
    slope = row_gradients(grad.double(), x.double(), targets, *plain)
    loss, tops, spreads, out = nans(rows), nans(rows), nans(rows), nans(rows, width, dtype=dtype)
    launch(losses.cross_entropy_kernel, backend, x, targets, loss, *options, tops, spreads)
    close(loss, expected)
    close(tops + spreads, top + spread)
    launch(losses.cross_entropy_backward_kernel, backend, grad, x, targets, tops, spreads, out, *options)
    close(out, slope)
    both, out = nans(rows), x.clone()
    launch(losses.cross_entropy_both_kernel, backend, grad, out, targets, both, out, *options)
    close(both, expected)
    close(out, slope)


@DTYPES
def test_cross_entropy_in_blocks(dtype, backend):
    """Statistics gathered over blocks of classes, and gradients of one block with what all gave."""
    rows, width, step = 4, 70, 32
    x, targets, grad = normal(4, rows, width, dtype=dtype) * 4, classes(5, rows, width), normal(6, rows)
    x[0, :step] = -INF
    top, total, picked, sums = torch.full((rows,), -INF), torch.zeros(rows), torch.zeros(rows), torch.zeros(rows)
    for start in range(0, width, step):
        launch(losses.logsumexp_update_kernel, backend, x[:, start:start + step], targets, top, total, picked, start,
               sums)
    wide = x.double()
    close(top + total.log(), wide.logsumexp(-1))
    close(sums[1:], wide.sum(-1)[1:], 10)
    counted = targets != -100
    close(picked[counted], wide[counted, targets[counted]])
    out = nans(rows, step, dtype=dtype)
    launch(losses.cross_entropy_backward_kernel, backend, grad, x[:, step:2 * step], targets, top, total.log(), out,
           -100, 0.1, None, step, width)
    close(out, row_gradients(grad.double(), wide, targets, -100, 0.1, 0.0)[:, step:2 * step])


def test_rows_without_a_distribution(backend):
    x = torch.tensor([[-INF, -INF, -INF], [1e30, 1e30, 0], [0, 1, 2.0]])
    targets, loss, top, spread, out = torch.tensor([0, 1, 2]), nans(3), nans(3), nans(3), nans(3, 3)
    launch(losses.cross_entropy_kernel, backend, x, targets, loss, top=top, spread=spread)
    assert loss[0] == INF and loss[1:].isfinite().all()
    launch(losses.cross_entropy_backward_kernel, backend, torch.ones(3), x, targets, top, spread, out)
    close(out[:2], torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0]]))
    launch(losses.cross_entropy_both_kernel, backend, torch.ones(3), x, targets, loss, out)
    assert loss[0] == INF
    close(out[:2], torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0]]))


@DTYPES
@SHAPES
def test_softmax(rows, width, dtype, backend):
    x, grad = normal(7, rows, width, dtype=dtype) * 4, normal(8, rows, width, dtype=dtype)
    for forward, backward, function in (
            (softmax_kernel, softmax_backward_kernel, torch.softmax),
            (log_softmax_kernel, log_softmax_backward_kernel, torch.log_softmax)):
        wide = x.double().requires_grad_()
        expected = function(wide, -1)
        expected.backward(grad.double())
        out, d_x = nans(rows, width, dtype=dtype), nans(rows, width, dtype=dtype)
        launch(forward, backend, x, out)
        close(out, expected.detach())
        launch(backward, backend, grad, out, d_x)
        close(d_x, wide.grad, 20)


def test_softmax_of_infinities(backend):
    x = torch.tensor([[-INF, -INF, -INF], [INF, 0, INF], [0, -INF, 0]])
    out = nans(3, 3)
    launch(softmax_kernel, backend, x, out)
    close(out, torch.tensor([[0.0, 0, 0], [0.5, 0, 0.5], [0.5, 0, 0.5]]))


@DTYPES
@pytest.mark.parametrize("m, n, k", [(5, 7, 33), (33, 17, 70)])
def test_products(m, n, k, dtype, backend):
    x, float_weight, bias = normal(9, m, k, dtype=dtype), normal(10, n, k), normal(11, n)
    for storage in (torch.int8, torch.float8_e4m3fn):
        weight, scale = quantize_rows(float_weight, storage)
        out = nans(m, n, dtype=dtype)
        launch(linears.casted_linear_kernel, backend, x, weight, scale, out, bias)
        close(out, x.double() @ (weight.double() * scale.double()[:, None]).T + bias, 4)
    weight, scale = quantize_rows(float_weight, torch.int8)
    rounded, x_scale = quantize_rows(x, torch.int8)
    expected = rounded.double() @ weight.double().T * x_scale.double()[:, None] * scale.double() + bias
    for in_floats in (False, True):
        out = nans(m, n, dtype=dtype)
        launch(linears.int8_product_kernel, backend, rounded, x_scale, weight, scale, out, bias, in_floats)
        close(out, expected)
    total = normal(12, m, n)
    before = total.double()
    launch(gemm_add_kernel, backend, x, float_weight.T, total)
    close(total, before + x.double() @ float_weight.double().T, 4)
    before = total.double()
    launch(gemm_transposed_add_kernel, backend, x.T.contiguous(), float_weight.T, total)
    close(total, before + x.double() @ float_weight.double().T, 4)
    launch(gemm_transposed_kernel, backend, x.T.contiguous(), float_weight.T, out)
    close(out, x.double() @ float_weight.double().T, 4)
    batch, out = torch.stack([x, x * 2]), nans(2, m, n, dtype=dtype)
    right = torch.stack([float_weight.T, -float_weight.T]).to(dtype)
    launch(batched_gemm_kernel, backend, batch, right, out)
    close(out, batch.double() @ right.double(), 4)


@DTYPES
@pytest.mark.parametrize("rows, width", [(2, 2), (5, 33)])
def test_metric_losses(rows, width, dtype, backend):
    scores, grad = normal(13, rows, width, dtype=dtype), normal(15, rows)
    targets = classes(14, rows, width).clamp(min=0)
    loss, rival, out = nans(rows), torch.zeros(rows, dtype=torch.int32), nans(rows, width, dtype=dtype)
    launch(metric.max_margin_kernel, backend, scores, targets, loss, rival, 0.5)
    wide = scores.double()
    others = wide.scatter(1, targets[:, None], -INF)
    assert torch.equal(rival.long(), others.argmax(1))
    close(loss, (others.amax(1) - wide.gather(1, targets[:, None])[:, 0] + 0.5).clamp(min=0))
    launch(metric.max_margin_backward_kernel, backend, grad, loss, targets, rival, out)
    slope = torch.where(loss > 0, grad, 0.0)[:, None]
    close(out, torch.zeros(rows, width).scatter(1, rival.long()[:, None], slope).scatter(1, targets[:, None], -slope))

    similarity, labels = normal(16, rows, rows, dtype=dtype), torch.arange(rows) // 2
    losses_, every, positive, out = nans(rows), nans(rows), nans(rows), nans(rows, rows, dtype=dtype)
    launch(metric.contrastive_kernel, backend, similarity, labels, losses_, every, positive)
    wide = similarity.double().requires_grad_()
    others = ~torch.eye(rows, dtype=torch.bool)
    alike = (labels[:, None] == labels) & others
    expected = torch.stack([
        row[others[i]].logsumexp(0) - row[alike[i]].logsumexp(0) if alike[i].any() else row.new_zeros(())
        for i, row in enumerate(wide)])
    close(losses_, expected.detach())
    launch(metric.contrastive_backward_kernel, backend, grad, similarity, labels, every, positive, out)
    expected.backward(grad.double())
    close(out, wide.grad)
