"""ts.quantized: stated 8-bit types are required, floats are rounded to them; within the rounding's own bounds."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera import Tensor, fp8, int8
from tessera.errors import InputError, ShapeError
from tests.function.documents import swiglu_quantized


def stored(x: torch.Tensor, dtype: torch.dtype, largest: float) -> tuple[torch.Tensor, float]:
    scale = float(x.abs().max()) / largest
    scaled = x / scale
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), scale


def test_documents_swiglu() -> None:
    generator = torch.Generator().manual_seed(4)
    x, gate, up, down = (torch.randn(s, generator=generator) for s in ((2, 3, 32), (32, 48), (32, 48), (48, 32)))
    x8, x_scale = stored(x, torch.float8_e4m3fn, 448.0)
    weights = [stored(w, torch.int8, 127.0) for w in (gate, up, down)]
    scales = {"input": x_scale, "gate_weight": weights[0][1], "up_weight": weights[1][1],
              "down_weight": weights[2][1], "hidden": 1.0}
    got = swiglu_quantized(x8, *(w for w, _ in weights), scales)
    assert got.dtype is torch.float8_e4m3fn
    want = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
    # Four roundings to three bits of mantissa stand between the two.
    assert (got.float() - want).norm() / want.norm() < 0.1
    with pytest.raises(ShapeError, match=r"W_up is torch.float32; expected torch.int8"):
        swiglu_quantized(x8, weights[0][0], up, weights[2][0], scales)


def mlp(x: Tensor["B", "S", "D"], up: Tensor["D", "F"], down: Tensor["F", "D"], bias: Tensor["D"], name: str = ""
        ) -> Tensor["B", "S", "D"]:
    return torch.relu(x @ up) @ down + bias


@pytest.mark.parametrize("weights, activations", [("int8", None), ("fp8_e4m3", "fp8_e5m2"), ("int8", "int8")])
def test_floats_are_rounded_as_they_would_be_stored(weights, activations) -> None:
    generator = torch.Generator().manual_seed(8)
    x, up, down, bias = (torch.randn(s, generator=generator, dtype=torch.float32).requires_grad_()
                         for s in ((2, 3, 8), (8, 16), (16, 8), (8,)))
    got = ts.quantized(weights=weights, activations=activations)(mlp)(x, up, down=down, bias=bias)

    def rounded(t: torch.Tensor, dim: int, kind: str | None) -> torch.Tensor:
        if kind is None:
            return t
        largest = {"int8": 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}[kind]
        scale = t.abs().amax(dim, keepdim=True) / largest
        units = t / scale
        return (units.round() if kind == "int8" else units.to(ts.types.dtype_of(kind).torch).float()) * scale

    with torch.no_grad():
        want = mlp(rounded(x, -1, activations), rounded(up, 0, weights), rounded(down, 0, weights), bias)
    torch.testing.assert_close(got.detach(), want)
    assert not torch.equal(got, mlp(x, up, down, bias))
    got.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, up, down, bias))


@pytest.mark.parametrize("options, problem", [
    ({"weights": ts.f32}, "weights: f32 given; expected int8, fp8_e4m3 or fp8_e5m2"),
    ({"weights": ts.int8, "activations": ts.bf16}, "activations: bf16 given"),
])
def test_types_that_cannot_be(options, problem) -> None:
    with pytest.raises(InputError, match=problem):
        ts.quantized(**options)


def test_annotations_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="w is annotated int8; weights=fp8_e4m3"):
        @ts.quantized(weights=fp8)
        def f(x: Tensor["B", "D"], w: Tensor["D", "F", int8]):
            return x

    with pytest.raises(InputError, match="g has no weight"):
        @ts.quantized(weights=int8)
        def g(x: Tensor["B", "D"], bias: Tensor["D"]):
            return x
