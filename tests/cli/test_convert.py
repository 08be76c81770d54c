"""`tessera convert`: a model survives the way there and back; mistakes are one line."""

from __future__ import annotations

import pytest
import torch

import tessera as ts


def test_folder_to_gguf_and_back(tessera, model_folder, tmp_path):
    assert tessera("convert", model_folder, tmp_path / "m.gguf", "--type", "f32") == (0, "", "")
    assert tessera("convert", tmp_path / "m.gguf", tmp_path / "back", "--type", "f32") == (0, "", "")
    before, after = (ts.load_model(path).state_dict() for path in (model_folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokenizer = ts.load_tokenizer(tmp_path / "back")
    assert tokenizer.encode("héllo") == ts.load_tokenizer(model_folder).encode("héllo")


def test_default_types(tessera, model_folder, tmp_path):
    assert tessera("convert", model_folder, tmp_path / "m.gguf")[0] == 0
    assert '"F16"' in tessera("info", tmp_path / "m.gguf", "--json")[1]
    assert tessera("convert", tmp_path / "m.gguf", tmp_path / "back")[0] == 0
    assert '{"bf16"' in tessera("info", tmp_path / "back", "--json")[1]


@pytest.mark.parametrize("source, target, options, word", [
    ("/nowhere", "m.gguf", [], "nothing at"),
    ("{model}", "folder", [], "ends with .gguf"),
    ("smollm2", "other.gguf", [], "a folder"),
    ("{model}", "m.gguf", ["--type", "q9"], "Q9"),
])
def test_errors(tessera, model_folder, tmp_path, source, target, options, word):
    code, out, err = tessera("convert", source.replace("{model}", str(model_folder)), tmp_path / target, *options)
    assert (code, out) == (2, "")
    assert word in err and err.count("\n") == 1
    assert not (tmp_path / target).exists()
