"""Products of bytes that are scaled group by group: the interpreter's bits, on every kind of processor."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tessera import Tile, f32, int8, int32, kernel, tile
from tessera.kernel.backends import cpu
from tessera.kernel.backends.cpu import jit
from tessera.kernel.backends.cpu.host import target
from tessera.ops.kernels.casted_linear import int8_product_kernel, int8_rows_kernel
from tessera.ops.kernels.quantize import quantize_kernel
from tessera.ops.kernels.quantized import int4_product_kernel, int8_group_product_kernel

from ..backends import launch

TARGETS = {
    "host": target(), "quads": replace(target(), has_vnni=True, emulates_dots=True), "narrow": target("generic"),
    "wide": replace(target(), vector_bits=512, vector_registers=32, has_vnni=True, emulates_dots=True)}
KINDS = ["int8", "int4", "int4 with minima"]


@kernel
def groups_of_64(x: Tile["M", "K", int8], w: Tile["N", "K", int8], scale: Tile["K/64", "N", f32], out: Tile["M", "N"]):
    """Scales that lie along the columns, an offset in the sum, longer groups."""
    (rows, depth), columns = x.shape, w.shape[0]
    left = tile.transpose(tile.reshape(tile.load(x), (rows, depth // 64, 64)), (1, 0, 2))
    right = tile.transpose(tile.reshape(tile.load(w), (columns, depth // 64, 64)), (1, 2, 0))
    product = tile.cast(tile.mma(left, right), f32) - 3.0
    tile.store(out, tile.reduce_sum(product * tile.load(scale)[:, None, :], axis=0))


@kernel
def accumulated(x: Tile["M", "K", int8], w: Tile["N", "K", int8], out: Tile["M", "N", int32]):
    tile.store(out, tile.mma(tile.load(x), tile.transpose(tile.load(w)), tile.load(out)))


def operands(kind: str, m: int, n: int, k: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(m * n + k)
    x = torch.randn(m, k, generator=generator)
    bits = 8 if kind == "int8" else 4
    quants = torch.randint(256, (n, k * bits // 8), generator=generator).to(torch.uint8)
    scale = torch.rand(n, k // 32, generator=generator)
    if kind == "int8":
        return [x, quants.view(torch.int8), scale]
    return [x, quants, scale, torch.randn(n, k // 32, generator=generator) if "minima" in kind else None]


def run(kind: str, backend: str, inputs: list[Tensor | None]) -> Tensor:
    out = torch.full((len(inputs[0]), len(inputs[1])), float("nan"))
    launch(int8_group_product_kernel if kind == "int8" else int4_product_kernel, backend, *inputs, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n,k", [(1, 1, 32), (2, 40, 128), (8, 37, 352), (13, 9, 288)])
def test_same_bits_as_the_interpreter_on_every_processor(kind, m, n, k):
    inputs = operands(kind, m, n, k)
    expected = run(kind, "interp", inputs)
    for name, host in TARGETS.items():
        with mock.patch.object(cpu, "target", return_value=host):
            assert torch.equal(run(kind, "cpu", inputs), expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind):
    x, quants, scale, *rest = operands(kind, 5, 33, 160)
    minimum = rest[0] if rest and rest[0] is not None else torch.zeros_like(scale)
    groups = x.double().unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / step).round() * step).flatten(-2)
    if kind != "int8":
        quants = torch.stack([quants & 15 ^ 8, quants >> 4 ^ 8], -1).flatten(-2).double() - 8
    weight = quants.double().unflatten(-1, (-1, 32)) * scale.double()[..., None] + minimum.double()[..., None]
    torch.testing.assert_close(run(kind, "cpu", operands(kind, 5, 33, 160)).double(),
                               rounded @ weight.flatten(-2).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m,n,k", [(1, 5, 64), (9, 20, 192)])
def test_longer_groups_and_other_formulas(m, n, k):
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8) for rows in (m, n))
    scale = torch.randn(k // 64, n, generator=generator)
    results = []
    for backend in ("interp", "cpu"):
        results.append(torch.full((m, n), float("nan")))
        launch(groups_of_64, backend, x, w, scale, results[-1])
    assert torch.equal(*results)


@pytest.mark.parametrize("k", [31, 64, 100])
def test_integers_are_added_to_an_accumulator(k):
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8) for rows in (3, 21))
    out = torch.full((3, 21), 1000, dtype=torch.int32)
    launch(accumulated, "cpu", x, w, out)
    assert torch.equal(out.double(), x.double() @ w.double().T + 1000)


@pytest.mark.parametrize("m,n,k", [(1, 5, 7), (3, 40, 100), (9, 33, 64)])
def test_rows_in_one_launch_have_the_bits_of_two(m, n, k):
    generator = torch.Generator().manual_seed(m)
    x, scale = torch.randn(m, k, generator=generator), torch.rand(n, generator=generator)
    w = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    codes, step = torch.empty(m, k, dtype=torch.int8), torch.empty(m)
    outs = [torch.full((m, n), float("nan")) for _ in range(3)]
    launch(int8_rows_kernel, "interp", x, w, scale, outs[0])
    launch(int8_rows_kernel, "cpu", x, w, scale, outs[1])
    launch(quantize_kernel, "cpu", x, codes, step)
    launch(int8_product_kernel, "cpu", codes, step, w, scale, outs[2], None, True)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("kind,name,instruction", [
    ("int8", "sapphirerapids", "vpdpbusd"), ("int4", "znver4", "vpdpbusd"), ("int4", "x86-64-v3", "vpmaddubsw"),
    ("int8", "x86-64-v4", "vpmaddubsw")])
def test_weights_are_multiplied_as_bytes(kind, name, instruction):
    host, inputs = target(name), operands(kind, 1, 16, 64)
    made = int8_group_product_kernel if kind == "int8" else int4_product_kernel
    with mock.patch.object(cpu, "target", return_value=host), mock.patch.object(cpu.jit, "load_object"), \
            mock.patch.object(cpu.openmp, "entry"):
        text = made.retype({}).source("cpu", *inputs, torch.empty(1, 16))
    assembly = jit.compile_to_asm(text, host)
    used = [line for line in assembly.splitlines() if instruction in line]
    assert used and all(("zmm" if host.has_avx512 else "ymm") in line for line in used)
