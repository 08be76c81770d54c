"""Control flow, indexing and calls of the language, run on interp against plain Python and torch."""

import math

import pytest
import torch

import tessera as ts
from tessera import Tile, bf16, f32, int32, tile
from tessera.errors import CompileError

SIZES = (1, 7, 33)


@pytest.fixture(autouse=True)
def interp(monkeypatch):
    """Run on the reference backend."""
    monkeypatch.setenv("TESSERA_BACKEND", "interp")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@ts.kernel
def collatz(n: Tile["N", int32], steps: Tile["N", int32], limit: int):
    for i in tile.grid(n.shape[0]):
        value = n[i]
        count = 0
        while value != 1:
            if count >= limit:
                break
            value = value // 2 if value % 2 == 0 else 3 * value + 1
            count += 1
        steps[i] = tile.cast(count, int32)


@pytest.mark.parametrize("limit", [3, 1000])
def test_while_with_break_and_conditional_expression(limit):
    n = torch.arange(1, 30, dtype=torch.int32)
    steps = torch.empty_like(n)
    collatz(n, steps, limit)

    def reference(value):
        count = 0
        while value != 1 and count < limit:
            value, count = (value // 2 if value % 2 == 0 else 3 * value + 1), count + 1
        return count

    assert steps.tolist() == [reference(v) for v in n.tolist()]


@ts.kernel
def first_above(x: Tile["S", "D", f32], where: Tile["S", int32], bound: float):
    for i in tile.grid(x.shape[0]):
        found = -1
        for j in tile.range(x.shape[1]):
            if x[i, j] < -bound:
                continue
            if x[i, j] > bound:
                found = j
                break
        where[i] = tile.cast(found, int32)


@pytest.mark.parametrize("size", SIZES)
def test_for_with_break_and_continue(size):
    x = rand(5, size)
    where = torch.empty(5, dtype=torch.int32)
    first_above(x, where, 0.7)
    expected = [next((j for j, v in enumerate(row) if v > 0.7), -1) for row in x.tolist()]
    assert where.tolist() == expected


def clip_or_scale(value, low, scale=2.0):
    if value < low:
        return low
    if value > 0:
        return value * scale
    return value


@ts.kernel
def helper_with_returns(x: Tile["N", f32], o: Tile["N", f32]):
    for i in tile.grid(x.shape[0]):
        o[i] = clip_or_scale(x[i], -0.5)


def test_inlined_function_with_early_returns():
    x = rand(40)
    o = torch.empty_like(x)
    helper_with_returns(x, o)
    expected = [clip_or_scale(v, -0.5) for v in x.tolist()]
    torch.testing.assert_close(o, torch.tensor(expected))


@ts.kernel
def branch_merge(x: Tile["N", f32], o: Tile["N", f32], n: int):
    scale = 1
    shift = x * 0.0
    if n > 2:
        scale = 2.5
        shift = shift + 1.0
    elif n == 2:
        scale = 0.5
    o[:] = x * scale + shift


@pytest.mark.parametrize("n", [1, 2, 3])
def test_if_merges_numbers_and_tiles(n):
    x = rand(9)
    o = torch.empty_like(x)
    branch_merge(x, o, n)
    scale, shift = {1: (1, 0), 2: (0.5, 0), 3: (2.5, 1)}[n]
    torch.testing.assert_close(o, x * scale + shift)


@ts.kernel
def blocked_sum(x: Tile["S", "D", f32], o: Tile["S", f32], block: ts.constexpr):
    for i in tile.grid(x.shape[0]):
        total = 0.0
        for j in tile.range(0, x.shape[1], block):
            total += tile.sum(x[i, j:j + block])
        o[i] = total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [1, 4, 64])
def test_ragged_blocks(size, block):
    x = rand(3, size)
    o = torch.empty(3)
    blocked_sum(x, o, block)
    torch.testing.assert_close(o, x.double().sum(-1).float())


@ts.kernel
def carried_block(x: Tile["S", "D", f32], o: Tile["D", f32]):
    ctx = tile.context()
    for j in tile.grid(tile.cdiv(ctx.D, 16)):
        acc = tile.zeros((16,))
        low = acc
        for i in range(ctx.S):
            row = x[i, j * 16:j * 16 + 16]
            acc, low = acc + row, tile.minimum(low, row)
        o[j * 16:j * 16 + 16] = acc + low


@pytest.mark.parametrize("size", SIZES)
def test_carried_tile_takes_the_ragged_end(size):
    x = rand(4, size)
    o = torch.empty(size)
    carried_block(x, o)
    torch.testing.assert_close(o, x.sum(0) + x.min(0).values.clamp(max=0))


@ts.kernel
def indexing_forms(x: Tile["S", "H", "D", f32], o: Tile["S", "D", f32], w: Tile["D", f32]):
    last = x[:, -1]
    first = x[:, 0, :]
    halves = tile.concat([x[..., 0, :4], x[:, 0, 4:]], axis=-1)
    o[:] = last + first * w[None, :] + halves
    o[0, 1:3] = x[0, 0, 1:3] * 2.0
    o[-1, -1] = 5


