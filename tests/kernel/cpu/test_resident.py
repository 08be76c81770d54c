"""Products of blocks inside loops: against float64, and bit for bit against the packed product of the same sum."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from torch import Tensor

from tessera import Tile, f32, kernel, tile
from tessera.kernel import Kernel
from tessera.kernel.backends import cpu
from tessera.kernel.backends.cpu import jit
from tessera.kernel.backends.cpu.host import runs_here, target
from tessera.kernel.backends.cpu.lower import lower
from tessera.kernel.passes import prepare
from tessera.ops import kernels


@kernel
def rows_by_columns(x: Tile["M", "K"], weight: Tile["N", "K"], out: Tile["M", "N"]):
    """x @ weight^T: the left operand stays, blocks of the right one are transposed."""
    ctx = tile.context()
    for block in tile.grid(tile.cdiv(ctx.M, ctx.block_m)):
        first = block * ctx.block_m
        rows = tile.load(x[first:first + ctx.block_m])
        for start in tile.range(0, ctx.N, ctx.block_n):
            product = tile.mma(rows, tile.transpose(tile.load(weight[start:start + ctx.block_n])))
            tile.store(out[first:first + ctx.block_m, start:start + ctx.block_n], product)


@kernel
def sum_of_blocks(x: Tile["K", "M"], w: Tile["K", "N"], out: Tile["M", "N"]):
    """x^T @ w, a block of K after the other: both operands are read in place."""
    ctx = tile.context()
    for block in tile.grid(tile.cdiv(ctx.M, ctx.block_m)):
        first = block * ctx.block_m
        total = tile.zeros((ctx.block_m, ctx.N), f32)
        for start in tile.range(0, ctx.K, ctx.block_k):
            left = tile.transpose(tile.load(x[start:start + ctx.block_k, first:first + ctx.block_m]))
            total = total + tile.mma(left, tile.load(w[start:start + ctx.block_k]))
        tile.store(out[first:first + ctx.block_m], total)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(launch: Kernel, x: Tensor, w: Tensor, m: int, n: int) -> Tensor:
    out = torch.full((m, n), float("nan"))
    launch.with_schedule(tile={"BM": 20, "BN": 24, "BK": 16})(x, w, out)
    return out


def packed(x: Tensor, w: Tensor) -> Tensor:
    """x @ w^T by the packed kernels, in the same chains."""
    out = torch.empty(x.shape[0], w.shape[0])
    kernels.linear_kernel(x, w, out)
    return out


SIZES = [(1, 1, 1), (19, 33, 7), (20, 24, 16), (45, 130, 66)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m,n,k", SIZES)
def test_an_element_is_the_same_chain_as_in_a_packed_product(m, n, k, dtype):
    x, w = draw(m, k, seed=m), draw(n, k, seed=n + 1, dtype=dtype)
    expected = packed(x, w)
    assert (expected - x.double() @ w.double().T).abs().max() < 1e-5 * max(1, k)
    assert torch.equal(run(rows_by_columns, x, w, m, n), expected)
    assert torch.equal(run(sum_of_blocks, x.T.contiguous(), w.T.contiguous(), m, n), expected)


@pytest.mark.parametrize("row", [40, 1024])
def test_rows_far_apart(row):
    """A right operand whose rows share cache sets is copied first."""
    m, n, k = 21, 37, 50
    x, w = draw(m, k, seed=1), draw(n, k, seed=2)
    wide = torch.zeros(k, row)
    wide[:, :n] = w.T
    assert torch.equal(run(sum_of_blocks, x.T.contiguous(), wide[:, :n], m, n), packed(x, w))


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_other_processors(name):
    """Code for a processor with other vectors gives the same bits where it can run."""
    host = target(name)
    x, w = draw(33, 40, seed=3), draw(50, 40, seed=4)
    if runs_here(host):
        with mock.patch.object(cpu, "target", return_value=host):
            assert torch.equal(run(rows_by_columns.retype({}), x, w, 33, 50), packed(x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name,most", [("avx2", 6), ("avx512", 14)])
def test_the_inner_loops_have_no_spills(name, most, dtype):
    """A broadcast element feeds two multiply-adds, or four where there are few rows; all sums stay in registers."""
    host = target(name)
    function = each_row.trace(w=dtype)
    module, _ = lower(prepare(function, lambda function, dims: []), host)
    text = jit.compile_to_asm(module.text(), host)
    suffix = str(dtype).removeprefix("torch.").replace("float32", "f32").replace("bfloat16", "bf16")
    for rows in (1, 2, most) if dtype == torch.float32 else (1, 2):
        code = text.split(f"product_{rows}_{suffix}:")[1].split("func_end")[0]
        loops = re.findall(r"^(\.LBB\w+):\n((?:\t.*\n)*?)\tj\w+\t\1\n", code, re.MULTILINE)
        body = max((body for _, body in loops), key=len)
        assert body.count("vfmadd") % (2 * rows) == 0 and body.count("vfmadd") >= 24
        assert "(%rsp)" not in body


@kernel
def each_row(x: Tile["B", "M", "K"], w: Tile["K", "N"], out: Tile["B", "M", "N"], steps: int):
    """x @ w, blocks of K one after the other, all rows and columns at once: what decoding does with its values."""
    ctx = tile.context()
    for i in tile.grid(ctx.B):
        total = tile.zeros((ctx.M, ctx.N), f32)
        for start in tile.range(0, steps, ctx.block_k):
            total = tile.mma(tile.load(x[i, :, start:start + ctx.block_k]),
                             tile.cast(tile.load(w[0:steps][start:start + ctx.block_k]), f32), total)
        tile.store(out[i], total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m,n", [(1, 64), (1, 150), (2, 33), (3, 1), (4, 96), (5, 40), (7, 64), (16, 150), (23, 40)])
def test_few_rows_read_the_right_operand_in_place(m, n, dtype):
    """Row by row or transposed, all of K or some of it; what lies behind the last step is not read."""
    k, steps = 300, 290
    x, w = draw(m, k, seed=m), draw(n, k, seed=n + 1, dtype=dtype)
    w[:, steps:] = float("nan")
    expected = packed(x[:, :steps].contiguous(), w[:, :steps].contiguous())
    for weights in (w.T.contiguous(), w.T, torch.zeros(2 * k, n + 1, 3, dtype=dtype)[::2, :n, 0].copy_(w.T)):
        out = torch.full((m, n), float("nan"))
        each_row.with_schedule(tile={"BK": 200})(x[None], weights, out[None], steps)
        assert torch.equal(out, expected)


@kernel
def capped_above(x: Tile["M", "K"], w: Tile["K", "N"], out: Tile["M", "N"], both: Tile["M", "N"], limit: int):
    ctx = tile.context()
    for block in tile.grid(tile.cdiv(ctx.M, ctx.block_m)):
        first = block * ctx.block_m
        product = tile.mma(tile.load(x[first:first + ctx.block_m]), tile.load(w))
        changed = product
        if first >= limit:
            changed = tile.minimum(product, 0.0) - 1.0
        tile.store(out[first:first + ctx.block_m], changed)
        tile.store(both[first:first + ctx.block_m], changed + product)


@kernel
def capped(x: Tile["M", "K"], w: Tile["K", "N"], out: Tile["M", "N"], limit: int):
    ctx = tile.context()
    for block in tile.grid(tile.cdiv(ctx.M, ctx.block_m)):
        first = block * ctx.block_m
        product = tile.mma(tile.load(x[first:first + ctx.block_m]), tile.load(w))
        if first >= limit:
            product = tile.minimum(product, 0.0) - 1.0
        tile.store(out[first:first + ctx.block_m], product)


@kernel
def centred(x: Tile["M", "K"], w: Tile["K", "N"], out: Tile["M", "N"], limit: int):
    ctx = tile.context()
    for block in tile.grid(tile.cdiv(ctx.M, ctx.block_m)):
        first = block * ctx.block_m
        product = tile.mma(tile.load(x[first:first + ctx.block_m]), tile.load(w))
        if first >= limit:
            product = product - tile.transpose(tile.transpose(product)[::, ::])[:, 0:1]
        tile.store(out[first:first + ctx.block_m], product)


@pytest.mark.parametrize("limit", [0, 20, 100])
def test_a_condition_changes_a_tile_in_place(limit):
    x, w = draw(45, 9, seed=5), draw(9, 30, seed=6)
    product = x.double() @ w.double()
    late = (torch.arange(45) // 20 * 20 >= limit)[:, None]
    expected = torch.where(late, product.clamp(max=0) - 1, product)
    out, both = torch.empty(45, 30), torch.empty(45, 30)
    schedule = {"BM": 20}
    capped.with_schedule(tile=schedule)(x, w, out, limit)
    assert (out - expected).abs().max() < 1e-5
    capped_above.with_schedule(tile=schedule)(x, w, out, both, limit)
    assert (out - expected).abs().max() < 1e-5
    assert (both - expected - product).abs().max() < 1e-5


@pytest.mark.parametrize("limit", [0, 20])
def test_a_condition_that_reads_other_elements_changes_a_copy(limit):
    x, w = draw(45, 9, seed=7), draw(9, 30, seed=8)
    product = x.double() @ w.double()
    late = (torch.arange(45) // 20 * 20 >= limit)[:, None]
    out = torch.empty(45, 30)
    centred.with_schedule(tile={"BM": 20})(x, w, out, limit)
    assert (out - torch.where(late, product - product[:, :1], product)).abs().max() < 1e-5


@kernel
def decayed(x: Tile["Z", "B", "M", "K"], w: Tile["K", "N"], decay: Tile["B", "M"], out: Tile["Z", "B", "M", "N"]):
    ctx = tile.context()
    for z in tile.grid(ctx.Z):
        total = tile.zeros((ctx.B, ctx.M, ctx.N), f32)
        for start in tile.range(0, ctx.K, ctx.block_k):
            left = tile.load(x[z, :, :, start:start + ctx.block_k])
            total = total * tile.load(decay)[:, :, None] + tile.mma(left, tile.load(w[start:start + ctx.block_k]))
        tile.store(out[z], total)


@pytest.mark.parametrize("b,m,n,k", [(1, 1, 1, 1), (3, 5, 33, 40)])
def test_an_accumulator_of_three_axes(b, m, n, k):
    """Batches that share the right operand, added to a tile that a broadcast scales."""
    x, w, decay, out = draw(2, b, m, k, seed=1), draw(k, n, seed=2), draw(b, m, seed=3), torch.empty(2, b, m, n)
    decayed.with_schedule(tile={"BK": 16})(x, w, decay, out)
    expected = torch.zeros(2, b, m, n, dtype=torch.float64)
    for start in range(0, k, 16):
        block = slice(start, start + 16)
        expected = expected * decay.double()[:, :, None] + x[..., block].double() @ w[block].double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
