"""Checks every `ts.function` and `ts.kernel` of a file or a module, without data.

In: a path or a module's name; the code is imported, and the functions' bodies run on FakeTensors, so it must be code
that one would run. Out: a `Report` of findings with file, line, column and the types of the operands. Kernels are
compiled to IR and launches in functions check their arguments and compute nothing. Called by `tessera check`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import linecache
import logging
import os
import pkgutil
import re
import sys
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tessera.errors import CompileError, LaunchError, NotFoundError, TesseraError, UnsupportedError
from tessera.function.decorator import signature_of
from tessera.function.trial import Failure, NoValue, try_function, type_text
from tessera.kernel.frontend.source import source_of
from tessera.kernel.launch import Kernel
from tessera.kernel.specialise import observing
from tessera.types import bool_, f32, int32, uint8

_MOST_OPERANDS = 6  # named below an error
_MOST_DTYPES = 64  # tried for a kernel
_ABOUT_DTYPES = re.compile(r"do not mix|expected (an )?int|expected (a )?bool|dtype")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An error, or what could not be checked (`is_error` False). Columns count from 1; 0 where there is none."""

    file: str
    line: int
    message: str
    column: int = 0
    end_column: int = 0
    notes: tuple[str, ...] = ()
    is_error: bool = True

    @property
    def source(self) -> str:
        """The line that it is about."""
        return linecache.getline(self.file, self.line).rstrip("\n")


@dataclass
class Report:
    """What was checked, and what was found."""

    functions: int = 0
    kernels: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [f for f in self.findings if f.is_error]


def check(target: str) -> Report:
    """Check a file, a module, or a package with everything in it.

    Raises:
        NotFoundError: there is no such file or module.
    """
    report = Report()
    linecache.checkcache()
    for module in _modules(target, report):
        with _without_computing():  # not while it is imported: what it computes then is its own
            _check_module(module, report)
    report.findings = sorted(dict.fromkeys(report.findings), key=lambda f: (f.file, f.line, f.column))
    return report


@contextlib.contextmanager
def _without_computing() -> Iterator[None]:
    """Kernels check their arguments when they are launched, and compute nothing."""
    before, logger = os.environ.get("TESSERA_BACKEND"), logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints the trace of every mismatch
    os.environ["TESSERA_BACKEND"] = "interp"  # nothing is compiled to machine code for a launch that does not happen
    try:
        with observing(lambda specialisation, run: lambda args, sizes: None):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["TESSERA_BACKEND"]
        else:
            os.environ["TESSERA_BACKEND"] = before


# -- importing --------------------------------------------------------------------------------------


def _modules(target: str, report: Report) -> Iterator[types.ModuleType]:
    path = Path(target)
    if path.suffix == ".py" or path.is_file():
        if not path.is_file():
            raise NotFoundError(f"target: {target!r} given; expected a Python file or a module's name")
        with _reported(str(path.resolve()), report):
            name = _name_in_package(path.resolve())
            yield importlib.import_module(name) if name else _import_file(path.resolve())
        return
    try:
        spec = importlib.util.find_spec(target)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise NotFoundError(f"target: {target!r} given; expected a Python file or a module's name")
    names = [target]
    if spec.submodule_search_locations:
        found = pkgutil.walk_packages(spec.submodule_search_locations, f"{target}.", onerror=lambda name: None)
        names += [m.name for m in found if not m.name.endswith("__main__")]
    for name in names:
        with _reported(spec.origin or target, report):
            yield importlib.import_module(name)


def _name_in_package(path: Path) -> str | None:
    """The name under which a file of an importable package is imported; None of any other file."""
    parts = [path.stem] if path.stem != "__init__" else []
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    name = ".".join(parts)
    if folder == path.parent or not parts:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return name if spec is not None and spec.origin and Path(spec.origin).resolve() == path else None


def _import_file(path: Path) -> types.ModuleType:
    """Run a file as a module of its stem; beside others of the same name, under one that is free."""
    name = path.stem if path.stem not in sys.modules else f"_checked_{path.stem}_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextlib.contextmanager
def _reported(file: str, report: Report) -> Iterator[None]:
    """A module that does not import is one error."""
    try:
        yield
    except SyntaxError as error:
        report.findings.append(Finding(
            file=error.filename or file, line=error.lineno or 1, column=error.offset or 0,
            end_column=max(error.end_offset or 0, (error.offset or 0) + 1), message=f"SyntaxError: {error.msg}"))
    except CompileError as error:
        report.findings.append(_of_compile_error(error, file, 1))
    except (Exception, SystemExit) as error:
        stated = re.match(r"(.+?\.py):(\d+): (.*)", str(error), re.DOTALL) if isinstance(error, TesseraError) else None
        if stated:
            report.findings.append(_marked(stated[1], int(stated[2]), stated[3]))
            return
        report.findings.append(_at_innermost(error, file, 1, f"does not import: {_text(error)}"))


