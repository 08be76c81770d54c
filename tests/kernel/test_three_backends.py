"""Programs whose meaning the backends could take differently, on interp, cpu and Triton's interpreter."""

import pytest
import torch

import tessera as ts
from tessera import Tile, bf16, f16, f32, f64, fp8_e4m3, int4, int8, int32, int64, tile, uint8
from tessera.errors import UnsupportedError
from tests.kernel.backends import BACKENDS, launch


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@ts.kernel
def joins_ragged_blocks(x: Tile["N", f32], y: Tile["M", f32], total: Tile["P", f32], top: Tile["P", f32],
                        both: Tile["P", 40, f32]):
    for i in tile.grid(total.shape[0]):
        joined = tile.concat([x[i * 16:i * 16 + 16], tile.load(y[i * 8:i * 8 + 8]) * 2.0])
        total[i] = tile.sum(joined * joined)
        top[i] = tile.max(joined)
        tile.store(both[i, 0:24], joined)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_with_ragged_ends_join_without_a_gap(backend):
    for n in (1, 33):
        x, y, programs = rand(n), rand(n // 2 + 8, seed=n), -(-n // 16)
        total, top, both = torch.empty(programs), torch.empty(programs), torch.zeros(programs, 40)
        launch(joins_ragged_blocks, backend, x, y, total, top, both)
        for i in range(programs):
            joined = torch.cat([x[i * 16:i * 16 + 16], y[i * 8:i * 8 + 8] * 2])
            torch.testing.assert_close(total[i], joined.square().sum())
            assert top[i] == joined.max()
            assert torch.equal(both[i], torch.cat([joined, torch.zeros(40 - len(joined))]))


@ts.kernel
def multiplies_ragged_rows(x: Tile["N", "D", f32], y: Tile["N", "D", f32], w: Tile["D", "E", f32], o: Tile["E", f32]):
    total = tile.zeros((w.shape[1],))
    for i in tile.range(0, x.shape[0], 8):
        rows = tile.concat([x[i:i + 8], y[i:i + 8]], axis=0)
        total = total + tile.sum(tile.mma(rows, w), axis=0)
    tile.store(o, total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_ragged_ends_join_before_a_product(backend):
    x, y, w, o = rand(13, 5), rand(13, 5, seed=1), rand(5, 11, seed=2), torch.empty(11)
    launch(multiplies_ragged_rows, backend, x, y, w, o)
    torch.testing.assert_close(o.double(), ((x + y).double() @ w.double()).sum(0), rtol=1e-4, atol=1e-4)


@ts.kernel
def exact_constants(x: Tile["N", f64], o: Tile["N", f64], factor: float):
    p = tile.abs(x) + 0.01
    o[:] = p ** 1.7 + tile.fma(x, 1.3, tile.maximum(x, 0.3)) * factor


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_and_arguments_of_f64_keep_their_digits(backend):
    x = rand(33).double()
    o = torch.empty_like(x)
    launch(exact_constants, backend, x, o, 0.1)
    expected = (x.abs() + 0.01) ** 1.7 + (x * 1.3 + x.clamp(min=0.3)) * 0.1
    torch.testing.assert_close(o, expected, rtol=1e-14, atol=1e-14)


@ts.kernel
def to_ints(x: Tile["N", bf16], o: Tile["N", int32], wide: Tile["N", int64]):
    o[:] = tile.cast(x, int32)
    wide[:] = tile.cast(x, int64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_becomes_ints(backend):
    x = (rand(33) * 100).bfloat16()
    o, wide = torch.empty(33, dtype=torch.int32), torch.empty(33, dtype=torch.int64)
    launch(to_ints, backend, x, o, wide)
    assert o.tolist() == wide.tolist() == [int(v) for v in x.tolist()]


@ts.kernel
def writes_rows(x: Tile["N", "D", f32], index: Tile["M", int32], y: Tile["M", "D", f32], o: Tile["N", "D", f32],
                sums: Tile["N", f32]):
    i = tile.load(index)
    o[i] = y
    o[i, :] += x[i]
    tile.store(sums[i], 2.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_int_tile_as_an_index_writes_rows(backend):
    x, index, y = rand(9, 5), torch.tensor([7, 0, 3, 8], dtype=torch.int32), rand(4, 5, seed=1)
    o, sums = torch.zeros(9, 5), torch.zeros(9)
    launch(writes_rows, backend, x, index, y, o, sums)
    expected, expected_sums = torch.zeros(9, 5), torch.zeros(9)
    expected[index.long()], expected_sums[index.long()] = y + x[index.long()], 2.5
    assert torch.equal(o, expected) and torch.equal(sums, expected_sums)


@ts.kernel
def divides(x: Tile["N", int32], y: Tile["N", int32], q: Tile["N", int32], r: Tile["N", int32], n: int):
    q[:] = x // y
    r[:] = x % y + x.shape[0] // n


def test_division_by_zero_does_not_stop_the_process():
    x = torch.tensor([1, -5, 7, -2**31, -7, 7, 0], dtype=torch.int32)
    y = torch.tensor([0, 0, 2, -1, 2, -2, 3], dtype=torch.int32)
    q, r = torch.empty_like(x), torch.empty_like(x)
    launch(divides, "cpu", x, y, q, r, 0)
    fits = (y != 0) & (y != -1)
    assert torch.equal(q[fits], x[fits] // y[fits]) and torch.equal(r[fits], x[fits] % y[fits])
    assert q[y == 0].tolist() == [0, 0]


@ts.kernel
def divides_floats(x: Tile["N", f32], y: Tile["N", f32], q: Tile["N", f32], r: Tile["N", f32]):
    q[:] = x // y
    r[:] = x % y


@pytest.mark.parametrize("backend", BACKENDS)
def test_quotients_and_remainders_of_floats_are_exact(backend):
    generator = torch.Generator().manual_seed(3)
    x = torch.cat([rand(40) * 10.0 ** torch.randint(-2, 7, (40,), generator=generator), torch.tensor([-7.0, 7.0, 0.0])])
    y = torch.cat([rand(40, seed=1), torch.full((3,), 0.7)])
    q, r = torch.empty_like(x), torch.empty_like(x)
    launch(divides_floats, backend, x, y, q, r)
    exact = torch.div(x.double(), y.double(), rounding_mode="floor")
    small = exact.abs() < 2**22
    assert torch.equal(q[small].double(), exact[small])
    torch.testing.assert_close(r, torch.remainder(x.double(), y.double()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("backend", ["interp", "cpu"])
def test_quotients_of_numbers_without_end(backend, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([5.0, -5.0, 0.0, inf, 1.0, 0.0, nan, -6.0, 6.0], dtype=dtype.torch)
    y = torch.tensor([inf, inf, -inf, 2.0, 0.0, 0.0, 1.0, 3.0, -3.0], dtype=dtype.torch)
    q, r = torch.empty_like(x), torch.empty_like(x)
    launch(divides_floats.retype({f32: dtype}), backend, x, y, q, r)
    torch.testing.assert_close(q, torch.tensor([0, -1, 0, nan, inf, nan, nan, -2, -2], dtype=q.dtype), equal_nan=True)
    torch.testing.assert_close(r, torch.tensor([5, inf, 0, nan, nan, nan, nan, 0, 0], dtype=q.dtype), equal_nan=True)


@ts.kernel
def packs(x: Tile["N", "2*K", f32], o: Tile["N", "K", uint8], scale: Tile["N", f32]):
    values = tile.load(x)
    step = tile.reduce_max(tile.abs(values)) / 7.0
    pairs = tile.reshape(tile.cast(tile.round(values / step[:, None]), int32), (x.shape[0], o.shape[1], 2))
    o[:] = tile.cast((pairs[..., 0] & 15) | ((pairs[..., 1] & 15) << 4), uint8)
    scale[:] = step


@ts.kernel
def unpacks(w: Tile["N", "K", int4], scale: Tile["N", f32], o: Tile["N", "K", f32]):
    o[:] = tile.cast(w, f32) * scale[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_int4_written_as_bytes_and_read_again(backend):
    x = rand(7, 22)
    packed, scale, again = torch.empty(7, 11, dtype=torch.uint8), torch.empty(7), torch.empty(7, 22)
    launch(packs, backend, x, packed, scale)
    launch(unpacks, backend, packed, scale, again)
    assert ((again - x).abs() <= 0.5001 * scale[:, None]).all() and packed.unique().numel() > 40


@pytest.mark.parametrize("dtype", [f64, f16, bf16, fp8_e4m3, int8, uint8, int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_atomic_sums_of_every_width(backend, dtype):
    if backend == "triton-interpreter" and dtype.bits == 8:
        with pytest.raises(UnsupportedError, match=r"atomic_add: .* cannot be added to; expected 16 bits or more"):
            launch(counts_in(dtype), backend, torch.ones(70), torch.zeros(7).to(dtype.torch))
        return
    o = torch.zeros(7).to(dtype.torch)
    launch(counts_in(dtype), backend, torch.ones(70), o)
    assert o.float().tolist() == [10.0] * 7


def counts_in(dtype):
    """`counts` with results of another dtype."""
    @ts.kernel
    def counts(w: Tile["N", f32], o: Tile[7, dtype]):
        for r in tile.grid(w.shape[0]):
            tile.atomic_add(o[r % 7], tile.cast(w[r], o.dtype))

    return counts


def sorts_in(dtype):
    """A kernel that sorts rows and columns of a dtype."""
    @ts.kernel
    def sorts(x: Tile["A", "C", dtype], rows: Tile["A", "C", dtype], order: Tile["A", "C", int32],
              columns: Tile["A", "C", dtype], top: Tile["A", 3, dtype]):
        rows[:], order[:] = tile.sort(x)
        columns[:] = tile.sort(x, axis=0, descending=True)[0]
        top[:] = tile.topk(x, 3)[0]

    return sorts


@pytest.mark.parametrize("dtype", [f64, int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_64_bits_are_sorted_by_all_of_them(backend, dtype):
    x = torch.randint(-2**62, 2**62, (4, 11), generator=torch.Generator().manual_seed(5))
    if dtype == f64:
        x = x.double() / 2.0**60
        x[0, 3], x[1, 2], x[1, 5] = float("nan"), float("inf"), -float("inf")
        x[3, 1], x[3, 4] = 1.0 + 2**-50, 1.0
    else:
        x[0, 0], x[0, 1] = 2**63 - 1, -2**63
        x[3] = x[3] % 3
    x[2] = x[1]
    rows, columns, top = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x[:, :3])
    order = torch.empty(4, 11, dtype=torch.int32)
    launch(sorts_in(dtype), backend, x, rows, order, columns, top)
    expected, expected_order = x.sort(stable=True)
    assert torch.equal(order.long(), expected_order)
    torch.testing.assert_close(rows, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(top, x.sort(descending=True).values[:, :3], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(columns, x.sort(dim=0, descending=True).values, rtol=0, atol=0, equal_nan=True)


@ts.kernel
def signs_of_zeros(x: Tile["N", f32], n: int, chosen: Tile["N", f32], both: Tile[2, "N", f32]):
    if n > 0:
        zero = 0.0
    else:
        zero = -0.0
    chosen[:] = 1.0 / (tile.load(x) * zero)
    both[0] = 1.0 / (tile.load(x) * 0.0)
    both[1] = 1.0 / (tile.load(x) * -0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_keep_their_signs(backend):
    """They are equal, and not the same constant."""
    for n, sign in ((1, 1.0), (-1, -1.0)):
        chosen, both = torch.empty(5), torch.empty(2, 5)
        launch(signs_of_zeros, backend, torch.ones(5), n, chosen, both)
        assert (chosen == sign * torch.inf).all() and (both[0] == torch.inf).all() and (both[1] == -torch.inf).all()
