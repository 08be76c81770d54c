"""docs/language.md: every example runs on the interpreter and on the CPU backend, prints what it says, and its tables
are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tessera.errors import TesseraError
from tessera.kernel.lang import table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "language.md"
NOT_ON_INTERP = "<!-- not on interp -->\n"
BLOCK = re.compile(rf"({NOT_ON_INTERP})?```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


@pytest.fixture
def one_thread():
    """The programs of a grid print in their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["interp", "cpu"])
def test_examples(backend, one_thread, tmp_path, monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TESSERA_BACKEND", backend)
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = BLOCK.findall(DOCUMENT.read_text())
    assert len(blocks) == DOCUMENT.read_text().count("```python")
    space: dict[str, object] = {"__name__": "example"}
    for position, (not_on_interp, code, shown) in enumerate(blocks):
        path = tmp_path / str(position) / "example.py"  # each has lines of its own, which messages quote
        path.parent.mkdir()
        path.write_text(code)
        refused = _run(code, path, space)
        printed = (capfd.readouterr().out + refused).replace(f"{path.parent}/", "")
        if not_on_interp and backend == "interp":
            assert printed.startswith("UnsupportedError: "), printed
        else:
            assert printed == shown


def _run(code: str, path: Path, space: dict[str, object]) -> str:
    try:
        exec(compile(code, str(path), "exec"), space)
    except TesseraError as error:
        return f"{type(error).__name__}: {error}\n"
    return ""


def test_tables() -> None:
    page = DOCUMENT.read_text()
    assert table.fill(page) == page, "run `make docs`"
    modules = ["memory", "elementwise", "shapes", "reductions", "program", "library"]
    assert re.findall(r"<!-- builtins: (\w+) -->", page) == modules
    tables = "".join(map(table.table, modules))
    assert [name for name in table.lang.__all__ if not re.search(rf"`{name}[(`]", tables)] == ["warp"]
