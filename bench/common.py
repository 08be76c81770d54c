"""What every benchmark needs: the machine's limits, systems in processes of their own, tables and JSON.

Benchmarks check correctness before they time, interleave the systems' repetitions so that a noisy moment hits
all of them, and report medians.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
_READ_BYTES = 512 << 20  # beyond any cache
_COPY_BYTES = 2 << 30  # the same on a GPU
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def median_seconds(run: Callable[[], object], repetitions: int = 5) -> float:
    """Median wall time of run(), after one call to warm up."""
    run()
    return statistics.median(seconds(run) for _ in range(repetitions))


def seconds(run: Callable[[], object], calls: int = 1) -> float:
    """Wall time of one of so many calls; on a GPU, which works behind the program's back, until all are done."""
    finish()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    finish()
    return (time.perf_counter() - start) / calls


def device() -> str:
    """Where tensors are made that do not say where: "cpu", or "cuda" after torch.set_default_device."""
    return torch.get_default_device().type


def finish() -> None:
    """Wait for the GPU, where it is the device."""
    if device() == "cuda":
        torch.cuda.synchronize()


def memory_bandwidth() -> float:
    """Bytes a second that all threads together read from memory: the sum of a large array; on a GPU, a copy's."""
    if device() == "cuda":
        data = torch.ones(_COPY_BYTES // 4)
        target = torch.empty_like(data)
        return 2 * _COPY_BYTES / median_seconds(lambda: target.copy_(data))
    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / median_seconds(data.sum)


def matmul_peak(dtype: torch.dtype) -> float:
    """Multiply-adds a second, times two, of torch's square matrix product."""
    size = _MATMUL_SIZE[device()]
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    slow = device() == "cpu" and seconds(lambda: a[:16] @ b) > 0.5  # emulated bf16: a full product would take seconds
    rows = 16 if slow else size
    return 2 * rows * size**2 / median_seconds(lambda: a[:rows] @ b, 1 if slow else 5)


def machine() -> dict[str, Any]:
    """The processor or the GPU, and what it can do at most."""
    about: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                             "simd": torch.backends.cpu.get_cpu_capability()}
    if device() == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "triton": metadata.version("triton")}
    return about | {"read_bytes_per_second": memory_bandwidth(), "f32_flops": matmul_peak(torch.float32),
                    "bf16_flops": matmul_peak(torch.bfloat16)}


def cpu_name() -> str:
    """The processor's own name for itself."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


class Worker:
    """A system in a process of its own that answers JSON requests, one a line.

    Args:
        script: the file to run; it calls `serve`.
        arguments: of the script.
    """

    def __init__(self, script: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, script, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, name: str, **values: Any) -> Any:
        """Call the worker's function `name`; its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, values]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(system: object) -> None:
    """In a worker: answer requests with the methods of `system` until stdin ends. Nothing else may print."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, values = json.loads(line)
        print(json.dumps(getattr(system, name)(**values)), file=answers, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells))


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Write bench/results/<name>_<cpu or GPU>.json."""
    name_of_machine = torch.cuda.get_device_name() if device() == "cuda" else cpu_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name_of_machine.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{slug}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path
