"""The cpu backend: tile IR -> LLVM -> native code, run by the threads that torch uses.

In: a function from the frontend. Out: `Compiled`, called with tensors and sizes by the launch path.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch

from tessera.kernel.backends.cpu import blocks, jit
from tessera.kernel.backends.cpu.host import Target, target
from tessera.kernel.backends.cpu.lower import lower
from tessera.kernel.ir import Function
from tessera.kernel.passes import prepare


class Compiled:
    """A kernel as machine code. Call it with the arguments in the order of the function's parameters."""

    def __init__(self, function: Function, host: Target) -> None:
        self.function = prepare(function, blocks.choose)
        module, segments = lower(self.function, host)
        self.source = module.text()
        self._library = jit.load_object(jit.compile_to_object(self.source, host), host)
        count = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)
        body = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
        self._segments = [(count(self._library.address(f"items_{k}")), body(self._library.address(f"body_{k}")))
                          for k in range(segments)]
        self._format = _slot_format(self.function)

    def __call__(self, args: Sequence[Any], sizes: Sequence[int]) -> None:
        slots: list[Any] = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                slots.append(arg.data_ptr())
                slots += arg.stride()
            else:
                slots.append(arg)
        packed = struct.pack(self._format, *slots, *sizes)
        for count, body in self._segments:
            body(packed, 0, count(packed))


def _slot_format(function: Function) -> str:
    slots = ""
    for param in function.params:
        dtype = param.value.type.dtype
        slots += "q" * (1 + param.value.type.rank) if param.is_view else "d" if dtype.is_float else "q"
    return slots + "q" * len(function.sizes)


def compile(function: Function) -> Compiled:
    """Machine code for this host (or for TESSERA_CPU)."""
    return Compiled(function, target())
