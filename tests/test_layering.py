"""Modules import only from layers below their own, and outside libraries only where they belong.

The checker reads the source, so that imports inside functions, under TYPE_CHECKING and through
importlib.import_module("literal") count as well.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tessera"

# From the bottom up; names on one line are siblings, which do not import each other.
LAYERS = (
    ("errors",),
    ("env", "types", "callable"),
    ("formats",),
    ("kernel",),
    ("function",),
    ("ops",),
    ("nn", "dist"),
    ("op",),
    ("models", "data", "checkpoint"),
    ("train", "infer", "plan"),
    ("serve",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Outside libraries that only these modules may import.
CONFINED = {
    "llvmlite": ("tessera.kernel.backends",),
    "triton": ("tessera.kernel.backends",),
    "torch.distributed": ("tessera.dist", "tessera.checkpoint"),
    "fastapi": ("tessera.serve",),
    "uvicorn": ("tessera.serve",),
    "pydantic": ("tessera.serve",),
    "prometheus_client": ("tessera.serve",),
    "typer": ("tessera.cli",),
    "rich": ("tessera.cli",),
}


def imports(module: str, source: str, *, is_package: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a module's source imports, `from a import b` as a.b."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and _calls_import(node):
            found.append((node.lineno, node.args[0].value))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.append((node.lineno, "torch.distributed"))
    return found


def _calls_import(node: ast.Call) -> bool:
    called = ast.unparse(node.func)
    is_literal = bool(node.args) and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    return is_literal and called in ("importlib.import_module", "import_module", "__import__")


def breaches(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """One line for each import of `module` that the layers forbid."""
    layer = module.split(".")[1]
    if layer not in LEVEL:
        return [f"{module}: layer {layer!r} is not in LAYERS"]
    found = []
    for line, name in imports(module, source, is_package=is_package):
        for library, owners in CONFINED.items():
            if _is_in(name, library) and not any(_is_in(module, owner) for owner in owners):
                found.append(f"{module}:{line} imports {name}; only {', '.join(owners)} may")
        if not _is_in(name, "tessera"):
            continue
        target = (name.split(".") + [""])[1]
        if target == layer or name == "tessera.__version__":
            continue
        if target not in LEVEL:
            found.append(f"{module}:{line} imports {name} through the public facade; name its module")
        elif LEVEL[target] >= LEVEL[layer]:
            found.append(f"{module}:{line} imports {name}; layer {layer} is not above {target}")
    return found


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def modules() -> list[tuple[str, Path]]:
    """(dotted name, path) of every module of the package but its facade, tessera/__init__.py."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return [(name, path) for name, path in found if name != "tessera"]


def test_every_import_goes_down() -> None:
    found = [breaches(name, path.read_text(), is_package=path.name == "__init__.py") for name, path in modules()]
    assert not list(itertools.chain(*found))


def test_the_walk_sees_the_package() -> None:
    names = {name for name, _ in modules()}
    assert {"tessera.errors", "tessera.ops", "tessera.ops.linear", "tessera.kernel.backends.cpu.lower"} <= names


@pytest.mark.parametrize("module, source", [
    ("tessera.ops.linear", "from tessera.models.gpt import GPTModel"),
    ("tessera.ops.linear", "import tessera.nn.layers"),
    ("tessera.ops.linear", "from tessera import nn"),
    ("tessera.ops.linear", "from ..nn import layers"),
    ("tessera.ops.linear", "def f():\n    from tessera.infer import engine"),
    ("tessera.ops.linear", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tessera.nn"),
    ("tessera.ops.linear", "import importlib\nimportlib.import_module('tessera.cli')"),
    ("tessera.ops.linear", "import tessera as ts"),
    ("tessera.ops.linear", "from tessera import GPTModel"),
    ("tessera.nn.layers", "from tessera.dist import mesh"),
    ("tessera.models.gpt", "from tessera.data import tokenizer"),
    ("tessera.errors", "from tessera import env"),
    ("tessera.formats.gguf", "from tessera import kernel"),
    ("tessera.kernel.launch", "import llvmlite.binding"),
    ("tessera.kernel.launch", "from triton import language"),
    ("tessera.models.load", "import torch.distributed as dist"),
    ("tessera.models.load", "from torch import distributed"),
    ("tessera.models.load", "import torch\nrank = torch.distributed.get_rank()"),
    ("tessera.infer.engine", "from fastapi import FastAPI"),
    ("tessera.infer.engine", "def f():\n    import rich.progress"),
    ("tessera.novel.thing", "import os"),
])
def test_breach_is_found(module: str, source: str) -> None:
    assert len(breaches(module, source)) == 1


@pytest.mark.parametrize("module, source", [
    ("tessera.ops.linear", "import torch, tessera.errors\nfrom tessera.kernel import cache"),
    ("tessera.ops.linear", "from . import norm\nfrom .norm import rms_norm"),
    ("tessera.kernel.backends.cpu.jit", "import llvmlite.binding"),
    ("tessera.kernel.backends.cuda.emit", "import triton"),
    ("tessera.dist.mesh", "import torch.distributed"),
    ("tessera.infer.engine", "from tessera import env, ops"),
    ("tessera.cli.app", "import rich, typer\nfrom tessera import __version__\nfrom tessera.serve import app"),
])
def test_sound_import_passes(module: str, source: str) -> None:
    assert breaches(module, source) == []


def test_relative_import_in_a_package_file() -> None:
    assert imports("tessera.ops", "from . import norm", is_package=True) == [(1, "tessera.ops.norm")]
    assert imports("tessera.ops.linear", "from .norm import rms_norm") == [(1, "tessera.ops.norm.rms_norm")]
