"""Kernels from the disk without a trace: taken where all that a trace would read is what it was, else never."""

import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch

import tessera as ts
from tessera import Tile, f32, tile
from tessera.kernel import cache, lang, launch
from tessera.kernel.backends import cpu
from tessera.kernel.backends.cpu import host
from tessera.kernel.dims import Dim
from tessera.kernel.frontend import reads
from tests.kernel import cached_programs as programs
from tests.kernel.cached_programs import ARGUMENTS, CASES, X, result, text

LIMITS = {"cpu": ts.profile.Limits(bytes_per_s=1e9, flops_per_s={"f32": 1e9})}
FRESH_PROCESS = """
import json
from tessera.kernel import launch
from tests.kernel.cached_programs import CASES, run_all
traces, trace = [], launch.frontend.trace
launch.frontend.trace = lambda source, name, *rest: traces.append(name) or trace(source, name, *rest)
before = {name: case.run() for name, case in CASES.items() if case.certain}
print(json.dumps([before, list(traces), run_all()]))
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TESSERA_BACKEND", "cpu")
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def traces(monkeypatch):
    """The names of the kernels that are traced."""
    found = []
    trace = launch.frontend.trace
    monkeypatch.setattr(launch.frontend, "trace",
                        lambda source, name, *rest: found.append(name) or trace(source, name, *rest))
    return found


# -- what a trace reads -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_change_of_what_was_read_is_seen(name, traces):
    case = CASES[name]
    assert case.run() == case.before
    traces.clear()
    assert case.run() == case.before and (not traces) == case.certain
    with case.change():
        assert case.run() == case.after
        traces.clear()
        assert case.run() == case.after
    assert case.run() == case.before


def test_arguments_schedules_and_dtypes_are_told_apart(traces):
    for _ in range(2):
        traces.clear()
        assert {name: run() for name, (run, _) in ARGUMENTS.items()} == {
            name: expected for name, (_, expected) in ARGUMENTS.items()}
    # One text, two sets of globals: the second takes the place of the first.
    assert set(traces) <= {"inner"}


def test_a_fresh_process_sees_every_change(place):
    for case in CASES.values():
        case.run()
    for run, _ in ARGUMENTS.values():
        run()
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    before, traces, after = json.loads(done.stdout)
    assert before == {name: case.before for name, case in CASES.items() if case.certain}
    assert not traces
    assert after == {**{name: case.after for name, case in CASES.items()},
                     **{name: expected for name, (_, expected) in ARGUMENTS.items()}}


# -- random changes -----------------------------------------------------------------------------------

A, B, C, D = 1.0, 2.0, 3.0, 4.0


def add_c(value, by=1.0):
    return value + C * by


def add_d(value, by=1.0):
    return value + D * by


def shift(value):
    return add_c(value) * B


@ts.kernel
def shifted(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, shift(tile.load(x)) / (A + 8.0))


@ts.kernel
def all_of_it(x: Tile["N", f32], o: Tile["N", f32], by: ts.constexpr = 1.0):
    if isinstance(A, bool) or B == D:
        tile.store(o, tile.load(x) * by)
    elif isinstance(C, float):
        shifted(x, o)
    else:
        tile.store(o, shift(add_d(tile.load(x))) + A)


def random_change(random: Random) -> None:
    """One thing that all_of_it may read, made something else."""
    here = sys.modules[__name__]
    number = random.choice([0, 1, 2, True, False, 1.0, 2.0, 3.0, 0.0, -0.0, math.nan, -2])
    what = random.choice(["A", "B", "C", "D", "default", "argument", "helper", "inner"])
    if what == "default":
        random.choice([add_c, add_d]).__defaults__ = (number,)
    elif what == "argument":
        all_of_it.function.__defaults__ = (number,)
    elif what == "helper":
        here.add_c, here.add_d = random.choice([(add_c, add_d), (add_d, add_c), (add_c, add_c)])
    elif what == "inner":
        here.shifted = random.choice([shifted, ts.kernel(shifted.function), programs.same])
    else:
        setattr(here, what, number)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_give_what_a_trace_gives(seed, monkeypatch, traces):
    here = sys.modules[__name__]
    for name in ("A", "B", "C", "D", "add_c", "add_d", "shifted"):
        monkeypatch.setattr(here, name, getattr(here, name))
    for function in (add_c, add_d, all_of_it.function):
        monkeypatch.setattr(function, "__defaults__", function.__defaults__)
    random = Random(seed)
    hits = 0
    for _ in range(25):
        if random.random() < 0.7:
            random_change(random)
        traces.clear()
        found = result(all_of_it)
        hits += not traces
        with monkeypatch.context() as without:
            without.setattr(launch.Variant, "_manifest", lambda *_: None)
            assert found == result(all_of_it)
    assert hits


# -- files --------------------------------------------------------------------------------------------

CALLER = """
import tessera as ts
from tessera import Tile, f32, tile
from {called} import body


