"""`@ts.autotune`: the schedule of a kernel chosen by measuring it with the arguments of its launches.

    @ts.autotune(configs=[{"tile": {"BM": 32}}, {"tile": {"BM": 128}}], key=["N", "K"])
    @ts.kernel
    def matmul(...): ...

    ts.autotune.enable(cache_key=("arch", "dtype", "shape"))  # every kernel with a matmul and no blocks

In: a `Specialisation` from the launch path. Out: a `Choice` that stands where the compiled kernel would. The first
launch with a key compiles each schedule, times it on copies of what the kernel writes, and keeps the fastest in
the cache folder (TESSERA_CACHE_DIR); from then on, also in other processes, nothing is measured. Every schedule
computes the same function; on CPU to the bit, unless the kernel itself reads its block sizes, as attention does; on
CUDA a schedule's BK fixes the order of a matmul's sum. A schedule that does not compile or run, or whose results are
not those of the kernel without one, is left out with a warning. An assertion that fails without a schedule is raised.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tessera.errors import CompileError, InputError, LaunchError, TesseraError
from tessera.kernel import backends, cache, ir
from tessera.kernel.ir import Function
from tessera.kernel.schedule import flatten
from tessera.kernel.specialise import Specialisation, set_default_tuner

KEY_PARTS = ("arch", "dtype", "shape")
MAX_SCHEDULES = 4096
_REPEATS = 5
_GPU_REPEATS = 15
_FILLED_BYTES = 256 << 20  # more than the cache of a GPU
_DEFAULT_SPACES = {
    "cpu": {"BM": [16, 64, 128], "BN": [128, 256, 512]},
    "cuda": {"BM": [32, 64, 128], "BN": [64, 128], "warps": [4, 8]},
}
_log = logging.getLogger("tessera.tune")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found for one key: the schedule, and of each schedule seconds or why it was left out.

    `measured` is False where the schedule came from the disk.
    """

    kernel: str
    key: tuple[Any, ...]
    schedule: Mapping[str, Any]
    seconds: Mapping[str, float]
    skipped: Mapping[str, str]
    measured: bool


