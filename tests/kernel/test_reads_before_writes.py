"""What is read before a write is what was there, on every backend."""

import pytest
import torch

import tessera as ts
from tessera import Tile, f32, tile
from tessera.errors import UnsupportedError
from tests.kernel.backends import BACKENDS, launch


@ts.kernel
def reads_then_clears(x: Tile["N", f32], out: Tile["N", f32]):
    total = tile.sum(x)
    first = x[0]
    for i in tile.grid(x.shape[0]):
        x[i] = 0.0
    for i in tile.grid(x.shape[0]):
        out[i] = total * 10.0 + first


@ts.kernel
def keeps_a_row(x: Tile["N", "D", f32], out: Tile["N", "D", f32], kept: Tile["D", f32]):
    before = tile.load(x[0])
    x[0] = 5.0
    out[0] = x[0]
    kept[:] = before


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_read_before_a_write_to_it(backend):
    x, out = torch.ones(3), torch.empty(3)
    if backend == "triton-interpreter":
        with pytest.raises(UnsupportedError, match="used after its memory was written"):
            launch(reads_then_clears, backend, x, out)
        return
    launch(reads_then_clears, backend, x, out)
    assert out.tolist() == [31, 31, 31] and not x.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_kept(backend):
    x, out, kept = torch.zeros(2, 3), torch.empty(2, 3), torch.ones(3)
    launch(keeps_a_row, backend, x, out, kept)
    assert not kept.any() and out[0].tolist() == x[0].tolist() == [5, 5, 5]
