"""The OpenMP runtime that torch has already loaded, as kernels call it.

In: a kernel's machine code, whose `launch` (`entries.py`) runs on a team of threads. Out: the addresses of the
functions that start and join the team, for `jit.load_object`, and `launch` as a Python callable, through ctypes, which
lets go of the GIL.

Sharing torch's runtime means sharing its threads: two pools would fight for the cores. Where no such runtime is
found, the same code runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from tessera.kernel.backends.cpu import jit
from tessera.kernel.backends.cpu.host import target

PARALLEL, BARRIER = "tessera_parallel", "tessera_barrier"
THREAD, THREADS = "tessera_thread_num", "tessera_num_threads"
_GOMP = {PARALLEL: "GOMP_parallel", BARRIER: "GOMP_barrier",
         THREAD: "omp_get_thread_num", THREADS: "omp_get_num_threads"}
MIN_WORK = 32768  # elements: about what one thread does while a team starts

Entry = Callable[[bytes, int], None]


def entry(library: jit.Library, name: str = "launch") -> Entry:
    """A Python callable for a compiled `launch`: (packed arguments as bytes, number of threads)."""
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64)(library.address(name))


@cache
def symbols() -> dict[str, int]:
    """Addresses of the runtime's functions, for `jit.load_object`."""
    runtime = _loaded_runtime()
    if runtime is None:
        return _serial_runtime()
    return {ours: ctypes.cast(getattr(runtime, theirs), ctypes.c_void_p).value or 0
            for ours, theirs in _GOMP.items()}


def _loaded_runtime() -> ctypes.CDLL | None:
    """The OpenMP library in this process that torch uses, if it has the GNU entry points."""
    candidates = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    candidates += [Path(line.split(maxsplit=5)[5].strip()) for line in _memory_map() if "omp" in line.rsplit("/")[-1]]
    for path in candidates:
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            if all(hasattr(library, name) for name in _GOMP.values()):
                return library
        except (OSError, AttributeError):
            continue
    return None


def _memory_map() -> list[str]:
    if not sys.platform.startswith("linux"):
        return []
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]


_serial_library: list[jit.Library] = []


def _serial_runtime() -> dict[str, int]:
    """The same four functions for a team of one."""
    # Imported here: what comes from the disk cache needs no generator on other machines.
    from tessera.kernel.backends.cpu.emit import I32, PTR, VOID, Module, const

    module = Module()
    parallel = module.function(PARALLEL, VOID, [("region", PTR), ("shared", PTR), ("threads", I32), ("flags", I32)])
    parallel.builder.call_pointer(parallel.args[0], VOID, parallel.args[1])
    parallel.builder.ret()
    module.function(BARRIER, VOID, []).builder.ret()
    for name, value in ((THREAD, 0), (THREADS, 1)):
        function = module.function(name, I32, [])
        function.builder.ret(const(value, I32))
    library = jit.load_object(jit.compile_to_object(module.text(), target("generic")), target("generic"))
    _serial_library.append(library)  # its code must outlive every kernel
    return {name: library.address(name) for name in _GOMP}
