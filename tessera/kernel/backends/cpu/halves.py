"""Machine code of a large module, made by two threads: each emits half of its functions.

In: an optimised module. Out: objects that are linked together. Called by `jit.py`. Most of the time that a large kernel
takes to compile goes into LLVM's code generator, function by function.

llvmlite lets one thread at a time into LLVM. LLVM itself asks for less: each module in a context of its own, each
thread with a target machine of its own. So the one call that takes long is made past llvmlite's lock, through a second
handle of its library.
"""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import llvmlite.binding as llvm
from llvmlite.binding import ffi

from tessera.errors import CompileError

LARGE = 80_000  # characters of a module's text from which on a second thread pays
_OBJECT = 1  # what LLVM is asked for, as llvmlite's emit_object does


def emit(module: llvm.ModuleRef, machines: tuple[llvm.TargetMachine, llvm.TargetMachine]) -> list[bytes]:
    """The module's objects: two, or one where it has variables, which can lie in one object only."""
    text = str(module)
    if " internal global " in text or _library() is None:
        return [machines[0].emit_object(module)]
    modules = [llvm.parse_assembly(half, context=llvm.create_context()) for half in split(text)]
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(_emit, modules[1], machines[1])
        return [_emit(modules[0], machines[0]), second.result()]


def split(text: str) -> tuple[str, str]:
    """Two modules that define half of the functions each and declare the others; a function that both may need is no
    longer internal, but hidden."""
    found = re.split(r"(?m)^(define [^\n]* \{\n.*?^\}\n)", text, flags=re.DOTALL)
    shared = "".join(found[::2])
    functions = [function.replace("define internal", "define hidden", 1) for function in found[1::2]]
    halves: tuple[list[str], list[str]] = ([], [])
    for function in sorted(functions, key=len, reverse=True):
        halves[sum(map(len, halves[0])) > sum(map(len, halves[1]))].append(function)
    heads = [[function.split(" {\n", 1)[0].replace("define", "declare", 1) + "\n" for function in half]
             for half in halves]
    return "".join([shared, *halves[0], *heads[1]]), "".join([shared, *halves[1], *heads[0]])


def _emit(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> bytes:
    library, error = _library(), ctypes.c_char_p()
    assert library is not None
    buffer = library.LLVMPY_TargetMachineEmitToMemory(machine, module, _OBJECT, ctypes.byref(error))
    if not buffer:
        raise CompileError(f"LLVM cannot emit an object: {(error.value or b'').decode()}")
    try:
        return ctypes.string_at(library.LLVMPY_GetBufferStart(buffer), library.LLVMPY_GetBufferSize(buffer))
    finally:
        library.LLVMPY_DisposeMemoryBuffer(buffer)


@cache
def _library() -> ctypes.CDLL | None:
    """llvmlite's library, without the lock around its functions; None for a version that keeps it elsewhere."""
    try:
        library = ctypes.CDLL(ffi.lib._name)
    except (AttributeError, OSError):
        return None
    pointer = ctypes.c_void_p
    for name, result, arguments in (
            ("LLVMPY_TargetMachineEmitToMemory", pointer,
             [ffi.LLVMTargetMachineRef, ffi.LLVMModuleRef, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]),
            ("LLVMPY_GetBufferStart", pointer, [pointer]),
            ("LLVMPY_GetBufferSize", ctypes.c_size_t, [pointer]),
            ("LLVMPY_DisposeMemoryBuffer", None, [pointer])):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
