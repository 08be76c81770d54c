"""Compile errors with file, line, caret and the lines where the operands were made.

In: a message, the place of the offending expression and the operands of a broken rule. Out: a
`CompileError` whose text is

    model.py:12: mma: inner dims differ: q: bf16[S, D] x k: bf16[S, D]: D against S
        s = tile.mma(q, k)
            ^^^^^^^^^^^^^^
    note: q is bf16[S, D], made at line 9: q = tile.load(Q)

The frontend and the verifier raise these.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from tessera.errors import CompileError
from tessera.kernel.ir import Location, TileTy, Value, ViewTy

_SCALAR = re.compile(r"%\d+")
# What an expression does to its operands on the way: the note names what they were before.
_CONVERSIONS = ("load", "cast", "broadcast")


class InternalCompilerError(CompileError):
    """The compiler made IR that breaks its own rules: a bug in Tessera, not in the kernel."""


def compile_error(message: str, loc: Location | None, operands: Sequence[Value] = (),
                  callers: Sequence[Location] = (), notes: Sequence[str] = (),
                  scalars: Mapping[str, str] | None = None) -> CompileError:
    """The error to raise; `callers` are the calls, outermost first, that were inlined to get to `loc`.

    `scalars` are the program's names of run-time scalars that sizes name as the IR does: "%12".
    """
    def named(text: str) -> str:
        return _SCALAR.sub(lambda found: (scalars or {}).get(found.group(), "?"), text)

    message = named(message)
    lines = [f"{loc}: {message}" if loc else message]
    if loc is not None:
        lines += _excerpt(loc)
    lines += [f"note: {text}" for text in _dedupe(_origin(value, loc, named) for value in operands)]
    lines += [f"note: {text}" for text in notes]
    lines += [f"note: called from {caller}: {caller.text.strip()}" for caller in reversed(callers)]
    return CompileError("\n".join(lines))


def _excerpt(loc: Location) -> list[str]:
    text = loc.text.rstrip()
    lead = len(text) - len(text.lstrip())
    width = max(1, min(loc.end_column, len(text)) - loc.column)
    return ["    " + text[lead:], "    " + " " * max(0, loc.column - lead) + "^" * width]


def _origin(value: Value, here: Location | None, named: Callable[[str], str]) -> str | None:
    """Where an operand comes from; None when it was made by the offending expression itself."""
    while value.op is not None and value.op.name in _CONVERSIONS and _same_place(value.op.loc, here):
        value = value.op.operands[0]
    what = f"{value.hint or 'this operand'} is {named(_type_text(value.type))}"
    loc = value.op.loc if value.op is not None else value.loc
    if loc is None:
        return what if value.hint else None
    if _same_place(loc, here):
        return None
    place = f"line {loc.line}" if here is not None and loc.file == here.file else str(loc)
    verb = "declared" if value.op is None else "made"
    return f"{what}, {verb} at {place}: {loc.text.strip()}"


def _same_place(a: Location | None, b: Location | None) -> bool:
    return a is not None and b is not None and (a.file, a.line, a.column) == (b.file, b.line, b.column)


def _type_text(type_: TileTy) -> str:
    return str(type_)[1:] if isinstance(type_, ViewTy) else str(type_)


def _dedupe(items: Iterable[str | None]) -> list[str]:
    return [item for item in dict.fromkeys(items) if item is not None]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'exp'?" or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
