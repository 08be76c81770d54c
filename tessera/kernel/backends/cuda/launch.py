"""Compiled kernels of the cuda backend: texts by size bucket, files, launches.

In: a function; at a call, tensors, scalars and sizes. The text for a set of sizes is built once for every
combination of powers of two that it depends on; a warm call is one look-up and Triton's own launch. A launch
allocates nothing and waits for nothing, so that a CUDA graph can capture it (call once before capturing).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tessera import env
from tessera.errors import NotFoundError, UnsupportedError
from tessera.kernel import ir
from tessera.kernel.backends.cuda.kernel import KernelText, Texts, build
from tessera.kernel.backends.cuda.values import next_power_of_2

NOMINAL = 1024  # every named size, where a source is asked for before any call
MAX_CALLS = 4096  # exact sizes remembered
Argument = torch.Tensor | int | float | bool


class Compiled:
    """A function for CUDA tensors. `__call__` launches it on the current stream; `source` is its Triton text."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self._texts: list[tuple[bool, Texts]] = []
        self._launches: dict[Any, list[_Launch]] = {}
        self._bounding = _bounding_params(function)

    @property
    def source(self) -> str:
        """The text that was used last; before any call, the one for sizes of 1024."""
        if not self._texts:
            self.texts([NOMINAL] * len(self.function.params), [NOMINAL] * len(self.function.sizes))
        return self._texts[-1][1].source

    def __call__(self, args: Sequence[Argument], sizes: Sequence[int]) -> None:
        key = (*sizes, *(args[i] for i in self._bounding), _is_wide(args))
        launches = self._launches.get(key)
        if launches is None:
            launches = self._prepare(args, sizes)
            if len(self._launches) >= MAX_CALLS:
                self._launches.clear()
            self._launches[key] = launches
        for launch in launches:
            launch(args, sizes)

    def texts(self, args: Sequence[Argument], sizes: Sequence[int]) -> Texts:
        """The kernels for these sizes.

        Raises:
            UnsupportedError: an operation cannot be expressed at these sizes.
        """
        wide, known = _is_wide(args), self.known(args, sizes)
        for number, (was_wide, texts) in enumerate(self._texts):
            if was_wide == wide and all(next_power_of_2(d.value(known)) == p for d, p in texts.bounds.items()):
                self._texts.append(self._texts.pop(number))
                return texts
        texts = build(self.function, known, wide)
        if "triton" in env.get("TESSERA_DUMP").split(","):
            print(texts.source, file=sys.stderr)
        self._texts.append((wide, texts))
        return texts

    def known(self, args: Sequence[Argument], sizes: Sequence[int]) -> dict[str, int]:
        """The numbers behind the names that a size expression may hold."""
        known = dict(zip(self.function.sizes, sizes))
        known.update((self.function.params[i].value.name, int(args[i])) for i in self._bounding)  # type: ignore[arg-type]
        return known

    def _prepare(self, args: Sequence[Argument], sizes: Sequence[int]) -> list[_Launch]:
        known = self.known(args, sizes)
        launches = []
        for text in self.texts(args, sizes).kernels:
            programs = count_programs(text, known)
            if programs:
                launches.append(_Launch(jit_function(text), text, (programs,)))
        return launches


@dataclass
class _Launch:
    """One kernel with its grid; arguments are picked from the call's."""

    kernel: Any
    text: KernelText
    grid: tuple[int]

    def __call__(self, args: Sequence[Argument], sizes: Sequence[int]) -> None:
        """Start it.

        Raises:
            UnsupportedError: the GPU's shared memory is too small for it, even without loads ahead.
        """
        try:
            launch(self.kernel, self.text, self.grid, args, sizes)
        except Exception as error:
            self.text = _with_fewer_stages(self.text, error)
            self(args, sizes)


def _with_fewer_stages(text: KernelText, error: Exception) -> KernelText:
    """The kernel with one load less ahead of use, after a launch that found too little shared memory."""
    from triton.runtime.errors import OutOfResources

    if not isinstance(error, OutOfResources):
        raise error
    if text.stages <= 1:
        raise UnsupportedError(f"cuda: kernel {text.name}: {error}; smaller blocks (ts.schedule) need less") from None
    return replace(text, stages=text.stages - 1)


def launch(kernel: Any, text: KernelText, grid: tuple[int], args: Sequence[Argument], sizes: Sequence[int]) -> None:
    """Start one kernel (jitted or interpreted)."""
    kernel[grid](*pick(text, args, sizes), **text.constants, **text.options)


def pick(text: KernelText, args: Sequence[Argument], sizes: Sequence[int]) -> list[Any]:
    """The kernel's run-time arguments out of a call's."""
    return [_PICK[str(kind)](rest, args, sizes) for kind, *rest in text.arguments]


_PICK: dict[str, Callable[..., Any]] = {
    "pointer": lambda at, args, sizes: args[at[0]],
    "stride": lambda at, args, sizes: args[at[0]].stride(at[1]),
    "size": lambda at, args, sizes: sizes[at[0]],
    "scalar": lambda at, args, sizes: args[at[0]],
}


def count_programs(text: KernelText, known: dict[str, int]) -> int:
    """How many programs a launch has."""
    return math.prod(max(0, -(-dim.value(known) // block)) for dim, block in text.grid)


def jit_function(text: KernelText) -> Any:
    """The kernel as a Triton function, from a file in the cache (Triton reads the source back)."""
    try:
        return getattr(load_module(text.name, text.source), text.name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise NotFoundError("cuda: the triton package is not installed; pip install 'tessera[cuda]'") from None


def load_module(name: str, source: str) -> ModuleType:
    """Write a generated file, atomically, and import it."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = Path(env.get("TESSERA_CACHE_DIR")) / "triton"
    path = folder / f"{name[:64]}_{digest}.py"
    if not path.is_file() or path.read_text() != source:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(source)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    spec = importlib.util.spec_from_file_location(f"tessera_triton_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_wide(args: Sequence[Argument]) -> bool:
    """Whether some tensor may need 64-bit offsets."""
    return any(isinstance(a, torch.Tensor) and a.untyped_storage().nbytes() > 2**31 for a in args)


def _bounding_params(function: ir.Function) -> list[int]:
    """The int arguments that sizes of tiles or of the launch grid depend on."""
    atoms: set[str] = set()
    for op in ir.walk(function.body):
        for value in op.results:
            for dim in value.type.shape:
                atoms |= dim.atoms
        if op.name == "grid":
            for count in op.operands:
                atoms |= count.expr.atoms if count.expr is not None else frozenset()
    return [i for i, param in enumerate(function.params) if not param.is_view and param.value.name in atoms]
