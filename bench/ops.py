"""Operations forward and backward beside torch.compile of the plain torch expression, and their peak memory.

    python bench/ops.py [--quick] [--only NAME] [--repetitions N] [--threads N] [--fastest] [--no-compile]

The cases come from the files ops_cases_*.py beside this one. Values and gradients of every case are checked against
float64 first. The systems take turns, so that a noisy moment hits all of them; the table shows medians, or with
--fastest (for a busy machine) the best of all repetitions. "x eager" and "x compiled" are torch's time over ours; the
goal is a geometric mean of 1.2 over torch.compile. Operations without a gradient (8-bit products, steps of
generation) are measured forward. torch.compile takes some seconds a case: processes, as many as threads, fill its
disk cache first.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ops_memory
import torch
from common import write_results
from kernels import measure, options
from ops_case import OpCase
from torch import Tensor

GOAL = 1.2
LABEL = 46  # characters of the widest label
HEADER = ("milliseconds", "tessera", "eager", "compiled", "x eager", "x compiled")
PART = "TESSERA_BENCH_PART"  # "I/N": compile only, every N-th case from the I-th


def cases(only: str, quick: bool, fast_bf16: bool) -> Iterator[OpCase]:
    """The cases whose label holds `only`; each is freed before the next is made."""
    torch.manual_seed(0)
    for path in sorted(Path(__file__).parent.glob("ops_cases_*.py")):
        made = importlib.import_module(path.stem).cases(quick, fast_bf16)
        yield from (case for case in made if only in case.label)


def check(case: OpCase) -> float:
    """Our values and gradients; the largest error, relative to the largest value of its tensor, or the end."""
    grads = case.gradients(case.ours(*case.inputs))
    actual = _step(case.ours, case.inputs, grads)
    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in case.inputs]
    expected = _step(case.formula, wide, [grad.double() for grad in grads])
    worst = 0.0
    for ours, theirs in zip(actual, expected):
        error = ((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()
        if not error <= case.tolerance:
            raise SystemExit(f"{case.label}: error {error:.1e}; expected at most {case.tolerance:.1e}")
        worst = max(worst, error)
    return worst


def _step(function: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results, then the gradients of the inputs that need one."""
    wanted = [x for x in inputs if x.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        outs = function(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
    return [*outs, *(torch.autograd.grad(outs, wanted, grads) if wanted else ())]


def _compiled(case: OpCase) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(case.formula, dynamic=False)


def run_case(case: OpCase, arguments: argparse.Namespace) -> dict[str, Any]:
    """Check and time one case: seconds of forward and backward together, and torch's over ours."""
    error = check(case)
    systems: dict[str, Callable[..., Any]] = {"tessera": case.ours, "eager": case.formula}
    if arguments.compile:
        systems["compiled"] = _compiled(case)
    grads = case.gradients(case.ours(*case.inputs))
    runs = {name: (lambda f=function: _step(f, case.inputs, grads)) for name, function in systems.items()}
    for run in runs.values():
        run()
    samples = measure(runs, arguments.repetitions)
    seconds = {name: (min if arguments.fastest else statistics.median)(values) for name, values in samples.items()}
    times = {name: value / seconds["tessera"] for name, value in seconds.items() if name != "tessera"}
    return {"group": case.group, "case": case.label, "error": error, "seconds": seconds, "times": times,
            "samples": samples}


def _fill_cache(arguments: argparse.Namespace) -> None:
    """Have processes of their own compile the cases: the code goes to torch's disk cache."""
    parts = [subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {PART: f"{i}/{arguments.threads}"})
             for i in range(arguments.threads)]
    for part in parts:
        part.wait()  # what it could not compile, an error included, comes again in the measuring process


def _compile_part(part: str, arguments: argparse.Namespace, fast_bf16: bool) -> None:
    first, step = map(int, part.split("/"))
    for number, case in enumerate(cases(arguments.only, arguments.quick, fast_bf16)):
        if number % step == first:
            function = _compiled(case)
            grads = case.gradients(case.formula(*case.inputs))
            _step(function, case.inputs, grads)


def line(cells: tuple[str, ...]) -> None:
    """Print a line of the table."""
    print(cells[0].ljust(LABEL), *(cell.rjust(10) for cell in cells[1:]), flush=True)


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a case."""
    seconds, times = result["seconds"], result["times"]
    return (result["case"], *(f"{seconds[name] * 1e3:.3f}" if name in seconds else "-"
                              for name in ("tessera", "eager", "compiled")),
            *(f"{times[name]:.2f}" if name in times else "-" for name in ("eager", "compiled")))


def main() -> None:
    arguments, about = options(__doc__)
    fast_bf16 = torch.cpu._is_avx512_bf16_supported()
    if PART in os.environ:
        return _compile_part(os.environ[PART], arguments, fast_bf16)
    if arguments.compile:
        _fill_cache(arguments)
    line(HEADER)
    results = []
    for case in cases(arguments.only, arguments.quick, fast_bf16):
        results.append(run_case(case, arguments))
        line(row(results[-1]))
    if not results:
        raise SystemExit(f"--only: {arguments.only!r} given; no case has it in its label")
    ratios = [result["times"].get("compiled", result["times"]["eager"]) for result in results]
    mean = statistics.geometric_mean(ratios)
    print(f"\ngeometric mean {mean:.2f} of {len(ratios)} cases over torch{'.compile' if arguments.compile else ''}; "
          f"goal {GOAL}: {'met' if mean >= GOAL else 'not met'}")
    memory = []
    for found in ops_memory.measure(arguments.quick) if not arguments.only else ():
        memory.append(found)
        goal = {None: "", True: " (goal met)", False: " (goal not met)"}[found["met"]]
        print(f"{found['case']}: {found['text']}{goal}", flush=True)
    print(f"load average at the start: {about['load_average']:.1f} (figures need a quiet machine)")
    if not arguments.only and not arguments.quick:
        path = write_results("ops", {"machine": about, "options": vars(arguments), "goal": GOAL,
                                     "geometric_mean": mean, "cases": results, "memory": memory})
        print(f"\n{path}")


if __name__ == "__main__":
    main()
