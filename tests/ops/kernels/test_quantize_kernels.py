"""The kernels that round rows to few bits, and back, on every backend: the bits of the plain expressions."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tessera.ops.kernels.quantize import (
    dequantize_kernel,
    dequantize_packed_kernel,
    fake_quantize_kernel,
    quantize_kernel,
)
from tests.kernel.backends import BACKENDS, launch

plain = importlib.import_module("tessera.ops.quantize")  # its package has a function of the name
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
F32, BF16 = torch.float32, torch.bfloat16
KINDS = [("int8", True, BF16), ("int8", False, F32), ("int4", True, F32), ("int4", False, BF16),
         ("fp8_e4m3", True, F32), ("fp8_e5m2", True, BF16), ("mxfp4", True, F32), ("mxfp4", True, BF16)]


def rows(seed: int, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Normal values of all magnitudes; a row of zeros, of ties between codes, and of values of one sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    x = x * 2.0 ** torch.randint(-100, 100, (count, 1), generator=generator)
    x[0] = 0
    x[1] = torch.arange(width) % 33 / 8 - 2
    x[2] = x[2].abs()
    return x.to(dtype)


@pytest.mark.parametrize("kind, symmetric, dtype", KINDS)
def test_rows(backend, kind, symmetric, dtype):
    x = rows(len(kind), 7, 32 if kind == "mxfp4" else 33, dtype)
    expected = plain._quantize_reference(x, kind, symmetric)
    codes, scale, zero = (torch.zeros_like(each) for each in expected)
    launch(quantize_kernel, backend, x, codes, scale, None if symmetric else zero, kind)
    for actual, wanted in zip((codes, scale, zero), expected):
        assert torch.equal(actual.float(), wanted.float())
    zero = None if symmetric else zero
    out = torch.full_like(x, torch.nan)
    if kind in plain._PACKED:
        packed = plain._pack(codes)
        scale = torch.exp2(scale.float() - 127) if kind == "mxfp4" else scale
        out = x.new_full((7, 2 * packed.shape[1]), torch.nan)
        launch(dequantize_packed_kernel, backend, packed, scale, out, zero, kind == "mxfp4")
        assert torch.equal(out, plain._dequantize_reference(packed, scale, zero, kind, dtype))
        return
    launch(dequantize_kernel, backend, codes, scale, out, zero)
    assert torch.equal(out, plain._dequantize_reference(codes, scale, zero, kind, dtype))
    if symmetric:
        launch(fake_quantize_kernel, backend, x, out, kind)
        assert torch.equal(out, plain._fake_quantize_reference(x, kind))
