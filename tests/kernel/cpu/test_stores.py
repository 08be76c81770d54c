"""Ragged ends of rows in every dtype, and concatenations that are stored part by part."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera import Tile, tile
from tessera.ops.kernels import rope_kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool,
          torch.int64]
WIDTHS = [1, 2, 3, 5, 15, 16, 17, 18, 19, 31, 33, 70]


@ts.kernel
def copy_kernel(x: Tile["N", "D"], out: Tile["N", "D"]):
    tile.store(out, tile.load(x))


@ts.kernel
def largest_kernel(x: Tile["N", "D"], out: Tile["N"]):
    tile.store(out, tile.reduce_max(tile.cast(tile.load(x), ts.f32), axis=-1))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_BACKEND", "cpu")


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_past_the_end_is_written(dtype, on_cpu):
    copy = copy_kernel.retype({})
    for width in WIDTHS:
        x, wide = numbers(dtype, 3, width), numbers(dtype, 3, width + 40)
        before = wide.clone()
        copy(x, wide[:, :width])
        as_bytes = wide.view(torch.uint8) if dtype != torch.bool else wide
        expected = torch.cat([x, before[:, width:]], 1)
        assert torch.equal(as_bytes, expected.view(torch.uint8) if dtype != torch.bool else expected), width


@pytest.mark.parametrize("dtype", DTYPES[:6], ids=str)
def test_nothing_past_the_end_counts(dtype, on_cpu):
    largest = largest_kernel.retype({})
    for width in WIDTHS:
        x = torch.full((3, width + 40), 120.0).to(dtype)
        x[:, :width] = numbers(dtype, 3, width)
        out = torch.empty(3)
        largest(x[:, :width], out)
        assert torch.equal(out, x[:, :width].float().amax(-1)), width


@ts.kernel
def three_parts_kernel(x: Tile["N", "D"], y: Tile["N", "D"], out: Tile["N", "3*D"]):
    tile.store(out, tile.concat([tile.load(x) * 2.0, tile.load(y) + tile.load(x), tile.load(y) - 1.0], axis=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_parts_of_a_concatenation(dtype, width, on_cpu):
    x, y, out = numbers(dtype, 5, width), numbers(dtype, 5, width) + 1, torch.empty(5, 3 * width, dtype=dtype)
    three_parts_kernel.retype({})(x, y, out)
    assert torch.equal(out, torch.cat([x * 2, y + x, y - 1], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 30, 64, 70])
def test_rotation_in_place(dtype, width, on_cpu):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(1, 6, 3, width, generator=generator).to(dtype)
    angles = torch.rand(6, width // 2, generator=generator)
    out, rope = torch.empty_like(x), rope_kernel.retype({})
    rope(x, angles.cos(), angles.sin(), out)
    rope(x, angles.cos(), angles.sin(), x)
    assert torch.equal(x, out)
