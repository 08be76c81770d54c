"""The cpu backend: tile IR -> LLVM -> native code, run by the threads that torch uses.

In: a function from the frontend. Out: `Compiled`, called with tensors and sizes by the launch path.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch._subclasses import FakeTensor

from tessera import env
from tessera.errors import LaunchError
from tessera.kernel import cache
from tessera.kernel.backends.cpu import jit
from tessera.kernel.backends.cpu import threads as openmp
from tessera.kernel.backends.cpu.host import Target, target
from tessera.kernel.ir import Function, asserts, walk


class Compiled:
    """A kernel as machine code. Call it with the arguments in the order of the function's parameters."""

    def __init__(self, function: Function, host: Target) -> None:
        self._function, self._host = function, host
        shown = {"passes", "llvm", "asm"} & set(env.get("TESSERA_DUMP").split(","))
        if "llvm" in shown:
            print(self.source, file=sys.stderr)
        # What is to be shown is made anew: the cache keeps only the code.
        code = self._compile() if shown else cache.cached(
            f"cpu {host.key}\n{function}\n{function.schedule}{_printed_places(function)}", self._compile)
        self._library = jit.load_object(code, host, openmp.symbols())
        self._launch = openmp.entry(self._library)
        self._pack = struct.Struct(_slot_format(function)).pack
        self._asserts = asserts(function)

    def _compile(self) -> bytes:
        return jit.compile_to_object(self.source, self._host)

    @cached_property
    def source(self) -> str:
        """The LLVM text that the code was made from."""
        # Imported here: what comes from the disk cache needs none of the generator, whose import takes longer than
        # all else that a first launch does.
        from tessera.kernel.backends.cpu import blocks, entries
        from tessera.kernel.backends.cpu.lower import lower, uneven_segments
        from tessera.kernel.passes import prepare

        function = prepare(self._function, lambda f, dims: blocks.choose(f, dims, self._host))
        module, segments = lower(function, self._host)
        entries.emit_launch(module, segments, dynamic=uneven_segments(function))
        return module.text()

    def pack(self, args: Sequence[Any], sizes: Sequence[int], threads: int) -> bytes:
        """The arguments as the machine code reads them: 8-byte slots, the last one for its status."""
        slots: list[Any] = []
        for arg in args:
            kind = type(arg)
            if kind is torch.Tensor or isinstance(arg, torch.Tensor):
                if kind is FakeTensor:  # its address is nowhere
                    raise self._without_memory(args, arg)
                try:
                    address = arg.data_ptr()
                except RuntimeError:  # under torch.func; of another library's layout
                    raise self._without_memory(args, arg) from None
                if not address and arg.numel():  # a subclass that wraps others; a storage that was let go
                    raise self._without_memory(args, arg)
                slots.append(address)
                slots += arg.stride()
            else:
                slots.append(arg)
        return self._pack(*slots, *sizes, threads, 0)

    def _without_memory(self, args: Sequence[Any], arg: torch.Tensor) -> LaunchError:
        name = next(p.name for p, given in zip(self._function.params, args) if given is arg)
        return LaunchError(f"kernel {self._function.name}: {name} is a {type(arg).__name__} without memory of its own; "
                           "expected a tensor with values")

    def __call__(self, args: Sequence[Any], sizes: Sequence[int]) -> None:
        threads = torch.get_num_threads()
        packed = self.pack(args, sizes, threads)
        if not self._asserts:
            self._launch(packed, threads)
            return
        memory = ctypes.create_string_buffer(packed, len(packed))
        self._launch(memory, threads)  # type: ignore[arg-type]  # ctypes takes a writable buffer as well
        self.check(struct.unpack("q", memory.raw[-8:])[0])

    def check(self, status: int) -> None:
        """Raise LaunchError where a launch has left the number of an assertion in its status."""
        if status:
            op = self._asserts[status - 1]
            raise LaunchError(f"{op.loc}: assertion failed: {op.attrs.get('text') or 'tile.assert'}")

    # -- for `replay`, which runs the parts of several kernels in one parallel region --------------------

    @property
    def has_asserts(self) -> bool:
        """Whether a launch can fail."""
        return bool(self._asserts)

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """The addresses of `items_k` and `body_k` of each segment."""
        count = ctypes.CFUNCTYPE(ctypes.c_int64)(self._library.address("segments"))()
        return [(self._library.address(f"items_{k}"), self._library.address(f"body_{k}")) for k in range(count)]

    def is_small(self, packed: bytes) -> bool:
        """Whether a launch with these packed arguments is left to one thread."""
        work = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(self._library.address("work"))
        return work(packed) < openmp.MIN_WORK

    def slot(self, argument: int) -> int:
        """Where an argument's address stands in the packed arguments."""
        return sum(1 + p.value.type.rank if p.is_view else 1 for p in self._function.params[:argument])


def _slot_format(function: Function) -> str:
    """The struct format of the packed arguments: what `Context` reads, the number of threads, the status slot."""
    slots = ""
    for param in function.params:
        dtype = param.value.type.dtype
        slots += "q" * (1 + param.value.type.rank) if param.is_view else "d" if dtype.is_float else "q"
    return slots + "q" * (len(function.sizes) + 2)


def _printed_places(function: Function) -> str:
    """The lines of its prints, which say them: the text of the function does not."""
    return "".join(f"\nprint at {op.loc}" for op in walk(function.body) if op.name == "print")


def compile(function: Function) -> Compiled:
    """Machine code for this host (or for TESSERA_CPU)."""
    return Compiled(function, target())
