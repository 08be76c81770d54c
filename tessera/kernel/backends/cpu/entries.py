"""The entry point of a kernel's code: all of its segments in one parallel region.

In: a module with, for each segment k of a kernel, `items_k(args) -> i64` and `body_k(args, begin, end)`.
Out: one more function, `launch(args, threads)`, that runs all segments, with a barrier between one segment and the
next, on the runtime that `threads.py` finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel.backends.cpu.emit import I32, I64, PTR, VOID, Builder, Callee, Function, Module, Val, const
from tessera.kernel.backends.cpu.threads import BARRIER, MIN_WORK, PARALLEL, THREAD, THREADS

_LINE = 64  # bytes; each shared counter has a cache line of its own
CHUNKS_PER_THREAD = 8


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
        parallel = module.declare(PARALLEL, VOID, [PTR, PTR, I32, I32])
        b.call(parallel, region.pointer, shared, b.cast("trunc", threads, I32), 0)
    b.ret()


def _emit_region(module: Module, segments: int, dynamic: frozenset[int], name: str) -> Function:
    """What each thread of the team runs."""
    function = module.function(name, VOID, [("shared", PTR)], internal=True)
    b, shared = function.builder, function.args[0]
    args = b.load(shared, PTR)
    thread, threads = (b.cast("sext", b.call(module.declare(symbol, I32, [])), I64) for symbol in (THREAD, THREADS))
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
            b.call(module.declare(BARRIER, VOID, []))
    b.ret()
    return function


def _dynamic_share(b: Builder, body: Callee, args: Val, items: Val, threads: Val, counter: Val) -> None:
    chunk = b.max(b.div(items, b.mul(threads, CHUNKS_PER_THREAD)), 1)
    with b.for_(b.atomic_add(counter, chunk), items) as loop:
        b.call(body, args, loop.i, b.min(b.add(loop.i, chunk), items))
        loop.next_i = b.atomic_add(counter, chunk)


def _counter(b: Builder, shared: Val, segment: int) -> Val:
    return b.gep(shared, _LINE * (1 + segment), "i8")
