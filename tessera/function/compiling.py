"""`@ts.jit` and `@ts.fused`: torch.compile where there is a compiler, plain torch with one message where there is none.

In: functions, methods and classes. Out: the same, compiled at their first call; registered operations of `ops` stay
whole in the graphs. A graph that cannot be compiled runs as torch traced it, so that nothing is done twice.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tessera.errors import CompileError
from tessera.function.decorator import decorate, decorate_class
from tessera.function.module import module

_lock = threading.Lock()
_no_compiler: str | None = None  # why nothing can be compiled in this process


def jit(function: Any = None, /, *, dynamic: bool | None = None) -> Any:
    """Decorator: compile with torch.compile, at the first call.

    What cannot be traced (printing, data-dependent branches, launches of kernels) runs in Python between the compiled
    pieces. Without a working C++ compiler, or where one fails, there is one RuntimeWarning and the code runs
    uncompiled; the results are the same. On a class, `forward` is compiled, or every method that is a `ts.function`;
    methods that are `ts.jit` themselves stay so.

    Args:
        dynamic: True: sizes are symbols from the start; False: one compilation for each shape; None: symbols for the
            sizes that turn out to vary.
    """
    if function is None:
        return functools.partial(jit, dynamic=dynamic)
    if isinstance(function, type) and any(getattr(m, "__tessera_jit__", False) for m in vars(function).values()):
        return function
    return _decorate(function, lambda body: _compiled(body, "jit", dynamic=dynamic), "jit")


def fused(function: Any) -> Any:
    """Decorator: compile as one graph, so that chains of elementwise operations become one loop.

    On a class it is `forward`, which may launch kernels of its own between the graphs; a plain class becomes a module
    as by `ts.module`.

    Raises:
        CompileError: at a call, the function cannot be one graph; the message says where it breaks.
    """
    if isinstance(function, type):
        return module(decorate_class(function, lambda body: _compiled(body, "fused"), "fused"))
    return _decorate(function, lambda body: _compiled(body, "fused", one_graph=True), "fused")


def _decorate(function: Any, transform: Callable[..., Any], name: str) -> Any:
    if isinstance(function, type):
        return decorate_class(function, transform, name)
    result = decorate(function, transform)
    getattr(result, "__func__", result).__tessera_jit__ = True
    return result


def _compiled(body: Callable[..., Any], decorator: str, *, dynamic: bool | None = None, one_graph: bool = False,
              ) -> Callable[..., Any]:
    compiled: Callable[..., Any] | None = None  # torch._dynamo takes a second to import: not before a call

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return body(*args, **kwargs)  # a mode that looks on (FakeTensors, a checkpoint_region) sees no graph
        if compiled is None:
            backend = _backend(f"ts.{decorator}: {body.__qualname__}")
            _leave_kernels_alone()
            compiled = torch.compile(body, backend=backend, dynamic=dynamic, fullgraph=one_graph)
        if not one_graph:
            return compiled(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()
            where = [line.strip() for line in reason if line.strip().startswith("File ")]
            raise CompileError(f"fused: {body.__qualname__} cannot be one graph: {reason[0]}"
                               f"{f' ({where[-1]})' if where else ''}") from None

    return run


@functools.cache
def _leave_kernels_alone() -> None:
    """Launch kernels between the graphs: traced, a launch would lead torch through our compiler."""
    from torch._dynamo import trace_rules

    trace_rules.add("tessera.kernel")


def _backend(who: str) -> Callable[..., Any]:
    """What torch.compile gives its graphs to: the inductor, or on its failure the graph itself."""
    warned = False

    def compile_graph(graph: Any, inputs: Sequence[Any]) -> Any:
        nonlocal warned
        global _no_compiler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what the inductor imports
            from torch._inductor.compile_fx import compile_fx
            from torch._inductor.exc import InvalidCxxCompiler

        if _no_compiler is not None:
            return graph.forward
        try:
            return compile_fx(graph, inputs)
        except Exception as error:
            with _lock:
                missing = isinstance(error, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(error)
                first = not warned and _no_compiler is None
                warned = True
                if missing:
                    _no_compiler = str(error)
            if first:
                what = "no working C++ compiler was found" if missing else f"compiling failed ({_first_line(error)})"
                warnings.warn(f"{who}: {what}; it runs uncompiled, with the same results", RuntimeWarning,
                              stacklevel=2)
            return graph.forward

    return compile_graph


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
