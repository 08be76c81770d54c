"""Writes to slices of tiles, `t[:, a:b] = u`, on every backend."""

import pytest
import torch

import tessera as ts
from tessera import Tile, f32, tile

from .backends import BACKENDS, launch


@ts.kernel
def known_places(x: Tile["S", "D"], o: Tile["S", "D"]):
    t = tile.load(x)
    t[:, 5:12] = t[:, 5:12] * 2.0
    t[2] = 7.0
    t[:, 3] = -1.0
    t[1:3, 4] = x[0:2, 0]
    tile.store(o, t)


@ts.kernel
def places_of_the_launch(x: Tile["S", "D"], o: Tile["S", "D"], row: int, column: int):
    t = tile.load(x)
    t[:, column:column + 4] = t[:, 0:4]
    t[row:row + 2, column:column + 3] = 9.0
    tile.store(o, t)


@ts.kernel
def by_blocks(x: Tile["S", "D"], o: Tile["S", "D"]):
    ctx = tile.context()
    t = tile.zeros((ctx.S, ctx.D), f32)
    for i in tile.range(0, ctx.D, 8):
        t[:, i:i + 8] = x[:, i:i + 8] + 1.0
    tile.store(o, t)


@ts.kernel
def products(a: Tile["M", "K"], b: Tile["K", 48], o: Tile["M", 48]):
    t = tile.zeros((tile.context().M, 48), f32)
    for k in tile.range(0, 48, 16):
        t[:, k:k + 16] = tile.mma(a, b[:, k:k + 16])
    tile.store(o, t)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_places(backend):
    x = draw(7, 33)
    o, expected = torch.full_like(x, torch.nan), x.clone()
    launch(known_places, backend, x, o)
    expected[:, 5:12] *= 2
    expected[2], expected[:, 3] = 7, -1
    expected[1:3, 4] = x[0:2, 0]
    assert torch.equal(o, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 9), (5, 29)])
def test_places_of_the_launch(backend, row, column):
    x = draw(7, 33)
    o, expected = torch.full_like(x, torch.nan), x.clone()
    launch(places_of_the_launch, backend, x, o, row, column)
    expected[:, column:column + 4] = x[:, 0:4]
    expected[row:row + 2, column:column + 3] = 9
    assert torch.equal(o, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 33])
def test_blocks_that_end_early(backend, width):
    x = draw(3, width)
    o = torch.full_like(x, torch.nan)
    launch(by_blocks, backend, x, o)
    assert torch.equal(o, x + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_put_together(backend):
    a, b = draw(16, 20), draw(20, 48, seed=1)
    o = torch.full((16, 48), torch.nan)
    launch(products, backend, a, b, o)
    torch.testing.assert_close(o.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_a_slice_is_written_as_a_whole():
    """No loop over its elements."""
    assert "insert(" not in known_places.ir() and "concat(" in known_places.ir()