def _check_module(module: types.ModuleType, report: Report) -> None:
    file = getattr(module, "__file__", None) or ""
    for name, thing, owner in _defined(module, file):
        if isinstance(thing, Kernel):
            report.kernels += 1
            report.findings += _check_kernel(thing)
        else:
            report.functions += 1
            report.findings += _check_function(name, thing, owner, file)


def _defined(module: types.ModuleType, file: str) -> list[tuple[str, Any, type | None]]:
    """(name, function or kernel, class of a method) of everything that the module defines, in order."""
    found: dict[types.CodeType, tuple[str, Any, type | None]] = {}

    def visit(name: str, thing: Any, owner: type | None) -> None:
        if isinstance(thing, type):
            if thing.__module__ == module.__name__ and thing is not owner:
                for cls in thing.__mro__:
                    if cls.__module__ == module.__name__:
                        for inner, member in vars(cls).items():
                            visit(f"{thing.__name__}.{inner}", member, thing)
            return
        method = owner if not isinstance(thing, (staticmethod, classmethod)) else None
        thing = getattr(thing, "__func__", thing)
        kernel = getattr(thing, "__tile_kernel__", None)
        thing = kernel if isinstance(kernel, Kernel) else thing
        signature = signature_of(thing)
        if not isinstance(thing, Kernel) and (signature is None or signature.is_trivial):
            return
        code = thing.function.__code__ if isinstance(thing, Kernel) else inspect.unwrap(thing).__code__
        if os.path.realpath(code.co_filename) == os.path.realpath(file):
            found.setdefault(code, (name, thing, method))

    for name, thing in list(vars(module).items()):
        visit(name, thing, None)
    return [found[code] for code in sorted(found, key=lambda c: c.co_firstlineno)]


# -- kernels ----------------------------------------------------------------------------------------


def _check_kernel(kernel: Kernel) -> list[Finding]:
    """Compile it with its optional arguments absent, with them, and with each flag turned."""
    code = kernel.function.__code__
    try:
        if kernel.is_method:
            return [Finding(file=code.co_filename, line=code.co_firstlineno, is_error=False, message=(
                f"kernel {kernel.name}: not checked, as what `self` holds is known at a launch only"))]
        given: list[dict[str, Any]] = [{}]
        optional = {p.name: p.dtype or f32 for p in kernel.parameters if p.optional and p.kind == "tile"}
        given += [optional] if optional else []
        given += [{p.name: not p.default} for p in kernel.parameters if isinstance(p.default, bool)]
        for arguments in given:
            _compile_somehow(kernel, arguments)
    except CompileError as error:
        return [_of_compile_error(error, code.co_filename, code.co_firstlineno)]
    except LaunchError as error:  # a compile-time argument without a default
        return [Finding(file=code.co_filename, line=code.co_firstlineno, is_error=False,
                        message=f"not checked: {error}")]
    except TesseraError as error:
        return [Finding(file=code.co_filename, line=code.co_firstlineno, message=str(error))]
    return []


def _compile_somehow(kernel: Kernel, arguments: dict[str, Any]) -> None:
    """Compile it with tiles without an annotated dtype as f32, or else with some of them as integers or bools.

    Raises:
        CompileError: it does not compile; of f32 tiles.
    """
    free = [p.name for p in kernel.parameters if p.kind == "tile" and p.dtype is None
            and (not p.optional or p.name in arguments)]
    subsets = itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(len(free) + 1))
    choices = itertools.chain(((names, int32) for names in subsets), itertools.product(itertools.combinations(free, 1),
                                                                                      (bool_, uint8)))
    first: CompileError | None = None
    for names, dtype in itertools.islice(choices, _MOST_DTYPES):
        try:
            kernel.check(**{**arguments, **dict.fromkeys(names, dtype)})
            return
        except CompileError as error:
            first = first or error
            if not _ABOUT_DTYPES.search(str(first).partition("\n")[0]):
                break
    assert first is not None
    raise first


def _of_compile_error(error: CompileError, file: str, line: int) -> Finding:
    """Read "file:line: message", the excerpt with its caret and the notes of the compiler's text."""
    first, *rest = str(error).splitlines()
    stated = re.match(r"(.+?):(\d+): (.*)", first)
    if stated:
        file, line, first = stated[1], int(stated[2]), stated[3]
    notes = tuple(text.removeprefix("note: ") for text in rest if not text.startswith("    "))
    carets = [text for text in rest if text.strip() and not text.strip(" ^")]
    source = linecache.getline(file, line)
    column = len(source) - len(source.lstrip()) + carets[0].index("^") - 4 + 1 if carets else 0
    return Finding(file=file, line=line, message=first, notes=notes, column=column,
                   end_column=column + carets[0].count("^") if carets else 0)


# -- functions --------------------------------------------------------------------------------------


def _check_function(name: str, function: Any, owner: type | None, file: str) -> list[Finding]:
    signature = signature_of(function)
    assert signature is not None
    body = inspect.unwrap(function)
    if owner is not None and (not signature.parameters or signature.parameters[0].spec is not None):
        owner = None
    try:
        failure = try_function(function, signature, owner)
    except NoValue as error:
        return [_at_definition(body, f"{name}: not checked: {error}", is_error=False)]
    if failure is None:
        return []
    return [_of_failure(name, body, failure, file)]


