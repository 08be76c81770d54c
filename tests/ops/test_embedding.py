"""Look-ups and the table's gradient; casted and block-sparse tables within their error bounds."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera import nn, ops
from tessera.errors import InputError, ShapeError
from tests.ops.checks import DTYPES, check_against_float64, check_compiled, layouts, normal

STORAGES = ["fp8_e4m3", "fp8_e5m2", "int8", "bf16", "f16", "f32"]


def random_ids(seed, n_rows, *shape):
    return torch.randint(0, n_rows, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (300,), (4, 7), (0,), (2, 0)])
def test_values_and_gradients(shape, dtype):
    ids = random_ids(1, 11, *shape)  # many ids come several times
    for table in layouts(normal(2, 11, 70, dtype=dtype)):
        check_against_float64(lambda t: ops.embedding(ids, t), lambda t: t[ids], (table,), factor=4)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    rows = ops.embedding(ids.int(), table, other)
    assert torch.equal(rows, table[ids].to(other)) and rows.dtype == other


def test_the_gradient_is_summed_in_order():
    """The same bits on every run and any number of threads."""
    ids, table = random_ids(1, 5, 400), normal(2, 5, 130)
    grad = normal(3, 400, 130).detach()
    expected = torch.zeros(5, 130)
    for i, row in zip(ids.tolist(), grad):
        expected[i] += row
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.autograd.grad(ops.embedding(ids, table), table, grad)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_the_gradient_of_few_rows_of_a_large_table():
    """In 16 bits the sums of the rows that were looked up are f32 too, and rounded once."""
    ids, table = random_ids(1, 90, 40), normal(2, 90, 33, dtype=torch.bfloat16)
    grad = normal(3, 40, 33, dtype=torch.bfloat16).detach()
    expected = torch.zeros(90, 33).index_add(0, ids, grad.float())
    actual, = torch.autograd.grad(ops.embedding(ids.int(), table), table, grad)
    assert torch.equal(actual, expected.bfloat16())


def test_registration_and_compilation():
    ids, table = random_ids(1, 9, 2, 5), normal(2, 9, 8)
    library = torch.ops.tessera
    torch.library.opcheck(library.embedding.default, (table, ids, torch.float32))
    torch.library.opcheck(library.embedding_backward.default, (normal(3, 2, 5, 8).detach(), ids, 9, torch.bfloat16))
    codes, scale = ops.quantize_rows(table.detach(), torch.int8)
    torch.library.opcheck(library.casted_embedding.default, (scale, codes, ids, torch.bfloat16))
    sparse = ops.to_block_sparse(table, 0.5, block_size=4, dtype=torch.int8)
    torch.library.opcheck(library.casted_sparse_embedding.default, (
        sparse.scales, sparse.blocks_MRC, sparse.pointers, sparse.columns, ids, 8, torch.float32))
    check_compiled(lambda t: ops.embedding(ids, t), (table,))
    assert torch.autograd.gradcheck(lambda t: ops.embedding(ids, t), normal(2, 9, 8, dtype=torch.float64))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n_rows, width", [(1, 1), (11, 33), (40, 100)])
def test_casted_within_its_bound(storage, n_rows, width):
    """Rows of very different size; one of zeros."""
    table = normal(1, n_rows, width).detach() * torch.logspace(-4, 3, n_rows)[:, None]
    if n_rows > 2:
        table[2] = 0
    module = nn.CastedEmbedding.from_float(table, storage_dtype=storage, compute_dtype="f32")
    ids = random_ids(2, n_rows, 3, 5)
    error = (module(ids) - table[ids]).abs()
    assert error.max() <= module.error_bound()
    assert torch.equal(module(ids), (module.weight.float() * module.scale[:, None])[ids])
    whole = (module(torch.arange(n_rows)) - table).abs().max().item()
    if n_rows > 1 and storage != "f32":
        assert whole >= module.error_bound() / 20  # the bound is not merely large
    assert nn.CastedEmbedding.from_float(table, storage_dtype=storage)(ids).dtype == torch.bfloat16


def test_casted_module():
    module = ts.nn.CastedEmbedding(20, 8, scale_factor=0.5)
    assert module.weight.dtype == torch.float8_e4m3fn and module(torch.arange(20)).shape == (20, 8)
    restored = ts.nn.CastedEmbedding(20, 8)
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored(torch.arange(20)), module(torch.arange(20)))
    table = normal(1, 9, 6).detach()
    rows = ops.casted_embedding(torch.tensor([3, 8]), table.bfloat16(), 0.5, torch.float32)
    assert torch.equal(rows, table.bfloat16().float()[[3, 8]] * 0.5)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n_rows, width, block_size, sparsity", [
    (32, 32, 16, 0.5), (33, 70, 16, 0.9), (7, 5, 4, 0.25), (20, 12, 3, 0.0), (9, 9, 16, 1.0), (6, 10, 1, 0.7)])
def test_sparse_within_its_bound(n_rows, width, block_size, sparsity, storage):
    table = normal(1, n_rows, width).detach()
    module = nn.CastedSparseEmbedding.from_float(table, sparsity, storage, "f32", block_size)
    n_blocks = -(-n_rows // block_size) * -(-width // block_size)
    assert len(module.block_data) == round(n_blocks * (1 - sparsity))
    ids = random_ids(2, n_rows, 4, 6)
    assert torch.equal(module(ids), module.table.to_dense()[ids])
    error = (module(torch.arange(n_rows)) - table).abs()
    assert error.max() <= module.error_bound()
    kept = module.table.to_dense() != 0
    if storage == "f32":
        assert torch.equal(module.table.to_dense()[kept], table[kept])
    weights = normal(3, 4, 6).detach()
    torch.testing.assert_close(module(ids, weights), module(ids) * weights[..., None])


def test_sparse_module():
    module = ts.nn.CastedSparseEmbedding(40, 32, sparsity=0.75)
    ids = torch.arange(40)
    assert module(ids).dtype == torch.bfloat16 and 0 < len(module.block_data) < 6
    restored = ts.nn.CastedSparseEmbedding(40, 32, sparsity=0.75)
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored(ids), module(ids))
    zeros = ts.nn.CastedSparseEmbedding.from_float(torch.zeros(5, 8))
    assert not zeros(torch.tensor([0, 4])).any() and zeros.error_bound() == 0


def test_learned_positions():
    module = ts.nn.LearnedPositionalEmbedding(12, 8)
    places = torch.tensor([[0, 11, 3]])
    assert torch.equal(module(places), module.weight[places])
    module(places).sum().backward()
    assert torch.equal(module.weight.grad.sum(-1).nonzero().flatten(), torch.tensor([0, 3, 11]))


def test_errors():
    table = torch.ones(5, 4)
    for bad in (-1, 5):
        with pytest.raises(InputError, match=rf"ids: {bad} given; expected 0\.\.4"):
            ops.embedding(torch.tensor([0, bad]), table)
        with pytest.raises(InputError, match=rf"ids: {bad} given"):
            ops.casted_embedding(torch.tensor([bad]), table)
        with pytest.raises(InputError, match=rf"ids: {bad} given"):
            ops.casted_sparse_embedding(torch.tensor([bad]), ops.to_block_sparse(table, 0.0))
    with pytest.raises(InputError, match=r"ids is torch\.float32; expected one of torch\.int64"):
        ops.embedding(torch.ones(2), table)
    with pytest.raises(ShapeError, match=r"table_VD has 1 axis, \[5\]; expected 2"):
        ops.embedding(torch.tensor([0]), torch.ones(5))
    with pytest.raises(ShapeError, match=r"scale has V=3 .* but table_VD has V=5 .*; 1 would fit as well"):
        ops.casted_embedding(torch.tensor([0]), table, torch.ones(3))
    with pytest.raises(ShapeError, match=r"weights has \[3\] for .* but ids has \[1\]"):
        ops.casted_sparse_embedding(torch.tensor([0]), ops.to_block_sparse(table, 0.0), torch.ones(3))
    with pytest.raises(InputError, match=r"sparsity: 1\.5 given"):
        ops.to_block_sparse(table, 1.5)
    with pytest.raises(InputError, match="block_size: 0 given"):
        ops.to_block_sparse(table, 0.5, block_size=0)
