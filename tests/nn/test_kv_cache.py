"""KVCache against plain concatenation: growth, storage types, and every way of changing its rows."""

import pytest
import torch

import tessera as ts
from tessera.errors import InputError, ShapeError, UnsupportedError


def cache_of(dtype="f32", batch_size=3, max_seq_len=300):
    return ts.KVCache(batch_size, max_seq_len, 2, 2, 8, dtype=dtype)


def fill(cache, lengths, seed=0):
    """Append pieces of these lengths to both layers; what was appended, [layer][k, v] -> [B, K, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [[[], []] for _ in range(cache.n_layers)]
    for n in lengths:
        for layer in range(cache.n_layers):
            k, v = (torch.randn(cache.batch_size, 2, n, 8, generator=generator) for _ in range(2))
            pieces[layer][0].append(k), pieces[layer][1].append(v)
            cache.update(layer, k, v)
    return [[torch.cat(parts, 2) for parts in layer] for layer in pieces]


def content(cache, layer):
    empty = torch.empty(cache.batch_size, 2, 0, 8)
    return cache.update(layer, empty, empty)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_growth_keeps_everything(seed):
    lengths = torch.randint(1, 90, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    cache = cache_of(max_seq_len=600)
    expected = fill(cache, [*lengths, 1, 1], seed)
    assert cache.length == sum(lengths) + 2
    for layer in range(2):
        for actual, wanted in zip(content(cache, layer), expected[layer]):
            assert torch.equal(actual, wanted)


def test_storage_doubles_and_is_never_larger_than_the_limit():
    cache = cache_of(max_seq_len=1000)
    assert cache.nbytes == cache.capacity == 0
    sizes = set()
    for _ in range(1000):
        fill(cache, [1])
        sizes.add(cache.capacity)
    assert sizes == {64, 128, 256, 512, 1000}
    assert cache.nbytes == 2 * 2 * 3 * 2 * 1000 * 8 * 4
    with pytest.raises(InputError, match=r"KVCache: 1001 tokens given \(1000 of them cached\); .* max_seq_len = 1000"):
        fill(cache, [1])
    assert cache.length == 1000


def test_views_are_not_copies():
    cache = cache_of()
    fill(cache, [5])
    storage = content(cache, 0)[0].data_ptr()
    fill(cache, [1, 1])
    assert content(cache, 0)[0].data_ptr() == storage


@pytest.mark.parametrize("dtype, relative, bytes_per_head", [
    ("f32", 0, 32), ("bf16", 2**-8, 16), ("f16", 2**-11, 16), ("fp8_e4m3", 2**-4, 12), ("fp8_e5m2", 2**-3, 12)])
def test_storage_error_and_size(dtype, relative, bytes_per_head):
    """fp8: half a step of the entry, or half the finest step of the head's largest, at scales from 1e-6 to 1e6."""
    cache = cache_of(dtype)
    generator = torch.Generator().manual_seed(4)
    k = torch.randn(3, 2, 50, 8, generator=generator)
    if cache.dtype.bits == 8 or dtype == "f32":
        k = k * torch.logspace(-6, 6, 50)[:, None]
    k[0, 0, 7] = 0
    for got in cache.update(0, k, k):
        finest = {"fp8_e4m3": 2**-10 / 448, "fp8_e5m2": 2**-17 / 57344, "f16": 2**-25}.get(dtype, 0)
        largest = k.abs().amax(-1, keepdim=True) if cache.dtype.bits == 8 else 1
        assert got.dtype == torch.float32
        assert ((got - k).abs() <= 1.0001 * (relative * k.abs() + finest * largest)).all()
    cache.update(1, k, k)
    assert cache.nbytes == 2 * 2 * 3 * 2 * cache.capacity * bytes_per_head


@pytest.mark.parametrize("dtype", ["f32", "fp8_e5m2"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0], [2, 1, 0, 0, 2]])
def test_select_and_reorder(rows, dtype):
    cache, twin = cache_of(dtype), cache_of(dtype)
    fill(cache, [70, 5], 5), fill(twin, [70, 5], 5)
    valid = torch.rand(3, 76, generator=torch.Generator().manual_seed(6)) < 0.5
    cache.mark_valid(1, valid)
    (cache.reorder if len(rows) == 3 else cache.select)(torch.tensor(rows))
    assert cache.batch_size == len(rows)
    assert torch.equal(cache.valid, valid[rows])
    for layer in range(2):
        for actual, before in zip(content(cache, layer), content(twin, layer)):
            assert torch.equal(actual, before[rows])
    fill(cache, [3])
    assert cache.length == 78


def test_truncate_then_append():
    cache = cache_of()
    first = fill(cache, [20], 7)
    cache.mark_valid(0, torch.ones(3, 20, dtype=torch.bool))
    cache.truncate(12)
    assert cache.length == 12 and cache.valid.shape == (3, 12)
    second = fill(cache, [4], 8)
    expected = torch.cat((first[1][0][:, :, :12], second[1][0]), 2)
    assert torch.equal(content(cache, 1)[0], expected)
    with pytest.raises(InputError, match=r"length: 17 given; expected 0\.\.16 \(cached\)"):
        cache.truncate(17)


def test_valid_places_are_remembered():
    cache = cache_of(batch_size=2)
    assert cache.mark_valid(3, None) is None
    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert cache.mark_valid(3, mask) is mask
    fill(cache, [3])
    assert cache.mark_valid(2, None).tolist() == [[False, True, True, True, True], [True] * 5]


def test_no_gradient_is_kept():
    cache = cache_of()
    k = torch.randn(3, 2, 4, 8, requires_grad=True)
    assert not any(got.requires_grad for got in cache.update(0, k, k))


def test_refused():
    for name, value in (("batch_size", 0), ("max_seq_len", 0), ("n_layers", -1), ("n_kv_heads", 0), ("d_head", 0)):
        sizes = {"batch_size": 1, "max_seq_len": 1, "n_layers": 1, "n_kv_heads": 1, "d_head": 1, name: value}
        with pytest.raises(InputError, match=f"{name}: {value} given; expected at least 1"):
            ts.KVCache(**sizes)
    with pytest.raises(InputError, match="compression: 'zip' given; expected 'group_query' or None"):
        ts.KVCache(1, 1, 1, 1, 1, compression="zip")
    with pytest.raises(UnsupportedError, match="dtype: int8 given; a KV cache holds one of f32"):
        ts.KVCache(1, 1, 1, 1, 1, dtype="int8")
    cache = cache_of()
    with pytest.raises(ShapeError, match=r"k, v: \(3, 4, 1, 8\), \(3, 4, 1, 8\) given; expected \(3, 2, 1, 8\)"):
        cache.update(0, torch.zeros(3, 4, 1, 8), torch.zeros(3, 4, 1, 8))
    for rows, message in (([3], r"rows: 3 given; expected 0\.\.2"), ([-1], "rows: -1 given"), ([], "at least one row"),
                          ([True, False, True], r"rows: \(3,\) torch.bool given")):
        with pytest.raises(InputError, match=message):
            cache.select(rows)
