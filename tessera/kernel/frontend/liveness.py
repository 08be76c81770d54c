"""Which names a piece of a kernel's body reads before it writes them, and which it assigns.

In: statements. Out: sets of names, conservative: every branch may be taken, every loop may run zero
times. The frontend carries a name around a loop, or out of a branch, only where it is live.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

Names = frozenset[str]
# The name that a call statement changes and whether its old value does not matter: tile.fill(x, 0) -> (x, True).
Destination = Callable[[ast.Call], "tuple[ast.expr, bool] | None"]


@dataclass(frozen=True)
class Exits:
    """What is live where control goes: at the end of the statements, at `break` and at `continue`."""

    end: Names = frozenset()
    on_break: Names = frozenset()
    on_continue: Names = frozenset()


def reads(*nodes: ast.AST | None) -> Names:
    """Names that expressions read."""
    return frozenset().union(*(_reads(node) for node in nodes if node is not None))


@lru_cache(maxsize=1 << 14)
def _reads(node: ast.AST) -> Names:
    found: set[str] = set()
    nodes = [node]
    while nodes:  # ast.walk takes three times as long
        node = nodes.pop()
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                found.add(node.id)
            continue
        for name in node._fields:
            child = getattr(node, name, None)
            if isinstance(child, ast.AST):
                nodes.append(child)
            elif isinstance(child, list):
                nodes += [c for c in child if isinstance(c, ast.AST)]
    return frozenset(found)


@lru_cache(maxsize=1 << 12)
def _writers(statement: ast.stmt) -> list[list[ast.expr] | ast.Call]:
    """Everything in a statement that may bind names: lists of targets, and calls made as statements."""
    found: list[list[ast.expr] | ast.Call] = []
    if isinstance(statement, ast.Assign):
        found.append(statement.targets)
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign, ast.For)):
        found.append([statement.target])
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        found.append(statement.value)
    for block in ("body", "orelse"):
        for inner in getattr(statement, block, ()):
            found += _writers(inner)
    return found


class Liveness:
    """Liveness of one function's body.

    Args:
        destination: resolves calls that change an argument.
        is_view: whether a name is a parameter's view: writing to its elements does not change the name.
    """

    def __init__(self, destination: Destination, is_view: Callable[[str], bool]) -> None:
        self.destination = destination
        self.is_view = is_view

    def live(self, statements: Sequence[ast.stmt], exits: Exits) -> Names:
        """Names that may be read, before they are written, from the start of the statements on."""
        live = exits.end
        for statement in reversed(statements):
            live = self._before(statement, live, exits)
        return live

    def _before(self, s: ast.stmt, after: Names, exits: Exits) -> Names:
        inner = Exits(after, exits.on_break, exits.on_continue)
        if isinstance(s, (ast.Assign, ast.AnnAssign)):
            targets = s.targets if isinstance(s, ast.Assign) else [s.target]
            kept, read = self._targets(targets)
            return (after - kept) | read | reads(s.value)
        if isinstance(s, ast.AugAssign):
            return after | reads(s.value, s.target) | _roots([s.target])
        if isinstance(s, ast.Expr):
            return self._expression(s, after)
        if isinstance(s, ast.If):
            return self.live(s.body, inner) | self.live(s.orelse, inner) | reads(s.test)
        if isinstance(s, ast.For):
            kept, read = self._targets([s.target])
            return after | (self.loop_entry(s.body, after) - kept) | read | reads(s.iter)
        if isinstance(s, ast.While):
            return after | self.loop_entry(s.body, after | reads(s.test)) | reads(s.test)
        if isinstance(s, ast.Break):
            return exits.on_break
        if isinstance(s, ast.Continue):
            return exits.on_continue
        if isinstance(s, ast.Return):
            return reads(s.value)
        return after | reads(s)

    def loop_entry(self, body: Sequence[ast.stmt], after: Names) -> Names:
        """Names live at the head of a loop's body, given those live after the loop."""
        head: Names = frozenset()
        for _ in range(2):  # one more round than the first reaches the fixed point of this union
            head = self.live(body, Exits(head | after, after, head | after))
        return head

    def _expression(self, s: ast.Expr, after: Names) -> Names:
        found = self.destination(s.value) if isinstance(s.value, ast.Call) else None
        if found is None:
            return after | reads(s.value)
        target, overwrites = found
        if overwrites and isinstance(target, ast.Name) and isinstance(s.value, ast.Call):
            others = [a for a in [*s.value.args, *(k.value for k in s.value.keywords)] if a is not target]
            return (after - {target.id}) | reads(s.value.func, *others)
        return after | reads(s.value)

    def _targets(self, targets: Iterable[ast.expr]) -> tuple[Names, Names]:
        """Names that assignment targets overwrite, and names that they read (x of x[i] = ...)."""
        written: Names = frozenset()
        read: Names = frozenset()
        for target in targets:
            if isinstance(target, ast.Name):
                written |= {target.id}
            elif isinstance(target, (ast.Tuple, ast.List)):
                inner = self._targets(target.elts)
                written, read = written | inner[0], read | inner[1]
            elif isinstance(target, ast.Starred):
                inner = self._targets([target.value])
                written, read = written | inner[0], read | inner[1]
            else:
                read |= reads(target)
        return written, read

    def assigned(self, statements: Sequence[ast.stmt]) -> list[str]:
        """Names that statements may bind or change, in order of appearance."""
        found: dict[str, None] = {}
        for statement in statements:
            for writer in _writers(statement):
                if isinstance(writer, ast.Call):
                    change = self.destination(writer)
                    writer = [change[0]] if change else []
                found.update(dict.fromkeys(sorted(self._changed(writer))))
        return list(found)

    def _changed(self, targets: Iterable[ast.expr]) -> Names:
        """The roots of targets, without views that are written through."""
        found: Names = frozenset()
        for target in targets:
            if isinstance(target, (ast.Tuple, ast.List)):
                found |= self._changed(target.elts)
            else:
                roots = _roots([target])
                found |= roots if isinstance(target, ast.Name) else {n for n in roots if not self.is_view(n)}
        return found


def _roots(targets: Iterable[ast.expr]) -> Names:
    """Names at the root of targets: x of x, x[i], (x, y)."""
    found: Names = frozenset()
    for target in targets:
        while isinstance(target, (ast.Subscript, ast.Starred)):
            target = target.value
        if isinstance(target, ast.Name):
            found |= {target.id}
        elif isinstance(target, (ast.Tuple, ast.List)):
            found |= _roots(target.elts)
    return found


def jumps(statements: Iterable[ast.stmt]) -> bool:
    """Whether statements may leave their block: break or continue of the enclosing loop, or return."""
    return any(_jumps(s, in_loop=False) for s in statements)


def _jumps(s: ast.stmt, in_loop: bool) -> bool:
    if isinstance(s, ast.Return):
        return True
    if isinstance(s, (ast.Break, ast.Continue)):
        return not in_loop
    if isinstance(s, ast.If):
        return any(_jumps(x, in_loop) for x in [*s.body, *s.orelse])
    if isinstance(s, (ast.For, ast.While)):
        return any(_jumps(x, True) for x in s.body)
    return False
