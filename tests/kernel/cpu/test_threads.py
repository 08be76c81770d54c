"""Parallel regions: every item runs exactly once, segments are ordered, the serial runtime agrees."""

import struct

import pytest
import torch

from tessera.kernel.backends.cpu import entries, jit, threads
from tessera.kernel.backends.cpu.emit import I64, PTR, VOID, Module
from tessera.kernel.backends.cpu.host import target


def _add_segment(module: Module, k: int) -> None:
    """Segment 0 adds 1 to x[i]; segment 1 sets y[i] = x[n - 1 - i] * 10, across the barrier."""
    items = module.function(f"items_{k}", I64, [("args", PTR)])
    items.builder.ret(items.builder.load(items.builder.gep(items.args[0], 2, I64), I64))
    body = module.function(f"body_{k}", VOID, [("args", PTR), ("begin", I64), ("end", I64)])
    b, (args, begin, end) = body.builder, body.args
    x, y = (b.load(b.gep(args, slot, I64), PTR) for slot in (0, 1))
    n = b.load(b.gep(args, 2, I64), I64)
    with b.for_(begin, end) as loop:
        if k == 0:
            at = b.gep(x, loop.i, I64)
            b.store(b.add(b.load(at, I64), 1), at)
        else:
            mirrored = b.load(b.gep(x, b.sub(b.sub(n, 1), loop.i), I64), I64)
            b.store(b.mul(mirrored, 10), b.gep(y, loop.i, I64))
    b.ret()


def _launcher(segments: int, dynamic: tuple[int, ...], symbols: dict[str, int]) -> tuple[jit.Library, threads.Entry]:
    module = Module()
    for k in range(segments):
        _add_segment(module, k)
    entries.emit_launch(module, segments, dynamic=dynamic)
    library = jit.load_object(jit.compile_to_object(module.text(), target()), target(), symbols)
    return library, threads.entry(library)


def test_torch_runtime_is_found():
    if "libgomp" in " ".join(threads._memory_map()):
        assert threads._loaded_runtime() is not None


@pytest.mark.parametrize("runtime", ["openmp", "serial"])
@pytest.mark.parametrize("dynamic", [(), (0, 1)])
@pytest.mark.parametrize("segments", [1, 2])
def test_each_item_once_in_order(runtime, dynamic, segments):
    symbols = threads.symbols() if runtime == "openmp" else threads._serial_runtime()
    _library, launch = _launcher(segments, dynamic[:segments], symbols)
    generator = torch.Generator().manual_seed(segments + 10 * len(dynamic))
    for n in (0, 1, 2, 7, 1000, 12345):
        for width in (1, 2, 5):
            x = torch.randint(-1000, 1000, (n,), generator=generator)
            want = x + 1
            y = torch.zeros_like(x)
            launch(struct.pack("QQq", x.data_ptr(), y.data_ptr(), n), width)
            assert torch.equal(x, want)
            assert torch.equal(y, want.flip(0) * 10 if segments == 2 else torch.zeros_like(x))