@ts.kernel
def caller(x: Tile["N", f32], o: Tile["N", f32]):
    body(x, o)
    assert tile.reduce_max(tile.load(o), axis=-1) < 100.0, "too large"
"""
CALLED = """
import tessera as ts
from tessera import Tile, f32, tile


@ts.kernel
def body(x: Tile["N", f32], o: Tile["N", f32]):
    tile.store(o, tile.load(x) * {scale})
"""


def module_of(folder, name, source):
    (folder / f"{name}.py").write_text(source)
    importlib.invalidate_caches()
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def test_an_edited_file_of_a_called_kernel(tmp_path, monkeypatch, traces):
    monkeypatch.syspath_prepend(str(tmp_path))
    for scale in (2.0, 30.0, 2.0):
        module_of(tmp_path, "called_by_test", CALLED.format(scale=scale))
        caller = module_of(tmp_path, "caller_of_test", CALLER.format(called="called_by_test")).caller
        expected = text(X * scale) if scale < 3 else f"{tmp_path}/caller_of_test.py:10: assertion failed: too large"
        traces.clear()
        assert result(caller) == expected and traces == ["caller"]
        traces.clear()
        assert result(caller) == expected and not traces


def test_a_copy_of_a_file_names_itself(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module_of(tmp_path, "called_by_test", CALLED.format(scale=30.0))
    for name in ("one", "copy_of_one"):
        caller = module_of(tmp_path, name, CALLER.format(called="called_by_test")).caller
        for _ in range(2):
            assert result(caller) == f"{tmp_path}/{name}.py:10: assertion failed: too large"
    moved = module_of(tmp_path, "one", "\n\n" + CALLER.format(called="called_by_test")).caller
    assert result(moved) == f"{tmp_path}/one.py:12: assertion failed: too large"


# -- the folder ----------------------------------------------------------------------------------------


def split(place):
    """The paths of the one manifest and of the one code."""
    files = {path.read_bytes()[:1] == b"{": path for path in place.iterdir()}
    assert len(files) == len(list(place.iterdir())) == 2
    return files[True], files[False]


def test_code_that_was_evicted_is_made_again(place, traces):
    result(programs.by_global)
    split(place)[1].unlink()
    traces.clear()
    assert result(programs.by_global) == text(X * 2) and traces
    traces.clear()
    assert result(programs.by_global) == text(X * 2) and not traces


def rewritten(body: bytes) -> bytes:
    """An entry as somebody who knows the format writes it."""
    return body + cache.hashlib.sha256(body).digest()


def with_part(**parts):
    return lambda data: rewritten(json.dumps({**json.loads(data[:-32]), **parts}).encode())


INTERFACE = {"name": "k", "names": ["x", "o"], "params": [1, 1], "sizes": ["N"], "outputs": [1], "asserts": []}
HOSTILE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-40],
    "one bit": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "no JSON": lambda data: rewritten(b"{"),
    "not UTF-8": lambda data: rewritten(b"\xff\xfe{}"),
    "nested deeply": lambda data: rewritten(b"[" * 500_000),
    "a list": lambda data: rewritten(b"[1, 2]"),
    "no parts": lambda data: rewritten(b"{}"),
    "long": lambda data: rewritten(data[:-32] + b" " * (2 << 20)),
    "a path for a name": with_part(code="../../../etc/passwd"),
    "a name that is no text": with_part(code=[]),
    "a number too many": with_part(reads=[[0, "tile.store", "", None, 5]]),
    "a function that is none": with_part(reads=[[10**30, "tile", "", None]]),
    "a negative function": with_part(reads=[[-1, "tile", "", None]]),
    "no name": with_part(reads=[[0, "", "x", None]]),
    "a name of dots": with_part(reads=[[0, "." * 10_000, "x", None]]),
    "a number for a name": with_part(reads=[[0, 5, "x", None]]),
    "a huge rank": with_part(interface={**INTERFACE, "params": [10**12, 1]}),
    "an output that is none": with_part(interface={**INTERFACE, "outputs": [7]}),
    "a name too few": with_part(interface={**INTERFACE, "names": ["x"]}),
    "no interface": with_part(interface=None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_manifest_counts_as_absent(name, place, traces):
    result(programs.by_global)
    path = split(place)[0]
    path.write_bytes(HOSTILE[name](path.read_bytes()))
    traces.clear()
    assert result(programs.by_global) == text(X * 2) and traces
    traces.clear()
    assert result(programs.by_global) == text(X * 2) and not traces


def test_threads_with_changing_globals(place):
    """Eight at once, over one folder: each gets its own kernel's scale."""
    kernels = [programs.closing(float(scale))[0] for scale in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(result, kernels)) == [text(X * scale) for scale in range(1, 9)]


