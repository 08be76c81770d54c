"""What kernels cost while a program runs: time, bytes, operations, and how near the machine's limit they come.

    with profile.session(exporters=[profile.summary("kernels.csv"), profile.chrome_trace("trace.json")]):
        train_one_epoch()

In: launches of kernels, in any thread, while a session is open. Out: a `Row` a kernel, and files. A session
changes what the launch tables hold (`specialise.observing`); without one, launches run the bare kernels.
Bytes and operations come from the IR at each launch's sizes (`cost`). The limit of a launch is the longer of
its bytes at the machine's bandwidth and its operations at the machine's rate: the roofline of Williams,
Waterman and Patterson, "Roofline" (2009). Operations that torch runs itself are not kernels and do not appear.
"""

from __future__ import annotations

import csv
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tessera.errors import InputError
from tessera.kernel.cost import Cost, cost
from tessera.kernel.specialise import Run, Specialisation, observing

MAX_EVENTS = 200_000  # launches that a trace shows; the summary counts all
_COPY_BYTES = 64 << 20
_CUDA_MATMUL = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a machine can do at most: bytes a second of memory traffic, operations a second by class.

    Classes are those of `cost.Cost.flops`; one that is missing counts as "f32".
    """

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.flops_per_s, Mapping):
            raise InputError(f"limits: flops_per_s={self.flops_per_s!r} given; expected a rate for each class")
        if not self.bytes_per_s > 0 or not all(rate > 0 for rate in self.flops_per_s.values()):
            raise InputError(f"limits: {self} given; expected rates above 0")
        if "f32" not in self.flops_per_s:
            raise InputError(f"limits: flops_per_s={dict(self.flops_per_s)} given; expected a rate for 'f32'")

    def seconds(self, spent: Cost) -> float:
        """The least time in which the machine can do it."""
        f32 = self.flops_per_s["f32"]
        compute = sum(n / self.flops_per_s.get(kind, f32) for kind, n in spent.flops.items())
        return max(spent.bytes / self.bytes_per_s, compute)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One launch: when it started (seconds since the session opened), how long it took, what it did."""

    kernel: str
    backend: str
    thread: int
    start: float
    seconds: float
    cost: Cost
    sizes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Row:
    """All launches of one kernel on one backend.

    `fraction_of_limit` is the roofline's time over the measured one; None where nothing is moved or computed.
    """

    kernel: str
    backend: str
    calls: int
    seconds: float
    bytes: int
    flops: int
    fraction_of_limit: float | None


@dataclass
class _Sum:
    calls: int = 0
    seconds: float = 0.0
    costs: dict[int, tuple[Cost, int]] = field(default_factory=dict)  # id of a cost -> itself, how often


class Session:
    """The launches since it opened. `rows` sums them up; exporters get the session when it closes.

    Args:
        limits: of the machine, by torch device type; what is missing is measured when it is first needed.
        max_events: how many launches `events` keeps.
    """

    def __init__(self, limits: Mapping[str, Limits] | None = None, max_events: int = MAX_EVENTS) -> None:
        self.events: list[Event] = []
        self._given, self._max_events = dict(limits or {}), max_events
        self._sums: dict[tuple[str, str], _Sum] = {}
        self._pending: list[tuple[Specialisation, Sequence[int], Cost, Any, Any]] = []
        self._lock = threading.Lock()
        self._opened = time.perf_counter()

    def limits(self, device: str) -> Limits:
        """The machine's limits for a device type ("cpu", "cuda"): as given, or measured."""
        return self._given.get(device) or (_cuda_limits() if device == "cuda" else _cpu_limits(torch.get_num_threads()))

    @property
    def rows(self) -> list[Row]:
        """One a kernel and backend, the longest time first."""
        self._settle()
        rows = [self._row(kernel, backend, total) for (kernel, backend), total in self._sums.items()]
        return sorted(rows, key=lambda row: -row.seconds)

    def _row(self, kernel: str, backend: str, total: _Sum) -> Row:
        limits = self.limits("cuda" if backend == "cuda" else "cpu")
        least = sum(limits.seconds(spent) * n for spent, n in total.costs.values())
        return Row(kernel=kernel, backend=backend, calls=total.calls, seconds=total.seconds,
                   bytes=sum(spent.bytes * n for spent, n in total.costs.values()),
                   flops=sum(spent.total_flops * n for spent, n in total.costs.values()),
                   fraction_of_limit=least / total.seconds if least and total.seconds else None)

    def wrap(self, specialisation: Specialisation, run: Run) -> Run:
        """`run`, timed and counted."""
        scalars = [i for i, kind in enumerate(specialisation.interface.params) if kind == "int"]
        costs: dict[Any, Cost] = {}

        def counted(args: Sequence[Any], sizes: Sequence[int]) -> Cost:
            specialisation.resolve(args, sizes)  # a search for a schedule is no time of the kernel
            key = (*sizes, *(args[i] for i in scalars))
            if key not in costs:
                costs[key] = cost(specialisation.function, args, sizes)
            return costs[key]

        def timed(args: Sequence[Any], sizes: Sequence[int]) -> None:
            spent = counted(args, sizes)
            start = time.perf_counter()
            run(args, sizes)
            seconds = time.perf_counter() - start
            self._add(specialisation, sizes, spent, start - self._opened, seconds)

        def timed_on_stream(args: Sequence[Any], sizes: Sequence[int]) -> None:
            if torch.cuda.is_current_stream_capturing():
                return run(args, sizes)
            spent = counted(args, sizes)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run(args, sizes)
            last.record()
            with self._lock:
                self._pending.append((specialisation, sizes, spent, first, last))
                full = len(self._pending) >= 10_000
            if full:
                self._settle()

        return timed_on_stream if specialisation.backend == "cuda" else timed

    def _settle(self) -> None:
        """Read the GPU's clocks: launches that were only marked in the stream become events."""
        with self._lock:
            pending, self._pending = self._pending, []
        if not pending:
            return
        torch.cuda.synchronize()
        origin = pending[0][3]
        start = time.perf_counter() - self._opened - origin.elapsed_time(pending[-1][4]) / 1e3
        for specialisation, sizes, spent, first, last in pending:
            self._add(specialisation, sizes, spent, start + origin.elapsed_time(first) / 1e3,
                      first.elapsed_time(last) / 1e3)

    def _add(self, of: Specialisation, sizes: Sequence[int], spent: Cost, start: float, seconds: float) -> None:
        with self._lock:
            total = self._sums.setdefault((of.name, of.backend), _Sum())
            total.calls += 1
            total.seconds += seconds
            total.costs[id(spent)] = spent, total.costs.get(id(spent), (spent, 0))[1] + 1
            if len(self.events) < self._max_events:
                self.events.append(Event(
                    kernel=of.name, backend=of.backend, thread=threading.get_native_id(), start=start,
                    seconds=seconds, cost=spent, sizes=dict(zip(of.interface.sizes, sizes))))


