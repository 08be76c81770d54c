"""Grids whose size is read from memory: a fixed number of programs share the iterations; nothing waits for the GPU."""

import pytest
import torch

import tessera as ts
from tessera import Tile, int64, tile
from tessera.kernel.backends.cuda import launch as cuda_launch
from tessera.kernel.backends.cuda import plan

from ..backends import BACKENDS, launch


@ts.kernel
def take(ids: Tile["N", int64], count: Tile["ONE", int64], x: Tile["V", "D"], o: Tile["N", "D"]):
    n = count[0]
    for i, half in tile.grid(n, 2):
        if half == 0:
            tile.store(o[i], tile.load(x[ids[i]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 3, 5])
def test_as_many_iterations_as_memory_says(backend, count, monkeypatch):
    monkeypatch.setattr(plan, "OPEN_PROGRAMS", 2)
    ids, x = torch.tensor([2, 5, 0, 1, 5]), torch.randn(6, 33, generator=torch.Generator().manual_seed(count))
    o = torch.zeros(5, 33)
    launch(take, backend, ids, torch.tensor([count]), x, o)
    expected = torch.zeros(5, 33)
    expected[:count] = x[ids[:count]]
    assert torch.equal(o, expected)


def test_the_number_of_programs_is_fixed():
    compiled = cuda_launch.Compiled(take.trace())
    (kernel,) = compiled.texts([None] * 4, [5, 1, 6, 33]).kernels
    assert cuda_launch.count_programs(kernel, {}) == plan.OPEN_PROGRAMS
    assert "in range(tl.program_id(0), n, tl.num_programs(0)):" in kernel.source
