"""Profiling: calls, bytes and operations are exact, files hold them, and nothing is left behind."""

import csv
import json
import threading
import time
from itertools import pairwise

import pytest
import torch

import tessera as ts
from tessera import Tile, f32, profile, tile
from tessera.errors import InputError, LaunchError
from tessera.kernel import specialise, tune
from tessera.kernel.cost import Cost

LIMITS = {"cpu": profile.Limits(bytes_per_s=1e9, flops_per_s={"f32": 1e9, "bf16": 4e9})}


def make_kernels():
    @ts.kernel
    def double(x: Tile["N", f32], o: Tile["N", f32]):
        tile.store(o, x * 2.0)

    @ts.kernel
    def matmul(a: Tile["M", "K", f32], b: Tile["K", "N", f32], o: Tile["M", "N", f32]):
        tile.store(o, tile.mma(a, b))

    return double, matmul


def launch_double(double, n):
    x, o = torch.arange(float(n)), torch.empty(n)
    double(x, o)
    assert torch.equal(o, 2 * x)


@pytest.mark.parametrize("warm", [False, True])
def test_rows_are_exact(warm):
    double, matmul = make_kernels()
    if warm:
        launch_double(double, 5)
    with profile.session(limits=LIMITS) as session:
        for n in (1, 33, 1000, 33):
            launch_double(double, n)
        matmul(torch.ones(7, 3), torch.ones(3, 5), torch.empty(7, 5))
    launch_double(double, 7)  # after the end: not counted
    rows = {row.kernel: row for row in session.rows}
    assert set(rows) == {"double", "matmul"}
    assert (rows["double"].calls, rows["double"].bytes, rows["double"].flops) == (4, 8 * 1067, 1067)
    assert (rows["matmul"].calls, rows["matmul"].bytes, rows["matmul"].flops) == (1, 4 * (21 + 15 + 35), 2 * 105)
    assert all(row.backend == "cpu" and row.seconds > 0 for row in rows.values())
    # Bytes bound the one, operations the other: 1e9 of each a second.
    assert rows["double"].fraction_of_limit == pytest.approx(8 * 1067 / 1e9 / rows["double"].seconds)
    assert rows["matmul"].fraction_of_limit == pytest.approx(284 / 1e9 / rows["matmul"].seconds)
    assert [event.sizes for event in session.events[:2]] == [{"N": 1}, {"N": 33}]


def test_bare_kernels_come_back():
    double, _ = make_kernels()
    launch_double(double, 3)
    table = double.variant(())._table
    (bare,) = table.runs.values()
    with profile.session(limits=LIMITS) as outer:
        assert specialise.is_observed() and next(iter(table.runs.values())) is not bare
        with profile.session(limits=LIMITS) as inner:
            launch_double(double, 4)
        launch_double(double, 4)
    assert list(table.runs.values()) == [bare] and not specialise.is_observed()
    assert (outer.rows[0].calls, inner.rows[0].calls) == (2, 1)


def test_files(tmp_path):
    double, matmul = make_kernels()
    table, trace = tmp_path / "kernels.csv", tmp_path / "trace.json"
    with profile.session(exporters=[profile.summary(table), profile.chrome_trace(str(trace))], limits=LIMITS):
        launch_double(double, 10)
        launch_double(double, 20)
        matmul(torch.ones(2, 3), torch.ones(3, 4), torch.empty(2, 4))
    with table.open(newline="") as file:
        rows = {row["kernel"]: row for row in csv.DictReader(file)}
    assert (rows["double"]["calls"], rows["double"]["bytes"], rows["double"]["flops"]) == ("2", "240", "30")
    assert rows["matmul"]["flops"] == "48" and float(rows["matmul"]["fraction_of_limit"]) > 0
    assert tuple(rows["double"]) == profile.COLUMNS
    events = json.loads(trace.read_text())["traceEvents"]
    assert [(e["name"], e["ph"], e["args"]) for e in events] == [
        ("double", "X", {"N": 10, "bytes": 80, "flops": 10}), ("double", "X", {"N": 20, "bytes": 160, "flops": 20}),
        ("matmul", "X", {"M": 2, "K": 3, "N": 4, "bytes": 4 * 26, "flops": 48})]
    assert all(first["ts"] + first["dur"] <= second["ts"] for first, second in pairwise(events))


