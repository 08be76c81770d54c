"""Softmax, log-softmax, masked mean and unit vectors against torch in float64; rows of -inf and of +inf."""

from __future__ import annotations

import pytest
import torch

from tessera.errors import ShapeError
from tessera.ops.registration import implementation
from tessera.ops.softmax import (
    _log_softmax_backward_op,
    _log_softmax_op,
    _softmax_backward_op,
    _softmax_op,
    l2_normalize,
    log_softmax,
    masked_mean,
    softmax,
)

INF, NAN = float("inf"), float("nan")
PAIRS = [(softmax, torch.softmax), (log_softmax, torch.log_softmax)]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize("shape, dim", [((7,), 0), ((3, 1), -1), ((5, 33), 0), ((2, 3, 70), 1), ((4, 1000), -1)])
def test_values_and_gradients(shape, dim, ours, theirs, dtype, choice):
    x = (normal(1, *shape) * 4).to(dtype)
    wide = x.double().requires_grad_()
    x.requires_grad_()
    with implementation(choice):
        out = ours(x, dim)
    expected = theirs(wide, dim)
    assert out.dtype == dtype and out.shape == shape
    bound = 3e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    slopes = normal(2, *shape).to(dtype)
    out.backward(slopes)
    expected.backward(slopes.double())
    scale = slopes.abs().sum(dim).max().item()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=bound, atol=2 * bound * scale)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(choice, dtype):
    x = torch.tensor([[-INF] * 4, [1e30, 1e30, -INF, 0], [NAN, 0, 0, 0], [INF, 0, INF, 0], [0, -INF, 0, 0],
                      [-3e38, 3e38, 0, 0]], dtype=dtype, requires_grad=True)
    third = 1 / 3
    expected = torch.tensor([[0] * 4, [0.5, 0.5, 0, 0], [NAN] * 4, [0.5, 0, 0.5, 0], [third, 0, third, third],
                             [0, 1, 0, 0]], dtype=dtype)
    with implementation(choice):
        out, log_out = softmax(x), log_softmax(x)
        torch.testing.assert_close(out, expected, equal_nan=True)
        rows = [0, 1, 3, 4]
        torch.testing.assert_close(log_out[rows].exp(), expected[rows])
        out[[0, 1, 4]].sum().backward()
    assert x.grad.abs().nan_to_num(0).max() < 1e-6 and x.grad[[0, 1, 4]].isfinite().all()


def test_empty_and_wrong():
    for shape in ((0, 3), (3, 0), (2, 0, 4)):
        assert softmax(torch.zeros(shape)).shape == shape
    with pytest.raises(ShapeError, match=r"dim: 2 given for \[3, 4\]; expected -2..1"):
        softmax(torch.zeros(3, 4), 2)


@pytest.mark.parametrize("ours", [softmax, log_softmax])
def test_gradcheck_and_compile(ours):
    x = normal(3, 2, 5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x, 1), x)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, 1), x)
    compiled = torch.compile(lambda x: ours(x * 2).square().sum(), fullgraph=True, backend="aot_eager")
    x = normal(4, 6, 9).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x), x), torch.autograd.grad(ours(x * 2).square().sum(), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    x = normal(5, 3, 7).to(dtype)
    for forward, backward in ((_softmax_op, _softmax_backward_op),
                              (_log_softmax_op, _log_softmax_backward_op)):
        torch.library.opcheck(forward.registered, (x.clone().requires_grad_(),))
        torch.library.opcheck(backward.registered, (torch.rand_like(x), forward(x)))


def test_masked_mean():
    x, mask = normal(6, 4, 5, 6), normal(7, 4, 1, 6) > 0.3
    mask[2] = False
    expected = torch.stack([row[keep.expand(5, 6)].mean() if keep.any() else torch.tensor(0.0)
                            for row, keep in zip(x, mask)])
    spoiled = torch.where(mask, x, NAN).requires_grad_()
    result = masked_mean(spoiled, mask, (1, 2))
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert spoiled.grad.isfinite().all()
    torch.testing.assert_close(masked_mean(x, torch.ones(6, dtype=torch.bool)), x.mean())
    assert masked_mean(x.bfloat16(), mask).dtype == torch.bfloat16


def test_unit_vectors():
    x = normal(8, 3, 7).double().requires_grad_()
    torch.testing.assert_close(l2_normalize(x, 0), torch.nn.functional.normalize(x, dim=0))
    assert torch.autograd.gradcheck(l2_normalize, x)
    for scale in (1e30, 3e38, 1e-10, 1e-37):
        unit = torch.nn.functional.normalize(torch.tensor([[0.25, -1.0, 0.5]], dtype=torch.float64))
        tiny = scale < 1e-12
        expected = unit * 1.1456439237389600 * scale / 1e-12 if tiny else unit
        torch.testing.assert_close(l2_normalize(torch.tensor([[0.25, -1, 0.5]]) * scale).double(), expected)
    assert (l2_normalize(torch.zeros(2, 3)) == 0).all()
