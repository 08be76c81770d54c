"""The interpreter's shapes, memory, control flow and errors, through hand-built IR."""

import sys

import pytest
import torch

from tessera import types as ts
from tessera.errors import LaunchError
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Location, TileTy, Value

from .programs import Program, apply

D = Dim.of


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1


def blocks(program: Program, view, dim: str, size: int, i):
    """view[i:i+size] with a ragged end."""
    return program.view(view, [("range", 1, D(size), D(dim).__sub__(i.expr).minimum(size))]
                        + [("all",)] * (view.type.rank - 1), [i])


# -- shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ts.f32, ts.bf16, ts.fp8_e4m3, ts.int32, ts.bool_], ids=str)
def test_moves_of_every_dtype(dtype):
    x = torch.randint(0, 2, (2, 3, 5), generator=torch.Generator().manual_seed(1)).to(dtype.torch)
    program = Program()
    value = program.load(program.tensor("x", [2, 3, 5], dtype))
    value = program.transpose(value, (2, 0, 1))
    value = program.reshape(value, [D(5), D(6)])
    value = program.slice(value, [("range", 1, D(3), None), ("all",)], [program.const(1)])
    value = program.concat([value, value], 0)
    value = program.broadcast(value, [D(4), D(6), D(6)], [None, 0, 1])
    expected = x.permute(2, 0, 1).reshape(5, 6)[1:4]
    expected = torch.cat([expected, expected]).expand(4, 6, 6)
    assert torch.equal(apply(program, value, x), expected)


def test_broadcast_by_axes():
    program = Program()
    x = program.load(program.tensor("x", ["M", 1], ts.f32))
    value = program.broadcast(x, [D("K"), D("N"), D("M")], [None, 1, 0])
    result = apply(program, value, numbers(3, 1), M=3, K=2, N=4)
    assert torch.equal(result, numbers(3).expand(2, 4, 3))


def test_extract_and_insert():
    program = Program()
    x = program.load(program.tensor("x", [2, 3], ts.f32))
    one, two = program.const(1), program.const(2)
    value = program.insert(x, program.extract(x, [one, two]), [program.const(0), one])
    assert apply(program, value, numbers(2, 3)).tolist() == [[1, 6, 3], [4, 5, 6]]


def test_where_iota_full():
    program = Program()
    place = program.iota([D(2), D("N")], 1)
    value = program.where(program.binary("lt", place, program.const(2)), program.full([D(2), D("N")], program.const(9)),
                          program.cast(place, ts.int64))
    assert apply(program, value, N=4).tolist() == [[9, 9, 2, 3]] * 2


# -- ragged tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 33])
def test_ragged_blocks_use_their_valid_part_only(size):
    """Per block of 8 rows: x minus the block's column means; sums of the block by mma with ones."""
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    program = Program()
    source = program.tensor("x", ["S", 4], ts.f32)
    out = program.tensor("out", ["S", 4], ts.f32, output=True)
    total = program.tensor("total", ["S", 4], ts.f32, output=True)
    grid = program.grid(program.size(D("S").ceildiv(8)))
    with program.inside(grid):
        start = program.binary("mul", grid.args[0], program.const(8))
        tile = program.load(blocks(program, source, "S", 8, start))
        mean = program.reduce("mean", tile, 0)
        program.store(blocks(program, out, "S", 8, start), program.binary("sub", tile, mean))
        ones = program.full([D(8), D(8)], program.const(1.0))
        program.store(blocks(program, total, "S", 8, start), program.mma(ones, tile))
    got, sums = torch.full((2, size, 4), torch.nan).unbind(0)
    program.run(x, got, sums, S=size)
    for i in range(0, size, 8):
        rows = x[i:i + 8].double()
        torch.testing.assert_close(got[i:i + 8], (rows - rows.mean(0)).float())
        torch.testing.assert_close(sums[i:i + 8], rows.sum(0).expand(rows.shape).float())


