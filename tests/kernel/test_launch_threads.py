"""Launches from several Python threads: first ones that compile, of the same and of different kernels, and replays of
graphs among them, all with the bits of one thread alone."""

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tessera import Tile, f32, kernel, tile
from tessera.kernel import graph

THREADS = 6


@kernel
def centred(x: Tile["S", "D"], out: Tile["S", "D"]):
    value = tile.cast(tile.load(x), f32)
    tile.store(out, value - tile.reduce_mean(value, axis=-1, keepdim=True))


@kernel
def product(x: Tile["S", "D"], y: Tile["D", "N"], out: Tile["S", "N"]):
    tile.store(out, tile.mma(tile.load(x), tile.load(y)))


@kernel
def scaled(x: Tile["S", "D"], out: Tile["S", "D"], factor: float, bias: Tile["D"] | None = None):
    value = tile.cast(tile.load(x), f32) * factor
    if bias is not None:
        value = value + tile.cast(tile.load(bias), f32)
    tile.store(out, value)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Work:
    """Launches of kernels that nobody has compiled yet, by number; each gives its result."""

    def __init__(self) -> None:
        self.centred, self.product, self.scaled = (k.retype({}) for k in (centred, product, scaled))
        self.graph = graph.capture(self.chain)
        self.jobs = [lambda n=n, job=job: job(n) for n in (1, 7, 33) for job in (
            self.one_row_each, self.multiplied, self.with_bias, self.without_bias, self.replayed)]

    def one_row_each(self, n: int) -> torch.Tensor:
        out = torch.empty(n, 50, dtype=torch.bfloat16 if n == 7 else torch.float32)
        self.centred(draw(n, 50, seed=n).to(out.dtype), out)
        return out

    def multiplied(self, n: int) -> torch.Tensor:
        out = torch.empty(n, 20)
        self.product(draw(n, 40, seed=n), draw(40, 20, seed=n + 1), out)
        return out

    def with_bias(self, n: int) -> torch.Tensor:
        out = torch.empty(n, 30)
        self.scaled(draw(n, 30, seed=n), out, 0.1, draw(30, seed=2))
        return out

    def without_bias(self, n: int) -> torch.Tensor:
        out = torch.empty(n, 30)
        self.scaled(draw(n, 30, seed=n), out, 0.1)
        return out

    def chain(self, x: torch.Tensor) -> torch.Tensor:
        middle, out = torch.empty_like(x), torch.empty_like(x)
        self.centred(x, middle)
        self.scaled(middle, out, 3.0)
        return out

    def replayed(self, n: int) -> torch.Tensor:
        return self.graph(draw(n, 24, seed=n))


@pytest.mark.parametrize("warm", [False, True], ids=["first", "from disk"])
def test_any_kernels_from_any_threads(warm, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path))
    if warm:
        for job in Work().jobs:
            job()
    work, start = Work(), Barrier(THREADS)

    def run(seed: int) -> list[tuple[int, torch.Tensor]]:
        order = [*range(len(work.jobs))] * 2
        random.Random(seed).shuffle(order)
        start.wait()
        return [(number, work.jobs[number]()) for number in order]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [pair for pairs in pool.map(run, range(THREADS)) for pair in pairs]
    alone = Work()
    expected = [job() for job in alone.jobs]
    for number, result in found:
        assert torch.equal(result, expected[number]), number
