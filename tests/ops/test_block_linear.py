"""Linear maps and look-ups with a GGUF file's blocks, against the weight that the gguf package dequantizes."""

from __future__ import annotations

import gguf
import pytest
import torch

from tessera import ops
from tessera.errors import InputError
from tessera.kernel.recording import record
from tessera.ops.block_linear import block_embedding, block_linear, dequantize_blocks
from tessera.ops.kernels.quantized import from_blocks

KINDS = ("Q8_0", "Q4_0", "Q4_1")


def weight_of(kind, rows, columns, seed):
    """(the parts that the kernels read, the weight as the gguf package has it, f32)."""
    wanted = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    blocks = gguf.quants.quantize(wanted.numpy(), gguf.GGMLQuantizationType[kind])
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    return from_blocks(torch.from_numpy(blocks), kind), weight


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_as_the_gguf_package_does(kind):
    parts, weight = weight_of(kind, 9, 96, 1)
    torch.testing.assert_close(dequantize_blocks(*parts), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_product_against_float64(kind, dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    parts, weight = weight_of(kind, 33, 64, rows)
    x = torch.randn(2, rows, 64, generator=generator).to(dtype)
    bias = torch.randn(33, generator=generator)
    for given in (None, bias):
        expected = x.double() @ weight.double().t() + (0 if given is None else given.double())
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        actual = block_linear(x, *parts, given)
        assert actual.dtype is dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_every_batch(kind):
    parts, _ = weight_of(kind, 70, 160, 5)
    x = torch.randn(40, 160, generator=torch.Generator().manual_seed(6))
    whole = block_linear(x, *parts)
    for rows in (1, 2, 7, 16, 17):
        assert torch.equal(block_linear(x[:rows], *parts), whole[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_activations(kind):
    parts, weight = weight_of(kind, 20, 32, 7)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(8), requires_grad=True)
    bias = torch.zeros(20, requires_grad=True)
    block_linear(x, *parts, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 32), rtol=1e-5, atol=1e-5)
    assert torch.equal(bias.grad, torch.full((20,), 5.0))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_id(kind):
    parts, weight = weight_of(kind, 50, 64, 9)
    ids = torch.tensor([[0, 49], [7, 7]])
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(block_embedding(ids, *parts, dtype), weight[ids].to(dtype), rtol=1e-2 if dtype is
                                   torch.bfloat16 else 1e-6, atol=1e-7)


def test_the_reference_and_a_recording():
    parts, _ = weight_of("Q4_1", 20, 32, 11)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(12))
    with ops.implementation("reference"):
        torch.testing.assert_close(block_linear(x, *parts), x @ dequantize_blocks(*parts).t())
    with record("test") as recorded:
        block_linear(x, *parts)
        block_embedding(torch.tensor([3]), *parts, torch.float32)
    assert [launch.specialisation.name for launch in recorded.launches] == [
        "int4_linear_kernel", "int4_embedding_kernel"]


def rounding_bound(x, weight):
    """What rounding x to 8 bits by groups may change, with the f32 sums: see block_linear."""
    largest = x.double().abs().unflatten(-1, (-1, 32)).amax(-1)
    sums = weight.double().abs().unflatten(-1, (-1, 32)).sum(-1)
    rounding = x.shape[-1] * 2.0**-23 * (x.double().abs() @ weight.double().abs().t())
    return 1.001 * (largest / 254) @ sums.t() + rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,columns,depth", [(1, 9, 32), (3, 33, 288), (8, 70, 96), (21, 40, 160)])
def test_int8_activations_stay_within_their_bound(kind, rows, columns, depth):
    parts, weight = weight_of(kind, columns, depth, rows)
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(rows)) * torch.logspace(-3, 3, depth)
    x[0, :32] = 0
    bias = torch.randn(columns, generator=torch.Generator().manual_seed(1))
    actual = block_linear(x, *parts, bias, activations="int8").double()
    expected = x.double() @ weight.double().t() + bias.double()
    bound = rounding_bound(x, weight) + 2.0**-23 * expected.abs()
    assert ((actual - expected).abs() <= bound).all()
    with ops.implementation("reference"):
        reference = block_linear(x, *parts, bias, activations="int8").double()
    assert ((actual - reference).abs() <= 0.01 * bound + 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations_give_a_row_the_same_bits_in_every_batch(kind):
    parts, _ = weight_of(kind, 70, 160, 5)
    x = torch.randn(40, 160, generator=torch.Generator().manual_seed(6))
    whole = block_linear(x, *parts, activations="int8")
    for rows in (1, 2, 5, 8, 9, 16, 17):
        assert torch.equal(block_linear(x[:rows], *parts, activations="int8"), whole[:rows])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(block_linear(x, *parts, activations="int8"), whole)
    finally:
        torch.set_num_threads(before)


def test_gradient_through_rounded_activations():
    parts, weight = weight_of("Q4_0", 20, 32, 7)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(8), requires_grad=True)
    block_linear(x, *parts, activations="int8").sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 32), rtol=1e-5, atol=1e-5)


def test_other_activations_are_refused():
    parts, _ = weight_of("Q4_0", 20, 32, 7)
    with pytest.raises(InputError, match="activations: 'int4' given; expected 'int8' or None"):
        block_linear(torch.ones(1, 32), *parts, activations="int4")