def test_an_index_past_the_valid_part_is_an_error():
    program = Program()
    x = program.tensor("x", ["S"], ts.f32)
    start = program.const(8)
    tile = program.load(blocks(program, x, "S", 8, start))
    with pytest.raises(LaunchError, match=r"made.py:1: extract: .*index 2 of an axis of 2 elements"):
        apply(program, program.extract(tile, [program.const(2)]), numbers(10), S=10)


# -- control flow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_for_carries_tiles(steps):
    program = Program()
    x = program.load(program.tensor("x", [3], ts.f32))
    zero, one, n = program.const(0), program.const(1), program.scalar("n", ts.int32)
    result, = program.loop(zero, program.cast(n, ts.int64), one, [x], lambda i, t: [program.binary("add", t, t)])
    assert torch.equal(apply(program, result, numbers(3), steps), numbers(3) * 2**steps)


def test_early_exit_keeps_the_values_of_the_last_iteration():
    program = Program()
    total = program.const(0)

    def body(i, t):
        t = program.binary("add", t, i)
        return [program.binary("ge", t, program.const(10)), t]

    region = Block([program.argument(TileTy((), ts.int64)), program.argument(TileTy((), ts.int64))])
    with program.inside(region):
        program.emit("yield", body(*region.args))
    low, high, step = (program.const(v) for v in (1, 100, 2))
    result = program.emit("for", [low, high, step, total], [total.type], [region], early_exit=True).result
    assert apply(program, result).item() == 1 + 3 + 5 + 7


def test_while_and_if():
    """Steps of the Collatz sequence."""
    program = Program()
    number = program.cast(program.scalar("n", ts.int32), ts.int64)
    steps = program.const(0)
    condition, body = (Block([program.argument(TileTy((), ts.int64)) for _ in range(2)]) for _ in range(2))
    with program.inside(condition):
        program.emit("yield", [program.binary("ne", condition.args[0], program.const(1))])
    with program.inside(body):
        n, count = body.args
        even = program.binary("eq", program.binary("mod", n, program.const(2)), program.const(0))
        after, = program.branch(
            even, lambda: [program.binary("floordiv", n, program.const(2))],
            lambda: [program.binary("add", program.binary("mul", n, program.const(3)), program.const(1))])
        program.emit("yield", [after, program.binary("add", count, program.const(1))])
    result = program.emit("while", [number, steps], [number.type, steps.type], [condition, body]).results[1]
    assert apply(program, result, 27).item() == 111


# -- memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ts.f32, ts.fp8_e4m3, ts.int8], ids=str)
def test_gather_and_scatter_rows_of_a_window(dtype):
    table = torch.randint(0, 9, (6, 4, 5), generator=torch.Generator().manual_seed(0)).to(dtype.torch)
    index = torch.tensor([[3, 0], [5, 3]], dtype=torch.int32)
    program = Program()
    view = program.view(program.tensor("table", [6, 4, 5], dtype), [("all",), ("at", 1), ("range", 2, D(2), None)],
                        [program.const(1), program.const(3)])
    rows = program.gather(view, program.load(program.tensor("index", [2, 2], ts.int32)))
    target = program.tensor("target", [3, 2, 2, 2], dtype, output=True)
    program.scatter(target, program.load(program.tensor("to", [1], ts.int32)),
                    program.reshape(rows, [D(1), D(2), D(2), D(2)]))
    out = torch.zeros(3, 2, 2, 2).to(dtype.torch)
    program.run(table, index, out, torch.tensor([2], dtype=torch.int32))
    assert torch.equal(out[2], table[:, 1, 3:][index.long()]) and not out[:2].float().any()


def test_strided_tensors_and_unit_axes():
    x = numbers(4, 3).T
    program = Program()
    value = program.load(program.tensor("x", ["M", "N"], ts.f32))
    assert torch.equal(apply(program, value, x, M=3, N=4), x)


