"""Launches a kernel on a backend by name: interp, cpu, or its Triton text under Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tessera.kernel import backends, ir
from tessera.kernel.backends import cpu, cuda, interp

BACKENDS = ["interp", "cpu", "triton-interpreter"]


class _Interpreted:
    """A compiled kernel that runs as Triton text, without a GPU."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function

    def __call__(self, args: Any, sizes: Any) -> None:
        cuda.run_interpreted(self.function, args, sizes)


COMPILE = {"interp": interp.compile, "cpu": cpu.compile, "triton-interpreter": _Interpreted}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: the interpreter's many small operations wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def launch(kernel: Any, backend: str, *args: Any, **kwargs: Any) -> None:
    """Launch a fresh copy of a kernel, compiled by one backend."""
    compiler = mock.patch.object(backends, "get", return_value=SimpleNamespace(compile=COMPILE[backend]))
    with compiler, one_thread() if backend == "interp" else nullcontext():
        kernel.retype({})(*args, **kwargs)
