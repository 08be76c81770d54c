"""Tuning: every schedule gives the same bits, a choice is made once, kept on disk and obeyed from then on."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tessera as ts
from tessera import Tile, autotune, f32, int32, tile
from tessera.errors import CompileError, InputError, LaunchError
from tessera.kernel import specialise, tune


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, no results, and no tuning of all kernels left behind."""
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_results", [])
    yield tmp_path
    autotune.disable()


def matmul(a: Tile["M", "K", f32], b: Tile["K", "N", f32], o: Tile["M", "N", f32]):
    tile.store(o, tile.mma(a, b))


def which_block(o: Tile["N", f32], x: Tile["N", f32]):
    tile.store(o, tile.zeros((tile.context().N,), f32) + (1.0 + tile.context().block_m / 2**20))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scripted(monkeypatch, seconds):
    """Replace the clock: the k-th schedule that is timed takes seconds[k]; the list of what was timed."""
    timed = []

    def median(run, args):
        run()
        timed.append(1)
        return seconds[(len(timed) - 1) % len(seconds)]

    monkeypatch.setattr(tune, "_median_seconds", median)
    ticks = itertools.count()  # a busy machine does not use a search's budget up
    monkeypatch.setattr(tune, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 1e-3))
    return timed


BLOCKS = [{"BM": 16}, {"BM": 32}, {"tile": {"BM": 64}}]


def chosen(kernel, n=5):
    """The block size that a kernel ran with: `which_block`'s results differ by less than a search minds."""
    out = torch.empty(n)
    kernel(out, torch.empty(n))
    assert (out == out[0]).all()
    return (out[0].item() - 1) * 2**20


@pytest.mark.parametrize("seconds, best", [([3, 1, 2], 32), ([1, 2, 3], 16), ([2, 2, 1], 64), ([1, 1, 1], 16)])
def test_the_fastest_is_chosen_once_and_kept(monkeypatch, seconds, best):
    timed = scripted(monkeypatch, seconds)
    kernel = autotune(configs=BLOCKS)(ts.kernel(which_block))
    assert [chosen(kernel) for _ in range(3)] == [best] * 3 and len(timed) == 3
    assert [chosen(kernel, n=6), chosen(kernel, n=5)] == [best] * 2 and len(timed) == 6  # another shape
    again = autotune(configs=BLOCKS)(ts.kernel(which_block))
    assert chosen(again) == best and len(timed) == 6  # from the disk
    first, _, last = autotune.report()
    assert (first.kernel, first.key, first.measured, last.measured) == ("which_block", (5,), True, False)
    assert first.schedule == {"BM": best} and first.seconds == dict(zip(["BM=16", "BM=32", "BM=64"], seconds))
    assert (last.schedule, last.seconds) == (first.schedule, first.seconds)


def test_other_schedules_or_kernels_share_nothing(monkeypatch):
    timed = scripted(monkeypatch, [1])
    chosen(autotune(configs=BLOCKS)(ts.kernel(which_block)))
    chosen(autotune(configs=BLOCKS[:2])(ts.kernel(which_block)))
    assert len(timed) == 5


def test_key_names_what_tells_launches_apart(monkeypatch):
    timed = scripted(monkeypatch, [1, 2])
    kernel = autotune(configs=BLOCKS[:2], key=["N", "K"])(ts.kernel(matmul))
    for m, k, n, total in ((3, 4, 5, 2), (7, 4, 5, 2), (3, 4, 6, 4), (3, 5, 5, 6), (9, 5, 5, 6)):
        a, b, out = draw(m, k), draw(k, n), torch.empty(m, n)
        kernel(a, b, out)
        torch.testing.assert_close(out, a @ b)
        assert len(timed) == total
    assert [result.key for result in autotune.report()] == [(5, 4), (6, 4), (5, 5)]

    @autotune(configs=BLOCKS[:2], key=["times"])
    @ts.kernel
    def scaled(x: Tile["N", f32], o: Tile["N", f32], times: int):
        tile.store(o, x * tile.cast(times, f32))

    for times in (2, 3, 2):
        out = torch.empty(4)
        scaled(torch.ones(4), out, times)
        assert (out == times).all()
    assert len(timed) == 6 + 4
    with pytest.raises(InputError, match=r"key 'Q' is not one of its dims and numbers \(M, K, N\)"):
        autotune(configs=BLOCKS, key=["Q"])(ts.kernel(matmul))(draw(1, 1), draw(1, 1), torch.empty(1, 1))