# -- who needs the function ------------------------------------------------------------------------------


def test_environment(monkeypatch, traces, capfd):
    result(programs.by_global)
    traces.clear()
    with monkeypatch.context() as other:
        other.setattr(cpu, "target", lambda: host.target("generic"))
        assert result(programs.by_global) == text(X * 2) and traces
    monkeypatch.setenv("TESSERA_DUMP", "ir,llvm")
    assert result(programs.by_global) == text(X * 2)
    shown = capfd.readouterr().err
    assert "kernel by_global(" in shown and "define " in shown
    monkeypatch.setenv("TESSERA_BACKEND", "interp")
    assert result(programs.by_global) == text(X * 2)


def test_tools_trace_what_came_from_disk(traces):
    def twice(x):
        out = torch.empty_like(x)
        fresh(x, out)
        fresh(out, out)
        return out

    result(programs.by_global)
    traces.clear()
    fresh = programs.by_global.retype({})
    assert torch.equal(ts.graph.capture(twice)(X), X * 4) and not traces
    with ts.profile.session(limits=LIMITS) as session:
        fresh(X, torch.empty_like(X))
    assert [(row.kernel, row.calls, row.bytes) for row in session.rows] == [("by_global", 1, 24)]
    assert traces == ["by_global"]
    (specialisation,) = fresh.variant(())._table.specialisations.values()
    assert specialisation.compiled.source == programs.by_global.source("cpu")


def test_a_tuner_chooses_for_what_came_from_disk(traces):
    result(programs.by_global)
    fresh = programs.by_global.retype({})
    fresh(X, torch.empty_like(X))
    tuned = ts.autotune(configs=[{"BM": 8}, {"BM": 16}], key=["N"])(programs.by_global)
    for kernel in (tuned, tuned.retype({}), fresh):
        out = torch.empty_like(X)
        kernel(X, out)
        assert torch.equal(out, X * 2)
    assert len(traces) == 1 + 2 * (1 + 1) + 1


# -- fingerprints ----------------------------------------------------------------------------------------


def test_fingerprints_tell_values_apart():
    values = [None, True, 1, 1.0, "1", 0.0, -0.0, math.nan, math.inf, -1, 2**70, "None", "int 1", (), [], {}, (1,), [1],
              (1, 2), ((1,), 2), (1, (2,)), ("a", "b"), ("a, b",), ("'a', 'b'",), {1: 2}, {"1": 2}, {2: 1}, f32,
              ts.bf16, torch.float32, ts.int4, ts.uint8, len, max, math.exp, float, int, tile.exp, tile.max,
              tile.maximum]
    found = [reads.fingerprint(value) for value in values]
    assert None not in found and len(set(found)) == len(values)


def test_what_cannot_be_judged_has_no_fingerprint():
    cyclic: list = []
    cyclic.append(cyclic)

    class Number(int):
        pass

    @lang.core.builtin
    def own(x):
        return x

    for value in (object(), torch.ones(2), torch.nn, math, Number(3), cyclic, programs.CONFIG, programs.Config, own,
                  torch.exp, 1 << 10_000, "x" * 10_000, {1, 2}, b"x", lambda: 0, [].append, range(3)):
        assert reads.fingerprint(value) is None


def test_every_dim_has_a_fingerprint_of_its_own():
    whole, twice = Dim.of("D"), 2 * Dim.atom("D/2")
    assert str(whole) == str(twice) and reads.size_fingerprint(whole) != reads.size_fingerprint(twice)


def test_a_method_has_no_manifest(place):
    class Model:
        scale = 2.0

        @ts.kernel
        def forward(self, x: Tile["N", f32], o: Tile["N", f32]):
            tile.store(o, tile.load(x) * self.scale)

    model, out = Model(), torch.empty_like(X)
    model.forward(X, out)
    assert torch.equal(out, X * 2) and len(list(place.iterdir())) == 1
