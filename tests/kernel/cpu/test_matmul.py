"""Products inside kernels: what stands before and after them, against float64, for several processors.

A store that alone uses a product computes it chunk by chunk; every other use goes through memory. Either way a row
has the same bits in any batch and at any thread count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera import Tile, f32, kernel, tile
from tessera.kernel import Kernel
from tessera.kernel.backends import cpu
from tessera.kernel.backends.cpu.host import Target, target

HOSTS = {"host": target(), "generic": target("generic"), "dots": replace(
    target(), vector_bits=512, vector_registers=32, has_avx512bf16=True, has_vnni=True, emulates_dots=True)}
SIZES = [(1, 33, 40), (17, 100, 33), (40, 130, 129), (70, 1040, 530)]  # M, N, K


@kernel
def dense(x: Tile["M", "K"], w: Tile["N", "K"], v: Tile["N", "K"], bias: Tile["N"], rest: Tile["M", "N"],
          out: Tile["M", "N"]):
    """out = gelu(x w^T + bias) + rest"""
    product = tile.mma(tile.load(x), tile.transpose(tile.load(w))) + tile.broadcast(tile.load(bias), axis=0)
    tile.store(out, tile.gelu(product) + tile.load(rest))


@kernel
def gated(x: Tile["M", "K"], w: Tile["N", "K"], v: Tile["N", "K"], bias: Tile["N"], rest: Tile["M", "N"],
          out: Tile["M", "N"]):
    """out = silu(x w^T) * (x v^T): two products for one store"""
    row = tile.load(x)
    gate = tile.mma(row, tile.transpose(tile.load(w)))
    tile.store(out, tile.silu(gate) * tile.mma(row, tile.transpose(tile.load(v))))


@kernel
def stored_twice(x: Tile["M", "K"], w: Tile["N", "K"], v: Tile["N", "K"], bias: Tile["N"], rest: Tile["M", "N"],
                 out: Tile["M", "N"]):
    """rest = x w^T, out = 2 x w^T + 1"""
    product = tile.mma(tile.load(x), tile.transpose(tile.load(w)))
    tile.store(rest, product)
    tile.store(out, product * 2.0 + 1.0)


@kernel
def chained(x: Tile["M", "K"], w: Tile["N", "K"], v: Tile["N", "K"], bias: Tile["N"], rest: Tile["M", "N"],
            out: Tile["M", "N"]):
    """out = x w^T + (x v^T) (w v^T)^T: a product is an operand of another one"""
    row, low = tile.load(x), tile.transpose(tile.load(v))
    square = tile.mma(tile.load(w), low)
    inner = tile.mma(row, low)
    tile.store(out, tile.mma(row, tile.transpose(tile.load(w))) + tile.mma(inner, tile.transpose(square)))


@kernel
def normalized(x: Tile["M", "K"], w: Tile["N", "K"], v: Tile["N", "K"], bias: Tile["N"], rest: Tile["M", "N"],
               out: Tile["M", "N"]):
    """out = softmax(x w^T) along the rows: the product is read across"""
    scores = tile.mma(tile.load(x), tile.transpose(tile.load(w)))
    weights = tile.exp(scores - tile.broadcast(tile.reduce_max(scores, axis=-1), axis=-1))
    tile.store(out, weights / tile.broadcast(tile.reduce_sum(weights, axis=-1), axis=-1))


@kernel
def by_blocks(x: Tile["M", "K"], w: Tile["N", "K"], v: Tile["N", "K"], bias: Tile["N"], rest: Tile["M", "N"],
              out: Tile["M", "N"]):
    """out = x w^T, accumulated over blocks of k in a loop"""
    ctx = tile.context()
    for i in tile.grid(tile.cdiv(ctx.M, 50)):
        total = tile.zeros((50, ctx.N), f32)
        for k in tile.range(0, ctx.K, 36):
            block = tile.transpose(tile.load(w[:, k:k + 36]))
            total = tile.mma(tile.load(x[i * 50:i * 50 + 50, k:k + 36]), block, total)
        tile.store(out[i * 50:i * 50 + 50], total)


FORMULAS: dict[Kernel, Callable[..., Tensor]] = {
    dense: lambda x, w, v, bias, rest: F.gelu(x @ w.T + bias) + rest,
    gated: lambda x, w, v, bias, rest: F.silu(x @ w.T) * (x @ v.T),
    stored_twice: lambda x, w, v, bias, rest: 2 * (x @ w.T) + 1,
    chained: lambda x, w, v, bias, rest: x @ w.T + (x @ v.T) @ (w @ v.T).T,
    normalized: lambda x, w, v, bias, rest: (x @ w.T).softmax(-1),
    by_blocks: lambda x, w, v, bias, rest: x @ w.T,
}


@contextmanager
def processor(host: Target) -> Iterator[None]:
    with mock.patch.object(cpu, "target", return_value=host):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m + 100 * n + 10_000 * k)
    draw = [(m, k), (n, k), (n, k), (n,), (m, n)]
    return [(torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) for shape in draw]


@pytest.mark.parametrize("host,dtype", [("host", torch.float32), ("dots", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("launch", FORMULAS, ids=lambda k: k.__name__)
def test_against_float64(launch, host, dtype):
    _against_float64(launch, host, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("host,dtype", [("host", torch.bfloat16), ("generic", torch.float32), ("dots", torch.float32)],
                         ids=str)
@pytest.mark.parametrize("launch", FORMULAS, ids=lambda k: k.__name__)
def test_against_float64_on_more_processors(launch, host, dtype):
    _against_float64(launch, host, dtype)


def _against_float64(launch: Kernel, host: str, dtype: torch.dtype) -> None:
    with processor(HOSTS[host]):
        run = launch.retype({})
        for m, n, k in SIZES:
            arguments = operands(m, n, k, dtype)
            want = FORMULAS[launch](*(t.double() for t in arguments))
            out = torch.full((m, n), float("nan")).to(dtype)
            run(*arguments, out)
            error = (out.double() - want).abs().max() / want.abs().max()
            assert error < (2e-5 if dtype == torch.float32 else 2.0**-6), (m, n, k)
            if launch is stored_twice and dtype == torch.float32:
                assert torch.equal(arguments[4] * 2 + 1, out)


@pytest.mark.parametrize("host,dtype", [("host", torch.float32), ("dots", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("launch", [dense, gated, normalized], ids=lambda k: k.__name__)
def test_rows_have_the_same_bits_in_any_batch(launch, host, dtype):
    x, w, v, bias, rest = operands(64, 100, 150, dtype)
    with processor(HOSTS[host]):
        run = launch.retype({})
        want = torch.empty(64, 100, dtype=dtype)
        run(x, w, v, bias, rest, want)
        for first, last in [(0, 1), (3, 5), (7, 23), (20, 53)]:
            out = torch.empty(last - first, 100, dtype=dtype)
            with threads(1):
                run(x[first:last], w, v, bias, rest[first:last], out)
            assert torch.equal(out, want[first:last]), (first, last)


@kernel
def batched(x: Tile["B", "M", "K"], w: Tile["B", "K", "N"], out: Tile["B", "M", "N"]):
    tile.store(out, tile.mma(tile.load(x), tile.load(w)))


@kernel
def transposed(x: Tile["K", "M"], w: Tile["K", "N"], out: Tile["M", "N"]):
    """The gradient of a weight: both operands run along their lanes."""
    tile.store(out, tile.mma(tile.transpose(tile.load(x)), tile.load(w)))


@pytest.mark.parametrize("host,dtype", [
    ("host", torch.float32), ("host", torch.int8), ("dots", torch.bfloat16), ("dots", torch.int8),
    ("generic", torch.bfloat16)], ids=str)
def test_layouts(host, dtype):
    generator = torch.Generator().manual_seed(1)
    total = torch.int32 if dtype == torch.int8 else torch.float32

    def draw(*shape: int) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-128, 128, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    with processor(HOSTS[host]):
        a, b = draw(3, 20, 37), draw(3, 37, 50)
        out = torch.empty(3, 20, 50, dtype=total)
        batched.retype({})(a, b, out)
        assert _close(out, a.double() @ b.double(), dtype)
        a, b = draw(530, 37), draw(530, 50)
        out = torch.empty(37, 100, dtype=total)
        transposed.retype({})(a, b, out[:, ::2])
        assert _close(out[:, ::2], a.double().T @ b.double(), dtype)
        square = torch.empty(37, 50, dtype=total)
        transposed.retype({})(a, b, square)
        assert torch.equal(square, out[:, ::2])


def _close(out: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    if dtype == torch.int8:
        return torch.equal(out.double(), want)
    return bool(((out.double() - want).abs() <= 1e-5 * want.abs().max()).all())
