"""How products reach the tensor cores: the type of each tl.dot, tiles in a grid, loads that elements share."""

import pytest
import torch

import tessera as ts
from tessera import Tile, bf16, f16, f32, fp8_e4m3, int4, int8, tile
from tessera.errors import InputError
from tessera.kernel.backends import cuda
from tessera.ops.kernels.gemm import batched_gemm_kernel
from tessera.ops.kernels.quantized import int4_linear_kernel, int8_group_linear_kernel, pack_int4

from ..backends import launch

SIZES = {"M": 64, "N": 64, "K": 128, "B": 3, "K/32": 4}


@ts.kernel
def product(x: Tile["M", "K"], w: Tile["N", "K"], out: Tile["M", "N", f32]):
    tile.store(out, tile.mma(tile.cast(x, f32), tile.transpose(tile.cast(w, f32))))


def text(kernel, *dtypes, **sizes) -> str:
    function = kernel.trace(*dtypes)
    return cuda.build(function, {name: {**SIZES, **sizes}[name] for name in function.sizes}).source


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(-128, 128, shape, dtype=dtype, generator=generator)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize(("a", "b", "dots"), [
    (bf16, bf16, 1), (bf16, int8, 1), (bf16, fp8_e4m3, 1), (f16, int8, 1), (f32, bf16, 3), (f16, bf16, 3)])
def test_numbers_that_16_bits_hold_are_multiplied_in_16_bits(a, b, dots):
    source = text(product, a, b)
    assert source.count("tl.dot(") == dots and "input_precision" not in source
    assert (".to(tl.float32)" in source.partition("def product")[2]) == (a is f16 and b is bf16)


def test_f32_products_keep_22_bits_unless_the_schedule_says_otherwise():
    assert 'input_precision="tf32x3"' in text(product, f32, f32)
    assert 'input_precision="ieee"' in text(product.with_schedule(f32_dot="ieee"), f32, f32)
    assert 'input_precision="tf32"' in text(product.with_schedule(f32_dot="tf32"), f32, f32)
    assert text(product.with_schedule(mixed_dot="bf16"), f32, bf16).count("tl.dot(") == 1
    with pytest.raises(InputError, match="mixed_dot='f16' given; expected one of bf16x3, bf16x2, bf16"):
        product.with_schedule(mixed_dot="f16")


@pytest.mark.parametrize(("a", "b"), [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.int8), (torch.float16, torch.bfloat16),
    (torch.float8_e4m3fn, torch.bfloat16), (torch.float8_e5m2, torch.float8_e4m3fn)])
def test_mixed_products_have_the_accuracy_of_f32(a, b):
    x, w = draw(17, 70, dtype=a), draw(20, 70, dtype=b, seed=1)
    out = torch.empty(17, 20)
    launch(product, "triton-interpreter", x, w, out)
    expected, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    assert ((out.double() - expected).abs() <= 70 * 2.0**-23 * scale).all()


def test_infinity_stays_infinity_where_f32_is_split():
    x, w = draw(16, 20), draw(16, 20, dtype=torch.bfloat16, seed=1)
    x[3, 4], x[5, 6] = float("inf"), float("nan")
    out = torch.empty(16, 16)
    launch(product, "triton-interpreter", x, w, out)
    expected = x @ w.float().T
    assert torch.equal(out.isinf(), expected.isinf()) and torch.equal(out.isnan(), expected.isnan())


def test_a_product_in_a_grid_is_tiled_over_programs():
    function = batched_gemm_kernel.trace(bf16, bf16, bf16)
    (kernel,) = cuda.build(function, {"B": 4, "M": 1024, "N": 1024, "K": 1024}).kernels
    assert [block for _, block in kernel.grid] == [1, 128, 128]


@pytest.mark.parametrize(("b", "m", "k", "n"), [(2, 150, 40, 140), (3, 1, 33, 70)])
def test_tiles_in_groups_of_rows(b, m, k, n):
    x, y = draw(b, m, k), draw(b, k, n, seed=1)
    out = torch.full((b, m, n), torch.nan)
    launch(batched_gemm_kernel, "triton-interpreter", x, y, out)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-4)


def test_scales_of_groups_and_pairs_of_int4_are_loaded_once():
    source = text(int4_linear_kernel.with_schedule(mixed_dot="bf16"), bf16, int4, f16, f16, bf16)
    assert source.count("tl.load(") == 4 and "tl.interleave(" in source and source.count("tl.reshape(") == 2
    assert " % 2" not in source and "% 32" not in source


@pytest.mark.parametrize("rows", [1, 17])
def test_quantized_weights(rows):
    x, scale = draw(rows, 96), draw(37, 3, seed=1).half()
    quants = draw(37, 96, dtype=torch.int8, seed=2)
    weight = (quants.double().unflatten(1, (3, 32)) * scale.double()[..., None]).flatten(1)
    out = torch.empty(rows, 37)
    launch(int8_group_linear_kernel, "triton-interpreter", x, quants, scale, out)
    torch.testing.assert_close(out.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-2)
    small = quants >> 4
    weight = (small.double().unflatten(1, (3, 32)) * scale.double()[..., None] + scale.double()[..., None]).flatten(1)
    launch(int4_linear_kernel, "triton-interpreter", x, pack_int4(small), scale, scale, out)
    torch.testing.assert_close(out.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-3)
