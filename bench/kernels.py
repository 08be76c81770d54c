"""Tile kernels beside torch, torch.compile, on a GPU liger-kernel, and the machine's limit.

    python bench/kernels.py [--quick] [--only NAME] [--repetitions N] [--threads N] [--fastest] [--no-compile]
                            [--device cuda]

Every case is checked against float64 first. The systems take turns, so that a noisy moment hits all of them; the
table shows medians, or with --fastest (for a busy machine) the best of all repetitions. "limit" is the time that the
machine needs at least: a torch operation that moves the same bytes, or the flops at the speed of torch's 1024 x 1024
product. "x eager" and "x compiled" are torch's time over ours; the goal is for torch.compile where there is one (or
85 % of the limit), else for torch's own operation.

On a GPU every system is captured in a CUDA graph of CAPTURED calls (of one for each weight, where they take turns), so
that the time is the GPU's, not that of launching from Python; sizes are larger, and bytes are compared with what
torch's copies reach. liger-kernel is a peer where it is installed (`pip install liger-kernel`) and has the operation;
its cross-entropy waits for the GPU, which a graph cannot hold, and is timed call by call.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import device, finish, machine, print_table, seconds, write_results
from kernel_cases import Case, attention_cases, gemm_cases, pointwise_cases, quantized_cases

from tessera import Kernel
from tessera.ops import kernels

SAMPLE = 2e-3  # seconds: shorter calls are timed several at once
BUDGET = 6.0  # seconds for the repetitions of one case; at least 3 are made
LIMIT_GOAL = 0.85
PEERS = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "liger")}
CAPTURED = 8  # calls in a CUDA graph, at least
LAUNCHES, COMPILED = 2000, ("rms_norm_kernel", "softmax_kernel", "cross_entropy_kernel", "gated_kernel", "rope_kernel",
                            "casted_embedding_kernel", "linear_kernel", "flash_attention_kernel")


def check(case: Case) -> float:
    """Run our kernel; its largest error, relative to the largest value, or the end."""
    case.out.fill_(float("nan"))
    case.ours()
    expected = case.expected()
    actual = case.out[:expected.shape[0]] if case.out.ndim == expected.ndim else case.out
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= case.tolerance:
        raise SystemExit(f"{case.label}: error {error:.1e}; expected at most {case.tolerance:.1e}")
    return error


def at_once(case: Case) -> int:
    """How many calls a timed function makes."""
    return 1 if device() == "cpu" else max(CAPTURED, case.turns)


def repeated(run: Callable[[], object], calls: int, *, capture: bool) -> Callable[[], None]:
    """So many calls of a warm function, as one replay of a CUDA graph where they can be captured."""
    def together() -> None:
        for _ in range(calls):
            run()

    if not capture:
        return together
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together()
    return graph.replay


def systems(case: Case, compiled: bool) -> dict[str, Callable[[], object]]:
    """The callables to time, warm; each makes `at_once` calls."""
    runs: dict[str, Callable[[], object]] = {"tessera": case.ours, "eager": case.eager}
    if compiled and case.function is not None:
        torch._dynamo.reset()
        function = torch.compile(case.function, dynamic=False)
        runs["compiled"] = lambda: function(*case.arguments)
    if case.floor is not None:
        runs["limit"] = case.floor
    if case.liger is not None:
        runs["liger"] = case.liger
    for run in runs.values():
        run()
    finish()
    if device() == "cpu":
        return runs
    return {name: repeated(run, at_once(case), capture=name != "liger" or not case.liger_waits)
            for name, run in runs.items()}


def measure(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of one call of each system, for each repetition; the systems take turns."""
    once = {name: max(seconds(run), 1e-7) for name, run in runs.items()}
    calls = {name: max(1, min(1000, int(SAMPLE / time))) for name, time in once.items()}
    affordable = int(BUDGET / sum(max(SAMPLE, time) for time in once.values()))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(min(repetitions, max(3, affordable))):
        for name, run in runs.items():
            times[name].append(seconds(run, calls[name]))
    return times


