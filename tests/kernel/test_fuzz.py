"""Random tile programs: every backend against a float64 reference with error bounds, and against each other.

`TESSERA_FUZZ_PROGRAMS=2000 pytest tests/kernel/test_fuzz.py` runs that many seeds; by default a few do. Seeds
that once failed stand in fuzz_seeds.txt, with the vocabulary they were found in, and are always run again.
hypothesis looks for more, and shrinks them. A kernel that brings the process down shows as such when the
programs are run one by one in children: `python -m tests.kernel.fuzz 0 2000`.
"""

import os
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.kernel import ir
from tessera.kernel.backends import interp_math

from . import fuzz
from .fuzz.check import check

BACKENDS = ["interp", "cpu"]
WORDS = {"first": fuzz.FIRST, "all": fuzz.ALL}
KEPT = [line.split()[:2] for line in (Path(__file__).parent / "fuzz_seeds.txt").read_text().splitlines()
        if line.split("#")[0].strip()]
SEEDS = int(os.environ.get("TESSERA_FUZZ_PROGRAMS", "30"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_seeds(seed):
    check(fuzz.make(Random(seed)), BACKENDS)


@pytest.mark.parametrize("words,seed", KEPT)
def test_kept_seeds(words, seed):
    check(fuzz.make(Random(int(seed)), WORDS[words]), BACKENDS)


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])
def test_programs_that_hypothesis_finds(random):
    check(fuzz.make(random), BACKENDS)


def test_the_fuzzer_uses_every_kind_of_operation():
    missing = ir.ELEMENTWISE | ir.BITWISE | ir.CONTROL | set(
        "const dim full iota reduce scan sort mma slice extract insert concat reshape transpose broadcast view load"
        " store gather scatter atomic_add rand".split())
    small = replace(fuzz.ALL, sizes=(1, 2, 3))
    for seed in range(300):
        missing -= {op.name for op in ir.walk(fuzz.make(Random(seed), small).program.function.body)}
        if not missing:
            return
    raise AssertionError(f"no program has {sorted(missing)}")


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
    cases = (fuzz.make(Random(seed), fuzz.FIRST) for seed in range(150))
    with pytest.raises(AssertionError, match="interp, out"):
        all(check(case, ["interp"]) is None for case in cases)
