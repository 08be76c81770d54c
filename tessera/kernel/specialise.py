"""Compiled kernels as the launch path finds them, and who looks on while they run.

In: what traces a function, its backend, and where its code may lie on disk, from `launch.Variant`. Out:
`Table.runs`, key -> what a launch calls. `profile` and `graph` open `observing(wrap)`: while it is open, every
table holds wrapped kernels; when it is closed, the bare ones. A launch that nobody observes therefore pays nothing.
`tune` puts a `Chooser` where a compiled kernel would stand.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

from tessera.kernel import backends
from tessera.kernel.direct import Manifest
from tessera.kernel.frontend.reads import Reads
from tessera.kernel.interface import Interface
from tessera.kernel.ir import Function

Run = Callable[[Sequence[Any], Sequence[int]], None]


class Chooser(Protocol):
    """A kernel with several schedules: `choose` gives the one for a call."""

    def __call__(self, args: Sequence[Any], sizes: Sequence[int]) -> None:
        """Run as the chosen one."""

    def choose(self, args: Sequence[Any], sizes: Sequence[int]) -> backends.Compiled:
        """The compiled kernel that runs with these arguments."""


Tuner = Callable[["Specialisation"], "Chooser | None"]


class Trace(Protocol):
    """Makes a specialisation's function."""

    def __call__(self, schedule: Mapping[str, Any], reads: Reads | None = None) -> Function:
        """The function under a schedule; `reads` takes note of what the trace depends on."""


class Specialisation:
    """A kernel at fixed dtypes, strides and compile-time values, on one backend.

    `retrace` makes the same function under another schedule. Where `manifest` leads to code on disk, the function is
    traced only when somebody asks for it.
    """

    def __init__(self, name: str, backend: str, schedule: Mapping[str, Any], retrace: Trace, tuner: Tuner | None,
                 manifest: Manifest | None = None) -> None:
        self.name, self.backend, self.schedule, self.retrace, self.tuner = name, backend, schedule, retrace, tuner
        self._manifest = manifest
        self._compiled: backends.Compiled | None = None
        self.chooser: Chooser | None = None
        self.set_chooser()

    @cached_property
    def function(self) -> Function:
        """The kernel's IR under its own schedule.

        Raises:
            CompileError: it does not compile.
        """
        return self.retrace(self.schedule, self._manifest.reads if self._manifest else None)

    @cached_property
    def interface(self) -> Interface:
        """What a launch knows of it."""
        return Interface.of(self.function)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The positions of the arguments that it writes."""
        return self.interface.outputs

    @property
    def compiled(self) -> backends.Compiled:
        """The kernel under its own schedule."""
        if self._compiled is None:
            self._compiled = self._find_or_make(self._manifest) if self._manifest else \
                backends.get(self.backend).compile(self.function)
        return self._compiled

    def _find_or_make(self, manifest: Manifest) -> backends.Compiled:
        found = manifest.find()
        if found is not None:
            self.interface, code = found
            return manifest.backend.load(self.interface, code, lambda: self.function)
        compiled = manifest.backend.compile(self.function)
        manifest.keep(self.interface, compiled.entry)
        return compiled

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
