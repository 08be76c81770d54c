"""Compiles generated Triton text to machine code for a GPU that need not be there: a check of the text.

Called by tests and by bench/cubins.py; a launch compiles through Triton itself, which knows as much about arguments:
that pointers are aligned, and which strides and sizes are multiples of 16.
"""

from __future__ import annotations

from typing import Any

from tessera.kernel import ir
from tessera.kernel.backends.cuda.kernel import KernelText, build
from tessera.kernel.backends.cuda.launch import jit_function

_POINTER = {
    "f64": "*fp64", "f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "fp8_e4m3": "*fp8e4nv", "fp8_e5m2": "*fp8e5",
    "int64": "*i64", "int32": "*i32", "int8": "*i8", "uint8": "*u8", "int4": "*u8", "bool": "*i1",
}


def compile_to_cubin(function: ir.Function, sizes: dict[str, int], capability: int = 90) -> list[bytes]:
    """Machine code of each launch of a function, for a compute capability (90 is H100 and H200).

    Raises:
        UnsupportedError: the text cannot be made.
        triton.CompilationError: Triton refuses the text.
    """
    return [compiled.asm["cubin"] for compiled in compile_for(function, sizes, capability)]


def compile_for(function: ir.Function, sizes: dict[str, int], capability: int = 90) -> list[Any]:
    """The same as Triton's compiled kernels, which also know their shared memory (`metadata.shared`)."""
    return [_compile(function, text, sizes, capability) for text in build(function, sizes).kernels]


def _compile(function: ir.Function, text: KernelText, sizes: dict[str, int], capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = jit_function(text)
    run_time = kernel.arg_names[:len(text.arguments)]
    signature = {name: _type(function, argument) for name, argument in zip(run_time, text.arguments)}
    signature |= dict.fromkeys(text.constants, "constexpr")
    aligned: list[Any] = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, argument in enumerate(text.arguments) if argument[0] in ("pointer", "stride")
                  or (argument[0] == "size" and sizes[function.sizes[int(argument[1])]] % 16 == 0)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(text.constants), attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=text.options)


def _type(function: ir.Function, argument: tuple[str | int, ...]) -> str:
    kind, number = argument[0], int(argument[1])
    if kind in ("stride", "size"):
        return "i32"
    dtype = function.params[number].value.type.dtype
    if kind == "pointer":
        return _POINTER[dtype.name]
    return "fp32" if dtype.is_float else "i1" if dtype.name == "bool" else "i32"
