"""numerically_stable: wide inside, and an error where finite numbers become infinities."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera import Tensor, f32, f64
from tessera.errors import NumericalError


@ts.numerically_stable
def stable_rms_norm(x: Tensor["B", "S", "D"], weight: Tensor["D"], eps: float = 1e-6) -> Tensor["B", "S", "D"]:
    """The documents' own."""
    with ts.precision(compute=f32, accumulate=f64):
        mean_sq = ts.stable.mean_of_squares(x, dim=-1, keepdim=True)
        rms = ts.stable.sqrt(mean_sq + eps)
        x_normed = ts.stable.divide(x, rms)
    return x_normed * weight


@ts.numerically_stable
def log_softmax_stable(x: Tensor["B", "V"], dim: int = -1) -> Tensor["B", "V"]:
    """The documents' own."""
    x_shifted = x - x.max(dim=dim, keepdim=True).values
    return x_shifted - torch.log(torch.exp(x_shifted).sum(dim=dim, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_rms_norm_of_extreme_values(dtype, scale) -> None:
    generator = torch.Generator().manual_seed(int(scale) % 97)
    x = (torch.randn(2, 3, 33, generator=generator) * scale).to(dtype)
    weight = torch.randn(33, generator=generator).to(dtype)
    if not x.isfinite().all():
        pytest.skip("f16 does not hold these numbers")
    got = stable_rms_norm(x, weight)
    want = torch.nn.functional.rms_norm(x.double(), (33,), weight.double(), 1e-6)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax_of_extreme_values(dtype) -> None:
    x = torch.tensor([[1e30, -1e30, 1.0], [88.0, 90.0, -1e4]]).to(dtype)
    got = log_softmax_stable(x)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), x.double().log_softmax(-1), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_pass_through_the_widening() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(8, dtype=torch.bfloat16)
    got = torch.autograd.grad(stable_rms_norm(x, weight).float().square().sum(), x)[0]
    wide = x.detach().double().requires_grad_()
    want = torch.autograd.grad(torch.nn.functional.rms_norm(wide, (8,), weight.double(), 1e-6).square().sum(), wide)[0]
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


@ts.numerically_stable
def exponentials(x, y=None):
    return {"exp": torch.exp(x), "x": (x, y)}


def test_overflow_is_named() -> None:
    with pytest.raises(NumericalError) as caught:
        exponentials(torch.tensor([1.0, 1000.0, -5.0, 2000.0]))
    assert str(caught.value) == ("exponentials: result['exp'] has 2 of 4 numbers that are not finite, the first at [1],"
                                 " from finite arguments")
    with pytest.raises(NumericalError, match=r"result\['exp'\]"):  # fits f32, not f16
        exponentials(torch.tensor([12.0], dtype=torch.float16))


def test_arguments_that_are_not_finite_may_give_what_they_give() -> None:
    out = exponentials(torch.tensor([float("inf"), 1.0]))
    assert out["exp"][0] == float("inf")
    assert exponentials(torch.tensor([1.0]), torch.tensor([float("nan")]))["x"][1].isnan().all()


@pytest.mark.parametrize("dtypes, result", [
    ((torch.bfloat16, torch.float16), torch.bfloat16), ((torch.bfloat16, torch.float32), torch.float32),
    ((torch.float8_e4m3fn, torch.float8_e4m3fn), torch.float8_e4m3fn), ((torch.float64, torch.float16), torch.float64),
    ((torch.int64, torch.float16), torch.float16)])
def test_result_type(dtypes, result) -> None:
    add = ts.numerically_stable(lambda x, y: x + y)
    assert add(torch.ones(2).to(dtypes[0]), torch.ones(2).to(dtypes[1])).dtype is result


def test_shapes_are_checked() -> None:
    with pytest.raises(ts.ShapeError, match="weight has D=7"):
        stable_rms_norm(torch.ones(1, 2, 8), torch.ones(7))


def test_under_torch_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(stable_rms_norm, backend="eager", fullgraph=True)
    x, weight = torch.randn(2, 3, 8) * 1e30, torch.randn(8)
    torch.testing.assert_close(compiled(x, weight), stable_rms_norm(x, weight))
    with pytest.raises(RuntimeError, match=r"exponentials: result\['exp'\] is not finite"):
        torch.compile(exponentials, backend="eager")(torch.tensor([1000.0]))
    torch._dynamo.reset()
