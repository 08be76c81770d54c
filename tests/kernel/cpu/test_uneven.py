"""Programs of a grid that differ in cost are handed out while they run; the result does not depend on it."""

from __future__ import annotations

import pytest
import torch

from tessera import Tile, f32, int64, kernel, tile
from tessera.kernel.backends.cpu.lower import uneven_segments
from tessera.ops import kernels


@kernel
def prefix_sums(x: Tile["N", f32], out: Tile["N", f32]):
    """out[i] = x[0] + ... + x[i]: program i takes i steps."""
    ctx = tile.context()
    for i in tile.grid(ctx.N):
        total = 0.0
        for j in tile.range(0, i + 1):
            total = total + x[j]
        out[i] = total


@kernel
def counted_sums(x: Tile["N", f32], count: Tile["N", int64], out: Tile["N", f32]):
    """out[i] = x[0] + ... + x[count[i] - 1]: the number of steps is data."""
    ctx = tile.context()
    for i in tile.grid(ctx.N):
        total = 0.0
        for j in tile.range(0, count[i]):
            total = total + x[j]
        out[i] = total


@kernel
def whole_sums(x: Tile["N", f32], out: Tile["N", f32]):
    ctx = tile.context()
    for i in tile.grid(ctx.N):
        total = 0.0
        for j in tile.range(0, ctx.N):
            total = total + x[j]
        out[i] = total


@pytest.mark.parametrize("launch,options,expected", [
    (prefix_sums, {}, [0]), (counted_sums, {}, [0]), (whole_sums, {}, []), (kernels.softmax_kernel, {}, []),
    (kernels.flash_attention_kernel, {"causal": True}, [0]), (kernels.flash_attention_kernel, {"causal": False}, [])])
def test_which_programs_differ(launch, options, expected):
    assert uneven_segments(launch.trace(**options)) == expected


@pytest.mark.parametrize("n", [1, 5, 400])
def test_every_program_runs_once(n):
    x, out, counted = torch.randn(n, generator=torch.Generator().manual_seed(n)), torch.zeros(n), torch.zeros(n)
    count = torch.arange(n) * 7 % (n + 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            prefix_sums(x, out.fill_(0))
            counted_sums(x, count, counted.fill_(0))
            sums = torch.cat([torch.zeros(1), x]).double().cumsum(0)
            assert (out - sums[1:]).abs().max() < 1e-4
            assert (counted - sums[count]).abs().max() < 1e-4
    finally:
        torch.set_num_threads(before)
