"""How long kernels take to compile for this processor: cold, and from the disk cache.

    python bench/compile.py [--only NAME] [--repetitions N]

Every kernel of tessera.ops.kernels, with tensors of f32 and of bf16, attention with softcap and dropout as well: from
Python source to code that can be called, in a process that has imported everything and compiled another kernel. The
table shows the best of the repetitions: wall time, processor time of all threads, and wall time where the code is in
the disk cache. GOALS are wall times on a quiet machine; on a busy one, processor time says more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from common import cpu_name, print_table, write_results

from tessera import Kernel, bf16, f32, int8, int64
from tessera.errors import CompileError
from tessera.ops import kernels

GOALS = {"cold": 0.400, "cached": 0.015}
_INTEGERS = {"targets", "ids", "labels", "pointers", "columns", "rival", "positions"}  # parameters without a dtype
_CONSTANTS = {"kind": "silu", "activation": "silu", "causal": True}
_OPTIONS = {"softcap": 30.0, "dropout": 0.1}  # of attention: what has them is compiled with and without


def all_kernels(only: str) -> Iterator[tuple[str, Kernel]]:
    """The kernels that the modules of tessera.ops.kernels define, by name."""
    for info in sorted(pkgutil.iter_modules(kernels.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, Kernel) and value.function.__module__ == module.__name__ and only in name:
                yield name, value


def arguments(kernel: Kernel, dtype: Any) -> dict[str, Any]:
    """What `Kernel.trace` takes: a dtype for every tensor whose annotation leaves it open."""
    found = {}
    for p in kernel.parameters:
        if p.name in _CONSTANTS:
            found[p.name] = _CONSTANTS[p.name]
        elif p.kind == "tile" and p.dtype is None:
            found[p.name] = int64 if p.name in _INTEGERS else dtype
    if kernel.name == "casted_linear_kernel":
        found["weight"] = int8
    return found


def all_cases(only: str) -> Iterator[tuple[str, Kernel, Any, dict[str, Any]]]:
    """(name, kernel, dtype, what it is traced with)."""
    for name, kernel in all_kernels(only):
        options = {p.name: _OPTIONS[p.name] for p in kernel.parameters if p.name in _OPTIONS}
        for dtype in (f32, bf16):
            types = arguments(kernel, dtype)
            if dtype == bf16 and dtype not in types.values():
                continue
            yield name, kernel, dtype, types
            if options:
                yield f"{name}, {', '.join(options)}", kernel, dtype, {**types, **options}


def compile_once(kernel: Kernel, types: dict[str, Any]) -> tuple[float, float]:
    """(wall, processor) seconds that a fresh copy takes."""
    fresh = kernel.retype({})
    wall, cpu = time.perf_counter(), time.process_time()
    fresh.specialise("cpu", (), types).compiled  # noqa: B018 (compiles)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(kernel: Kernel, types: dict[str, Any], repetitions: int) -> dict[str, float]:
    """Best times of a kernel, each repetition with an empty cache."""
    cold, cached = [], []
    for _ in range(repetitions):
        folder = tempfile.mkdtemp()
        os.environ["TESSERA_CACHE_DIR"] = folder
        try:
            cold.append(compile_once(kernel, types))
            cached.append(compile_once(kernel, types))
        finally:
            shutil.rmtree(folder)
    return {"cold": min(wall for wall, _ in cold), "cold_processor": min(cpu for _, cpu in cold),
            "cached": min(wall for wall, _ in cached), "cached_processor": min(cpu for _, cpu in cached)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    compile_once(kernels.rms_norm_kernel, {})
    results, rows = [], []
    for name, kernel, dtype, types in all_cases(options.only):
        try:
            found = measure(kernel, types, options.repetitions)
        except CompileError:  # a kernel for f32 only
            continue
        results.append({"kernel": name, "dtype": dtype.name, **found})
        rows.append([name, dtype.name, *(f"{1e3 * found[key]:.0f}" for key in (
            "cold", "cold_processor", "cached", "cached_processor"))])
    print_table(["milliseconds", "dtype", "cold", "processor", "from disk", "processor"], rows)
    for key, goal in GOALS.items():
        met = sum(result[key] <= goal for result in results)
        print(f"{key}: {met} of {len(results)} within {1e3 * goal:.0f} ms")
    if not options.only:
        write_results("compile", {"machine": {"cpu": cpu_name(), "cores": os.cpu_count()}, "results": results})


if __name__ == "__main__":
    main()
