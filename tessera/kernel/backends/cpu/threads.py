"""Parallel entry points on the OpenMP runtime that torch has already loaded.

In: a module with, for each segment k of a kernel, `items_k(args) -> i64` and `body_k(args, begin, end)`.
Out: one more function, `launch(args, threads)`, that runs all segments in one parallel region, with a barrier
between one segment and the next. It is called from Python through ctypes (`entry`), which lets go of the GIL.

Sharing torch's runtime means sharing its threads: two pools would fight for the cores. Where no such runtime is
found, the same code runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from tessera.kernel.backends.cpu import jit
from tessera.kernel.backends.cpu.emit import I32, I64, PTR, VOID, Builder, Callee, Function, Module, Val, const
from tessera.kernel.backends.cpu.host import target

_PARALLEL, _BARRIER = "tessera_parallel", "tessera_barrier"
_THREAD, _THREADS = "tessera_thread_num", "tessera_num_threads"
_GOMP = {_PARALLEL: "GOMP_parallel", _BARRIER: "GOMP_barrier",
         _THREAD: "omp_get_thread_num", _THREADS: "omp_get_num_threads"}
_LINE = 64  # bytes; each shared counter has a cache line of its own
CHUNKS_PER_THREAD = 8
MIN_WORK = 32768  # elements: about what one thread does while a team starts

Entry = Callable[[bytes, int], None]


def emit_launch(module: Module, segments: int, *, dynamic: Sequence[int] = (), name: str = "launch") -> None:
    """Add `name(ptr args, i64 threads)`, which runs segments 0 .. segments - 1 in order, and `segments() -> i64`.

    Args:
        segments: how many `items_k`, `body_k` pairs the module has. If it also has `work(args) -> i64`, an estimate
            of the elements to be computed, a launch of less than MIN_WORK stays on the calling thread.
        dynamic: the segments whose items differ in cost: threads take chunks from a shared counter. The others are
            cut into one contiguous share a thread, the same one at every launch. Which thread computes an item
            never changes its value.
    """
    count = module.function("segments", I64, [])
    count.builder.ret(const(segments, I64))
    function = module.function(name, VOID, [("args", PTR), ("threads", I64)])
    b, (args, threads) = function.builder, function.args
    if "work" in module.functions:
        threads = b.select(b.cmp("lt", b.call(module.functions["work"], args), MIN_WORK), 1, threads)
    if segments == 1:
        threads = b.min(threads, b.call(module.functions["items_0"], args))
    with b.if_(b.cmp("le", threads, 1)) as branch:
        for k in range(segments):
            b.call(module.functions[f"body_{k}"], args, 0, b.call(module.functions[f"items_{k}"], args))
    with branch.else_():
        region = _emit_region(module, segments, frozenset(dynamic), f"{name}_region")
        shared = b.alloca(f"[{_LINE * (1 + segments)} x i8]")
        b.store(args, shared)
        for k in dynamic:
            b.store(const(0, I64), _counter(b, shared, k))
        parallel = module.declare(_PARALLEL, VOID, [PTR, PTR, I32, I32])
        b.call(parallel, region.pointer, shared, b.cast("trunc", threads, I32), 0)
    b.ret()


def _emit_region(module: Module, segments: int, dynamic: frozenset[int], name: str) -> Function:
    """What each thread of the team runs."""
    function = module.function(name, VOID, [("shared", PTR)], internal=True)
    b, shared = function.builder, function.args[0]
    args = b.load(shared, PTR)
    thread, threads = (b.cast("sext", b.call(module.declare(symbol, I32, [])), I64) for symbol in (_THREAD, _THREADS))
    for k in range(segments):
        items = b.call(module.functions[f"items_{k}"], args)
        body = module.functions[f"body_{k}"]
        if k in dynamic:
            _dynamic_share(b, body, args, items, threads, _counter(b, shared, k))
        else:
            begin = b.div(b.mul(items, thread), threads)
            end = b.div(b.mul(items, b.add(thread, 1)), threads)
            with b.if_(b.cmp("lt", begin, end)):
                b.call(body, args, begin, end)
        if k + 1 < segments:
            b.call(module.declare(_BARRIER, VOID, []))
    b.ret()
    return function


def _dynamic_share(b: Builder, body: Callee, args: Val, items: Val, threads: Val, counter: Val) -> None:
    chunk = b.max(b.div(items, b.mul(threads, CHUNKS_PER_THREAD)), 1)
    with b.for_(b.atomic_add(counter, chunk), items) as loop:
        b.call(body, args, loop.i, b.min(b.add(loop.i, chunk), items))
        loop.next_i = b.atomic_add(counter, chunk)


def _counter(b: Builder, shared: Val, segment: int) -> Val:
    return b.gep(shared, _LINE * (1 + segment), "i8")


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
    module = Module()
    parallel = module.function(_PARALLEL, VOID, [("region", PTR), ("shared", PTR), ("threads", I32), ("flags", I32)])
    parallel.builder.call_pointer(parallel.args[0], VOID, parallel.args[1])
    parallel.builder.ret()
    module.function(_BARRIER, VOID, []).builder.ret()
    for name, value in ((_THREAD, 0), (_THREADS, 1)):
        function = module.function(name, I32, [])
        function.builder.ret(const(value, I32))
    library = jit.load_object(jit.compile_to_object(module.text(), target("generic")), target("generic"))
    _serial_library.append(library)  # its code must outlive every kernel
    return {name: library.address(name) for name in _GOMP}