def _of_failure(name: str, body: types.FunctionType, failure: Failure, file: str) -> Finding:
    error, sizes = failure.error, failure.sizes
    text = re.sub(r"; called at \S+:\d+$", "", str(error))
    needs_data = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException, UnsupportedError))
    if needs_data or (failure.invented and not isinstance(error, TesseraError | RuntimeError)):
        why = "what follows depends on the numbers in a tensor" if needs_data else _text(error)
        return _at_innermost(error, file, body.__code__.co_firstlineno, f"{name}: not checked from here: {why}",
                             is_error=False)
    if failure.is_refusal(file):
        return _at_innermost(error, file, body.__code__.co_firstlineno,
                             f"{name}: not checked from here: {sizes.translate(text)}",
                             is_error=False)
    if isinstance(error, CompileError):
        return _of_compile_error(error, file, body.__code__.co_firstlineno)
    if not isinstance(error, TesseraError):
        text = _text(error)
    text = sizes.translate(text)
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if os.path.realpath(frame.f_code.co_filename) == os.path.realpath(file)]
    if not frames:
        return _at_result(body, text)
    found = _at_innermost(error, file, body.__code__.co_firstlineno, text)
    notes = [f"{what} is {type_text(value, sizes)}" for what, value in _operands(frames[-1][0], found)]
    return Finding(file=found.file, line=found.line, column=found.column, end_column=found.end_column,
                   message=text, notes=tuple(notes[:_MOST_OPERANDS]))


def _text(error: BaseException) -> str:
    """An error of Python or torch on one line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    message = lines[0] if lines else ""
    return message if isinstance(error, (RuntimeError, TesseraError)) and message else (
        f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _at_innermost(error: BaseException, file: str, line: int, message: str, *, is_error: bool = True) -> Finding:
    """At the innermost line of the file that the error went through."""
    column = end = 0
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if os.path.realpath(code.co_filename) == os.path.realpath(file):
            positions = list(code.co_positions())[trace.tb_lasti // 2]
            line, column, end = trace.tb_lineno, 0, 0
            if positions[2] is not None and positions[3] is not None and positions[0] is not None:
                line, column, end = positions[0], positions[2] + 1, positions[3] + 1
                if positions[1] != positions[0]:
                    end = len(linecache.getline(file, line).rstrip()) + 1
        trace = trace.tb_next
    return Finding(file=file, line=line, column=column, end_column=end, message=message, is_error=is_error)


def _at_definition(body: types.FunctionType, message: str, *, is_error: bool = True) -> Finding:
    code = body.__code__
    try:
        source = source_of(body)
        line = source.first_line + source.tree.lineno - 1
    except CompileError:
        line = code.co_firstlineno
    return _marked(code.co_filename, line, message, is_error=is_error)


def _marked(file: str, line: int, message: str, *, is_error: bool = True) -> Finding:
    """A finding about a whole line."""
    text = linecache.getline(file, line).rstrip()
    lead = len(text) - len(text.lstrip())
    return Finding(file=file, line=line, column=lead + 1 if text else 0, end_column=len(text) + 1 if text else 0,
                   message=message, is_error=is_error)


def _at_result(body: types.FunctionType, message: str) -> Finding:
    """What a function returns does not fit: at its return, when there is one, and else at its annotation."""
    try:
        source = source_of(body)
    except CompileError:
        return _at_definition(body, message)
    inner = {n for f in ast.walk(source.tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) and f is not source.tree
             for n in ast.walk(f)}
    returns: list[ast.AST] = [n for n in ast.walk(source.tree) if isinstance(n, ast.Return) and n not in inner]
    loc = source.location(returns[0] if len(returns) == 1 else source.tree.returns or source.tree)
    return Finding(file=loc.file, line=loc.line, column=loc.column + 1, end_column=loc.end_column + 1, message=message)


def _operands(frame: types.FrameType, found: Finding) -> list[tuple[str, torch.Tensor]]:
    """(source text, tensor) of the names in the expression that failed."""
    try:
        tree = ast.parse("".join(linecache.getlines(found.file)))
    except SyntaxError:
        return []
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.expr) and n.lineno == found.line
              and n.col_offset + 1 >= found.column
              and (n.end_lineno != n.lineno or (n.end_col_offset or 0) + 1 <= found.end_column)]
    result: dict[str, torch.Tensor] = {}
    for node in inside:
        if isinstance(node, (ast.Name, ast.Attribute)):
            value = _value(node, frame)
            if isinstance(value, torch.Tensor):
                result.setdefault(ast.unparse(node), value)
    return list(result.items())


def _value(node: ast.expr, frame: types.FrameType) -> Any:
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        base = _value(node.value, frame)
        # Of modules and plain objects only: a tensor's attributes (x.T, x.grad) are computed.
        return None if base is None or isinstance(base, torch.Tensor) else getattr(base, node.attr, None)
    return None


