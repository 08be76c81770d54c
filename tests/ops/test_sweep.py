"""Every public operation against its meaning in float64: sizes, layouts, extreme values, and torch's own checks.

What an operation is and means stands in `sweep_cases.py`; one that is missing there is a failure here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tessera import ops
from tessera.errors import LaunchError
from tessera.ops import table
from tessera.ops.kernels.activations import activation_kernel
from tessera.ops.registration import Operation, implementation
from tests.ops.checks import TOLERANCE
from tests.ops.sweep_cases import CASES, Case

every = pytest.mark.parametrize("name", CASES)
# Some have two names; torch need not trace them twice.
ONE_NAME = {getattr(ops, name): name for name in reversed(CASES)}.values()
traceable = pytest.mark.parametrize("name", [n for n in CASES if n in ONE_NAME and "traced" not in CASES[n].no])
CHECKED: set[str] = set()  # registrations that opcheck has seen


def results(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def slopes(outs: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum whose terms have different weights; zeros where there is none."""
    factors = [torch.linspace(0.5, 1.5, out.numel() + 1, dtype=out.dtype)[1:].view(out.shape) for out in outs]
    total: Any = sum((out * factor).sum() for out, factor in zip(outs, factors))
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in tensors]
    return list(torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True))


def compare(
    case: Case, tensors: list[Tensor], *, factor: float = 1.0, floor: float = 1.0, values_only: bool = False,
) -> None:
    """Values and gradients beside those of f64; finite where those fit the dtype.

    Args:
        factor: on the tolerance of the case.
        floor: errors are relative to the largest number, or to this one.
    """
    outs = results(case.call(*tensors))
    wide = [x.detach().double().requires_grad_() for x in tensors]
    wanted = results(case.want(*wide))
    pairs = [("value", got, want) for got, want in zip(outs, wanted)]
    if not values_only:
        pairs += [("gradient", got, want) for got, want in zip(slopes(outs, tensors), slopes(wanted, wide))]
    tolerance = factor * case.factor * max(TOLERANCE[x.dtype] for x in (*tensors, *outs))
    for kind, got, want in pairs:
        assert got.shape == want.shape, (kind, got.shape, want.shape)
        fits = want.to(got.dtype).isfinite()
        got, want = got[fits].double(), want[fits]
        assert got.isfinite().all(), kind
        if want.numel():
            error, bound = (got - want).abs().max().item(), tolerance * max(floor, want.abs().max().item())
            assert error <= bound, f"{kind}: error {error:.2e}, bound {bound:.2e}"


def test_every_operation_is_swept():
    assert set(CASES) == {name for row in table.ROWS for name in row.functions}


@every
def test_ragged_sizes_in_both_ways(name):
    case = CASES[name]
    compare(case, case.tensors(1, torch.bfloat16))
    tensors = case.tensors(2, torch.float32)
    compare(case, tensors)
    with implementation("reference"):
        compare(case, tensors, factor=2)


@every
def test_dims_of_one_and_none(name):
    case = CASES[name]
    for letter in sorted({*case.shapes.replace(" ", "")} - {*case.fixed, "M"}):
        for size in (1, 0) if letter in "BS" else (1,):
            try:
                compare(case, case.tensors(3, torch.float32, **{letter: size}), factor=4)
            except Exception as error:
                raise AssertionError(f"{letter} = {size}: {type(error).__name__}: {error}") from error


@every
def test_layouts(name):
    """Every second entry of transposed tensors; of the last tensor, one row for all."""
    case = CASES[name]
    leaves = []
    for x in (x.detach() for x in case.tensors(4, torch.float32)):
        spread = torch.full([2 * n for n in reversed(x.shape)], torch.nan, dtype=x.dtype)
        view = spread[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
        leaves.append(view.copy_(x).requires_grad_())
    if leaves:
        leaves[-1] = leaves[-1].detach()[:1].expand(leaves[-1].shape).requires_grad_()
    compare(case, leaves, factor=2)


@every
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_extremes(name, scale):
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16) if scale > 1 else (torch.float32,):
        tensors = case.tensors(5, dtype)
        if tensors:
            tensors[0] = (tensors[0].detach() * scale).requires_grad_()
        compare(case, tensors, factor=4, floor=1e-32, values_only="slopes of 1e30" in case.no and scale > 1)


@every
def test_infinite_rows(name):
    """A first row of -inf gives NaN, infinities and numbers where the plain expressions give them."""
    case = CASES[name]
    if not case.shapes or "infinite" in case.no:
        return
    tensors = [x.detach() for x in case.tensors(6, torch.float32)]
    tensors[0].view(-1, tensors[0].shape[-1])[0] = -torch.inf
    outs = results(case.call(*tensors))
    with implementation("reference"):
        for got, want in zip(outs, results(case.call(*tensors))):
            torch.testing.assert_close(got, want, equal_nan=True, atol=1e-4, rtol=1e-4)


@traceable
def test_registrations_and_fake_tensors(name, monkeypatch):
    case, seen = CASES[name], []
    tensors, call = case.tensors(7, torch.float32), Operation.__call__

    def record(operation, *args):
        seen.append((operation, args))
        return call(operation, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Operation, "__call__", record)
        outs = results(case.call(*tensors))
        slopes(outs, tensors)
    for operation, args in seen:
        if operation.name not in CHECKED:
            CHECKED.add(operation.name)
            leaves = tuple(arg.detach().clone().requires_grad_(arg.is_floating_point()) if isinstance(arg, Tensor) else
                           arg for arg in args)
            torch.library.opcheck(operation.registered, leaves, test_utils=(
                "test_schema", "test_autograd_registration", "test_faketensor"))
    with FakeTensorMode() as mode:
        fakes = results(case.call(*map(mode.from_tensor, tensors)))
    assert [(fake.shape, fake.dtype) for fake in fakes] == [(out.shape, out.dtype) for out in outs]


def test_a_kernel_refuses_tensors_without_memory():
    with FakeTensorMode():
        x = torch.empty(3, 4)
    with pytest.raises(LaunchError, match="FakeTensor"):
        activation_kernel(x[None], x[None], "silu", 1.0)


@traceable
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of torch, which traces an autograd function
def test_one_graph(name):
    """torch.compile of the call, with gradients traced."""
    torch._dynamo.reset()
    case = CASES[name]
    tensors = case.tensors(8, torch.float32)
    compiled = torch.compile(case.call, fullgraph=True, backend="eager")
    for got, want in zip(results(compiled(*tensors)), results(case.call(*tensors))):
        torch.testing.assert_close(got, want)


@traceable
def test_vmap(name):
    case = CASES[name]
    if not case.shapes or "vmap" in case.no:
        return
    tensors = [x.detach() for x in case.tensors(9, torch.float32)]
    first = torch.stack([tensors[0], tensors[0] / 2])
    got = results(torch.vmap(lambda x: case.call(x, *tensors[1:]))(first))
    for a, each in zip(got, zip(*(results(case.call(x, *tensors[1:])) for x in first))):
        torch.testing.assert_close(a, torch.stack(each), atol=1e-4, rtol=1e-4)
