"""A kernel's source: its syntax tree with the columns of the file, and the names it can see."""

from __future__ import annotations

import ast
import builtins
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tessera.errors import CompileError
from tessera.kernel.ir import Location

MISSING = object()


@dataclass(eq=False)
class Source:
    """One Python function, parsed."""

    function: types.FunctionType
    tree: ast.FunctionDef
    file: str
    first_line: int  # of the file, for line 1 of the tree
    lines: list[str] = field(repr=False)

    @property
    def name(self) -> str:
        return self.function.__name__

    @cached_property
    def parameters(self) -> list[ast.arg]:
        """Parameters in order; `*args` and `**kwargs` are refused by the frontend."""
        arguments = self.tree.args
        return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]

    @cached_property
    def closure(self) -> Mapping[str, Any]:
        """The names of enclosing functions."""
        cells = self.function.__closure__ or ()
        found = {}
        for name, cell in zip(self.function.__code__.co_freevars, cells):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not yet assigned
                continue
        return found

    def lookup(self, name: str) -> Any:
        """A name of the closure, the globals or Python's builtins; MISSING where there is none."""
        for space in (self.closure, self.function.__globals__, vars(builtins)):
            if name in space:
                return space[name]
        return MISSING

    def location(self, node: ast.AST) -> Location:
        """The place of a syntax node; a node of several lines is marked to the end of its first's code."""
        line = getattr(node, "lineno", 1)
        text = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        column = getattr(node, "col_offset", 0)
        end = getattr(node, "end_col_offset", column + 1)
        if getattr(node, "end_lineno", line) != line:
            end = len(text.split("  #")[0].rstrip())
        if not text.isascii():  # ast counts bytes
            raw = text.encode()
            column, end = len(raw[:column].decode(errors="ignore")), len(raw[:end].decode(errors="ignore"))
        return Location(self.file, self.first_line + line - 1, column, end, text.rstrip("\n"))


_parsed: dict[tuple[str, types.CodeType], tuple[ast.FunctionDef, str, int, list[str]]] = {}


def source_of(function: types.FunctionType) -> Source:
    """Parse a function's source; the tree is kept per code object.

    Raises:
        CompileError: the source cannot be read (made by exec or typed at a prompt without history), or is
            not a plain `def`.
    """
    key = function.__code__.co_filename, function.__code__  # equal code of two files is equal in Python's eyes
    found = _parsed.get(key)
    if found is None:
        found = _parsed[key] = _parse(function)
    return Source(function, *found)


def _parse(function: types.FunctionType) -> tuple[ast.FunctionDef, str, int, list[str]]:
    try:
        file = inspect.getsourcefile(function) or function.__code__.co_filename
        whole, first = inspect.findsource(inspect.unwrap(function))
        rest, first = whole[first:], first + 1
        try:
            # What inspect.getsourcelines does, without its tokenizer, which takes longer than the parser.
            lines = rest[:_block_length(rest)]
            tree = _parse_lines(lines)
        except SyntaxError:
            lines = inspect.getblock(rest)
            tree = _parse_lines(lines)
    except (OSError, TypeError):
        raise CompileError(f"kernel {function.__name__}: its source cannot be read; define it in a file") from None
    except SyntaxError as error:
        raise CompileError(f"kernel {function.__name__}: its source does not parse on its own: {error.msg}") from None
    body = tree.body
    if lines[0][:1].isspace() and isinstance(body[0], ast.If):
        body = body[0].body
        for node in ast.walk(body[0]):
            if hasattr(node, "lineno"):
                node.lineno -= 1
                node.end_lineno -= 1  # type: ignore[attr-defined]
    if not isinstance(body[0], ast.FunctionDef):
        raise CompileError(f"kernel {function.__name__}: expected a plain def; got {type(body[0]).__name__}")
    return body[0], file, first, lines


def _block_length(lines: list[str]) -> int:
    """How many lines the function that starts at the first one has, by their indentation.

    Where a line inside of brackets or of a text stands to the left of the function, the lines up to it do not parse.
    """
    margin = len(lines[0]) - len(lines[0].lstrip())
    defined = False
    length = len(lines)
    for number, line in enumerate(lines):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        inside = len(line) - len(line.lstrip()) > margin
        if defined and not inside and text[0] not in ")]}":
            length = number
            break
        defined = defined or text.startswith(("def ", "async def "))
    while not lines[length - 1].strip() or lines[length - 1].lstrip().startswith("#"):
        length -= 1
    return length


def _parse_lines(lines: list[str]) -> ast.Module:
    return ast.parse("".join(["if 1:\n", *lines] if lines[0][:1].isspace() else lines))
