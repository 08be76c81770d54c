"""How fast this machine multiplies: a generated loop of fused multiply-adds that stays in registers.

In: the number of threads. Out: operations a second, by class of matmul; `profile` divides by them.
"""

from __future__ import annotations

import struct
import time
from functools import cache

import torch

from tessera.kernel.backends.cpu import entries, jit, threads
from tessera.kernel.backends.cpu.emit import F32, I64, PTR, VOID, Module, vec
from tessera.kernel.backends.cpu.host import target

_CHAINS = 12  # independent sums: more than latency x throughput of any core, and they fit 16 registers
_ROUNDS = 1_000_000  # of all chains an item
_ATTEMPTS = 16
_AREA = 256  # floats: where an item's chains start from and go to


@cache
def flops_per_second(width: int) -> dict[str, float]:
    """Measured f32 multiply-adds x 2 on `width` threads, and what follows for the other classes.

    bf16 and int8 dot instructions do two and four times the f32 work of one FMA; without them the operands
    are widened first and the f32 rate is the limit. The best of a few short runs counts.
    """
    host = target()
    library = jit.load_object(jit.compile_to_object(_loop_text(), host), host, threads.symbols())
    run = threads.entry(library)
    lanes = host.lanes(32)
    out = torch.zeros(width * _AREA)
    args = struct.pack("Qq", out.data_ptr(), width)
    best = float("inf")
    for _ in range(_ATTEMPTS):
        start = time.perf_counter()
        run(args, width)
        best = min(best, time.perf_counter() - start)
    f32 = 2.0 * width * _ROUNDS * _CHAINS * lanes / best
    return {"f32": f32, "f64": f32 / 2, "f16": f32, "bf16": f32 * (2 if host.has_avx512bf16 else 1),
            "int8": f32 * (4 if host.has_vnni else 1)}


def _loop_text() -> str:
    """args: address of _AREA floats for each item, number of items."""
    module, lanes = Module(), target().lanes(32)
    items = module.function("items_0", I64, [("args", PTR)])
    items.builder.ret(items.builder.load(items.builder.gep(items.args[0], 1, I64), I64))
    body = module.function("body_0", VOID, [("args", PTR), ("begin", I64), ("end", I64)])
    b, (args, begin, end) = body.builder, body.args
    with b.for_(begin, end) as item:
        out = b.gep(b.load(args, PTR), b.mul(item.i, _AREA), F32)
        # Read from memory, each chain from its own place, so that nothing is folded.
        factor, *starts = (b.load(b.gep(out, k * lanes, F32), vec(lanes, F32)) for k in range(_CHAINS + 1))
        with b.for_(0, _ROUNDS, carry=starts) as loop:
            loop.next([b.fma(x, factor, factor) for x in loop.carry])
        for k, chain in enumerate(loop.results):
            b.store(chain, b.gep(out, k * lanes, F32))
    b.ret()
    entries.emit_launch(module, 1)
    return module.text()