@torch.inference_mode()
def run_case(case: Case, peak: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Check and time one case: seconds (medians, or the fastest), ratios to the best peer and to the limit."""
    print(case.label, file=sys.stderr, flush=True)
    error = check(case)
    times = measure(systems(case, arguments.compile), arguments.repetitions)
    times = {name: [time / at_once(case) for time in values] for name, values in times.items()}
    typical = {name: (min if arguments.fastest else statistics.median)(values) for name, values in times.items()}
    limit = typical.pop("limit", 0.0) or case.flops / peak
    ours = typical["tessera"]
    ratios = {name: other / ours for name, other in typical.items() if name != "tessera"}
    met = ratios.get("compiled", ratios["eager"]) >= case.goal or (case.flops == 0 and limit / ours >= LIMIT_GOAL)
    return {"group": case.group, "case": case.label, "error": error, "seconds": typical, "limit_seconds": limit,
            "flops": case.flops, "bytes": case.bytes, "times": ratios, "of_limit": limit / ours, "goal": case.goal,
            "met": met, "samples": times}


def launch_seconds() -> float:
    """A warm launch with 4 arguments of a kernel that has nothing to do."""
    x, weight, out = torch.ones(1, 1, 8), torch.ones(8), torch.empty(1, 1, 8)
    kernels.rms_norm_kernel(x, weight, out, 1e-6)
    return min(seconds(lambda: kernels.rms_norm_kernel(x, weight, out, 1e-6), LAUNCHES) for _ in range(5))


def compile_seconds() -> Iterator[dict[str, Any]]:
    """Cold compile of each kernel, and its load from the disk cache by a fresh copy."""
    folder = tempfile.mkdtemp()
    before = {name: os.environ.get(name) for name in ("TESSERA_CACHE_DIR", "TRITON_CACHE_DIR")}
    os.environ.update(dict.fromkeys(before, folder))
    try:
        for name in COMPILED:
            kernel, arguments = getattr(kernels, name), _small_arguments(name)
            cold, cached = (_first_launch(kernel, arguments) for _ in range(2))
            yield {"kernel": name, "cold_seconds": cold, "cached_seconds": cached}
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder)


def _first_launch(kernel: Kernel, arguments: tuple[Any, ...]) -> float:
    fresh = kernel.retype({})
    return seconds(lambda: fresh(*arguments))


def _small_arguments(name: str) -> tuple[Any, ...]:
    x, row, ids, heads = torch.ones(2, 64), torch.ones(64), torch.zeros(2, dtype=torch.int64), torch.ones(1, 2, 4, 16)
    cases: dict[str, tuple[Any, ...]] = {
        "rms_norm_kernel": (x[None], row, x[None].clone(), 1e-6), "softmax_kernel": (x, x.clone()),
        "cross_entropy_kernel": (x, ids, torch.empty(2)), "gated_kernel": (x[None], x[None], x[None].clone()),
        "rope_kernel": (x.reshape(1, 2, 2, 32), *(x[:, :16].contiguous() for _ in range(2)), torch.empty(1, 2, 2, 32)),
        "casted_embedding_kernel": (ids, x, x.clone(), 1.0), "linear_kernel": (x, x, torch.empty(2, 2)),
        "flash_attention_kernel": (heads, heads, heads, heads.clone(), 0.25),
    }
    return cases[name]


def cases(arguments: argparse.Namespace, fast_bf16: bool) -> Iterator[Case]:
    """The cases whose group or label holds --only; each is freed before the next is made."""
    torch.manual_seed(0)
    for made in (pointwise_cases(arguments.quick), gemm_cases(arguments.quick, fast_bf16),
                 quantized_cases(arguments.quick), attention_cases(arguments.quick, fast_bf16)):
        yield from (case for case in made if arguments.only in case.label)


def row(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    typical, times, peers = result["seconds"], result["times"], PEERS[device()]
    columns = [f"{typical[name] * 1e3:.3f}" if name in typical else "-" for name in ("tessera", *peers)]
    columns.append(f"{result['limit_seconds'] * 1e3:.3f}")
    columns += [f"{times[name]:.2f}" if name in times else "-" for name in peers]
    return [result["case"], *columns, f"{result['goal']:.1f}", f"{result['of_limit']:.0%}",
            "yes" if result["met"] else "no"]


def summary(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each group: the geometric mean of its ratios, and how many of its cases meet the goal."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["group"], []).append(result)
    return [[name, f"{statistics.geometric_mean(r['times'].get('compiled', r['times']['eager']) for r in members):.2f}",
             f"{members[0]['goal']:.1f}", f"{statistics.geometric_mean(r['of_limit'] for r in members):.0%}",
             f"{sum(r['met'] for r in members)}/{len(members)}"] for name, members in groups.items()]


def options(description: str, devices: Sequence[str] = ("cpu",)) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(command line, machine) of a benchmark of single operations; threads and device are set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions")
    parser.add_argument("--only", default="", help="cases whose label has this text")
    parser.add_argument("--repetitions", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fastest", action="store_true", help="the fastest repetition instead of the median")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--device", choices=devices, default=devices[0])
    arguments = parser.parse_args()
    if arguments.device != device():  # not for the CPU: a default that is set costs each of torch's calls some 10 us
        torch.set_default_device(arguments.device)
    arguments.repetitions = arguments.repetitions or (3 if arguments.quick else 15)
    arguments.compile = arguments.compile and shutil.which(os.environ.get("CXX", "g++")) is not None
    torch.set_num_threads(arguments.threads)
    about = machine() | {"load_average": os.getloadavg()[0]}
    return arguments, about


def main() -> None:
    arguments, about = options(__doc__, ("cpu", "cuda"))
    fast_bf16 = about["bf16_flops"] > about["f32_flops"] / 10
    results = [run_case(case, about["bf16_flops" if " bf16 " in case.label and fast_bf16 else "f32_flops"], arguments)
               for case in cases(arguments, fast_bf16)]
    peers = PEERS[device()]
    header = ("milliseconds", "tessera", *peers, "limit", *(f"x {peer}" for peer in peers), "goal", "of limit", "met")
    print_table(header, [row(result) for result in results])
    print()
    print_table(["geometric means", "x torch", "goal", "of limit", "met"], summary(results))
    overhead = {"launch_seconds": launch_seconds(), "compile": list(compile_seconds())}
    print(f"\nload average at the start: {about['load_average']:.1f} (figures need a quiet machine)")
    print(f"warm launch, 4 arguments: {overhead['launch_seconds'] * 1e6:.1f} us")
    print_table(["milliseconds", "cold compile", "from disk"],
                [[c["kernel"], f"{c['cold_seconds'] * 1e3:.0f}", f"{c['cached_seconds'] * 1e3:.1f}"]
                 for c in overhead["compile"]])
    if not arguments.only and not arguments.quick:
        path = write_results("kernels", {"machine": about, "options": vars(arguments), "cases": results, **overhead})
        print(f"\n{path}")


if __name__ == "__main__":
    main()