@pytest.mark.parametrize("m, k, n", [(1, 33, 65), (70, 48, 300)])
def test_all_schedules_give_the_same_bits_whatever_is_fastest(monkeypatch, m, k, n):
    a, b = draw(m, k), draw(k, n, seed=1)
    want = torch.empty(m, n)
    ts.kernel(matmul)(a, b, want)
    torch.testing.assert_close(want, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    configs = [{"BM": 16, "BN": 64}, {"BM": 64, "BN": 64}, {"BM": 16, "BN": 256}]
    for first in range(len(configs)):  # another order is another search
        scripted(monkeypatch, [0, 1, 1])
        kernel = autotune(configs=configs[first:] + configs[:first])(ts.kernel(matmul))
        out = torch.empty(m, n)
        kernel(a, b, out)
        assert torch.equal(out, want)
        assert autotune.report()[-1].schedule == configs[first]


def test_measuring_leaves_what_is_written_alone(monkeypatch):
    scripted(monkeypatch, [1, 2, 3])

    @autotune(configs=BLOCKS)
    @ts.kernel
    def accumulate(x: Tile["S", "D", f32], state: Tile["S", "D", f32]):
        tile.store(state, tile.load(state) + tile.load(x))

    for state in (torch.zeros(4, 6), torch.zeros(6, 8).T[::2], torch.zeros(4, 12)[:, :6]):
        x = draw(*state.shape)
        accumulate(x, state)
        accumulate(x, state)
        assert torch.equal(state, x + x)


def test_schedules_that_do_not_compile_are_left_out_and_reported(monkeypatch, caplog):
    timed = scripted(monkeypatch, [5, 4])

    @autotune(configs=[{"BM": 48}, {"BM": 16}, {"BM": 32}])
    @ts.kernel
    def picky(o: Tile["N", f32], x: Tile["N", f32]):
        tile.static_assert(tile.context().block_m != 48, "48 will not do")
        tile.store(o, tile.zeros((tile.context().N,), f32) + (1.0 + tile.context().block_m / 2**20))

    assert chosen(picky) == 32 and len(timed) == 2
    (result,) = autotune.report()
    assert list(result.skipped) == ["BM=48"] and "48 will not do" in result.skipped["BM=48"]
    assert "kernel picky: schedule BM=48 left out" in caplog.text
    with pytest.raises(CompileError, match=r"none of the 1 schedules to tune works; the first: .*48 will not do"):
        chosen(autotune(configs=[{"BM": 48}])(picky))


def test_schedules_with_other_results_are_left_out_and_reported(monkeypatch, caplog):
    timed = scripted(monkeypatch, [5, 4])

    @autotune(configs=[{"BM": 16}, {"BM": 32}, {"BM": 48}, {"BM": 96}])
    @ts.kernel
    def broken(total: Tile["N", f32], count: Tile["N", int32], x: Tile["N", f32]):
        block = tile.context().block_m
        factor = 0.5 if block == 16 else float("inf") if block == 48 else 1.0
        tile.store(total, tile.load(total) + tile.load(x) * factor)
        tile.store(count, tile.load(count) + (3 if block == 96 else 1))

    x, total, count = draw(7), draw(7, seed=1), torch.zeros(7, dtype=torch.int32)
    expected = total + x
    broken(total, count, x)
    assert torch.equal(total, expected) and (count == 1).all() and len(timed) == 1
    (result,) = autotune.report()
    assert result.schedule == {"BM": 32} and list(result.skipped) == ["BM=16", "BM=48", "BM=96"]
    assert "kernel broken: schedule BM=16 left out: its results differ from those of the kernel without" in caplog.text


def test_schedules_that_fail_in_any_way_are_left_out(monkeypatch):
    scripted(monkeypatch, [1])
    kernel = autotune(configs=BLOCKS)(ts.kernel(which_block))
    make = tune.Choice._compiled

    def failing(self, index):
        if index == 0:
            raise RuntimeError("the driver says no")
        return make(self, index)

    monkeypatch.setattr(tune.Choice, "_compiled", failing)
    assert chosen(kernel) == 32 and autotune.report()[0].skipped == {"BM=16": "the driver says no"}


def test_an_assertion_fails_as_it_does_untuned():
    @autotune(configs=BLOCKS)
    @ts.kernel
    def checked(x: Tile["N", f32], o: Tile["N", f32]):
        for i in tile.grid(x.shape[0]):
            assert x[i] > 0.0
            o[i] = x[i]

    x, o = torch.ones(3), torch.zeros(3)
    with pytest.raises(LaunchError, match="assertion failed"):
        checked(-x, o)
    checked(x, o)
    assert torch.equal(o, x) and len(autotune.report()) == 1


def block_of(x: Tile["N", f32], o: Tile["N", f32], BM: ts.constexpr = 8):
    for i in tile.grid(tile.cdiv(x.shape[0], BM)):
        o[i * BM:i * BM + BM] = x[i * BM:i * BM + BM] + BM / 2**20


def test_schedules_set_compile_time_parameters(monkeypatch):
    scripted(monkeypatch, [3, 1, 2])
    x, o = torch.ones(100), torch.empty(100)

    def block(kernel, *given):
        kernel(x, o, *given)
        return int((o[0].item() - 1) * 2**20)

    plain = ts.kernel(block_of)
    assert block(plain) == 8 and block(plain.with_schedule(BM=48)) == 48
    assert block(autotune(configs=BLOCKS)(plain)) == 32
    assert block(autotune(configs=BLOCKS)(plain), 24) == 24  # given at the launch
    needed = copy_of(block_of)
    needed.__defaults__ = None
    assert block(autotune(configs=[{"BM": 64}, {"BM": 16}])(ts.kernel(needed))) == 16


def test_other_machines_measure_anew_whatever_the_key(monkeypatch):
    timed = scripted(monkeypatch, [1])
    for machine in ("one", "two", "one"):
        monkeypatch.setattr(tune, "_arch", lambda backend, args, machine=machine: machine)
        chosen(autotune(configs=BLOCKS, key=["N"])(ts.kernel(which_block)))
    assert len(timed) == 6


def test_a_kernels_own_schedule_tells_stored_choices_apart(monkeypatch):
    timed = scripted(monkeypatch, [1])
    a, b, out = draw(3, 4), draw(4, 5), torch.empty(3, 5)
    for size in (128, 256):
        autotune(configs=BLOCKS)(ts.kernel(matmul).with_schedule(BN=size))(a, b, out)
    assert len(timed) == 6


@pytest.mark.parametrize("text", [b"{}", b"[1]", b"no json", b'{"best": 7, "seconds": {}, "skipped": {}}',
                                  b'{"best": 0, "seconds": {"9": 1}, "skipped": {}}',
                                  b'{"best": "x", "seconds": {}, "skipped": []}'])
def test_a_stored_choice_that_makes_no_sense_is_measured_anew(monkeypatch, text):
    timed = scripted(monkeypatch, [2, 1, 3])
    cached = tune.cache.cached
    monkeypatch.setattr(tune.cache, "cached", lambda key, make: text if '"tune"' in key else cached(key, make))
    assert chosen(autotune(configs=BLOCKS)(ts.kernel(which_block))) == 32 and len(timed) == 3


def test_a_search_that_is_killed_leaves_nothing_behind(monkeypatch):
    timed = scripted(monkeypatch, [1, KeyboardInterrupt, 1, 1, 1])
    monkeypatch.setattr(tune, "_median_seconds", interrupted(tune._median_seconds))
    kernel = autotune(configs=BLOCKS)(ts.kernel(which_block))
    with pytest.raises(KeyboardInterrupt):
        chosen(kernel)
    assert autotune.report() == [] and len(timed) == 2
    assert chosen(kernel) == 16 and len(timed) == 5


def interrupted(median):
    """A clock that passes on an interruption in place of a time."""
    def call(run, args):
        seconds = median(run, args)
        if seconds is KeyboardInterrupt:
            raise KeyboardInterrupt
        return seconds

    return call


def test_the_budget_ends_measuring(monkeypatch):
    timed = scripted(monkeypatch, [1])
    kernel = autotune(configs=BLOCKS, budget=0.0)(ts.kernel(which_block))
    assert chosen(kernel) == 16 and len(timed) == 1
    assert "not tried: the budget of 0.0 s was used up" in autotune.report()[0].skipped["BM=64"]


def copy_of(function):
    """The same function as a new object, whose attributes may be set."""
    copy = type(function)(function.__code__, function.__globals__, function.__name__)
    copy.__annotations__ = function.__annotations__
    return copy


def test_decorator_below_and_variants_of_a_kernel(monkeypatch):
    timed = scripted(monkeypatch, [2, 1])
    below = ts.kernel(autotune(configs=BLOCKS[:2])(copy_of(which_block)))
    assert chosen(below) == 32
    assert chosen(below.retype({})) == 32 and len(timed) == 2
    assert "kernel which_block" in below.ir()
    with ts.profile.session(limits={"cpu": ts.profile.Limits(bytes_per_s=1, flops_per_s={"f32": 1})}) as session:
        assert chosen(below, n=9) == 32
    assert [row.calls for row in session.rows] == [1]  # trial runs are not launches


def test_graphs_record_the_chosen_schedule(monkeypatch):
    scripted(monkeypatch, [2, 1])
    kernel = autotune(configs=BLOCKS[:2])(ts.kernel(which_block))

    @ts.graph.capture
    def run(x):
        out = torch.empty(x.shape)
        kernel(out, x)
        return out

    for _ in range(3):
        assert (run(torch.empty(7)) == 1 + 32 / 2**20).all()


def test_enable_tunes_matmuls_without_a_schedule(monkeypatch):
    timed = scripted(monkeypatch, [1])
    kernel, fixed, other = ts.kernel(matmul), ts.kernel(matmul).with_schedule(BM=32), ts.kernel(which_block)
    a, b = draw(5, 6), draw(6, 7)
    want, out = torch.empty(5, 7), torch.empty(5, 7)
    kernel(a, b, want)  # compiled before
    autotune.enable(cache_key=("arch", "dtype", "shape"), budget=1000.0)
    for one in (kernel, fixed):
        one(a, b, out)
        assert torch.equal(out, want)
    chosen(other)
    candidates = 1 + len(tune._schedules(None, tune._DEFAULT_SPACES["cpu"]))
    assert len(timed) == candidates and [r.kernel for r in autotune.report()] == ["matmul"]
    kernel(draw(4, 6), b, torch.empty(4, 7))
    assert len(timed) == 2 * candidates
    autotune.enable(cache_key=("arch", "dtype"))  # without "shape" one choice serves all
    for m in (1, 2, 3):
        kernel(draw(m, 6), b, torch.empty(m, 7))
    assert [r.key for r in autotune.report()][2:] == [()]
    autotune.disable()
    ts.kernel(matmul)(a, b, out)
    assert len(autotune.report()) == 3 and specialise._default_tuner is None


@pytest.mark.parametrize("make, message", [
    (lambda: autotune(), "either configs"),
    (lambda: autotune(configs=[{}], space={"BM": [1]}), "either configs"),
    (lambda: autotune(configs=[]), "no schedule to try"),
    (lambda: autotune(configs=[{"warp": 4}]), "'warp' is not an option"),
    (lambda: autotune(space={"BM": [0]}), "block size BM=0"),
    (lambda: autotune(configs=[{}], key="N"), "expected a list of names"),
    (lambda: autotune(configs=[{}])(3), "expected a kernel or a function"),
    (lambda: autotune(configs=[{}], key=3), "key=3 given; expected a list of names"),
    (lambda: autotune(configs=3), "configs=3 given; expected a list of schedules"),
    (lambda: autotune(configs=[3]), "schedule: 3 given; expected a mapping"),
    (lambda: autotune(configs={"BM": 16}), "configs={'BM': 16} given; expected a list of schedules"),
    (lambda: autotune(space=["BM"]), r"space=\['BM'\] given; expected {name: \[values\]}"),
    (lambda: autotune(space={"BM": 16}), "space={'BM': 16} given"),
    (lambda: autotune(space={f"B{x}": range(1, 100) for x in "KMN"}), "970299 combinations; expected at most 4096"),
    (lambda: autotune(configs=[{}], budget=-1), "budget=-1 given; expected seconds, 0 or more"),
    (lambda: autotune(configs=[{"tile": {"bm": 16}}]), "expected names in capitals such as 'BM'"),
    (lambda: autotune(configs=[{"warps": 3}]), "warps=3 given; expected one of 1, 2, 4, 8, 16, 32"),
    (lambda: autotune(configs=[{"warps": True}]), "warps=True given"),
    (lambda: autotune(configs=[{"stages": 0}]), "stages=0 given; expected one of 1, 2"),
    (lambda: autotune(configs=[{"pipeline": "no"}]), "pipeline='no' given; expected one of False, True"),
    (lambda: autotune.enable(cache_key=("arch", "batch")), "expected names out of arch, dtype, shape"),
    (lambda: autotune.enable(cache_key=5), "expected names out of arch, dtype, shape"),
    (lambda: autotune.enable(budget=-1), "budget=-1 given; expected seconds, 0 or more"),
    (lambda: autotune.enable(budget=float("nan")), "budget=nan given"),
    (lambda: autotune.enable(budget="5"), "budget='5' given"),
])
def test_wrong_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


_SECOND = """
import json, sys, torch
from tests.kernel import test_tune as t
if sys.argv[1] == "refuse":
    t.tune._median_seconds = lambda run, args: sys.exit("measured again")
kernel = t.autotune(configs=t.BLOCKS)(t.ts.kernel(t.which_block))
print(json.dumps([t.chosen(kernel), t.autotune.report()[0].measured]))
"""


def test_a_second_process_does_not_measure(fresh):
    def run(argument):
        done = subprocess.run([sys.executable, "-c", _SECOND, argument], capture_output=True, text=True, timeout=120,
                              cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first, measured = run("measure")
    assert measured and first in (16, 32, 64)
    assert run("refuse") == [first, False]