def test_atomic_add_counts():
    program = Program()
    counts = program.tensor("counts", [4], ts.int32, output=True)
    keys = program.tensor("keys", ["N"], ts.int32)
    grid = program.grid(program.size(D("N")))
    with program.inside(grid):
        key = program.load(program.view(keys, [("at", 1)], [grid.args[0]]))
        program.atomic_add(program.view(counts, [("at", 1)], [key]), program.const(1))
    out = torch.tensor([10, 0, 0, 0], dtype=torch.int32)
    program.run(out, torch.tensor([0, 3, 3, 1, 3], dtype=torch.int32), N=5)
    assert out.tolist() == [11, 1, 0, 3]


@pytest.mark.parametrize("start", [-1, 7, 100])
def test_a_window_out_of_bounds(start):
    program = Program()
    x = program.tensor("x", [10], ts.f32)
    value = program.load(program.view(x, [("range", 1, D(4), None)], [program.const(start)]))
    with pytest.raises(LaunchError, match=rf"view of x: elements {start} to {start + 3} of an axis of 10"):
        apply(program, value, numbers(10))


@pytest.mark.parametrize("row", [-1, 4])
def test_a_gather_out_of_bounds(row):
    program = Program()
    value = program.gather(program.tensor("x", [4, 2], ts.f32), program.load(program.tensor("i", [2], ts.int32)))
    with pytest.raises(LaunchError, match=rf"row of x: index {row} of an axis of 4"):
        apply(program, value, numbers(4, 2), torch.tensor([0, row], dtype=torch.int32))


def test_undefined_elements_may_move_but_not_count():
    def partly_written() -> tuple[Program, Value]:
        program = Program()
        fresh = program.full([D(3)], program.const(0.0))
        fresh.op.attrs["undefined"] = True
        return program, program.insert(fresh, program.const(5.0), [program.const(1)])

    program, partly = partly_written()
    written = program.slice(partly, [("range", 1, D(1), None)], [program.const(1)])
    assert apply(program, written).tolist() == [5.0]
    program, partly = partly_written()
    with pytest.raises(LaunchError, match="add: the tile is read before all of it has been written"):
        apply(program, program.binary("add", partly, partly))


def test_reading_an_output_before_it_is_written():
    program = Program()
    out = program.tensor("out", [4], ts.f32, output=True)
    program.store(program.view(out, [("range", 1, D(2), None)], [program.const(0)]),
                  program.full([D(2)], program.const(1.0)))
    value = program.load(program.view(out, [("range", 1, D(2), None)], [program.const(1)]))
    with pytest.raises(LaunchError, match="load of out: an element is read before the kernel has written it"):
        apply(program, value, torch.zeros(4))


def test_an_output_that_is_loaded_first_holds_the_callers_values():
    program = Program()
    out = program.tensor("out", [4], ts.f32, output=True)
    program.store(out, program.binary("add", program.load(out), program.const(1.0)))
    x = numbers(4)
    program.run(x)
    assert torch.equal(x, numbers(4) + 1)


def neighbours(kinds: tuple[str, str]) -> Program:
    """A grid whose program i does kinds[0] on x[i], then kinds[1] on x[i + 1]."""
    program = Program()
    x = program.tensor("x", ["N"], ts.f32, output=True)
    program.store(x, program.full([D("N")], program.const(0.0)))
    grid = program.grid(program.size(D("N") - 1))
    with program.inside(grid):
        value = program.const(1.0)
        for offset, kind in enumerate(kinds):
            place = program.view(x, [("at", 1)], [program.binary("add", grid.args[0], program.const(offset))])
            if kind == "load":
                program.load(place)
            else:
                program.emit(kind, [place, value])
    return program


@pytest.mark.parametrize("kinds", [("store", "store"), ("store", "load"), ("load", "store"), ("store", "atomic_add"),
                                   ("atomic_add", "load"), ("load", "atomic_add")], ids=str)
def test_races_between_programs(kinds):
    with pytest.raises(LaunchError, match=r"race on x: this .* another grid program"):
        neighbours(kinds).run(numbers(5), N=5)


