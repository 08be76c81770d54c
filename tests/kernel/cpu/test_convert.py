"""Conversions of low-precision floats, bit for bit against torch: every code, and f32 values around every tie."""

from types import SimpleNamespace

import pytest
import torch

import tessera as ts
from tessera.kernel.backends import cpu
from tessera.kernel.backends.cpu.host import target
from tests.kernel.programs import Program

LOW = [ts.bf16, ts.f16, ts.fp8_e4m3, ts.fp8_e5m2]
BACKENDS = {"host": cpu, "generic": SimpleNamespace(compile=lambda f: cpu.compile(f, target("generic")))}


@pytest.fixture(params=BACKENDS)
def backend(request):
    """This processor; and one without any instructions for these types."""
    return BACKENDS[request.param]


def convert(x: torch.Tensor, source: ts.DType, to: ts.DType, backend) -> torch.Tensor:
    program = Program()
    value = program.load(program.tensor("x", ["N"], source))
    program.output("y", program.cast(value, to))
    y = torch.empty(x.shape, dtype=to.torch)
    program.run(x, y, backend=backend, N=len(x))
    return y


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_code_to_f32(dtype, backend):
    codes = torch.arange(256 if dtype.bits == 8 else 65536).to(torch.uint8 if dtype.bits == 8 else torch.int16)
    x = codes.view(dtype.torch)
    got, expected = convert(x, dtype, ts.f32, backend), x.float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(bits(got)[~expected.isnan()], bits(expected)[~expected.isnan()])


@pytest.mark.parametrize("size", [1, 7, 33, 200_001])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_f32_rounds_as_torch(dtype, size, backend):
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(-2**31, 2**31 - 1, (size,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = x.view(torch.float32)
    codes = torch.arange(256 if dtype.bits == 8 else 65536).to(torch.uint8 if dtype.bits == 8 else torch.int16)
    exact = codes.view(dtype.torch).float()
    ties = (exact[:-1] + exact[1:]) / 2
    edges = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 448, 464, 465, 480, 57344, 61440, 65504,
                          65520, 3.4e38, 1e-45])
    x = torch.cat([x, exact, ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9)), edges])
    # Saturated, as torch 2.13 does; 2.11 makes NaN of what is larger.
    within = x.clamp(-448, 448) if dtype == ts.fp8_e4m3 else x
    got, expected = convert(x, ts.f32, dtype, backend), within.to(dtype.torch)
    nan = expected.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan])
