"""Compiled kernels as the launch path finds them, and who looks on while they run.

In: a traced function and its backend, from `launch.Variant`. Out: `Table.runs`, key -> what a launch calls.
`profile` and `graph` open `observing(wrap)`: while it is open, every table holds wrapped kernels; when it is
closed, the bare ones. A launch that nobody observes therefore pays nothing. `tune` puts a `Chooser` where a
compiled kernel would stand.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tessera.kernel import backends
from tessera.kernel.ir import Function

Run = Callable[[Sequence[Any], Sequence[int]], None]


class Chooser(Protocol):
    """A kernel with several schedules: `choose` gives the one for a call."""

    def __call__(self, args: Sequence[Any], sizes: Sequence[int]) -> None:
        """Run as the chosen one."""

    def choose(self, args: Sequence[Any], sizes: Sequence[int]) -> backends.Compiled:
        """The compiled kernel that runs with these arguments."""


Tuner = Callable[["Specialisation"], "Chooser | None"]


class Specialisation:
    """A kernel at fixed dtypes, strides and compile-time values, on one backend.

    `retrace` makes the same function under another schedule. `outputs` are the positions of the arguments that
    it writes.
    """

    def __init__(self, function: Function, backend: str, retrace: Callable[[Mapping[str, Any]], Function],
                 tuner: Tuner | None) -> None:
        self.function, self.backend, self.retrace, self.tuner = function, backend, retrace, tuner
        self.outputs = [i for i, p in enumerate(function.params) if p.is_output]
        self.chooser: Chooser | None = None
        self._compiled: backends.Compiled | None = None
        self.set_chooser()

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.function.name

    @property
    def compiled(self) -> backends.Compiled:
        """The kernel under its own schedule."""
        if self._compiled is None:
            self._compiled = backends.get(self.backend).compile(self.function)
        return self._compiled

    def set_chooser(self) -> None:
        """Ask its tuner, or the one that tunes all kernels; without either it runs under its own schedule."""
        tuner = self.tuner or _default_tuner
        self.chooser = tuner(self) if tuner else None

    @property
    def run(self) -> Run:
        """What a launch calls when nobody looks on."""
        return self.chooser or self.compiled

    def resolve(self, args: Sequence[Any], sizes: Sequence[int]) -> backends.Compiled:
        """The compiled kernel that a launch with these arguments runs."""
        return self.chooser.choose(args, sizes) if self.chooser else self.compiled


Wrap = Callable[[Specialisation, Run], Run]
_lock = threading.RLock()
_wraps: list[Wrap] = []
_tables: weakref.WeakSet[Table] = weakref.WeakSet()
_default_tuner: Tuner | None = None


class Table:
    """The specialisations of one variant of a kernel, and `runs`: what a launch calls, by key."""

    def __init__(self) -> None:
        self.specialisations: dict[Any, Specialisation] = {}
        self.runs: dict[Any, Run] = {}
        with _lock:
            _tables.add(self)

    def add(self, key: Any, specialisation: Specialisation) -> Run:
        """Make a specialisation known; what launches of this key call from now on."""
        specialisation.run  # noqa: B018 (compiles, before the lock is taken)
        with _lock:
            self.specialisations[key] = specialisation
            self.runs[key] = _wrapped(specialisation)
            return self.runs[key]


def _wrapped(specialisation: Specialisation) -> Run:
    run = specialisation.run
    for wrap in _wraps:
        run = wrap(specialisation, run)
    return run


def _rewire(*, choose: bool = False) -> None:
    for table in _tables:
        for key, specialisation in table.specialisations.items():
            if choose:
                specialisation.set_chooser()
            table.runs[key] = _wrapped(specialisation)


@contextmanager
def observing(wrap: Wrap) -> Iterator[None]:
    """While open, launches of every kernel, in every thread, call `wrap(specialisation, run)` instead of run."""
    with _lock:
        _wraps.append(wrap)
        _rewire()
    try:
        yield
    finally:
        with _lock:
            _wraps.remove(wrap)
            _rewire()


def is_observed() -> bool:
    """Whether anything looks on."""
    return bool(_wraps)


def observed_run(specialisation: Specialisation) -> Run:
    """What a launch calls now, observers included."""
    with _lock:
        return _wrapped(specialisation)


def set_default_tuner(tuner: Tuner | None) -> None:
    """The tuner of every kernel that has none of its own, compiled ones included; None ends it."""
    global _default_tuner
    with _lock:
        _default_tuner = tuner
        _rewire(choose=True)
