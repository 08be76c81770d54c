"""Compiled kernels of the cuda backend: texts by size bucket, files, launches.

In: a function; at a call, tensors, scalars and sizes. The text for a set of sizes is built once for every
combination of powers of two that it depends on, and Triton compiles it once; a warm call is one look-up and Triton's
own launch, on the tensors' GPU and its current stream. A launch allocates nothing and waits for nothing, so that a CUDA
graph can capture it (call once before capturing: a module that is loaded under a capture may end it).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tessera import env
from tessera.errors import CompileError, LaunchError, NotFoundError, UnsupportedError
from tessera.kernel import ir
from tessera.kernel.backends.cuda.kernel import KernelText, Texts, build
from tessera.kernel.backends.cuda.values import next_power_of_2

NOMINAL = 1024  # every named size, where a source is asked for before any call
MAX_CALLS = 4096  # exact sizes remembered
Argument = torch.Tensor | int | float | bool
_HERE = contextlib.nullcontext()


class Compiled:
    """A function for CUDA tensors. `__call__` launches it on the current stream; `source` is its Triton text."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self._texts: list[tuple[bool, Texts]] = []
        self._kernels: dict[int, _Kernel] = {}  # by the identity of a text, which _texts keeps alive
        self._functions: dict[str, Any] = {}  # Triton's, by source
        self._launches: dict[Any, list[tuple[_Kernel, tuple[int]]]] = {}
        self._bounding = _bounding_params(function)
        self._first = next(i for i, param in enumerate(function.params) if param.is_view)
        self._lock = threading.RLock()

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
            launches = self._prepare(key, args, sizes)
        device = args[self._first].get_device()  # type: ignore[union-attr]
        if device < 0:
            raise LaunchError(f"kernel {self.function.name}: tensors on cpu given; the cuda backend expects cuda")
        # Triton launches on the current device.
        with _HERE if device == torch.cuda.current_device() else torch.cuda.device(device):
            for kernel, grid in launches:
                kernel(grid, args, sizes)

    def texts(self, args: Sequence[Argument], sizes: Sequence[int]) -> Texts:
        """The kernels for these sizes.

        Raises:
            UnsupportedError: an operation cannot be expressed at these sizes.
        """
        wide, known = _is_wide(args), self.known(args, sizes)
        with self._lock:
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

    def _prepare(self, key: Any, args: Sequence[Argument], sizes: Sequence[int]) -> list[tuple[_Kernel, tuple[int]]]:
        """The launches of a call with new sizes: Triton has compiled their texts, where others of the same powers of
        two came before."""
        known = self.known(args, sizes)
        with self._lock:
            counts = [(self._kernel(text), (count_programs(text, known),)) for text in self.texts(args, sizes).kernels]
            if len(self._launches) >= MAX_CALLS:
                self._launches.clear()
            self._launches[key] = [(kernel, grid) for kernel, grid in counts if grid[0]]
            return self._launches[key]

    def _kernel(self, text: KernelText) -> _Kernel:
        if id(text) not in self._kernels:
            if text.source not in self._functions:
                self._functions[text.source] = jit_function(text)
            self._kernels[id(text)] = _Kernel(self._functions[text.source], text)
        return self._kernels[id(text)]


@dataclass
class _Kernel:
    """One Triton function as it is launched."""

    function: Any
    text: KernelText
    pick: Callable[[Sequence[Argument], Sequence[int]], list[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.pick = picker(self.text)

    def __call__(self, grid: tuple[int], args: Sequence[Argument], sizes: Sequence[int]) -> None:
        """Start it.

        Raises:
            UnsupportedError: the GPU's shared memory is too small for it, even without loads ahead.
            CompileError: Triton refuses the text.
            LaunchError: a CUDA graph is captured, and the kernel is not loaded yet.
        """
        try:
            self.function[grid](*self.pick(args, sizes), **self.text.constants, **self.text.options)
        except Exception as error:
            self.text = _with_fewer_stages(self.text, error)
            self(grid, args, sizes)


def _with_fewer_stages(text: KernelText, error: Exception) -> KernelText:
    """The kernel with one load less ahead of use, after a launch that found too little shared memory."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, (CompilationError, PTXASError)):
        raise CompileError(f"cuda: kernel {text.name}: Triton does not take the text: {error}") from error
    if isinstance(error, OutOfResources) and text.stages > 1:
        return replace(text, stages=text.stages - 1)
    if isinstance(error, OutOfResources):
        raise UnsupportedError(f"cuda: kernel {text.name}: {error}; smaller blocks (ts.schedule) need less") from None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise LaunchError(f"cuda: kernel {text.name}: its first launch cannot be captured in a CUDA graph; call it "
                          f"once before, with tensors of the same sizes and dtypes ({error})") from error
    raise error


_PICKED = {"pointer": "args[{}]", "stride": "args[{}].stride({})", "size": "sizes[{}]", "scalar": "args[{}]"}


def picker(text: KernelText) -> Callable[[Sequence[Argument], Sequence[int]], list[Any]]:
    """(args, sizes) -> the kernel's run-time arguments out of a call's."""
    items = ", ".join(_PICKED[str(kind)].format(*rest) for kind, *rest in text.arguments)
    picked: Callable[[Sequence[Argument], Sequence[int]], list[Any]] = eval(f"lambda args, sizes: [{items}]")
    return picked


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
