"""Machine code of a large module, made by two threads: each takes a share of its functions, then the next one.

In: a module whose functions know of each other what they will. Out: objects that are linked together. Called by
`jit.py`. Most of the time that a large kernel takes to compile goes into what LLVM does function by function: the
passes that simplify each, and the code generator.

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
SHARES = 5  # how long a function takes is not known before: several shares a thread even that out
_OBJECT = 1  # what LLVM is asked for, as llvmlite's emit_object does


Worker = tuple[llvm.TargetMachine, llvm.ModulePassManager, llvm.PassBuilder]  # what a thread works with


def emit(module: llvm.ModuleRef, workers: tuple[Worker, Worker]) -> list[bytes]:
    """The module's objects: SHARES, or one where it has variables, which can lie in one object only.

    Args:
        workers: of the two threads, with the passes that each function takes by itself.
    """
    text = str(module)
    if " internal global " in text or _library() is None:
        machine, passes, builder = workers[0]
        passes.run(module, builder)
        return [machine.emit_object(module)]
    # All that takes llvmlite's lock is made before there is a second thread.
    modules = [llvm.parse_assembly(share, context=llvm.create_context()) for share in split(text)]
    waiting, objects = iter(list(enumerate(modules))), [b""] * len(modules)

    def work(worker: Worker) -> None:
        for number, share in waiting:
            objects[number] = _emit(share, *worker)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(work, workers[1])
        work(workers[0])
        second.result()
    return objects


def split(text: str) -> list[str]:
    """Modules that define a share of the functions each and declare the others, the largest one first; a function that
    several may need is no longer internal, but hidden."""
    found = re.split(r"(?m)^(define [^\n]* \{\n.*?^\}\n)", text, flags=re.DOTALL)
    common = "".join(found[::2])
    functions = [function.replace("define internal", "define hidden", 1) for function in found[1::2]]
    shares: list[list[str]] = [[] for _ in range(min(SHARES, len(functions)))]
    for function in sorted(functions, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(function)
    heads = {function: function.split(" {\n", 1)[0].replace("define", "declare", 1) + "\n" for function in functions}
    return ["".join([common, *share, *(head for function, head in heads.items() if function not in share)])
            for share in shares]


def _emit(module: llvm.ModuleRef, machine: llvm.TargetMachine, passes: llvm.ModulePassManager,
          builder: llvm.PassBuilder) -> bytes:
    library, error = _library(), ctypes.c_char_p()
    assert library is not None
    library.LLVMPY_RunNewModulePassManager(passes, module, builder)
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
            ("LLVMPY_RunNewModulePassManager", None,
             [ffi.LLVMModulePassManagerRef, ffi.LLVMModuleRef, ffi.LLVMPassBuilderRef]),
            ("LLVMPY_GetBufferStart", pointer, [pointer]),
            ("LLVMPY_GetBufferSize", ctypes.c_size_t, [pointer]),
            ("LLVMPY_DisposeMemoryBuffer", None, [pointer])):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
