"""Activations and gated MLPs with their gradients, against float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from tessera import ops
from tessera.errors import InputError, ShapeError
from tessera.ops import activations, mlp
from tests.ops.checks import DTYPES, check_against_float64, check_compiled, layouts, normal

SHAPES = [(1,), (7,), (5, 33), (2, 3, 64), (2, 1, 3, 40), (0, 8), (3, 0), (4100,)]
FORMULAS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_values_and_gradients(name, dtype):
    for shape in SHAPES:
        x, up = normal(len(shape), *shape, dtype=dtype), normal(9, *shape, dtype=dtype)
        check_against_float64(ops.ACTIVATIONS[name], FORMULAS[name], ((3 * x).detach().requires_grad_(),))
        check_against_float64(
            lambda gate, up: ops.gated(gate, up, name), lambda gate, up: FORMULAS[name](gate) * up, (x, up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.702])
def test_swish(beta, dtype):
    x, up = normal(1, 3, 50, dtype=dtype), normal(2, 3, 50, dtype=dtype)
    check_against_float64(lambda x: ops.swish(x, beta), lambda x: x * torch.sigmoid(beta * x), (x,))
    check_against_float64(
        lambda x, up: ops.swiglu(x, up, beta=beta), lambda x, up: x * torch.sigmoid(beta * x) * up, (x, up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(dtype):
    x = (normal(1, 4, 70, dtype=dtype) * 40).detach().requires_grad_()
    check_against_float64(lambda x: ops.softcap(x, 30.0), lambda x: 30 * torch.tanh(x / 30), (x,))
    with pytest.raises(InputError, match="cap: 0 given"):
        ops.softcap(x, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 66), (2, 5, 34), (2, 3, 1, 8), (0, 4)])
def test_packed(shape, dtype):
    gate_up = normal(1, *shape, dtype=dtype)
    half = shape[-1] // 2

    def formula(x):
        return F.silu(x[..., :half]) * x[..., half:]

    for x in layouts(gate_up):
        check_against_float64(ops.swiglu_packed, formula, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    base, up = normal(1, 6, 5, 24, dtype=dtype), normal(2, 6, 5, 24, dtype=dtype)
    for x in layouts(base):
        check_against_float64(ops.gelu, F.gelu, (x,))
        check_against_float64(ops.swiglu, lambda gate, up: F.silu(gate) * up, (x, up))
        check_against_float64(ops.swiglu, lambda gate, up: F.silu(gate) * up, (up, x))


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_extremes(name):
    """Large, tiny and zero inputs; what overflows in f32 by its definition is left out."""
    large = 1e15 if name == "relu2" else 1e30
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 100.0, -100.0, large, -large]).requires_grad_()
    check_against_float64(ops.ACTIVATIONS[name], FORMULAS[name], (x,))
    ones = torch.ones(10).requires_grad_()
    check_against_float64(
        lambda gate, up: ops.gated(gate, up, name), lambda gate, up: FORMULAS[name](gate) * up, (x, ones))


@pytest.mark.parametrize("name", [*ops.ACTIVATIONS, "softcap"])
def test_references(name):
    """gradcheck of what the kernels are measured by, and of its written derivative."""
    x, up = normal(1, 4, 5, dtype=torch.float64), normal(2, 4, 5, dtype=torch.float64)
    run = functools.partial(ops.softcap, cap=2.0) if name == "softcap" else ops.ACTIVATIONS[name]
    assert torch.autograd.gradcheck(run, x)
    with ops.implementation("reference"):
        assert torch.autograd.gradcheck(run, x)
        if name != "softcap":
            assert torch.autograd.gradcheck(lambda gate, up: ops.gated(gate, up, name), (x, up))
    slope = activations.reference_slope(x, name, 2.0)
    assert torch.autograd.gradcheck(lambda x: activations.reference(x, name, 2.0), x)
    expected = torch.autograd.grad(activations.reference(x, name, 2.0).sum(), x)[0]
    torch.testing.assert_close(slope, expected)


def mlp_tensors(d_model, d_ffn, dtype=torch.float32):
    shapes = [(2, 3, d_model), (d_model, d_ffn), (d_model, d_ffn), (d_ffn, d_model)]
    return [normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def mlp_formula(x, w_gate, w_up, w_down):
    return (F.silu(x @ w_gate) * (x @ w_up)) @ w_down


@pytest.mark.parametrize("chunk_size", [1, 7, 10, 512])
def test_whole_mlp(chunk_size):
    tensors = mlp_tensors(12, 30)
    check_against_float64(ops.swiglu, mlp_formula, tensors)
    check_against_float64(
        functools.partial(ops.swiglu_memory_efficient, chunk_size=chunk_size), mlp_formula, tensors, factor=2)


def test_the_chunked_mlp_keeps_little():
    """What autograd saves is the inputs; the plain one saves three tensors [..., F] more."""
    tensors = mlp_tensors(8, 512)
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ops.swiglu_memory_efficient(*tensors, chunk_size=64)
    given = {t.untyped_storage().data_ptr() for t in tensors}
    assert all(t.untyped_storage().data_ptr() in given for t in kept)


def test_registration():
    x, up = normal(1, 2, 3, 16), normal(2, 2, 3, 16)
    torch.library.opcheck(activations._ACTIVATION.registered, (x, "gelu", 1.0))
    torch.library.opcheck(activations._BACKWARD.registered, (up.detach(), x.detach(), "gelu_tanh", 1.0))
    torch.library.opcheck(mlp._GATED.registered, (x, up, "silu", 1.0))
    torch.library.opcheck(mlp._BACKWARD.registered, (x.detach(), x.detach(), up.detach(), "silu", 1.0))
    torch.library.opcheck(mlp._GATED_PACKED.registered, (x, "silu", 1.0))
    torch.library.opcheck(mlp._PACKED_BACKWARD.registered, (x.detach()[..., :8], x.detach(), "silu", 1.0))


def test_compiled():
    x, up = normal(1, 2, 3, 16), normal(2, 2, 3, 16)
    check_compiled(lambda x, up: ops.gated(x, up, "gelu"), (x, up))
    check_compiled(ops.swiglu_packed, (x,))
    check_compiled(ops.gelu_tanh, (x,))
    check_compiled(ops.swiglu, mlp_tensors(4, 6))


def test_errors():
    x = torch.ones(2, 3, 8)
    with pytest.raises(ShapeError, match=r"gated: up has F=7 \(axis 2 of \[2, 3, 7\]\) but gate has F=8"):
        ops.swiglu(x, torch.ones(2, 3, 7))
    with pytest.raises(ShapeError, match=r"gate_up has 2\*F=7 .* there is no F to that"):
        ops.swiglu_packed(torch.ones(2, 3, 7))
    with pytest.raises(InputError, match="activation: 'tanh' given; expected one of silu"):
        ops.gated(x, x, "tanh")
    with pytest.raises(InputError, match="3 tensors given"):
        ops.swiglu(x, x, x)
    with pytest.raises(ShapeError, match=r"w_down has F=5 .* but w_gate has F=6 .*; called at .*test_activations"):
        ops.swiglu(x, torch.ones(8, 6), torch.ones(8, 6), torch.ones(5, 4))
    with pytest.raises(InputError, match="chunk_size: 0 given"):
        ops.swiglu_memory_efficient(x, torch.ones(8, 6), torch.ones(8, 6), torch.ones(6, 8), chunk_size=0)
    assert math.isnan(ops.silu(torch.tensor([math.nan])).item())
