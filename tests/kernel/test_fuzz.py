"""Random tile programs: every backend against a float64 reference with error bounds, and against each other.

`TESSERA_FUZZ_PROGRAMS=2000 pytest tests/kernel/test_fuzz.py` runs that many seeds; by default a few do. Seeds
that once failed stand in fuzz_seeds.txt and are always run again. hypothesis looks for more, and shrinks them.
"""

import os
from importlib import import_module
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.kernel import ir
from tessera.kernel.backends import interp_math

from . import fuzzer

BACKENDS = ["interp", "cpu"]
KEPT = [int(line.split("#")[0]) for line in
        (Path(__file__).parent / "fuzz_seeds.txt").read_text().splitlines() if line.split("#")[0].strip()]
SEEDS = int(os.environ.get("TESSERA_FUZZ_PROGRAMS", "40"))


def check(case: fuzzer.Case) -> None:
    """Run a program everywhere and compare."""
    text = f"sizes {case.sizes}:\n{case.program.function}"
    results = {name: case.run(import_module(f"tessera.kernel.backends.{name}")) for name in BACKENDS}
    for name, outputs in results.items():
        for number, (output, expected) in enumerate(zip(outputs, case.expected)):
            close(output, expected, f"{name}, out{number}, {text}")
    for number, same in enumerate(case.same):
        first, *others = (outputs[number].double() for outputs in results.values())
        if same:
            assert all(torch.equal(first, other) for other in others), f"out{number} differs, {text}"


def close(output: torch.Tensor, expected: fuzzer.Approx, what: str) -> None:
    value = output.double() if output.is_floating_point() else output.to(expected.x.dtype)
    assert value.shape == expected.x.shape, what
    off = value != expected.x
    if output.is_floating_point():
        off &= ~((value - expected.x).abs() <= expected.e)
    assert not off.any(), f"{what}\ngot {value[off][:4]}, expected {expected.x[off][:4]} +- {expected.e[off][:4]}"


@pytest.mark.parametrize("seed", sorted({*range(SEEDS), *KEPT}))
def test_seeds(seed):
    check(fuzzer.make(Random(seed)))


@given(st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])
def test_programs_that_hypothesis_finds(random):
    check(fuzzer.make(random))


def test_the_fuzzer_uses_every_kind_of_operation():
    seen = {op.name for seed in range(300) for op in ir.walk(fuzzer.make(Random(seed)).program.function.body)}
    wanted = ir.ELEMENTWISE | ir.BITWISE | {"for", "if", "grid"} | set(
        "const dim iota reduce scan sort mma slice extract insert concat reshape transpose broadcast view load".split())
    assert wanted - seen == set()


MUTATIONS = {
    "max is min": (interp_math.BINARY, "max", torch.minimum),
    "a sum forgets its last element": (interp_math, "lane_sum", lambda x: x[..., :-1].sum(-1)),
    "fma rounds to bf16": (interp_math, "fma", lambda x, y, z: (x * y + z).bfloat16().to(x.dtype)),
    "a cumsum runs backwards": (interp_math, "scan", lambda kind, x, axis: x.flip(axis).cumsum(axis).to(x.dtype)),
    "a sort is unstable": (interp_math, "sort", lambda x, axis, down: (
        (s := torch.sort(x.double().flip(axis), dim=axis, descending=down, stable=True)).values.to(x.dtype),
        (x.shape[axis] - 1 - s.indices).int())),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_fuzzer_finds_a_broken_backend(name, monkeypatch):
    owner, key, broken = MUTATIONS[name]
    (monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr)(owner, key, broken)
    monkeypatch.setitem(globals(), "BACKENDS", ["interp"])
    cases = (fuzzer.make(Random(seed)) for seed in range(150))
    with pytest.raises(AssertionError, match="interp, out"):
        all(check(case) is None for case in cases)