@pytest.mark.parametrize("kinds", [("load", "load"), ("atomic_add", "atomic_add")], ids=str)
def test_shared_reads_and_adds_are_no_race(kinds):
    neighbours(kinds).run(numbers(5), N=5)


def test_a_grid_is_ordered_before_what_follows():
    """Two grids one after another, inside a third: each hands its elements on."""
    program = Program()
    x = program.tensor("x", [3, 2], ts.f32, output=True)
    outer = program.grid(program.const(3))
    with program.inside(outer):
        for shift in (0, 1):
            inner = program.grid(program.const(2))
            with program.inside(inner):
                column = program.binary("mod", program.binary("add", inner.args[0], program.const(shift)),
                                        program.const(2))
                place = program.view(x, [("at", 1), ("at", 2)], [outer.args[0], column])
                program.store(place, program.cast(inner.args[0], ts.f32))
    final = program.load(x)
    result = apply(program, final, torch.zeros(3, 2))
    assert result.tolist() == [[1.0, 0.0]] * 3


def test_many_readers_of_an_inner_grid_do_not_bar_a_later_write():
    program = Program()
    x = program.tensor("x", [2], ts.f32, output=True)
    outer = program.grid(program.const(2))
    with program.inside(outer):
        place = program.view(x, [("at", 1)], [outer.args[0]])
        inner = program.grid(program.const(3))
        with program.inside(inner):
            program.load(place)
        program.store(place, program.const(7.0))
    out = torch.zeros(2)
    program.run(out)
    assert out.tolist() == [7.0, 7.0]


def test_tensors_on_one_memory_share_its_history():
    program = Program()
    x = program.tensor("x", ["N"], ts.f32)
    y = program.tensor("y", ["N"], ts.f32, output=True)
    grid = program.grid(program.size(D("N") - 1))
    with program.inside(grid):
        after = program.binary("add", grid.args[0], program.const(1))
        program.store(program.view(y, [("at", 1)], [grid.args[0]]),
                      program.load(program.view(x, [("at", 1)], [after])))
    shared = numbers(4)
    program.run(numbers(4), shared.clone(), N=4)
    with pytest.raises(LaunchError, match="race"):
        program.run(shared, shared, N=4)


# -- errors and tools ---------------------------------------------------------------------------------


def test_division_by_zero_has_a_place():
    program = Program()
    x = program.load(program.tensor("x", [2], ts.int32))
    program.loc = Location("model.py", 12, 4, 9, "    y = x // 0")
    value = program.binary("floordiv", x, program.const(0))
    with pytest.raises(LaunchError, match=r"model.py:12: floordiv: .*\n    y = x // 0"):
        apply(program, value, torch.ones(2, dtype=torch.int32))


def test_assert_and_print(capsys):
    program = Program()
    x = program.load(program.tensor("x", [2], ts.f32))
    grid = program.grid(program.const(2))
    with program.inside(grid):
        program.emit("print", [x], text="x is {}")
    program.emit("assert", [program.binary("gt", x, program.const(1.5))], text="x must exceed 1.5")
    with pytest.raises(LaunchError, match=r"assert: x must exceed 1\.5"):
        program.run(numbers(2))
    assert capsys.readouterr().out.splitlines() == [
        f"made.py:1: program ({i},): x is [1, 2]" for i in range(2)]


def test_breakpoint_shows_the_kernels_variables(monkeypatch):
    program = Program()
    x = program.load(program.tensor("x", [2], ts.f32))
    x.hint = "x_tile"
    program.emit("print", [], text="", breakpoint=True)
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(sys._getframe(1).f_locals))
    program.run(numbers(2))
    assert torch.equal(seen[0]["tiles"]["x_tile"], numbers(2)) and seen[0]["place"] == "made.py:1:"


def test_arguments_that_do_not_fit():
    program = Program()
    program.load(program.tensor("x", ["N", 2], ts.f32))
    with pytest.raises(LaunchError, match=r"x: a tensor of \[3, 3\] given; expected \[3, 2\]"):
        program.run(numbers(3, 3), N=3)