def test_files_are_written_after_an_error_and_failed_launches_do_not_count(tmp_path):
    double, _ = make_kernels()
    session = None

    def fail():
        nonlocal session
        with profile.session(exporters=[profile.summary(tmp_path / "k.csv")], limits=LIMITS) as session:
            launch_double(double, 10)
            double(torch.ones(3), torch.empty(4))

    with pytest.raises(LaunchError):
        fail()
    assert session.rows[0].calls == 1
    assert len((tmp_path / "k.csv").read_text().splitlines()) == 2
    assert not specialise.is_observed()


def test_exporters_run_when_others_fail(tmp_path):
    def fail(session):
        raise OSError("disk full")

    with (pytest.raises(OSError, match="disk full"),
          profile.session([fail, profile.summary(tmp_path / "k.csv")], limits=LIMITS)):
        launch_double(make_kernels()[0], 10)
    assert len((tmp_path / "k.csv").read_text().splitlines()) == 2
    assert not specialise.is_observed()


def test_searching_for_a_schedule_is_no_time_of_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_median_seconds", lambda run, args: time.sleep(0.3) or 1.0)
    tuned = ts.autotune(configs=[{"BM": 16}])(make_kernels()[1])
    with profile.session(limits=LIMITS) as session:
        tuned(torch.ones(7, 3), torch.ones(3, 5), torch.empty(7, 5))
    (row,) = session.rows
    assert row.calls == 1 and row.seconds < 0.3


def test_sessions_nest():
    double, _ = make_kernels()
    with profile.session(limits=LIMITS) as outer:
        launch_double(double, 3)
        with profile.session(limits=LIMITS) as inner:
            launch_double(double, 5)
        launch_double(double, 7)
    assert [event.sizes["N"] for event in outer.events] == [3, 5, 7]
    assert [event.sizes["N"] for event in inner.events] == [5]


def test_threads_are_counted_together():
    double, _ = make_kernels()
    with profile.session(limits=LIMITS, max_events=10) as session:
        threads = [threading.Thread(target=lambda: [launch_double(double, 9) for _ in range(25)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (session.rows[0].calls, session.rows[0].flops) == (100, 900)
    assert len(session.events) == 10


def test_interp_is_counted_alike(monkeypatch):
    monkeypatch.setenv("TESSERA_BACKEND", "interp")
    double, _ = make_kernels()
    with profile.session(limits=LIMITS) as session:
        launch_double(double, 33)
    assert [(row.backend, row.bytes, row.flops) for row in session.rows] == [("interp", 264, 33)]


def test_the_limit_is_the_roof():
    limits = profile.Limits(bytes_per_s=100.0, flops_per_s={"f32": 10.0, "bf16": 40.0})
    assert limits.seconds(Cost(bytes_read=150, bytes_written=50, flops={"f32": 10})) == 2.0
    assert limits.seconds(Cost(bytes_read=1, flops={"f32": 10, "bf16": 40, "f16": 20})) == 4.0


def test_measured_limits_are_those_of_this_machine():
    limits = profile.Session().limits("cpu")
    assert 1e8 < limits.bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s["f32"] < 1e14
    assert limits.flops_per_s["bf16"] in (limits.flops_per_s["f32"], 2 * limits.flops_per_s["f32"])
    assert profile.Session().limits("cpu") is limits  # measured once


@pytest.mark.parametrize("make, message", [
    (lambda: profile.summary("/nowhere/at/all.csv"), "the folder '/nowhere/at' does not exist"),
    (lambda: profile.chrome_trace("/nowhere/at/all.json"), "does not exist"),
    (lambda: profile.Limits(bytes_per_s=0, flops_per_s={"f32": 1.0}), "rates above 0"),
    (lambda: profile.Limits(bytes_per_s=1, flops_per_s={"bf16": 1.0}), "a rate for 'f32'"),
    (lambda: profile.Limits(bytes_per_s=1, flops_per_s=1.0), "a rate for each class"),
    (lambda: profile.summary("/"), "expected a file, this is a folder"),
    (lambda: profile.chrome_trace(None), "path: None given; expected the path of a file"),
    (lambda: profile.session(exporters=["x.csv"]).__enter__(), "expected profile.summary"),
    (lambda: profile.session(profile.summary("x.csv")).__enter__(), "expected a list of profile.summary"),
    (lambda: profile.session(limits=LIMITS["cpu"]).__enter__(), "expected {'cpu': profile.Limits"),
    (lambda: profile.session(limits={"cpu": 1e9}).__enter__(), "limits: {'cpu': 1000000000.0} given"),
    (lambda: profile.session(max_events=-1).__enter__(), "max_events: -1 given"),
])
def test_wrong_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()
