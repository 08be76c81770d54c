"""Recorded launches as one native call: one parallel region, with barriers between kernels.

In: launches in order (`Launch`), from `kernel.graph`. Out: a `Replay`, called with the addresses that may change
from call to call. Its data is one table of steps, a step being a segment of a kernel: the addresses of
`items_k`, `body_k` and of the packed arguments, whether one thread does it, whether a barrier follows. A second
table says which argument slots are written anew at each call: slot = sources[index] + offset.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from tessera.kernel.backends.cpu import jit, threads
from tessera.kernel.backends.cpu.emit import I32, I64, PTR, VOID, Builder, Function, Module, Val
from tessera.kernel.backends.cpu.host import target

_STEP, _PATCH = 5, 3  # i64 slots: items, body, args, serial, barrier; address of a slot, source, offset


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One recorded launch of a `cpu.Compiled`.

    `bindings` has, for tensors whose address may change, argument -> (source, bytes from the source's address).
    """

    compiled: Any
    args: Sequence[Any]
    sizes: Sequence[int]
    bindings: Mapping[int, tuple[int, int]] = field(default_factory=dict)


class Replay:
    """Runs recorded launches on `width` threads. Not for two threads at once: they would share the tables.

    It keeps the kernels and the memory whose address is fixed.
    """

    def __init__(self, launches: Sequence[Launch], width: int) -> None:
        # Storages, not tensors: `tensor.data = other` lets go of the memory that the tables point at.
        self._kept = [(one.compiled, [arg.untyped_storage() for i, arg in enumerate(one.args)
                                      if i not in one.bindings and isinstance(arg, torch.Tensor)]) for one in launches]
        packed = [one.compiled.pack(one.args, one.sizes, width) for one in launches]
        self._args = ctypes.create_string_buffer(b"".join(packed), max(1, sum(map(len, packed))))
        starts = [sum(map(len, packed[:k])) for k in range(len(packed) + 1)]
        steps, patches = [], []
        for one, start, data in zip(launches, starts, packed):
            address = ctypes.addressof(self._args) + start
            serial = width <= 1 or one.compiled.is_small(data)
            steps += [[items, body, address, int(serial), 1] for items, body in one.compiled.segments]
            for argument, (source, offset) in one.bindings.items():
                patches.append([address + 8 * one.compiled.slot(argument), source, offset])
        for step, after in zip(steps, [*steps[1:], None]):
            # One thread does both without waiting; behind the last the region ends.
            step[4] = int(after is not None and not (step[3] and after[3]))
        self._status = [(one.compiled, end - 8) for one, end in zip(launches, starts[1:]) if one.compiled.has_asserts]
        self._steps, self._patches = _table(steps), _table(patches)
        self._fixed = (ctypes.addressof(self._steps), len(steps), ctypes.addressof(self._patches), len(patches))
        self._width = 1 if all(step[3] for step in steps) else width
        self._run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4, ctypes.c_char_p, ctypes.c_int64)(
            _library().address("replay"))

    def __call__(self, sources: bytes) -> None:
        """Run every launch, in order.

        Args:
            sources: addresses, packed as 8-byte integers.

        Raises:
            LaunchError: an assertion of a kernel failed (the kernels after it ran as well).
        """
        self._run(*self._fixed, sources, self._width)
        for compiled, at in self._status:
            status = ctypes.c_int64.from_buffer(self._args, at)
            failed, status.value = status.value, 0
            compiled.check(failed)


def _table(rows: Sequence[Sequence[int]]) -> ctypes.Array[ctypes.c_int64]:
    flat = [number for row in rows for number in row]
    return (ctypes.c_int64 * max(1, len(flat)))(*flat)


@cache
def _library() -> jit.Library:
    return jit.load_object(jit.compile_to_object(replay_text(), target()), target(), threads.symbols())


def replay_text() -> str:
    """LLVM text of `replay(steps, n, patches, m, sources, width)`."""
    module = Module()
    region = _region(module)
    function = module.function("replay", VOID, [("steps", PTR), ("n", I64), ("patches", PTR), ("m", I64),
                                                ("sources", PTR), ("width", I64)])
    b, (steps, n, patches, m, sources, width) = function.builder, function.args
    with b.for_(0, m) as loop:
        slot, source, offset = _row(b, patches, loop.i, _PATCH)
        address = b.add(b.load(b.gep(sources, source, I64), I64), offset)
        b.store(address, b.cast("inttoptr", slot, PTR))
    with b.if_(b.cmp("le", width, 1)) as branch, b.for_(0, n) as loop:
        items, body, args, _, _ = _row(b, steps, loop.i, _STEP)
        _share(b, items, body, args, b.value(0, I64), b.value(1, I64))
    with branch.else_():
        shared = b.alloca("[16 x i8]")
        b.store(steps, shared)
        b.store(n, b.gep(shared, 1, I64))
        parallel = module.declare("tessera_parallel", VOID, [PTR, PTR, I32, I32])
        b.call(parallel, region.pointer, shared, b.cast("trunc", width, I32), 0)
    b.ret()
    return module.text()


def _region(module: Module) -> Function:
    """What each thread of the team runs."""
    function = module.function("region", VOID, [("shared", PTR)], internal=True)
    b, shared = function.builder, function.args[0]
    steps, n = b.load(shared, PTR), b.load(b.gep(shared, 1, I64), I64)
    thread, team = (b.cast("sext", b.call(module.declare(name, I32, [])), I64)
                    for name in ("tessera_thread_num", "tessera_num_threads"))
    with b.for_(0, n) as loop:
        items, body, args, serial, barrier = _row(b, steps, loop.i, _STEP)
        _share(b, items, body, args, thread, b.select(b.cmp("ne", serial, 0), 1, team))
        with b.if_(b.cmp("ne", barrier, 0)):
            b.call(module.declare("tessera_barrier", VOID, []))
    b.ret()
    return function


def _share(b: Builder, items: Val, body: Val, args: Val, thread: Val, threads_: Val) -> None:
    """Run a thread's contiguous share of a step's items; threads past `threads_` have none."""
    pointer = b.cast("inttoptr", args, PTR)
    count = b.call_pointer(b.cast("inttoptr", items, PTR), I64, pointer)
    begin = b.div(b.mul(count, b.min(thread, threads_)), threads_)
    end = b.div(b.mul(count, b.min(b.add(thread, 1), threads_)), threads_)
    with b.if_(b.cmp("lt", begin, end)):
        b.call_pointer(b.cast("inttoptr", body, PTR), VOID, pointer, begin, end)


def _row(b: Builder, table: Val, index: Val, width: int) -> list[Val]:
    return [b.load(b.gep(table, b.add(b.mul(index, width), k), I64), I64) for k in range(width)]
