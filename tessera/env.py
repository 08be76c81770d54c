"""The environment variables that Tessera reads: one typed table, read at the time of use.

>>> env.get("TESSERA_DUMP")
''
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One environment variable: how its text is read, its default and what it does."""

    default: Any
    parse: Callable[[str], Any]
    doc: str


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("expected 0 or 1")


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError("expected one of " + ", ".join(allowed))
        return text

    return parse


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError("expected a whole number, 0 or more")
    return int(text)


def _some_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        items = [item.strip() for item in text.split(",")]
        if unknown := [item for item in items if item not in ("", *allowed)]:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
        return ",".join(items)

    return parse


VARIABLES: dict[str, Variable] = {
    "TESSERA_CACHE_DIR": Variable(
        default=Path(os.path.expanduser("~/.cache/tessera")), parse=lambda t: Path(t).expanduser(),
        doc="Where compiled kernels and tuning results are kept."),
    "TESSERA_CACHE_MB": Variable(
        default=512, parse=_count,
        doc="Upper bound of the on-disk kernel cache in MiB (least recently used go first)."),
    "TESSERA_BACKEND": Variable(
        default="auto", parse=_choice("auto", "interp", "cpu", "cuda"),
        doc="Which backend runs kernels: auto chooses by the tensors' device."),
    "TESSERA_DUMP": Variable(
        default="", parse=_some_of("ir", "passes", "llvm", "asm", "triton"),
        doc="Comma list of ir, passes, llvm, asm, triton: print what the compiler makes to stderr."),
    "TESSERA_CPU": Variable(
        default="host", parse=_choice("host", "avx512", "avx2", "generic"),
        doc="Instruction set that the CPU backend generates for; host reads it from the machine."),
    "TESSERA_DIST_CHECK": Variable(
        default=False, parse=_flag, doc="Before each collective, compare what the ranks are about to do."),
    "TESSERA_OPS": Variable(
        default="auto", parse=_choice("auto", "reference"),
        doc="How operations run: auto takes tile kernels where they pay, reference the plain torch expressions."),
    "TESSERA_SHARED_MEMORY": Variable(
        default=True, parse=_flag, doc="Ranks on one host move tensors through shared memory; 0: through sockets."),
    "TESSERA_DEBUG": Variable(default=False, parse=_flag, doc="Show tracebacks on the command line."),
}


def get(name: str) -> Any:
    """The value of a variable of the table, parsed; its default when unset.

    Raises:
        InputError: the text in the environment cannot be read as the variable's type.
        KeyError: the name is not in the table.
    """
    variable = VARIABLES[name]
    text = os.environ.get(name)
    if text is None:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError as error:
        raise InputError(f"environment variable {name}={text!r}: {error}") from None
