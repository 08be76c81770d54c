"""Kernels from the disk without a trace: which code a specialisation has, by all that decides it.

In: what a launch knows of a specialisation. Out: its machine code, where an earlier process has left it. The cache
keeps code by the text of the IR (`cache`), which only a trace tells. Beside it stands a manifest, under a key that
needs no trace (the kernel's source and its place, the arguments, the schedule, the target), with the name of the
code's entry, the kernel's interface, and all that the trace looked up outside of the kernel, each with a fingerprint
(`frontend.reads`). Code is taken only if all of it is what it was; else the kernel is traced, as without a manifest,
and a new one is written. A kernel of which not all can be judged (methods, properties, objects as values) has none.

Manifests are plain JSON, at most a mebibyte; what is damaged or is not what it should be counts as absent.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tessera.kernel import cache
from tessera.kernel.backends import Keeping
from tessera.kernel.dims import Dim
from tessera.kernel.frontend import Argument
from tessera.kernel.frontend.reads import (
    Read,
    Reads,
    fingerprint,
    function_fingerprint,
    hold,
    mapping_fingerprint,
    size_fingerprint,
)
from tessera.kernel.frontend.source import closure_of
from tessera.kernel.interface import Interface
from tessera.types import DType

_LIMIT = 1 << 20  # bytes of a manifest


class Manifest:
    """Where one specialisation's code lies, and what it depends on; its trace fills in `reads`."""

    def __init__(self, backend: Keeping, kernel: types.FunctionType, name: str) -> None:
        self.backend, self._kernel, self._name = backend, kernel, name
        self.reads = Reads(kernel)

    def find(self) -> tuple[Interface, bytes] | None:
        """The kernel's interface and code, if they are on disk and a trace would lead to them."""
        data = cache.read(self._name, _LIMIT)
        if data is None:
            return None
        try:
            code, interface, reads = _parse(data)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
        if not hold(self._kernel, reads):
            return None
        found = cache.read(code)
        return None if found is None else (interface, found)

    def keep(self, interface: Interface, code: str | None) -> None:
        """Remember what the trace has read, and the name of the cache's entry with its code."""
        found = self.reads.found
        if code is None or not self.reads.certain or not hold(self._kernel, found):
            return
        data = json.dumps({"code": code, "interface": interface.data(), "reads": [
            [read.space, read.name, read.fingerprint, read.enters] for read in found]}).encode()
        if len(data) <= _LIMIT:
            cache.write(self._name, data)


def manifest(backend: Keeping, kernel: types.FunctionType, name: str, arguments: Sequence[Argument],
             sizes: Sequence[str], named: Mapping[str, Dim], schedule: Mapping[str, Any], blocks: Mapping[str, int],
             retypes: Mapping[DType, DType]) -> Manifest | None:
    """The manifest of what `frontend.trace` makes of these arguments; None where no text says what they are."""
    parts = [
        backend.target_key(), sys.version, torch.__version__, name, function_fingerprint(kernel),
        str(list(map(_argument, arguments))), str(list(sizes)),
        str([(n, size_fingerprint(d)) for n, d in named.items()]),
        mapping_fingerprint(schedule), mapping_fingerprint(blocks), mapping_fingerprint(retypes),
        # Of the functions that a factory makes, each has its own.
        str([(n, fingerprint(value)) for n, value in closure_of(kernel).items()]),
    ]
    if None in parts or any(a.kind == "constant" and fingerprint(a.value) is None for a in arguments):
        return None
    return Manifest(backend, kernel, cache.name_of(f"manifest {parts}"))


def _argument(a: Argument) -> tuple[Any, ...]:
    value = fingerprint(a.value) if a.kind == "constant" else None
    dtype = None if a.dtype is None else fingerprint(a.dtype)
    return a.name, a.kind, [size_fingerprint(d) for d in a.shape], dtype, a.unit_stride, value


def _parse(data: bytes) -> tuple[str, Interface, list[Read]]:
    """A manifest's parts.

    Raises:
        ValueError, TypeError, AttributeError, RecursionError: it is something else.
    """
    whole = json.loads(data)
    code, reads = whole.get("code"), [Read(*read) for read in whole.get("reads")]
    if not isinstance(code, str) or not re.fullmatch("[0-9a-f]{64}", code):
        raise ValueError("not a name of an entry")
    for read in reads:
        numbers = (read.space,) if read.enters is None else (read.space, read.enters)
        if any(type(n) is not int for n in numbers) or type(read.name) is not str:
            raise ValueError("not what a trace read")
    return code, Interface.from_data(whole.get("interface")), reads
