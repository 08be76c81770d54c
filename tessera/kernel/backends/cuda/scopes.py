"""Nested scopes of generated Python text, and the memory of what each has computed.

The emitter writes each value into the outermost scope in which everything that it needs is known, so that
what does not change in a loop stands before it. A scope's lines join its parent's when it is closed; until
then the parent is open at its end, which is the place just before the loop.
"""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tessera.kernel.backends.cuda.helpers import HELPERS
from tessera.kernel.backends.cuda.values import Val
from tessera.kernel.ir import Location

INDENT = "    "
RESERVED = frozenset([*dir(builtins), *keyword.kwlist, "tl", "triton", "libdevice", "program", *HELPERS])


@dataclass
class Scope:
    """Lines at one depth, what they compute (`memo`), and the source line that they came from last."""

    lines: list[str] = field(default_factory=list)
    memo: dict[Any, Val] = field(default_factory=dict)
    loc: Location | None = None
    branch: bool = False


class Scopes:
    """A stack of scopes; depth 0 is the kernel's body."""

    def __init__(self) -> None:
        self.stack = [Scope()]
        self._names: set[str] = set()

    @property
    def depth(self) -> int:
        return len(self.stack) - 1

    def name(self, hint: str) -> str:
        """An unused variable name like the hint."""
        base = "".join(c if c.isalnum() or c == "_" else "_" for c in hint).strip("_") or "v"
        base = base if not base[0].isdigit() else f"v{base}"
        name, count = base, 1
        while name in self._names or name in RESERVED:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def branch_of(self, depth: int) -> int:
        """The depth of the innermost branch that a depth lies in; what belongs to a branch does not leave it."""
        return max((i for i, scope in enumerate(self.stack[:depth + 1]) if scope.branch), default=0)

    def line(self, text: str, loc: Location | None = None) -> None:
        """Append a line to the innermost scope, below the source line that it comes from."""
        scope = self.stack[-1]
        if loc is not None and (scope.loc is None or scope.loc.line != loc.line):
            scope.lines.append(f"# {loc.line}: {loc.text.strip()}")
            scope.loc = loc
        scope.lines.append(text)

    def find(self, key: Any) -> Val | None:
        """A value computed before, in a scope that is still open."""
        for scope in reversed(self.stack):
            if key in scope.memo:
                return scope.memo[key]
        return None

    def keep(self, key: Any, value: Val) -> Val:
        """Remember a value in the scope that it was computed in."""
        self.stack[min(value.depth, self.depth)].memo[key] = value
        return value

    @contextmanager
    def at(self, depth: int) -> Iterator[None]:
        """Write into an outer scope for a while."""
        saved, self.stack = self.stack, self.stack[:depth + 1]
        try:
            yield
        finally:
            self.stack = saved

    @contextmanager
    def inside(self, header: str, loc: Location | None = None) -> Iterator[None]:
        """A new innermost scope under a header line (`for ...:`); an empty body becomes `pass`."""
        self.stack.append(Scope(loc=loc))
        try:
            yield
        finally:
            body = self.stack.pop().lines
            self.line(header, loc)
            self.stack[-1].lines += [INDENT + text for text in body or ["pass"]]

    @contextmanager
    def aside(self) -> Iterator[list[str]]:
        """A new innermost scope whose lines, indented, are handed over when it is closed: a branch of an `if`."""
        handed: list[str] = []
        self.stack.append(Scope(loc=self.stack[-1].loc, branch=True))
        try:
            yield handed
        finally:
            handed += [INDENT + text for text in self.stack.pop().lines or ["pass"]]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A scope for memory only: its lines stand at the same depth, what it computed is forgotten.

        The depth number grows by one, as in a real scope.
        """
        self.stack.append(Scope(loc=self.stack[-1].loc))
        try:
            yield
        finally:
            lines = self.stack.pop().lines
            self.stack[-1].lines += lines
