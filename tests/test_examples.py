"""Every numbered example runs and prints what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SHOWN = {
    "01_generate.py": ["' Paris", "(ended by length)", " four, five, six"],
    "02_chat_template.py": ["<|im_start|>user\nWhat color is the sky?<|im_end|>", "The sky is a deep shade of"],
    "03_load_and_save.py": ["equal logits: True", "as bf16: torch.bfloat16"],
    "04_sampling.py": ["top_p=0.9, seed=1", "same seed, same text: True"],
    "05_kernel.py": ["largest error: below 1e-5", "kernel rms_norm(", "x has D=1003 but weight has D=1002"],
    "06_function.py": ["down has F=8 (axis 0 of [8, 32]) but up has F=32", "same gradients: True", "torch.bfloat16",
                       "wrong.py:7:12: error: ", "note: k is f32[B, T, D]", "exit code 1"],
}


def test_every_example_is_listed() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("[0-9]*.py")) == sorted(SHOWN)


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    assert [text for text in SHOWN[name] if text not in out] == [], out