_results: list[Result] = []


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """Makes choices: which schedules to try, what tells launches apart, how long a search may take (seconds)."""

    schedules: tuple[Mapping[str, Any], ...]
    key: tuple[str, ...]
    budget: float

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What compile-time parameters of these names are before a schedule is chosen."""
        return self.schedules[0]

    def __call__(self, specialisation: Specialisation) -> Choice:
        return Choice(specialisation, self)


class Choice:
    """One specialisation under several schedules; called like a compiled kernel.

    Raises:
        InputError: the tuner's key names what the kernel does not have.
        CompileError: at a launch, none of the schedules works.
    """

    def __init__(self, specialisation: Specialisation, tuner: Tuner) -> None:
        self._specialisation, self._tuner = specialisation, tuner
        self._pick = _key_reader(specialisation.function, tuner.key)
        self._best: dict[Any, backends.Compiled] = {}
        self._made: dict[int, backends.Compiled] = {}
        self._lock = threading.RLock()

    @property
    def source(self) -> str:
        """The text of the schedule that was chosen last; before any launch, of the kernel's own."""
        return next(reversed(self._best.values())).source if self._best else self._specialisation.compiled.source

    def __call__(self, args: Sequence[Any], sizes: Sequence[int]) -> None:
        self.choose(args, sizes)(args, sizes)

    def choose(self, args: Sequence[Any], sizes: Sequence[int]) -> backends.Compiled:
        """The compiled kernel for a launch: known, from the disk, or the fastest of those that are measured now."""
        key = self._pick(args, sizes)
        found = self._best.get(key)
        if found is None:
            with self._lock:
                found = self._best.get(key)
                if found is None:
                    found = self._best[key] = self._find(key, args, sizes)
        return found

    def _find(self, key: tuple[Any, ...], args: Sequence[Any], sizes: Sequence[int]) -> backends.Compiled:
        measured: list[bool] = []

        def measure() -> bytes:
            measured.append(True)
            return json.dumps(self._measure(args, sizes)).encode()

        identity = json.dumps(["tune", self._identity(args), [*map(repr, key)]])
        report = self._read(cache.cached(identity, measure)) or self._read(measure())
        assert report is not None
        best, seconds, skipped = report
        names = [_text(schedule) for schedule in self._tuner.schedules]
        _results.append(Result(
            kernel=self._specialisation.name, key=key, schedule=self._tuner.schedules[best], measured=bool(measured),
            seconds={names[i]: s for i, s in seconds.items()}, skipped={names[i]: why for i, why in skipped.items()}))
        return self._compiled(best)

    def _read(self, stored: bytes) -> tuple[int, dict[int, float], dict[int, str]] | None:
        """The best schedule, the seconds of those that work, and why others do not; None if it cannot be that."""
        try:
            report = json.loads(stored)
            seconds = {int(i): float(s) for i, s in report["seconds"].items()}
            skipped = {int(i): str(why) for i, why in report["skipped"].items()}
            best = int(report["best"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        known = range(len(self._tuner.schedules))
        return (best, seconds, skipped) if best in known and all(i in known for i in (*seconds, *skipped)) else None

    def _identity(self, args: Sequence[Any]) -> list[str]:
        """What a stored choice belongs to, besides its key: the kernel, the schedules, the machine."""
        function = self._specialisation.function
        text = f"{function}\n{_text(function.schedule)}\n{[_text(schedule) for schedule in self._tuner.schedules]}"
        arch = _arch(self._specialisation.backend, args) if "arch" in self._tuner.key else ""
        return [hashlib.sha256(text.encode()).hexdigest(), self._specialisation.backend, arch]

    def _compiled(self, index: int) -> backends.Compiled:
        if index not in self._made:
            schedule = {**self._specialisation.function.schedule, **self._tuner.schedules[index]}
            function = self._specialisation.retrace(schedule)
            self._made[index] = backends.get(self._specialisation.backend).compile(function)
        return self._made[index]

    def _measure(self, args: Sequence[Any], sizes: Sequence[int]) -> dict[str, Any]:
        """{"best": index, "seconds": {index: s}, "skipped": {index: why}}; the first of equals is best."""
        trial = _Trial(args, sizes, self._specialisation.outputs)
        trial.expect(lambda: self._specialisation.compiled)
        seconds: dict[int, float] = {}
        skipped: dict[int, str] = {}
        started = time.perf_counter()
        for index, schedule in enumerate(self._tuner.schedules):
            if seconds and time.perf_counter() - started > self._tuner.budget:
                skipped[index] = f"not tried: the budget of {self._tuner.budget} s was used up"
                continue
            try:
                run = self._compiled(index)
                trial.check(run)
                seconds[index] = _median_seconds(lambda run=run: run(trial.args, sizes), args)  # type: ignore[misc]
            except Exception as error:  # whatever a compiler or a driver raises
                skipped[index] = " ".join(str(error).split()) or type(error).__name__
                _log.warning("kernel %s: schedule %s left out: %s", self._specialisation.name, _text(schedule),
                             skipped[index])
        if not seconds:
            raise CompileError(f"kernel {self._specialisation.name}: none of the {len(skipped)} schedules to tune "
                               f"works; the first: {skipped[0]}")
        best = min(seconds, key=lambda index: (seconds[index], index))
        return {"best": best, "seconds": seconds, "skipped": skipped}


class _Trial:
    """Arguments to try schedules with: copies of what a kernel writes, so that the caller's tensors are left alone."""

    def __init__(self, args: Sequence[Any], sizes: Sequence[int], outputs: Sequence[int]) -> None:
        self.args, self._sizes = list(args), sizes
        self._before = {i: args[i] for i in outputs}
        self._expected: list[torch.Tensor] | None = None
        for i in outputs:
            self.args[i] = args[i].detach().clone()

    def expect(self, untuned: Callable[[], backends.Compiled]) -> None:
        """Take the results of the kernel without a schedule as those that are right.

        Raises:
            LaunchError: it fails with these arguments; so it would under any schedule.
        """
        try:
            self._expected = self._results(untuned())
        except LaunchError:
            raise
        except TesseraError:
            pass  # it needs a schedule: the first that works is the measure of the others

    def check(self, run: backends.Compiled) -> None:
        """Run once, which may compile and touches cold memory.

        Raises:
            CompileError: the results differ from those expected by more than another order of sums explains.
        """
        results = self._results(run)
        if self._expected is None:
            self._expected = results
        if not all(map(_is_close, results, self._expected)):
            raise CompileError("its results differ from those of the kernel without a schedule")

    def _results(self, run: backends.Compiled) -> list[torch.Tensor]:
        for i, before in self._before.items():
            self.args[i].copy_(before)
        run(self.args, self._sizes)
        return [self.args[i].clone() for i in self._before]


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results differ by roundings at most: of their dtype, relative to the largest; ints by one step."""
    if not expected.dtype.is_floating_point:
        return bool(((found.long() - expected.long()).abs() <= 1).all())
    x, y = found.double(), expected.double()
    finite = y.isfinite()
    if not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()) or not bool(x[finite].isfinite().all()):
        return False
    largest = y[finite].abs().max().item() if finite.any() else 0.0
    return bool(((x - y)[finite].abs() <= max(1e-3, 4 * torch.finfo(expected.dtype).eps) * largest).all())


def _median_seconds(run: Callable[[], None], args: Sequence[Any]) -> float:
    """The median time of a few calls."""
    device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))
    if device.type == "cuda":
        return _median_on_gpu(run, device)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _median_on_gpu(run: Callable[[], None], device: torch.device) -> float:
    """By the GPU's own clock. What fills memory before each call empties the cache, and gives the launch, which may
    take longer than the kernel, time to arrive."""
    with torch.cuda.device(device):
        filled = torch.empty(_FILLED_BYTES, dtype=torch.uint8, device=device)
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_GPU_REPEATS)]
        for first, last in marks:
            filled.zero_()
            first.record()
            run()
            last.record()
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) / 1e3 for first, last in marks)


def _arch(backend: str, args: Sequence[Any]) -> str:
    """The machine as far as times depend on it."""
    if backend == "cuda":
        return torch.cuda.get_device_name(next(arg.device for arg in args if isinstance(arg, torch.Tensor)))
    return f"{_cpu_key()} {torch.get_num_threads()} threads"


def _cpu_key() -> str:
    from tessera.kernel.backends.cpu.host import target

    return target().key


def _key_reader(function: Function, key: Sequence[str]) -> Callable[[Sequence[Any], Sequence[int]], tuple[Any, ...]]:
    """(args, sizes) -> what tells launches apart. Dtypes always do: each has a specialisation of its own."""
    names = [name for name in key if name not in KEY_PARTS]
    scalars = {p.name: i for i, p in enumerate(function.params) if not p.is_view}
    for name in names:
        if name not in function.sizes and name not in scalars:
            raise InputError(f"kernel {function.name}: autotune key {name!r} is not one of its dims and numbers "
                             f"({', '.join([*function.sizes, *scalars])}), nor of {', '.join(KEY_PARTS)}")
    if "shape" in key:
        names += [size for size in function.sizes if size not in names]
    at_sizes = [function.sizes.index(name) for name in names if name in function.sizes]
    at_args = [scalars[name] for name in names if name not in function.sizes]
    if not at_args and at_sizes == list(range(len(function.sizes))):
        return lambda args, sizes: tuple(sizes)
    return lambda args, sizes: (*(sizes[i] for i in at_sizes), *(args[i] for i in at_args))


def _text(schedule: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(schedule.items())) or "default"


def _schedules(configs: Sequence[Mapping[str, Any]] | None,
               space: Mapping[str, Sequence[Any]] | None) -> tuple[Mapping[str, Any], ...]:
    if (configs is None) == (space is None):
        raise InputError("autotune: expected either configs=[{...}, ...] or space={name: [values]}")
    if space is not None:
        if not isinstance(space, Mapping) or not all(isinstance(values, (list, tuple, range))
                                                     for values in space.values()):
            raise InputError(f"autotune: space={space!r} given; expected {{name: [values]}}")
        count = math.prod(len(values) for values in space.values())
        if count > MAX_SCHEDULES:
            raise InputError(f"autotune: space has {count} combinations; expected at most {MAX_SCHEDULES}")
        configs = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    if not isinstance(configs, (list, tuple)):
        raise InputError(f"autotune: configs={configs!r} given; expected a list of schedules such as {{'BM': 64}}")
    found = tuple(flatten(config) for config in configs)
    if not found:
        raise InputError("autotune: no schedule to try; expected at least one")
    return found


def _names(what: str, given: Any, expected: str) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in given):
        raise InputError(f"autotune: {what}={given!r} given; expected {expected}")
    return tuple(given)


def _seconds(budget: Any) -> float:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0:
        raise InputError(f"autotune: budget={budget!r} given; expected seconds, 0 or more")
    return float(budget)


class _Autotune:
    """`ts.autotune`: the decorator, and the switch for kernels without one."""

    def __call__(self, *, configs: Sequence[Mapping[str, Any]] | None = None,
                 space: Mapping[str, Sequence[Any]] | None = None, key: Sequence[str] = KEY_PARTS,
                 budget: float = 5.0) -> Callable[[Any], Any]:
        """Decorator, above or below `@ts.kernel`: choose the schedule by measuring.

        Args:
            configs: schedules to try, each with options as for `ts.schedule`.
            space: values of each option, in all combinations, in place of configs.
            key: what tells launches apart: dims and number arguments by name, "shape" (every dim). Each dtype, machine
                and number of threads is always measured by itself.
            budget: seconds that a search may take, compiling included; at least one schedule is tried.

        A block size with the name of a compile-time parameter (`BM: ts.constexpr`) is its value, unless a launch gives
        another than its default.

        Raises:
            InputError: an option is unknown, or both or neither of configs and space are given.
        """
        names = _names("key", key, "a list of names")
        tuner = Tuner(schedules=_schedules(configs, space), key=("arch", *names), budget=_seconds(budget))

        def apply(target: Any) -> Any:
            if hasattr(target, "with_tuner"):
                return target.with_tuner(tuner)
            if not callable(target):
                raise InputError(f"autotune: {target!r} given; expected a kernel or a function")
            target.__tile_tuner__ = tuner
            return target

        return apply

    def enable(self, cache_key: Sequence[str] = KEY_PARTS, budget: float = 5.0) -> None:
        """Tune every kernel that has a matmul and no block sizes or tuner of its own, from its next launch on.

        Args:
            cache_key: of "arch" (the machine and its threads), "dtype", "shape": what a stored choice is told apart by.
                Without "shape" the first launch decides for all sizes, without "arch" for all machines.
            budget: seconds that a search may take, compiling included.

        Raises:
            InputError: another name in cache_key, a budget below 0.
        """
        expected = f"names out of {', '.join(KEY_PARTS)}"
        key, limit = _names("cache_key", cache_key, expected), _seconds(budget)
        if not set(key) <= set(KEY_PARTS):
            raise InputError(f"autotune: cache_key={cache_key!r} given; expected {expected}")
        tuners = {backend: Tuner(schedules=({}, *_schedules(None, space)), key=key, budget=limit)
                  for backend, space in _DEFAULT_SPACES.items()}

        def tune(specialisation: Specialisation) -> Choice | None:
            function = specialisation.function
            tuner = tuners.get(specialisation.backend)
            fixed = any(name.isupper() for name in function.schedule)
            if tuner is None or fixed or not any(op.name == "mma" for op in ir.walk(function.body)):
                return None
            return tuner(specialisation)

        set_default_tuner(tune)

    def disable(self) -> None:
        """End `enable`."""
        set_default_tuner(None)

    def report(self) -> list[Result]:
        """What has been chosen in this process, in order."""
        return list(_results)


autotune = _Autotune()
