"""Ragged ends of rows in every dtype, concatenations that are stored part by part, and stores that share a loop."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera import Tile, tile
from tessera.kernel.passes.parallelize import parallelize
from tessera.ops.kernels import rope_kernel
from tests.kernel.backends import launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool,
          torch.int64]
WIDTHS = [1, 2, 3, 5, 15, 16, 17, 18, 19, 31, 33, 70]


@ts.kernel
def copy_kernel(x: Tile["N", "D"], out: Tile["N", "D"]):
    tile.store(out, tile.load(x))


@ts.kernel
def transpose_kernel(x: Tile["N", "D"], out: Tile["D", "N"]):
    out[:] = x.T


@ts.kernel
def swap_kernel(x: Tile["B", "N", "D"], bias: Tile["N"], out: Tile["B", "D", "N"]):
    out[:] = x.transpose(0, 2, 1) + tile.load(bias)


@ts.kernel
def scale_rows_kernel(x: Tile["N", "D"], scale: Tile["N"], out: Tile["N", "D"]):
    out[:] = x * tile.load(scale)[:, None]


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


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7), (129, 257), (0, 5)], ids=str)
def test_transposes(shape, on_cpu):
    """Of every dtype's size, and with axes around."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        x = numbers(dtype, *shape)
        wide = numbers(dtype, shape[1] + 2, shape[0] + 3)
        out, around = wide[1:-1, 1:-2], wide.clone()
        transpose_kernel(x, out)
        around[1:-1, 1:-2] = x.T
        assert torch.equal(wide, around)
    x, bias = numbers(torch.float32, 3, *shape), numbers(torch.float32, shape[0])
    out = torch.empty(3, shape[1], shape[0])
    swap_kernel(x, bias, out)
    assert torch.equal(out, x.transpose(1, 2) + bias)


@pytest.mark.parametrize("kernel, crossed", [
    (transpose_kernel, {"D": True, "N": False}), (swap_kernel, {"B": False, "D": True, "N": False}),
    (scale_rows_kernel, {"N": False, "D": False}), (copy_kernel, {"N": False, "D": False})], ids=lambda k: str(k)[:20])
def test_loads_across_what_is_stored_are_known(kernel, crossed):
    """A block of a transpose reads whole cache lines and writes whole ones."""
    seen: dict[str, bool] = {}
    parallelize(kernel.trace(), lambda f, dims: [seen.update({str(dim.size): dim.crossed}) for dim in dims])
    assert seen == crossed


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


@ts.kernel
def slopes_kernel(x: Tile["N", "D"], y: Tile["N", "D"], dx: Tile["N", "D"], dy: Tile["N", "D"]):
    share = tile.sigmoid(tile.cast(tile.load(x), ts.f32))
    tile.store(dx, tile.load(y) * share * (1.0 - share))
    tile.store(dy, share * 2.0)


@ts.kernel
def reread_kernel(x: Tile["N", "D"], total: Tile["N", "D"], out: Tile["N", "D"]):
    tile.store(total, tile.load(x) + 1.0)
    tile.store(out, tile.exp(tile.cast(tile.load(total), ts.f32)))


@ts.kernel
def same_place_kernel(x: Tile["N", "D"], out: Tile["N", "D"], other: Tile["N", "D"]):
    tile.store(out, tile.load(x) + 1.0)
    tile.store(out, tile.load(x) + 2.0)
    tile.store(other, tile.load(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 17, 40, 4100])
def test_stores_of_one_loop(width, dtype):
    """Stores of one shape run in one loop; what they share is in registers, and no scratch memory is asked for."""
    x, y = (torch.randn(3, width, generator=torch.Generator().manual_seed(width + i)).to(dtype) for i in range(2))
    results = {}
    for backend in ("interp", "cpu"):
        made = [torch.empty_like(x) for _ in range(2)]
        launch(slopes_kernel, backend, x, y, *made)
        results[backend] = made
    share = x.double().sigmoid()
    bound = 1e-6 if dtype is torch.float32 else 2.0**-8
    torch.testing.assert_close(results["cpu"][0].double(), y.double() * share * (1 - share), rtol=bound, atol=bound)
    for ours, slow in zip(results["cpu"], results["interp"]):
        torch.testing.assert_close(ours, slow, rtol=2 * bound, atol=bound)
    assert "scratch0" not in slopes_kernel.source("cpu", x, y, *made)


def test_stores_of_one_loop_in_place(on_cpu):
    """Every value of a point is computed before one is stored, so that results may lie where the inputs are."""
    x, y = torch.randn(3, 100), torch.randn(3, 100)
    dx, dy = torch.empty_like(x), torch.empty_like(x)
    slopes_kernel(x, y, dx, dy)
    slopes_kernel(x, y, x, y)
    assert torch.equal(x, dx) and torch.equal(y, dy)


def test_a_store_waits_for_no_later_reading_of_its_memory(on_cpu):
    """What is read again after a store is what was stored, rounded; the last of two stores to one place stands."""
    x = torch.randn(5, 70).bfloat16()
    total, out = torch.empty_like(x), torch.empty_like(x)
    reread_kernel(x, total, out)
    assert torch.equal(total, x + 1)
    torch.testing.assert_close(out, (x + 1).float().exp().bfloat16())
    same_place_kernel(x, total, out)
    assert torch.equal(total, x + 2) and torch.equal(out, x + 2)


@ts.kernel
def product_kernel(a: Tile["M", "K"], b: Tile["K", "N"], out: Tile["M", "N"], half: Tile["M", "N"],
                   double: Tile["M", "N"]):
    product = tile.mma(tile.load(a), tile.load(b))
    tile.store(out, product + 1.0)
    tile.store(half, product * 0.5)
    tile.store(double, tile.load(half) * 4.0)


def test_stores_of_a_product(on_cpu):
    """Products have loops of their own."""
    a, b = torch.randn(5, 33), torch.randn(33, 21)
    made = [torch.empty(5, 21) for _ in range(3)]
    product_kernel(a, b, *made)
    for result, (factor, more) in zip(made, [(1, 1), (0.5, 0), (2, 0)]):
        torch.testing.assert_close(result, a @ b * factor + more)
