"""A kernel's source: its text, its syntax tree with the columns of the file, and the names it can see."""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import linecache
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

    @property
    def closure(self) -> Mapping[str, Any]:
        """The names of enclosing functions, as they are now."""
        return closure_of(self.function)

    def lookup(self, name: str) -> Any:
        """A name of the closure, the globals or Python's builtins, as it is now; MISSING where there is none."""
        return lookup(self.function, name)

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


def closure_of(function: types.FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions that a function reads."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    return found


def lookup(function: types.FunctionType, name: str) -> Any:
    """What a name that is no variable of a function stands for in it; MISSING where there is nothing."""
    if function.__closure__:
        found = closure_of(function).get(name, MISSING)
        if found is not MISSING:
            return found
    found = function.__globals__.get(name, MISSING)
    return vars(builtins).get(name, MISSING) if found is MISSING else found


@dataclass(frozen=True, eq=False)
class Text:
    """Where a function's source lies: the lines of its file, and which is its first (from 0)."""

    file: str
    lines: list[str] = field(repr=False)
    first: int

    @property
    def digest(self) -> str:
        """Tells the file's content apart from any other."""
        known = _digests.get(self.file)
        if known is None or known[0] is not self.lines:
            text = "".join(self.lines).encode(errors="surrogatepass")
            known = _digests[self.file] = self.lines, hashlib.sha256(text).hexdigest()
        return known[1]


_digests: dict[str, tuple[list[str], str]] = {}
_Code = tuple[str, types.CodeType]  # equal code of two files is equal in Python's eyes
_texts: dict[_Code, Text] = {}
_parsed: dict[_Code, tuple[ast.FunctionDef, str, int, list[str]]] = {}


def text_of(function: types.FunctionType) -> Text:
    """The text that a function's source is read from; it is read once per code object.

    Raises:
        CompileError: it cannot be read (made by exec or typed at a prompt without history).
    """
    function = inspect.unwrap(function)
    key = function.__code__.co_filename, function.__code__
    found = _texts.get(key)
    if found is None:
        found = _texts[key] = _read(function)
    return found


def _read(function: types.FunctionType) -> Text:
    # What inspect.findsource does, without its search through all modules for the function's own.
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    first = code.co_firstlineno - 1
    if first < len(lines) and lines[first].lstrip().startswith(("def ", "@")):
        return Text(code.co_filename, lines, first)
    try:
        return Text(inspect.getsourcefile(function) or code.co_filename, *inspect.findsource(function))
    except (OSError, TypeError):
        raise CompileError(f"kernel {function.__name__}: its source cannot be read; define it in a file") from None


def source_of(function: types.FunctionType) -> Source:
    """Parse a function's source; the tree is kept per code object.

    Raises:
        CompileError: the source cannot be read (made by exec or typed at a prompt without history), or is
            not a plain `def`.
    """
    plain = inspect.unwrap(function)
    key = plain.__code__.co_filename, plain.__code__
    found = _parsed.get(key)
    if found is None:
        found = _parsed[key] = _parse(function.__name__, text_of(plain))
    return Source(function, *found)


def _parse(name: str, text: Text) -> tuple[ast.FunctionDef, str, int, list[str]]:
    rest = text.lines[text.first:]
    try:
        try:
            # What inspect.getsourcelines does, without its tokenizer, which takes longer than the parser.
            lines = rest[:_block_length(rest)]
            tree = _parse_lines(lines)
        except SyntaxError:
            lines = inspect.getblock(rest)
            tree = _parse_lines(lines)
    except SyntaxError as error:
        raise CompileError(f"kernel {name}: its source does not parse on its own: {error.msg}") from None
    body = tree.body
    if lines[0][:1].isspace() and isinstance(body[0], ast.If):
        body = body[0].body
        for node in ast.walk(body[0]):
            if hasattr(node, "lineno"):
                node.lineno -= 1
                node.end_lineno -= 1  # type: ignore[attr-defined]
    if not isinstance(body[0], ast.FunctionDef):
        raise CompileError(f"kernel {name}: expected a plain def; got {type(body[0]).__name__}")
    return body[0], text.file, text.first + 1, lines


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
