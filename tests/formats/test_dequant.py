"""Dequantization against the gguf package's reference, bit for bit."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tessera.errors import UnsupportedFileError
from tessera.formats.blocks import DataFile, read_units
from tessera.formats.dequant import decoder

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


def reference(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(all="ignore"):  # random scales overflow on purpose
        return gguf.quants.dequantize(raw, kind).reshape(-1)


def dequantize(raw: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    _, block_bytes = GGML_QUANT_SIZES[kind]
    units = torch.from_numpy(raw.reshape(-1, block_bytes))
    return decoder(kind)(units).float().reshape(-1)


def assert_bit_equal(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal bits; a NaN equals any NaN (payloads differ between conversion instructions)."""
    ours_np = ours.numpy()
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours_np), nan)
    np.testing.assert_array_equal(ours_np.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("n_blocks, seed", [(1, 0), (37, 1), (2500, 2)])
def test_random_bytes_are_bit_equal_to_gguf(name, n_blocks, seed):
    """Random bytes hold every kind of scale: subnormal, infinite, NaN, negative."""
    kind = GGMLQuantizationType[name]
    _, block_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, n_blocks * block_bytes, dtype=np.uint8)
    assert_bit_equal(dequantize(raw, kind), reference(raw, kind))


@pytest.mark.parametrize("scale", [0x0001, 0x83FF, 0x0400, 0x7BFF, 0x8000, 0x7C00], ids=hex)
@pytest.mark.parametrize("name", TYPES[3:])
def test_extreme_scales(name, scale):
    """The smallest and largest subnormal, smallest normal, largest finite, negative zero and infinity."""
    kind = GGMLQuantizationType[name]
    _, block_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 256, (5, block_bytes), dtype=np.uint8)
    raw[:, -2:] = raw[:, :2] = np.array([scale], np.uint16).view(np.uint8)
    assert_bit_equal(dequantize(raw, kind), reference(raw.reshape(-1), kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_from_a_file_equal_the_whole_rounded_once(tmp_path, dtype):
    kind = GGMLQuantizationType.Q4_1
    rows = np.random.default_rng(4).normal(size=(20000, 32)).astype(np.float32)  # more than one chunk of 2^19
    raw = gguf.quants.quantize(rows, kind)
    (tmp_path / "x").write_bytes(b"skip" + raw.tobytes())
    out = torch.empty(rows.size, dtype=dtype)
    file = DataFile(tmp_path / "x")
    read_units(out, file, 4, 32, 20, decoder(kind))
    file.close()
    assert torch.equal(out, torch.from_numpy(reference(raw, kind)).to(dtype))


def test_a_type_that_is_not_read_is_named_with_those_that_are():
    with pytest.raises(UnsupportedFileError, match=r"IQ2_XXS is not read; expected one of F32, .*Q6_K"):
        decoder(GGMLQuantizationType.IQ2_XXS)
