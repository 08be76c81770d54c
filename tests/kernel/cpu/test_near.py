"""Gathers whose indices are places next to their own (i ^ n, i >> n) are loads and shuffles, also at cut ends."""

from __future__ import annotations

import pytest
import torch

from tessera import kernel, tile
from tessera.types import Tile


@kernel
def near_kernel(x: Tile["V"], like: Tile["N"], swapped: Tile["N"], far: Tile["N"], doubled: Tile["N"]):
    place = tile.arange(tile.context().N)
    tile.store(swapped, tile.gather(x, place ^ 1))
    tile.store(far, tile.gather(x, place ^ 3))
    tile.store(doubled, tile.gather(x, place >> 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_neighbours(dtype):
    for n in (1, 2, 5, 16, 17, 33, 1001):
        x, place = (torch.randn(n + 3, generator=torch.Generator().manual_seed(n)) * 40).to(dtype), torch.arange(n)
        outs = [torch.zeros(n, dtype=dtype) for _ in range(3)]
        near_kernel(x, torch.zeros(n), *outs)
        for out, index in zip(outs, (place ^ 1, place ^ 3, place >> 1)):
            assert torch.equal(out, x[index]), n
