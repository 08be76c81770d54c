"""Backends: each turns a verified `ir.Function` into something that runs.

A backend is a module with `compile(function) -> Compiled` and `source(function)`. It is imported at its first use:
`cpu` needs llvmlite and `cuda` needs Triton, which a program that uses neither should not wait for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tessera.errors import UnsupportedError
from tessera.kernel.interface import Interface
from tessera.kernel.ir import Function
from tessera.types import DType

NAMES = ("interp", "cpu", "cuda")


class Compiled(Protocol):
    """A compiled specialisation. `source` is its text: LLVM IR, Triton, or the IR itself."""

    source: str

    def __call__(self, args: Sequence[Any], sizes: Sequence[int]) -> None:
        """Run with arguments in the order of `function.params`, sizes in that of `function.sizes`."""


class Backend(Protocol):
    """A backend's module."""

    def compile(self, function: Function) -> Compiled:
        """Compile one specialisation."""

    def source(self, function: Function) -> str:
        """Its text alone: LLVM IR, Triton, or the IR itself."""


class Kept(Compiled, Protocol):
    """A compiled specialisation whose code is on disk, in this entry of the cache (None: it is not)."""

    entry: str | None


class Keeping(Protocol):
    """The module of a backend whose code can be kept on disk and loaded without the function that it came from."""

    def compile(self, function: Function) -> Kept:
        """Compile one specialisation."""

    def load(self, interface: Interface, code: bytes, function: Callable[[], Function]) -> Compiled:
        """A specialisation whose code was on disk; `function` traces it, for those who ask for its source."""

    def target_key(self) -> str:
        """The backend and the processor that it makes code for."""


def keeping(name: str) -> Keeping | None:
    """The backend of a name, if it keeps code on disk."""
    module: Any = get(name)
    return module if hasattr(module, "load") else None


def get(name: str) -> Backend:
    """The backend of a name.

    Raises:
        UnsupportedError: it is unknown, or what it stands on is not installed.
    """
    if name not in NAMES:
        raise UnsupportedError(f"backend: {name!r} given; expected one of {', '.join(NAMES)}")
    try:
        module: Any = importlib.import_module(f"tessera.kernel.backends.{name}")
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"backend {name}: needs the package {error.name!r}, which is not installed") from None
    if not hasattr(module, "compile"):
        raise UnsupportedError(f"backend {name}: cannot compile in this version")
    return module


def default_blocks(name: str, dtypes: Sequence[DType]) -> Mapping[str, int]:
    """The sizes that `ctx.block_m`, `block_n` and `block_k` have without a schedule ("BM", "BN", "BK"), on a backend.

    Args:
        dtypes: of the kernel's tensors.
    """
    if name != "cuda":
        return {"BM": 64, "BN": 64, "BK": 32}
    # Registers hold the scores and the result of 128 queries where tensor cores add them up, of 64 where threads do.
    if any(dtype.is_float and dtype.bits <= 16 for dtype in dtypes):
        return {"BM": 128, "BN": 64, "BK": 64}
    return {"BM": 64, "BN": 32, "BK": 32}


def for_device(device: str) -> str:
    """The backend that runs on a torch device type.

    Raises:
        UnsupportedError: none does.
    """
    if device == "cpu":
        module = importlib.import_module("tessera.kernel.backends.cpu")
        return "cpu" if hasattr(module, "compile") else "interp"
    if device == "cuda":
        return "cuda"
    raise UnsupportedError(f"device {device!r}: no backend; expected cpu or cuda")
