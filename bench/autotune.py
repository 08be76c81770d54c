"""The untuned default of each kernel beside the best schedule that a search finds.

    python bench/autotune.py [--quick] [--only NAME] [--rounds N] [--threads N] [--budget SECONDS]

`@ts.autotune` searches about twenty schedules a case with an empty cache; the schedule that it keeps and the kernel
without one are then timed in turns, best of all rounds; with --threads 1 the processor's time counts, so that a busy
machine disturbs little. "default" is the time of the best over that of the default:
1.00 where nothing was to be gained, 0.90 where the search found a tenth; the goal is 0.9 for every case. Results are
checked against float64 first, untuned and tuned.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, print_table, write_results
from torch import Tensor

import tessera as ts
from tessera.ops import kernels

GOAL = 0.9
SAMPLE = 2e-3  # seconds: shorter calls are timed several at once
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Every schedule that is tried. One row of a product has no rows to cut; a row that is reduced is never cut.
PRODUCT = {"BM": [16, 48, 96, 192, 384], "BN": [64, 128, 256, 512]}
FEW_ROWS = {"BM": [8], "BN": [16, 32, 48, 64, 96, 128, 160, 192, 256, 288, 320, 384, 512, 640, 768, 1024, 1536, 2048]}
ATTENTION = {"BM": [32, 64, 96, 128, 256], "BN": [32, 64, 128, 256]}
ROWS = {"BM": [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]}
RUNS = {"BM": [1, 2, 4, 8], "BN": [512, 1024, 2048, 4096, 8192]}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table: a kernel, its arguments, and the schedules to try."""

    label: str
    kernel: Any
    arguments: tuple[Any, ...]
    out: Tensor
    expected: Callable[[], Tensor]  # in float64
    space: Mapping[str, Sequence[int]]


def cases(quick: bool) -> Iterator[Case]:
    """Products of 1 to 512 rows, attention, and what is bound by memory."""
    shapes = [(576, 1536)] if quick else [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]
    for name, dtype in DTYPES.items():
        for m in (1, 8) if quick else (1, 8, 128, 512):
            if name == "f32" or m <= 8:  # bf16 products of many rows run at f32's speed or at the machine's
                for n, k in shapes:
                    yield _linear(name, dtype, m, n, k)
        for length, width in [(256, 64)] if quick else [(512, 64), (1024, 64), (512, 128)]:
            yield _attention(name, dtype, length, width)
        for rows, width in [(256, 576)] if quick else [(8, 576), (512, 576), (2048, 2048)]:
            yield from _of_rows(name, dtype, rows, width)


def _linear(name: str, dtype: torch.dtype, m: int, n: int, k: int) -> Case:
    x, weight, out = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n, dtype=dtype)
    return Case(label=f"gemm {name} {m}x{n}x{k}", kernel=kernels.linear_kernel, arguments=(x, weight, out), out=out,
                expected=lambda: x.double() @ weight.double().T, space=FEW_ROWS if m <= 8 else PRODUCT)


def _attention(name: str, dtype: torch.dtype, length: int, width: int) -> Case:
    q, k, v = (torch.randn(1, 8, length, width).to(dtype) for _ in range(3))
    out = torch.empty_like(q)

    def expected() -> Tensor:
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)

    return Case(label=f"attention {name} 8x{length}x{width}", kernel=kernels.flash_attention_kernel,
                arguments=(q, k, v, out, width**-0.5, True), out=out, expected=expected, space=ATTENTION)


def _of_rows(name: str, dtype: torch.dtype, rows: int, width: int) -> Iterator[Case]:
    x, up = (torch.randn(1, rows, width).to(dtype) for _ in range(2))
    weight, out = torch.rand(width).to(dtype), torch.empty_like(x)
    size = f"{name} {rows}x{width}"
    yield Case(label=f"rms_norm {size}", kernel=kernels.rms_norm_kernel, arguments=(x, weight, out, 1e-6), out=out,
               expected=lambda: F.rms_norm(x.double(), (width,), weight.double(), 1e-6), space=ROWS)
    yield Case(label=f"softmax {size}", kernel=kernels.softmax_kernel, arguments=(x[0], out[0]), out=out,
               expected=lambda: x.double().softmax(-1), space=ROWS)
    yield Case(label=f"swiglu {size}", kernel=kernels.gated_kernel, arguments=(x, up, out), out=out,
               expected=lambda: F.silu(x.double()) * up.double(), space=RUNS)


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Check, search, check again, and time the two in turns."""
    expected = case.expected()
    error = _error(case, case.kernel, expected)
    configs = [{}, *(dict(zip(case.space, sizes)) for sizes in product(*case.space.values()))]
    tuned = ts.autotune(configs=configs, budget=arguments.budget)(case.kernel)
    error = max(error, _error(case, tuned, expected))
    found = ts.autotune.report()[-1]
    seconds = _in_turns({"default": lambda: case.kernel(*case.arguments), "best": lambda: tuned(*case.arguments)},
                        arguments.rounds, time.thread_time if arguments.threads == 1 else time.perf_counter)
    return {"case": case.label, "error": error, "seconds": seconds, "schedule": dict(found.schedule),
            "tried": len(found.seconds), "skipped": dict(found.skipped), "search": dict(found.seconds),
            "default": min(1.0, seconds["best"] / seconds["default"])}


def _error(case: Case, kernel: Any, expected: Tensor) -> float:
    """Run a kernel; its largest error, relative to the largest value, or the end."""
    case.out.fill_(float("nan"))
    kernel(*case.arguments)
    error = ((case.out.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= (1e-5 if case.out.dtype == torch.float32 else 2.0**-8):
        raise SystemExit(f"{case.label}: error {error:.1e}")
    return error


def _in_turns(runs: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a call of each, the best of all rounds."""
    def timed(run: Callable[[], None], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    calls = max(1, int(SAMPLE / max(1e-7, *(timed(run, 3) for run in runs.values()))))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], timed(run, calls))
    return best


def row(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    seconds = result["seconds"]
    schedule = ", ".join(f"{name}={size}" for name, size in result["schedule"].items()) or "default"
    return [result["case"], *(f"{seconds[name] * 1e6:.1f}" for name in ("default", "best")),
            f"{result['default']:.2f}", "yes" if result["default"] >= GOAL else "no", str(result["tried"]), schedule]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default="", help="cases whose label has this text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a search may take")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    about = machine() | {"load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TESSERA_CACHE_DIR"] = folder
        results = []
        for case in cases(arguments.quick):
            if arguments.only in case.label:
                results.append(run_case(case, arguments))
                print(*row(results[-1]), flush=True)
    print()
    print_table(("microseconds", "default", "best", "ratio", "met", "tried", "best schedule"), list(map(row, results)))
    if not arguments.only and not arguments.quick:
        print(f"\n{write_results('autotune', {'machine': about, 'options': vars(arguments), 'cases': results})}")


if __name__ == "__main__":
    main()
