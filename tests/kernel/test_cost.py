"""Bytes and operations of launches against the numbers that a person would work out."""

import pytest
import torch

import tessera as ts
from tessera import Tile, bf16, f32, int32, int64, tile
from tessera.kernel.cost import cost


def cost_of(kernel, *args, **sizes):
    function = kernel.trace(*args)
    return cost(function, [1] * len(function.params), [sizes[name] for name in function.sizes])


@ts.kernel
def matmul(a: Tile["M", "K"], b: Tile["K", "N"], o: Tile["M", "N", f32]):
    tile.store(o, tile.mma(a, b))


@pytest.mark.parametrize("dtype, kind, size", [(ts.f32, "f32", 4), (ts.bf16, "bf16", 2), (ts.f16, "f16", 2)])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (33, 7, 129), (1000, 3, 64)])
def test_matmul(dtype, kind, size, m, n, k):
    found = cost_of(matmul, dtype, dtype, M=m, N=n, K=k)
    assert found.flops == {kind: 2 * m * n * k}
    assert (found.bytes_read, found.bytes_written) == (size * k * (m + n), 4 * m * n)


def test_rows():
    @ts.kernel
    def normalise(x: Tile["S", "D", bf16], w: Tile["D", f32], o: Tile["S", "D", bf16], eps: float = 1e-6):
        wide = tile.cast(x, f32)
        tile.store(o, tile.cast(wide * tile.rsqrt(tile.reduce_mean(wide * wide, axis=-1) + eps)[:, None] * w, bf16))

    s, d = 33, 100
    found = cost_of(normalise, S=s, D=d)
    # A product, a sum and two products an element; an addition and a root a row.
    assert found.flops == {"f32": 4 * s * d + 2 * s}
    assert (found.bytes_read, found.bytes_written, found.bytes) == (2 * s * d + 4 * d, 2 * s * d, 4 * s * d + 4 * d)
    assert cost_of(normalise, S=0, D=d).flops == {}


@pytest.mark.parametrize("v, n", [(1000, 10), (5, 1000)])
def test_gathered_rows_count_and_no_more_than_the_table(v, n):
    @ts.kernel
    def embed(index: Tile["N", int32], table: Tile["V", "D", f32], o: Tile["N", "D", f32]):
        for i in tile.grid(tile.context().N):
            o[i, :] = table[index[i], :]

    d = 6
    found = cost_of(embed, V=v, N=n, D=d)
    assert found.bytes_read == 4 * n + 4 * d * min(n, v) and found.bytes_written == 4 * n * d
    assert found.flops == {}


@pytest.mark.parametrize("s", [1, 63, 64, 100, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_and_triangular_loops(s, causal):
    block = 64

    @ts.kernel
    def scores(q: Tile["S", "D", f32], k: Tile["S", "D", f32], o: Tile["S", "S", f32], lower: bool = False):
        ctx = tile.context()
        for i in tile.range(0, ctx.S, 64):
            end = tile.minimum(i + 64, ctx.S) if lower else ctx.S
            for j in tile.range(0, end, 64):
                o[i:i + 64, j:j + 64] = tile.mma(q[i:i + 64], tile.transpose(k[j:j + 64]))

    d = 8
    function = scores.trace(ts.f32, ts.f32, ts.f32, causal)
    found = cost(function, [0] * 3, [{"S": s, "D": d}[name] for name in function.sizes])
    pairs = sum(min(block, s - i) * min(block, s - j) for i in range(0, s, block)
                for j in range(0, i + 1 if causal else s, block))
    assert found.flops == {"f32": 2 * d * pairs}
    assert found.bytes_read == 2 * 4 * s * d  # once each, though the loops read k again and again
    assert found.bytes_written == 4 * pairs


def test_int_arguments_bound_loops_and_unknown_loops_count_once():
    @ts.kernel
    def repeat(x: Tile["N", f32], o: Tile["N", f32], times: int):
        total = tile.load(x)
        for _ in tile.range(0, times, 1):
            total = total * 2.0
        tile.store(o, total)

    function = repeat.trace()
    assert cost(function, [None, None, 7], [10]).flops == {"f32": 70}
    assert cost(function, [None, None, 0], [10]).flops == {}

    @ts.kernel
    def repeat_read(x: Tile["N", f32], o: Tile["N", f32], times: Tile[1, int64]):
        total = tile.load(x)
        for _ in tile.range(0, times[0], 1):
            total = total * 2.0
        tile.store(o, total)

    assert cost_of(repeat_read, N=10).flops == {"f32": 10}


def test_more_iterations_than_are_looked_at():
    """A loop of 40,000 ragged slices is sampled: right to a thousandth."""
    @ts.kernel
    def slices(x: Tile["N", f32], o: Tile["N", f32]):
        for i in tile.range(0, tile.context().N, 3):
            o[i:i + 3] = x[i:i + 3] * 2.0

    n = 120_001
    assert cost_of(slices, N=n).flops["f32"] == pytest.approx(n, rel=1e-3)


def test_cost_needs_no_tensors():
    found = cost(matmul.trace(), [torch.empty(0)] * 3, [2, 3, 5])
    assert found.total_flops == 2 * 2 * 3 * 5
