"""The cuda backend: tile IR to readable Triton source.

`compile(function)` is the backend's entry, called by `tessera.kernel.launch`. `build` gives the text alone;
`run_interpreted` runs it without a GPU; `compile_to_cubin` shows that ptxas takes it, also without one.

The parts: `plan` splits a function into launches and programs; `kernel` assembles a text; `emit` writes values on
demand with the rules of `rules` (elementwise, rearranging), `memory`, `contract` (reduce, scan, sort), `products` (mma)
and `control`; `launch` keeps texts by size bucket and launches them.
"""

from __future__ import annotations

from tessera.kernel import ir
from tessera.kernel.backends.cuda.cubin import compile_for, compile_to_cubin
from tessera.kernel.backends.cuda.interpret import run_interpreted
from tessera.kernel.backends.cuda.kernel import KernelText, Texts, build
from tessera.kernel.backends.cuda.launch import Compiled

__all__ = ["Compiled", "KernelText", "Texts", "build", "compile", "compile_for", "compile_to_cubin", "run_interpreted",
           "source"]


def compile(function: ir.Function) -> Compiled:
    """A function compiled for NVIDIA GPUs; the text is made at the first call, for the sizes of that call."""
    return Compiled(function)


def source(function: ir.Function) -> str:
    """The Triton text, at nominal sizes."""
    return Compiled(function).source
