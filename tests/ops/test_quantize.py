"""Every quantized format: within its documented error bound, packed as documented, idempotent, at ragged sizes."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.errors import InputError, ShapeError, UnsupportedError
from tessera.ops.quantize import Quantized, dequantize, quantize

SHAPES = [(1,), (7,), (5, 33), (2, 3, 64), (4, 1), (3, 100)]


def values(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** torch.randint(-6, 7, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * magnitude).to(dtype)


def shared(x: Tensor, granularity: str, group: int) -> Tensor:
    """max|x| of what shares a scale with each value, in x's shape."""
    if granularity == "tensor":
        return x.abs().amax().expand(x.shape)
    if granularity == "row":
        return x.abs().amax(-1, keepdim=True).expand(x.shape)
    if granularity == "channel":
        return x.abs().amax(tuple(range(x.dim() - 1)), keepdim=True).expand(x.shape) if x.dim() > 1 else x.abs()
    return torch.cat([part.abs().amax(-1, keepdim=True).expand(part.shape) for part in x.split(group, -1)], -1)


def bound(x: Tensor, kind: str, largest: Tensor, symmetric: bool) -> Tensor:
    if kind in ("int8", "int4"):
        top = 127 if kind == "int8" else 7
        return largest / top / 2 if symmetric else 2 * largest / (2 * top + 1)
    if kind == "fp8_e4m3":
        return torch.maximum(x.abs() * 2.0**-4, largest / 448 * 2.0**-10)
    if kind == "fp8_e5m2":
        return torch.maximum(x.abs() * 2.0**-3, largest / 57344 * 2.0**-17)
    return largest / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind, granularity, symmetric", [
    *itertools.product(["int8", "int4"], ["tensor", "row", "channel", "group"], [True, False]),
    *itertools.product(["fp8_e4m3", "fp8_e5m2"], ["tensor", "row", "channel", "group"], [True]),
    ("mxfp4", "group", True)])
def test_error_bounds(kind, granularity, symmetric, shape, dtype):
    x = values(len(shape) + shape[-1], shape, dtype)
    quantized = quantize(x, kind, granularity=granularity, symmetric=symmetric)
    result = dequantize(quantized)
    assert result.shape == shape and quantized.shape == shape and quantized.scale.isfinite().all()
    wide = x.double()
    allowed = bound(wide, kind, shared(wide, granularity, 32), symmetric)
    assert ((result.double() - wide).abs() <= allowed * (1 + 1e-5) + 1e-37).all()
    again = quantize(result, kind, granularity=granularity, symmetric=symmetric)
    torch.testing.assert_close(dequantize(again), result, rtol=1e-6, atol=0)
    assert dequantize(quantized, torch.bfloat16).equal(result.bfloat16())


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("int4", 4), ("fp8_e4m3", 8), ("mxfp4", 4)])
def test_storage(kind, bits):
    quantized = quantize(values(1, (6, 128)), kind, granularity="group")
    scales = 6 * 4 * (1 if kind == "mxfp4" else 4)
    assert quantized.nbytes == 6 * 128 * bits // 8 + scales
    assert quantized.scale.shape == (6, 4) and quantized.group == 32
    if bits == 4:
        assert quantized.values.shape == (6, 64) and quantized.values.dtype == torch.uint8


def test_int4_packs_even_places_low():
    quantized = quantize(torch.tensor([1.0, -2.0, 7.0, -7.0]), "int4", granularity="tensor")
    assert quantized.values.tolist() == [0x1 | 0xE << 4, 0x7 | 0x9 << 4] and quantized.scale == 1


def test_mxfp4_takes_the_nearest_and_ggml_reads_it():
    """Values at scales over most of f32's range; halfway between two, the even code."""
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-110, 120, (50, 4, 1), generator=generator).float()
    x = torch.randn(50, 4, 32, generator=generator)
    x[:, :, ::3] = torch.randint(-32, 33, (50, 4, 11), generator=generator) / 8  # ties among them
    x = (x * exponents.exp2()).flatten(-2)
    quantized = quantize(x, "mxfp4")
    blocks = x.double().numpy().reshape(50, 4, 32)
    scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(np.abs(blocks / scale)[..., None] - magnitudes) + np.arange(8) % 2 * 1e-12
    expected = np.sign(blocks) * magnitudes[distance.argmin(-1)] * scale
    actual = dequantize(quantized).double().numpy().reshape(50, 4, 32)
    np.testing.assert_array_equal(actual, expected)
    nibbles = np.stack([quantized.values.numpy() & 15, quantized.values.numpy() >> 4], -1).reshape(200, 32)
    stored = np.concatenate([quantized.scale.numpy().reshape(200, 1), nibbles[:, :16] | nibbles[:, 16:] << 4], -1)
    read = gguf.quants.dequantize(stored.astype(np.uint8), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(read.reshape(50, 4, 32), expected)


def test_every_mxfp4_code():
    """All sixteen codes, the scales 2^-127 and 2^127, and the scale that means NaN."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = torch.zeros(3, 16, dtype=torch.uint8)
    packed[:, :8] = codes[::2] | codes[1::2] << 4
    scale = torch.tensor([[127], [0], [255]], dtype=torch.uint8)
    result = Quantized(kind="mxfp4", values=packed, scale=scale, group=32, shape=(3, 16)).dequantize(torch.float64)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = torch.tensor(magnitudes + [-m for m in magnitudes], dtype=torch.float64)
    assert result[0].equal(expected)
    torch.testing.assert_close(result[1], expected * 2.0**-127, rtol=0, atol=2.0**-149)
    assert result[2].isnan().all()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxfp4"])
def test_extremes(kind):
    """Zeros, subnormal numbers and the largest number stay finite; zeros stay zeros."""
    x = torch.stack([torch.zeros(64), torch.full((64,), 3.4e38), torch.full((64,), 1e-42), -torch.full((64,), 3.4e38)])
    for options in ({}, {"symmetric": False} if kind.startswith("int") else {}):
        result = dequantize(quantize(x, kind, **options))
        assert result[[0, 2]].abs().max() <= 1e-38
        assert ((result[[1, 3]] - x[[1, 3]]).abs() / 3.4e38 < 0.3).all()
    assert dequantize(quantize(torch.zeros(0, 8), kind)).shape == (0, 8)
    assert dequantize(quantize(torch.zeros(4, 0), kind, granularity="group")).shape == (4, 0)


def test_one_sided_values_gain_from_a_zero_point():
    x = values(3, (8, 64)).abs()
    errors = [(dequantize(quantize(x, "int8", symmetric=symmetric)) - x).square().sum() for symmetric in (True, False)]
    assert errors[1] < errors[0] / 2


def test_wrong_arguments():
    x = torch.randn(4, 8)
    for arguments, error, match in [
        ((x, "int3"), UnsupportedError, "kind: 'int3' given"),
        ((x * torch.inf, "int8"), InputError, "x: NaN or infinite"),
        ((x.int(), "int8"), ShapeError, r"x is torch\.int32; expected one of"),
    ]:
        with pytest.raises(error, match=match):
            quantize(*arguments)
    for options, error, match in [
        ({"granularity": "block"}, InputError, "granularity: 'block' given"), ({"group": 3}, InputError, "group: 3"),
    ]:
        with pytest.raises(error, match=match):
            quantize(x, "int4", **options)
    with pytest.raises(UnsupportedError, match="fp8_e4m3: asymmetric given"):
        quantize(x, "fp8_e4m3", symmetric=False)
    with pytest.raises(UnsupportedError, match="mxfp4: granularity 'row'"):
        quantize(x, "mxfp4", granularity="row")