def test_indexing_forms():
    x, w = rand(3, 2, 7), rand(7, seed=1)
    o = torch.empty(3, 7)
    indexing_forms(x, o, w)
    expected = x[:, -1] + x[:, 0] * w + x[:, 0]
    expected[0, 1:3] = x[0, 0, 1:3] * 2
    expected[-1, -1] = 5
    torch.testing.assert_close(o, expected)


@ts.kernel
def tile_writes(x: Tile["N", f32], o: Tile["N", f32], start: int):
    row = tile.load(x)
    row[2] = 9
    row[start:start + 3] = tile.full((3,), 1.5)
    tile.fill(row[0:1], -1.0)
    o[:] = row


@pytest.mark.parametrize("start", [1, 4, 6])
def test_writes_to_elements_and_slices_of_tiles(start):
    x = rand(8)
    o = torch.empty(8)
    tile_writes(x, o, start)
    expected = x.clone()
    expected[2] = 9
    expected[start:start + 3] = 1.5
    expected[0] = -1
    torch.testing.assert_close(o, expected)


FACTORS = (1.0, 2.0, 3.0)


@ts.kernel
def unrolled(x: Tile["N", f32], o: Tile["N", f32], flag: bool, name: str = "plus"):
    acc = x * 0.0
    for i, factor in enumerate(FACTORS):
        if i == 2 and not flag:
            break
        acc += x * factor
    for k in tile.static_range(1, 3):
        acc = acc + math.sqrt(k)
    if name == "plus":
        acc = acc + 1
    o[:] = acc


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("name", ["plus", "minus"])
def test_unrolled_loops_and_compile_time_conditions(flag, name):
    x = rand(5)
    o = torch.empty(5)
    unrolled(x, o, flag, name=name)
    expected = x * (6.0 if flag else 3.0) + 1 + math.sqrt(2) + (name == "plus")
    torch.testing.assert_close(o, expected)
    assert "for(" not in unrolled.ir(flag=flag)


def test_short_circuit_does_not_read_past_the_end():
    @ts.kernel
    def guarded(x: Tile["N", f32], o: Tile["M", f32]):
        for i in tile.grid(o.shape[0]):
            o[i] = 1.0 if i < x.shape[0] and x[i] > 0 else 0.0

    x = rand(4)
    o = torch.empty(9)
    guarded(x, o)
    assert o.tolist() == [float(i < 4 and x[i] > 0) for i in range(9)]


@ts.kernel
def scale_rows(x: Tile["R", "C", f32], o: Tile["R", "C", f32]):
    ctx = tile.context()
    tile.store(o, x * ctx.C)


@ts.kernel
def calls_a_kernel(x: Tile["S", "D", f32], o: Tile["S", "D", f32]):
    scale_rows(x, o)


def test_kernels_call_kernels():
    x = rand(3, 5)
    o = torch.empty_like(x)
    calls_a_kernel(x, o)
    torch.testing.assert_close(o, x * 5)


def test_retype_changes_annotations_and_body():
    @ts.kernel
    def rounds(x: Tile["N", bf16], o: Tile["N", bf16]):
        o[:] = tile.cast(tile.cast(x, bf16) * 3.0, bf16)

    x = rand(16)
    o = torch.empty_like(x)
    rounds.retype({ts.bf16: ts.f32})(x, o)
    assert torch.equal(o, x * 3)
    assert "bf16" not in rounds.retype({ts.bf16: ts.f32}).ir()


def test_closures_are_constants():
    def make(power):
        @ts.kernel
        def kernel(x: Tile["N", f32], o: Tile["N", f32]):
            o[:] = x ** power

        return kernel

    x = rand(6).abs()
    o = torch.empty_like(x)
    for power in (2, 3, 0.5):
        make(power)(x, o)
        torch.testing.assert_close(o, x ** power)


def test_gather_by_an_index_tile():
    @ts.kernel
    def lookup(ids: Tile["N", int32], table: Tile["V", "D", f32], o: Tile["N", "D", f32]):
        o[:] = table[tile.load(ids)]

    ids, table = torch.tensor([3, 0, 3], dtype=torch.int32), rand(5, 4)
    o = torch.empty(3, 4)
    lookup(ids, table, o)
    assert torch.equal(o, table[ids.long()])


def test_thread_range_inside_a_grid_runs_in_order():
    @ts.kernel
    def pairs(x: Tile["S", "D", f32], o: Tile["S", "D", f32]):
        for i in tile.grid(x.shape[0]):
            for j in tile.thread_range(x.shape[1]):
                o[i, j] = x[i, j] + i * 10 + j

    x = rand(2, 3)
    o = torch.empty_like(x)
    pairs(x, o)
    torch.testing.assert_close(o, x + torch.arange(2)[:, None] * 10 + torch.arange(3))
    assert pairs.ir().count("grid(") == 1


def test_source_that_cannot_be_read():
    space = {"ts": ts, "Tile": Tile}
    exec('def f(x: Tile["N", ts.f32]):\n    x[0] = 1.0\n', space)
    with pytest.raises(CompileError, match="kernel f: its source cannot be read"):
        ts.kernel(space["f"]).check()
