"""An operation gives the same values and gradients eagerly, by its reference, and under torch.compile."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera.errors import InputError
from tessera.ops import registration
from tessera.ops.registration import Operation, implementation

CALLS: list[str] = []


def _kernel(x, scale):
    CALLS.append("kernel")
    return (x.float() * x.float() * scale).to(x.dtype)


def _reference(x, scale):
    CALLS.append("reference")
    return x * x * scale


def _slope(grad, x, scale):
    return 2 * grad * x * scale


SLOPE = Operation(
    "test_square_backward(Tensor grad, Tensor x, float scale) -> Tensor", kernel=_slope, reference=_slope,
    fake=lambda grad, x, scale: torch.empty_like(x))
SQUARE = Operation(
    "test_square(Tensor x, float scale) -> Tensor", kernel=_kernel, reference=_reference,
    fake=lambda x, scale: torch.empty_like(x), save=lambda inputs, output: tuple(inputs),
    backward=lambda saved, grad: (SLOPE(grad, *saved), None))


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def test_the_kernel_runs_for_its_dtypes_and_the_reference_for_others():
    x = torch.randn(5)
    torch.testing.assert_close(SQUARE(x, 3.0), x * x * 3)
    SQUARE(x.bfloat16(), 3.0)
    SQUARE(x.double(), 3.0)
    assert CALLS == ["kernel", "kernel", "reference"]


def test_the_reference_is_one_flag_away(monkeypatch):
    with implementation("reference"):
        SQUARE(torch.randn(5), 3.0)
    monkeypatch.setenv("TESSERA_OPS", "reference")
    registration._default.cache_clear()
    try:
        SQUARE(torch.randn(5), 3.0)
        with implementation("auto"):
            SQUARE(torch.randn(5), 3.0)
    finally:
        registration._default.cache_clear()
    assert CALLS == ["reference", "reference", "kernel"]
    with pytest.raises(InputError, match="choice: 'quick' given"), implementation("quick"):
        pass


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_gradients(choice):
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with implementation(choice):
        assert torch.autograd.gradcheck(lambda x: SQUARE(x, 1.5), x)


def test_torch_accepts_the_registration():
    torch.library.opcheck(SQUARE.registered, (torch.randn(3, 4, requires_grad=True), 2.0))


def test_compiled_whole_with_its_gradient():
    compiled = torch.compile(lambda x: SQUARE(x + 1, 2.0).sum(), fullgraph=True, backend="aot_eager")
    x = torch.randn(6, requires_grad=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 4 * (x.detach() + 1))


def test_shapes_without_values():
    assert SQUARE(torch.empty(3, 5, device="meta"), 1.0).shape == (3, 5)
    with torch._subclasses.FakeTensorMode():
        assert SQUARE(torch.empty(2, 9), 1.0).shape == (2, 9)
    assert not CALLS


def test_deterministic_mode_is_not_compiled():
    x = torch.randn(2, 8)
    with ts.ops.invariant.invariant():
        expected = ts.ops.rms_norm(x)
        with pytest.raises(Exception, match=r"torch\.compile given"):
            torch.compile(lambda x: ts.ops.rms_norm(x), backend="aot_eager", fullgraph=True)(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(lambda x: ts.ops.rms_norm(x), backend="aot_eager")(x), expected)


def test_operations_are_compiled_after_jit_has_been_used():
    """ts.jit keeps dynamo out of the compiler's own files; operations must not call into them while they are traced."""
    ts.jit(lambda x: x + 1)(torch.ones(2))
    weight, bias = torch.randn(8, 8), torch.randn(8)

    def block(x):
        heads = ts.ops.rotary(x[None, :, None], *ts.ops.rope_tables(range(3), 8, 1e4))[0, :, 0]
        return ts.ops.add(ts.ops.linear(ts.ops.rms_norm(heads), weight, bias), x)

    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
