"""LLVM text to machine code: verify, optimise, assemble, load.

In: the text of a module (`emit.py`) and a `Target`. Out: the bytes of its objects, which can be kept on disk, and from
these bytes a `Library` with the addresses of its functions. Called by the backend's launch path and cache.

The optimiser runs a few of LLVM's passes, each once: the generator has chosen vectors, unrolling and the order of
loops, so what is left is inlining, propagation of constants into helpers and the removal of what is computed twice.
LLVM's own pipeline (-O1) takes five times as long and makes code of the same speed, and so does a higher level of its
code generator, which takes a fifth longer. Floating-point results do not depend on the passes: only `contract` is
allowed.
"""

from __future__ import annotations

import itertools
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cache

import llvmlite.binding as llvm

from tessera import env
from tessera.errors import CompileError, UnsupportedError
from tessera.kernel.backends.cpu.host import Target, runs_here

_lock = threading.RLock()
_names = itertools.count()


class Library:
    """Loaded machine code; it is unmapped when the last reference goes."""

    def __init__(self, name: str, tracker: llvm.ResourceTracker) -> None:
        self._name, self._tracker = name, tracker
        self._lookups: dict[str, llvm.ResourceTracker] = {}

    def address(self, symbol: str) -> int:
        """The address of an external function or variable.

        Raises:
            CompileError: the object does not define it.
        """
        with _lock:
            if symbol not in self._lookups:
                try:
                    self._lookups[symbol] = _linker().lookup(self._name, symbol)
                except RuntimeError as error:
                    raise CompileError(f"compiled object has no symbol {symbol!r}: {_one_line(error)}") from None
            return self._lookups[symbol][symbol]


def compile_to_object(ir_text: str, target: Target) -> bytes:
    """Machine code of a module as relocatable objects: their number, their lengths, their bytes.

    Raises:
        CompileError: the text is not valid LLVM assembly (a defect of the generator).
    """
    # Imported here: what comes from the disk cache does not need it.
    from tessera.kernel.backends.cpu import halves

    with _lock:
        if "asm" in env.get("TESSERA_DUMP").split(","):
            print(compile_to_asm(ir_text, target), file=sys.stderr)
        machine = _machine(target)
        if len(ir_text) < halves.LARGE:
            objects = [machine.emit_object(_optimized(ir_text, machine))]
        else:
            module = _parsed(ir_text, machine)
            _across_functions().run(module, _pass_builder(machine))
            first, second = ((m, _within_functions(), _pass_builder(m)) for m in (machine, _machine(target, 1)))
            objects = halves.emit(module, (first, second))
        return struct.pack(f"<{1 + len(objects)}Q", len(objects), *map(len, objects)) + b"".join(objects)


def _objects(data: bytes) -> Iterator[bytes]:
    """What `compile_to_object` put together.

    Raises:
        CompileError: the bytes are something else.
    """
    try:
        (count,) = struct.unpack_from("<Q", data)
        lengths = struct.unpack_from(f"<{min(count, len(data))}Q", data, 8)
    except struct.error:
        lengths = ()
    start = 8 + 8 * len(lengths)
    if not lengths or start + sum(lengths) != len(data):
        raise CompileError("cannot load compiled objects: the bytes are not a kernel's")
    for length in lengths:
        yield data[start:start + length]
        start += length


def compile_to_asm(ir_text: str, target: Target) -> str:
    """The assembly text of a module, for people and tests."""
    with _lock:
        machine = _machine(target)
        return machine.emit_assembly(_optimized(ir_text, machine))


def optimized_ir(ir_text: str, target: Target) -> str:
    """The module after the optimiser, as LLVM text."""
    with _lock:
        return str(_optimized(ir_text, _machine(target)))


def load_object(data: bytes, target: Target, symbols: Mapping[str, int] | None = None) -> Library:
    """Map an object's code into the process.

    Args:
        data: what `compile_to_object` returned, perhaps in another process.
        target: the processor that the object was compiled for.
        symbols: addresses of functions that the object calls (`threads.symbols()` for kernels with a parallel
            entry); what stands neither there nor in the object comes from the process (the C library).

    Raises:
        UnsupportedError: the code is for a processor with instructions that this machine lacks.
        CompileError: the bytes are not an object of this machine, or a symbol is missing.
    """
    if not runs_here(target):
        raise UnsupportedError(f"code for {target.cpu} cannot run on this machine ({llvm.get_host_cpu_name()})")
    with _lock:
        name = f"tessera{next(_names)}"
        builder = llvm.JITLibraryBuilder().add_current_process()
        for part in _objects(data):
            builder.add_object_img(part)
        for symbol, address in (symbols or {}).items():
            builder.import_symbol(symbol, address)
        try:
            return Library(name, builder.link(_linker(), name))
        except RuntimeError as error:
            raise CompileError(f"cannot load compiled object: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def _linker() -> llvm.LLJIT:
    _initialize()
    return llvm.create_lljit_compiler(
        llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True), suppress_errors=False)


@cache
def _machine(target: Target, number: int = 0) -> llvm.TargetMachine:
    """A target machine; a thread that emits code needs one of its own, by `number`."""
    _initialize()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=1, reloc="pic", codemodel="small", jit=True)


def _optimized(ir_text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    module = _parsed(ir_text, machine)
    for passes in (_across_functions(), _within_functions()):
        passes.run(module, _pass_builder(machine))
    return module


def _parsed(ir_text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    try:
        module = llvm.parse_assembly(ir_text, context=llvm.create_context())
        module.verify()
    except RuntimeError as error:
        raise CompileError(f"the CPU backend generated invalid LLVM: {_one_line(error)}") from None
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return module


def _pass_builder(machine: llvm.TargetMachine) -> llvm.PassBuilder:
    return llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1))


def _across_functions() -> llvm.ModulePassManager:
    """What a function learns from its callers, and takes from those it calls."""
    passes = llvm.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.add_ipsccp_pass()
    passes.add_dead_arg_elimination_pass()
    passes.add_simplify_cfg_pass()
    return passes


def _within_functions() -> llvm.ModulePassManager:
    """What each function is simplified by, whoever calls it."""
    passes = llvm.create_new_module_pass_manager()
    passes.add_new_gvn_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    return passes
