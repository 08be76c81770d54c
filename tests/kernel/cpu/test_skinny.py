"""Products of few rows against float64, and their contract: a row has the same bits at any M and any thread count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tessera import Tile, f32, int4, int8, int32, kernel, tile
from tessera.kernel import Kernel
from tessera.kernel.backends import cpu
from tessera.kernel.backends.cpu.host import Target, runs_here, target
from tessera.ops import kernels

ROWS = [1, 2, 3, 5, 7, 8, 9, 16, 17, 33]
SHAPES = [(1, 1), (7, 100), (33, 37), (64, 64), (130, 577), (40, 1100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@kernel
def normed(x: Tile["M", "K"], weight: Tile["N", "K"], bias: Tile["N"], out: Tile["M", "N"]):
    row = tile.cast(tile.load(x), f32)
    row = row * tile.rsqrt(tile.reduce_mean(row * row, axis=-1, keepdim=True) + 1e-5)
    product = tile.mma(row, tile.transpose(tile.cast(tile.load(weight), f32)))
    tile.store(out, tile.silu(product + tile.broadcast(tile.load(bias), axis=0)))


@kernel
def scaled_columns(x: Tile["M", "K"], weight: Tile["N", "K", int8], scale: Tile["N", f32], out: Tile["M", "N"]):
    scaled = tile.cast(tile.load(weight), f32) * tile.load(scale)[:, None]
    tile.store(out, tile.mma(tile.load(x), tile.transpose(scaled)))


@kernel
def batched(x: Tile["B", "M", "K"], weight: Tile["B", "N", "K"], out: Tile["B", "M", "N"]):
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(weight))))


@kernel
def grouped_rows(x: Tile["M", "K"], quants: Tile["K", "N", int8], scale: Tile["K/32", "N", f32], out: Tile["M", "N"]):
    depth, columns = quants.shape
    groups = tile.reshape(tile.cast(tile.load(quants), f32), (depth // 32, 32, columns))
    weight = tile.reshape(groups * tile.load(scale)[:, None, :], (depth, columns))
    tile.store(out, tile.mma(tile.load(x), weight))


@kernel
def nibbles_from(x: Tile["M", 64], quants: Tile["N", "K", int4], out: Tile["M", "N"], start: int):
    weight = tile.cast(tile.load(quants[:, start:start + 64]), f32)
    tile.store(out, tile.mma(tile.load(x), tile.transpose(weight)))


@kernel
def one_row(x: Tile[1, "K"], weight: Tile["N", "K"], out: Tile[1, "N"]):
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(weight))))


@kernel
def three_rows(x: Tile[3, "K"], weight: Tile["N", "K"], out: Tile[3, "N"]):
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(weight))))


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(launch: Kernel, rows: int, columns: int, *arguments: Tensor) -> Tensor:
    out = torch.full((rows, columns), float("nan"))
    launch(*arguments, out)
    return out


def close(actual: Tensor, x: Tensor, w: Tensor) -> None:
    """Within the error of a sum of K products (Higham, chapter 3)."""
    x, w = x.double(), w.double()
    bound = (x.shape[-1] + 2) * 2.0**-24 * (x.abs() @ w.abs().transpose(-1, -2)) + 1e-30
    assert ((actual.double() - x @ w.transpose(-1, -2)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,k", SHAPES)
def test_rows_have_the_same_bits_in_any_batch(n, k, dtype):
    x, w = draw(max(ROWS), k, seed=n + k), draw(n, k, seed=n * k, dtype=dtype)
    full = run(kernels.linear_kernel, len(x), n, x, w)
    close(full, x, w)
    for rows in ROWS:
        assert torch.equal(run(kernels.linear_kernel, rows, n, x[:rows], w), full[:rows]), rows
    assert torch.equal(run(kernels.gemm_kernel, 3, n, x[:3], w.t().contiguous()), full[:3])
    with threads(1):
        assert torch.equal(run(kernels.linear_kernel, 3, n, x[:3], w), full[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1024, 2048])
def test_rows_a_page_apart(k, dtype):
    """Rows that share a set of the cache take another kernel."""
    x, w = draw(9, k, seed=1), draw(50, k, seed=2, dtype=dtype)
    full = run(kernels.linear_kernel, 9, 50, x, w)
    close(full, x, w)
    for rows in (1, 3):
        assert torch.equal(run(kernels.linear_kernel, rows, 50, x[:rows], w), full[:rows])


@pytest.mark.parametrize("n,k", [(1, 5), (9, 100), (33, 577), (50, 4096), (17, 1100)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_two_rows_of_bytes(n, k, dtype):
    """They are multiplied while they are read; three are packed first. The last panels have columns that lack."""
    x, scale = draw(5, k, seed=n + k), draw(n, seed=k)
    if dtype == torch.int8:
        w = torch.randint(-128, 128, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
        full = run(scaled_columns, 5, n, x, w, scale)
        close(full, x, w.float() * scale[:, None])
        launch, rest = scaled_columns, (w, scale)
    else:
        launch, rest = kernels.linear_kernel, (draw(n, k, seed=n, dtype=dtype),)
        full = run(launch, 5, n, x, *rest)
        close(full, x, rest[0])
    for first, rows in ((0, 2), (3, 2), (0, 3), (4, 1)):
        part = x[first:first + rows]
        assert torch.equal(run(launch, rows, n, part, *rest), full[first:first + rows]), (first, rows)


@pytest.mark.parametrize("n", [1, 8, 23, 48])
@pytest.mark.parametrize("groups", [1, 3, 40])
def test_two_rows_of_groups(n, groups):
    k, generator = 32 * groups, torch.Generator().manual_seed(n * groups)
    x, scale, least = draw(4, k, seed=1), draw(n, groups, seed=2), draw(n, groups, seed=3)
    codes = torch.randint(-8, 8, (n, k), generator=generator)
    packed = ((codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4).to(torch.uint8)
    for launch, rest, shift in ((kernels.int8_group_linear_kernel, (codes.to(torch.int8), scale), 0.0),
                                (kernels.int4_linear_kernel, (packed, scale, None), 0.0),
                                (kernels.int4_linear_kernel, (packed, scale, least), least)):
        full = run(launch, 4, n, x, *rest)
        dense = codes.unflatten(1, (groups, 32)) * scale[..., None].double()
        dense = (dense + (shift[..., None] if isinstance(shift, Tensor) else shift)).flatten(1)
        assert (full - x.double() @ dense.t()).abs().max() <= 1e-5 * (x.double().abs() @ dense.abs().t()).max()
        for rows in (1, 2):
            assert torch.equal(run(launch, rows, n, x[:rows], *rest), full[:rows]), rows


@pytest.mark.parametrize("step", [1, 2])
def test_strided_operands(step):
    w, x = draw(40, 70 * step, seed=1)[:, ::step], draw(5, 140, seed=2)[:, ::2]
    close(run(kernels.linear_kernel, 5, 40, x, w), x, w)
    rows = draw(80, 70, seed=3)[::2]
    close(run(kernels.linear_kernel, 5, 40, x, rows), x, rows)


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_what_comes_before_and_after(rows):
    x, w, bias = draw(20, 100, seed=1), draw(45, 100, seed=2, dtype=torch.bfloat16), draw(45, seed=3)
    out = run(normed, rows, 45, x[:rows], w, bias)
    x64 = x.double()
    row = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = torch.nn.functional.silu(row @ w.double().T + bias.double())[:rows]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, run(normed, 20, 45, x, w, bias)[:rows])


@pytest.mark.parametrize("rows", [1, 4, 7, 20])
def test_a_factor_of_each_column_inside_the_product(rows):
    x, scale = draw(20, 90, seed=1), draw(50, seed=2)
    w = (draw(50, 90, seed=3) * 40).to(torch.int8)
    close(run(scaled_columns, rows, 50, x[:rows], w, scale), x[:rows], w.float() * scale[:, None])


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_groups_along_the_columns_of_memory(rows):
    x, scale = draw(20, 96, seed=1), draw(3, 50, seed=2)
    quants = (draw(96, 50, seed=3) * 40).to(torch.int8)
    weight = (quants.float().reshape(3, 32, 50) * scale[:, None]).reshape(96, 50)
    close(run(grouped_rows, rows, 50, x[:rows], quants, scale), x[:rows], weight.T)


@pytest.mark.parametrize("start", [0, 1, 6, 33])
def test_int4_from_the_middle_of_a_byte(start):
    x, quants = draw(5, 64, seed=start), torch.randint(-8, 8, (45, 100), generator=torch.Generator().manual_seed(start))
    packed = (quants[:, ::2] & 15 | (quants[:, 1::2] & 15) << 4).to(torch.uint8)
    for rows in (1, 5):
        out = torch.full((rows, 45), float("nan"))
        nibbles_from(x[:rows], packed, out, start)
        close(out, x[:rows], quants[:, start:start + 64])


def test_a_number_of_rows_that_is_known():
    x, w = draw(3, 77, seed=1), draw(41, 77, seed=2)
    full = run(kernels.linear_kernel, 3, 41, x, w)
    assert torch.equal(run(three_rows, 3, 41, x, w), full)
    assert torch.equal(run(one_row, 1, 41, x[2:], w), full[2:])


@pytest.mark.parametrize("rows", [1, 6, 18])
def test_batches(rows):
    x, w = draw(3, 18, 50, seed=1), draw(3, 35, 50, seed=2)
    out = torch.full((3, rows, 35), float("nan"))
    batched(x[:, :rows], w, out)
    close(out, x[:, :rows], w)


@pytest.mark.parametrize("k,rows", [(1, 1), (2, 4), (33, 9), (64, 3), (131, 8), (131, 20)])
def test_pairs_of_bf16_are_added_as_the_instruction_adds_them(k, rows):
    """With the arithmetic of `vdpbf16ps` in place of the instruction: the higher k first, a missing one is zero."""
    host = replace(target(), has_avx512bf16=True, emulates_dots=True)
    x, w = (draw(m, k, seed=m, dtype=torch.bfloat16) for m in (rows, 37))
    with compiled_for(host) as fresh:
        out = run(fresh(kernels.linear_kernel), rows, 37, x, w)
    close(out, x, w)
    total = torch.zeros(rows, 37)
    for pair in range(0, k, 2):
        for place in (pair + 1, pair):
            if place < k:
                total = (x[:, place, None].double() * w[None, :, place].double() + total.double()).float()
    assert torch.equal(out, total)  # products of bf16 are exact in f64, and so are these sums: one rounding a step


@pytest.mark.parametrize("name", ["generic", "avx2"])
def test_other_processors_give_the_same_bits(name):
    host = target(name)
    if not runs_here(host):
        pytest.skip(f"this machine cannot run {host.cpu}")
    x, w = draw(5, 200, seed=1), draw(41, 200, seed=2)
    for launch, *operands in ((kernels.linear_kernel, x, w), (scaled_columns, x, (w * 30).to(torch.int8), w[:, 0])):
        operands = [operand.contiguous() for operand in operands]
        with compiled_for(host) as fresh:
            out = run(fresh(launch), 5, 41, *operands)
        assert torch.equal(out, run(launch, 5, 41, *operands))


@contextmanager
def compiled_for(host: Target) -> Iterator:
    with mock.patch.object(cpu, "target", return_value=host):
        yield lambda launch: launch.retype({})


@kernel
def integers(x: Tile["M", "K"], weight: Tile["N", "K", int8], out: Tile["M", "N", int32]):
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(weight))))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("quads", [False, True])
@pytest.mark.parametrize("n,k", [(1, 1), (37, 33), (64, 64), (130, 1030)])
def test_integers_are_exact(n, k, quads, dtype):
    """With pairs of 16 bits, and with the arithmetic of `vpdpbusd`."""
    host = replace(target(), has_vnni=True, emulates_dots=True) if quads else target()
    generator = torch.Generator().manual_seed(n * k)
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    x = torch.randint(low, high, (17, k), generator=generator).to(dtype)
    w = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    with compiled_for(host) as fresh:
        launch = fresh(integers)
        for rows in (1, 2, 4, 7, 16, 17):
            out = torch.full((rows, n), -1, dtype=torch.int32)
            launch(x[:rows], w, out)
            assert torch.equal(out.double(), x[:rows].double() @ w.double().T), rows
