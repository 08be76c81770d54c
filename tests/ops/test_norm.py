"""Norms and their gradients: kernels against float64, at ragged sizes, in any layout, at the ends of the range."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera import ops
from tessera.errors import ShapeError
from tessera.ops import norm
from tests.ops.checks import DTYPES, check_against_float64, check_compiled, layouts, normal

SHAPES = [(1,), (7,), (3, 1), (5, 33), (2, 3, 64), (2, 1, 3, 40), (70, 100), (130, 17), (0, 8), (2, 0, 8)]
EPS = 1e-5


def rms_formula(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def layer_formula(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight + bias


def add_formula(x, residual, weight):
    return rms_formula(x + residual, weight), x + residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    x, residual = normal(1, *shape, dtype=dtype), normal(2, *shape, dtype=dtype)
    weight, bias = normal(3, shape[-1], dtype=dtype), normal(4, shape[-1], dtype=dtype)
    few = max(1.0, shape[-1] / 64) if shape[0] else 1.0
    check_against_float64(lambda x, w: ops.rms_norm(x, w, EPS), rms_formula, (x, weight), factor=4 * few)
    if shape[-1] > 1:  # one number less its mean is a rounding error
        check_against_float64(
            lambda x, w, b: ops.layer_norm(x, w, b, EPS), layer_formula, (x, weight, bias), factor=4 * few)
    rounded = (x + residual).detach()
    check_against_float64(
        lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), add_formula,
        ((rounded / 2).requires_grad_(), (rounded / 2).requires_grad_(), weight), factor=4 * few)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_type(dtype):
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    x, weight, bias = normal(1, 4, 33, dtype=dtype), normal(2, 33, dtype=other), normal(3, 33, dtype=other)
    check_against_float64(lambda x, w: ops.rms_norm(x, w, EPS), rms_formula, (x, weight), factor=4)
    check_against_float64(lambda x, w, b: ops.layer_norm(x, w, b, EPS), layer_formula, (x, weight, bias), factor=4)
    assert ops.rms_norm(x, weight).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    base, weight, bias = normal(1, 6, 5, 24, dtype=dtype), normal(2, 24, dtype=dtype), normal(3, 24, dtype=dtype)
    for x in layouts(base):
        check_against_float64(lambda x, w: ops.rms_norm(x, w, EPS), rms_formula, (x, weight), factor=4)
        check_against_float64(lambda x, w, b: ops.layer_norm(x, w, b, EPS), layer_formula, (x, weight, bias), factor=4)
        normed, total = ops.add_rms_norm(x, base, weight, EPS)
        assert torch.equal(total, x + base) and torch.equal(normed, ops.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("scale", [1e30, 3e37, 1e-12, 1e-25, 0.0])
def test_extremes(scale):
    """Rows whose squares overflow or vanish in f32, beside ordinary ones."""
    x = normal(1, 5, 48).detach()
    x[1:4] *= scale
    x.requires_grad_()
    weight, bias = normal(2, 48), normal(3, 48)
    for function, formula, tensors in (
            (lambda x, w: ops.rms_norm(x, w, EPS), rms_formula, (x, weight)),
            (lambda x, w: ops.stable_rms_norm(x, w, EPS), rms_formula, (x, weight)),
            (lambda x, w, b: ops.layer_norm(x, w, b, EPS), layer_formula, (x, weight, bias))):
        check_against_float64(function, formula, tensors, factor=4)


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stable_equals_the_kernel(dtype, eps):
    x, weight = normal(1, 9, 40, dtype=dtype), normal(2, 40, dtype=dtype)
    for scale in (1e-9, 1.0, 1e20):
        scaled = (x * scale).detach()
        torch.testing.assert_close(ops.stable_rms_norm(scaled, weight, eps), ops.rms_norm(scaled, weight, eps))


def test_references():
    """gradcheck of what the kernels are measured by."""
    x, weight, bias = (normal(i, *shape, dtype=torch.float64) for i, shape in enumerate([(3, 5), (5,), (5,)]))
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: ops.stable_rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: ops.add_rms_norm(x, 2 * x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: ops.layer_norm(x, w, b, EPS), (x, weight, bias))
    with ops.implementation("reference"):
        assert torch.autograd.gradgradcheck(lambda x, w: ops.rms_norm(x, w, EPS), (x, weight))


def test_sharded_equals_whole():
    """Four parts of each row, their sums of squares added by hand as an all-reduce would."""
    x, weight = normal(1, 3, 5, 32), normal(2, 32)
    total = x.detach().square().sum(-1, keepdim=True)
    parts = [ops.sharded_rms_norm(part, w, 32, lambda local: total, EPS)
             for part, w in zip(x.split(8, -1), weight.split(8))]
    torch.testing.assert_close(torch.cat(parts, -1), ops.rms_norm(x, weight, EPS))


def test_defaults():
    x = normal(1, 3, 20)
    torch.testing.assert_close(ops.rms_norm(x), F.rms_norm(x, (20,), eps=1e-5))
    torch.testing.assert_close(ops.layer_norm(x), F.layer_norm(x, (20,)))


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_do_not_depend_on_the_threads(threads):
    x, weight = normal(1, 300, 64), normal(2, 64)
    before = torch.get_num_threads()
    grads = []
    try:
        for count in (threads, 3):
            torch.set_num_threads(count)
            grads.append(torch.autograd.grad(ops.rms_norm(x, weight).sum(), (x, weight)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_registration():
    x, weight, bias = normal(1, 2, 3, 16), normal(2, 16), normal(3, 16)
    torch.library.opcheck(norm._RMS_NORM.registered, (x, weight, EPS))
    torch.library.opcheck(norm._ADD_RMS_NORM.registered, (x, normal(4, 2, 3, 16), weight, EPS))
    torch.library.opcheck(norm._LAYER_NORM.registered, (x, weight, bias, EPS))
    plain = [t.detach() for t in (x, x, weight)]
    torch.library.opcheck(norm._RMS_NORM_BACKWARD.registered, (*plain, x.detach(), EPS))
    torch.library.opcheck(norm._LAYER_NORM_BACKWARD.registered, (*plain, bias.detach(), EPS))


def test_compiled():
    x, weight, bias = normal(1, 2, 3, 16), normal(2, 16), normal(3, 16)
    check_compiled(lambda x, w: ops.rms_norm(x, w, EPS), (x, weight))
    check_compiled(lambda x, w: ops.add_rms_norm(x, 2 * x, w, EPS), (x, weight))
    check_compiled(lambda x, w, b: ops.layer_norm(x, w, b, EPS), (x, weight, bias))


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_errors(choice):
    x = normal(1, 2, 3, 8)
    with ops.implementation(choice):
        with pytest.raises(ShapeError, match=r"rms_norm: weight has D=7 \(axis 0 of \[7\]\) but x has D=8 \(axis 2 of "
                                             r"\[2, 3, 8\]\); called at .*test_norm"):
            ops.rms_norm(x.detach(), torch.ones(7))
        with pytest.raises(ShapeError, match=r"residual has D=7 .* but x has D=8"):
            ops.add_rms_norm(x.detach(), torch.ones(2, 3, 7), torch.ones(8))
        with pytest.raises(ShapeError, match=r"bias has D=1 .* but x has D=8"):
            ops.layer_norm(x.detach(), torch.ones(8), torch.ones(1))