Exporter = Callable[[Session], None]


@contextmanager
def session(exporters: Sequence[Exporter] = (), *, limits: Mapping[str, Limits] | None = None,
            max_events: int = MAX_EVENTS) -> Iterator[Session]:
    """Profile the kernels that are launched while the block runs; exporters run at its end, also after an error.

    Args:
        exporters: `summary(path)`, `chrome_trace(path)`, or functions of the session.
        limits: {"cpu": Limits(...), "cuda": ...}; measured once a machine where not given.
        max_events: launches that a trace shows.
    """
    if not isinstance(exporters, (list, tuple)):
        raise InputError(f"exporters: {exporters!r} given; expected a list of profile.summary(path) and the like")
    for exporter in exporters:
        if not callable(exporter):
            raise InputError(f"exporters: {exporter!r} given; expected profile.summary(path) and the like")
    if limits is not None and not (isinstance(limits, Mapping) and all(isinstance(v, Limits) for v in limits.values())):
        raise InputError(f"limits: {limits!r} given; expected {{'cpu': profile.Limits(...)}}")
    if not isinstance(max_events, int) or max_events < 0:
        raise InputError(f"max_events: {max_events!r} given; expected a number of launches")
    opened = Session(limits, max_events)
    with ExitStack() as at_end:
        for exporter in reversed(exporters):  # each runs, also when another fails
            at_end.callback(exporter, opened)
        with observing(opened.wrap):
            yield opened


COLUMNS = ("kernel", "backend", "calls", "seconds", "bytes", "flops", "gb_per_s", "gflop_per_s", "fraction_of_limit")


def summary(path: str | os.PathLike[str]) -> Exporter:
    """Writes a CSV with one line a kernel: COLUMNS.

    Raises:
        InputError: the path is a folder, or is in none.
    """
    target = _writable(path)

    def export(profiled: Session) -> None:
        with target.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in profiled.rows:
                rates = [f"{n / row.seconds / 1e9:.4g}" if row.seconds else "" for n in (row.bytes, row.flops)]
                fraction = "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.4g}"
                writer.writerow([row.kernel, row.backend, row.calls, f"{row.seconds:.9f}", row.bytes, row.flops,
                                 *rates, fraction])

    return export


def chrome_trace(path: str | os.PathLike[str]) -> Exporter:
    """Writes the launches as a trace that chrome://tracing and Perfetto show.

    Raises:
        InputError: the path is a folder, or is in none.
    """
    target = _writable(path)

    def export(profiled: Session) -> None:
        profiled.rows  # noqa: B018 (reads the GPU's clocks)
        events = [{"name": e.kernel, "cat": e.backend, "ph": "X", "ts": e.start * 1e6, "dur": e.seconds * 1e6,
                   "pid": os.getpid(), "tid": e.thread,
                   "args": {**e.sizes, "bytes": e.cost.bytes, "flops": e.cost.total_flops}} for e in profiled.events]
        target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    return export


def _writable(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path: {path!r} given; expected the path of a file")
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"path: {str(path)!r} given; the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise InputError(f"path: {str(path)!r} given; expected a file, this is a folder")
    return target


@cache
def _cpu_limits(threads: int) -> Limits:
    """Bandwidth of a copy (read and written bytes count) and the rate of a loop of multiply-adds."""
    from tessera.kernel.backends.cpu import probe

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return Limits(bytes_per_s=2 * _COPY_BYTES / best, flops_per_s=probe.flops_per_second(threads))


@cache
def _cuda_limits() -> Limits:
    """Bandwidth of a copy of 1 GiB, and the rates that cuBLAS reaches at 4096 x 4096 x 4096."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rates = {}
    for name, dtype in (("f32", torch.float32), ("f64", torch.float64), ("f16", torch.float16),
                        ("bf16", torch.bfloat16)):
        a = torch.ones(_CUDA_MATMUL, _CUDA_MATMUL, dtype=dtype, device="cuda")
        rates[name] = 2 * _CUDA_MATMUL**3 / _cuda_seconds(lambda a=a: torch.matmul(a, a))  # type: ignore[misc]
    return Limits(bytes_per_s=2 * (1 << 30) / _cuda_seconds(lambda: target.copy_(source)),
                  flops_per_s={**rates, "int8": 2 * rates["bf16"]})


def _cuda_seconds(run: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(5):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        best = min(best, first.elapsed_time(last) / 1e3)
    return best
