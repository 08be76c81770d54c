"""docs/functions.md: every example runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tessera.errors import TesseraError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "functions.md"


def test_examples(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "example"}
    for code, shown in blocks:
        Path("example.py").write_text(code)
        try:
            exec(compile(code, "example.py", "exec"), space)
        except TesseraError as error:
            print(f"{type(error).__name__}: {error}")
        assert capsys.readouterr().out == shown
