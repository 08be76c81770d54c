"""The cpu backend: tile IR -> LLVM -> native code, run by the threads that torch uses.

In: a function from the frontend. Out: `Compiled`, called with tensors and sizes by the launch path.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from tessera.errors import LaunchError
from tessera.kernel import cache
from tessera.kernel.backends.cpu import blocks, jit
from tessera.kernel.backends.cpu import threads as openmp
from tessera.kernel.backends.cpu.host import Target, target
from tessera.kernel.backends.cpu.lower import asserts, lower
from tessera.kernel.ir import Function
from tessera.kernel.passes import prepare


class Compiled:
    """A kernel as machine code. Call it with the arguments in the order of the function's parameters."""

    def __init__(self, function: Function, host: Target) -> None:
        self._function, self._host = function, host
        code = cache.cached(f"cpu {host.key}\n{function}\n{function.schedule}", self._compile)
        self._library = jit.load_object(code, host, openmp.symbols())
        self._launch = openmp.entry(self._library)
        self._pack = struct.Struct(_slot_format(function)).pack
        self._asserts = asserts(function)

    def _compile(self) -> bytes:
        return jit.compile_to_object(self.source, self._host)

    @cached_property
    def source(self) -> str:
        """The LLVM text that the code was made from."""
        function = prepare(self._function, lambda f, dims: blocks.choose(f, dims, self._host))
        module, segments = lower(function, self._host)
        openmp.emit_launch(module, segments)
        return module.text()

    def __call__(self, args: Sequence[Any], sizes: Sequence[int]) -> None:
        slots: list[Any] = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                slots.append(arg.data_ptr())
                slots += arg.stride()
            else:
                slots.append(arg)
        threads = torch.get_num_threads()
        packed = self._pack(*slots, *sizes, threads, 0)
        if not self._asserts:
            self._launch(packed, threads)
            return
        memory = ctypes.create_string_buffer(packed, len(packed))
        self._launch(memory, threads)  # type: ignore[arg-type]  # ctypes takes a writable buffer as well
        failed = struct.unpack("q", memory.raw[-8:])[0]
        if failed:
            op = self._asserts[failed - 1]
            raise LaunchError(f"{op.loc}: assertion failed: {op.attrs.get('text') or 'tile.assert'}")


def _slot_format(function: Function) -> str:
    """The struct format of the packed arguments: what `Context` reads, the number of threads, the status slot."""
    slots = ""
    for param in function.params:
        dtype = param.value.type.dtype
        slots += "q" * (1 + param.value.type.rank) if param.is_view else "d" if dtype.is_float else "q"
    return slots + "q" * (len(function.sizes) + 2)


def compile(function: Function) -> Compiled:
    """Machine code for this host (or for TESSERA_CPU)."""
    return Compiled(function, target())
