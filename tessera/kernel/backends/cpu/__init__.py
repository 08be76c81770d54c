"""The cpu backend: tile IR -> LLVM -> native code, run by the threads that torch uses.

In: a function from the frontend. Out: `Compiled`, called with tensors and sizes by the launch path.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch._subclasses import FakeTensor

from tessera import env
from tessera.errors import LaunchError
from tessera.kernel import cache as disk
from tessera.kernel.backends.cpu import jit
from tessera.kernel.backends.cpu import threads as openmp
from tessera.kernel.backends.cpu.host import Target, target
from tessera.kernel.interface import Interface
from tessera.kernel.ir import Function, walk


class Compiled:
    """A kernel as machine code. Call it with the arguments in the order of the function's parameters.

    Args:
        code: what `jit.compile_to_object` made, perhaps in another process.
        entry: the name of the code's entry in the cache, if it has one.
        text: gives the LLVM text that the code was made from.
    """

    def __init__(self, interface: Interface, code: bytes, host: Target, text: Callable[[], str],
                 entry: str | None = None) -> None:
        self.interface, self.entry, self._text = interface, entry, text
        self._library = jit.load_object(code, host, openmp.symbols())
        self._launch = openmp.entry(self._library)
        self._pack = struct.Struct(_slot_format(interface)).pack
        self._asserts = interface.asserts

    @cached_property
    def source(self) -> str:
        """The LLVM text that the code was made from."""
        return self._text()

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
        name = next(name for name, given in zip(self.interface.names, args) if given is arg)
        return LaunchError(f"kernel {self.interface.name}: {name} is a {type(arg).__name__} without memory of its own; "
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
            raise LaunchError(self._asserts[status - 1])

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
        return len(_slot_format(self.interface, argument))


def _slot_format(interface: Interface, count: int | None = None) -> str:
    """The struct format of the packed arguments, or of the first ones: what `Context` reads. All of them are followed
    by the sizes, the number of threads and the status slot."""
    slots = "".join("q" * (1 + p) if isinstance(p, int) else "d" if p == "float" else "q"
                    for p in interface.params[:count])
    return slots if count is not None else slots + "q" * (len(interface.sizes) + 2)


def _llvm_text(function: Function, host: Target) -> str:
    # Imported here: what comes from the disk cache needs none of the generator, whose import takes longer than
    # all else that a first launch does.
    from tessera.kernel.backends.cpu import blocks, entries
    from tessera.kernel.backends.cpu.lower import lower, uneven_segments
    from tessera.kernel.passes import prepare

    function = prepare(function, lambda f, dims: blocks.choose(f, dims, host))
    module, segments = lower(function, host)
    entries.emit_launch(module, segments, dynamic=uneven_segments(function))
    return module.text()


def _printed_places(function: Function) -> str:
    """The lines of its prints, which say them: the text of the function does not."""
    return "".join(f"\nprint at {op.loc}" for op in walk(function.body) if op.name == "print")


def target_key() -> str:
    """What manifests are told apart by: the processor that code is made for."""
    return _key(target())


def _key(host: Target) -> str:
    return f"cpu {host.key}"


def load(interface: Interface, code: bytes, function: Callable[[], Function]) -> Compiled:
    """A kernel whose code was on disk; `function` traces it, for those who ask for its source."""
    host = target()
    return Compiled(interface, code, host, cache(lambda: _llvm_text(function(), host)))


def compile(function: Function, host: Target | None = None) -> Compiled:
    """Machine code for a processor (by default this one, or what TESSERA_CPU says), from the disk or made now."""
    host = host or target()
    text = cache(lambda: _llvm_text(function, host))
    shown = {"passes", "llvm", "asm"} & set(env.get("TESSERA_DUMP").split(","))
    if "llvm" in shown:
        print(text(), file=sys.stderr)
    if shown:  # made anew: the cache keeps only the code
        return Compiled(Interface.of(function), jit.compile_to_object(text(), host), host, text)
    entry = disk.name_of(f"{_key(host)}\n{function}\n{function.schedule}{_printed_places(function)}")
    code = disk.fetch(entry, lambda: jit.compile_to_object(text(), host))
    return Compiled(Interface.of(function), code, host, text, entry)


def source(function: Function) -> str:
    """The LLVM text alone, for a processor that need not be this one (TESSERA_CPU)."""
    return _llvm_text(function, target())
