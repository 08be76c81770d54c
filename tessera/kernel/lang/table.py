"""The tables of builtins in docs/language.md, made from the code. Run as a module, it takes the page's path.

In: signatures and the first lines of docstrings. Out: one Markdown table for each module of the language, written
between the page's marks `<!-- builtins: memory -->` and `<!-- end -->`. `make docs` runs it; a test holds the page
to what it makes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

from tessera.kernel import lang

_MARKED = re.compile(r"(<!-- builtins: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """A page with the table of each marked module in place."""
    return _MARKED.sub(lambda mark: f"{mark[1]}{table(mark[2])}{mark[3]}", page)


def table(module: str) -> str:
    """The builtins of one module of the language ("memory", "reductions", ...), in the order of its source."""
    rows = "".join(f"| {call} | {summary} |\n" for call, summary in _rows(module))
    return f"| | |\n|---|---|\n{rows}"


def _rows(module: str) -> Iterator[tuple[str, str]]:
    names: dict[FunctionType, list[str]] = {}
    for name in lang.__all__:
        function = getattr(lang, name)
        if isinstance(function, FunctionType) and function.__module__ == f"{lang.__name__}.{module}":
            names.setdefault(function, []).append(name)
    for function in sorted(names, key=lambda f: f.__code__.co_firstlineno):
        others = [f"`{name}`" for name in names[function] if name != function.__name__]
        yield ", ".join([f"`{function.__name__}({_parameters(function)})`", *others]), _summary(function)


def _parameters(function: FunctionType) -> str:
    """As in the source, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)


def _summary(function: FunctionType) -> str:
    line = (function.__doc__ or "").split("\n")[0].removesuffix(".")
    parts = re.split(r"(`[^`]*`)", line)  # code stays as it is; elsewhere * and | have a meaning in Markdown
    return "".join(part if part.startswith("`") else re.sub(r"([*|])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(fill(path.read_text()))
