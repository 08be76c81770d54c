"""Dequantization against the gguf package's reference, bit for bit."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tessera.errors import FileFormatError
from tessera.formats.dequant import dequantize_into

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


def reference(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(all="ignore"):  # random scales overflow on purpose
        return gguf.quants.dequantize(raw, kind).reshape(-1)


def assert_bit_equal(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal bits; a NaN equals any NaN (payloads differ between conversion instructions)."""
    ours_np = ours.numpy()
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours_np), nan)
    np.testing.assert_array_equal(ours_np.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("n_blocks, seed", [(1, 0), (37, 1), (2500, 2)])
def test_random_bytes_are_bit_equal_to_gguf(name, n_blocks, seed):
    """Random bytes hold every kind of scale: subnormal, infinite, NaN, negative; 2500 blocks cross chunks."""
    kind = GGMLQuantizationType[name]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, n_blocks * block_bytes, dtype=np.uint8)
    out = torch.empty(n_blocks * block)
    dequantize_into(out, raw, kind)
    assert_bit_equal(out, reference(raw, kind))


@pytest.mark.parametrize("scale", [0x0001, 0x83FF, 0x0400, 0x7BFF, 0x8000, 0x7C00], ids=hex)
@pytest.mark.parametrize("name", TYPES[3:])
def test_extreme_scales(name, scale):
    """The smallest and largest subnormal, smallest normal, largest finite, negative zero and infinity."""
    kind = GGMLQuantizationType[name]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 256, (5, block_bytes), dtype=np.uint8)
    raw[:, -2:] = raw[:, :2] = np.array([scale], np.uint16).view(np.uint8)
    out = torch.empty(5 * block)
    dequantize_into(out, raw.reshape(-1), kind)
    assert_bit_equal(out, reference(raw.reshape(-1), kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_from_float32(dtype):
    kind = GGMLQuantizationType.Q4_1
    raw = gguf.quants.quantize(np.random.default_rng(4).normal(size=(3, 320)).astype(np.float32), kind)
    out = torch.empty(960, dtype=dtype)
    dequantize_into(out, raw.reshape(-1), kind)
    assert torch.equal(out, torch.from_numpy(reference(raw, kind)).to(dtype))


def test_a_type_that_is_not_read_is_named_with_those_that_are():
    with pytest.raises(FileFormatError, match=r"IQ2_XXS is not read; expected one of F32, .*Q6_K"):
        dequantize_into(torch.empty(256), np.zeros(66, np.uint8), GGMLQuantizationType.IQ2_XXS)
