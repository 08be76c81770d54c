"""`tessera info` and `tessera env` tell what the files and the environment hold."""

from __future__ import annotations

import json

import pytest
import torch

import tessera as ts
from tessera import env
from tessera.formats.gguf import GGUFFile


@pytest.mark.parametrize("batch, context", [(1, 128), (3, 77)])
def test_folder(tessera, model_folder, batch, context):
    code, out, _ = tessera("info", model_folder, "--json", "--batch", batch, "--context", context)
    told, model = json.loads(out), ts.load_model(model_folder)
    assert code == 0
    assert told["architecture"] == "llama" and told["format"] == "safetensors"
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    assert told["tensors"] == len(list(model.parameters()))
    assert told["bytes"] == told["bytes_by_dtype"]["f32"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", ["f32", "bf16", "fp8_e4m3"])
def test_cache_bytes_are_those_of_a_cache(tessera, model_folder, dtype):
    told = json.loads(tessera("info", model_folder, "--json", "--batch", 2, "--context", 128)[1])
    cache = ts.KVCache(2, 128, n_layers=2, n_kv_heads=2, d_head=8, dtype=dtype)
    for layer in range(2):
        cache.update(layer, torch.zeros(2, 2, 128, 8), torch.zeros(2, 2, 128, 8))
    assert told["kv_cache_bytes"][dtype] == cache.nbytes


def test_smollm2_without_its_weights(tessera, monkeypatch):
    monkeypatch.setattr(GGUFFile, "tensor", lambda *args, **kwargs: pytest.fail("weights were read"))
    code, out, _ = tessera("info", "smollm2", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["format"] == "gguf" and told["architecture"] == "llama" and told["tensors"] == 272
    assert told["parameters"] == 134_515_008  # SmolLM2-135M, its embeddings counted once
    assert sum(told["bytes_by_dtype"].values()) == told["bytes"]


def test_table(tessera, model_folder):
    out = tessera("info", model_folder)[1]
    assert "architecture     llama" in out and "batch 1, 128 tokens" in out


@pytest.mark.parametrize("arguments, word", [
    (["/nowhere"], "nothing at"), (["{model}", "--context", "0"], "--context"), ([], "PATH"),
    (["{model}", "--batch", "0"], "--batch"), (["{model}", "--context", "129"], "at most 128"),
])
def test_errors(tessera, model_folder, arguments, word):
    code, out, err = tessera("info", *[a.replace("{model}", str(model_folder)) for a in arguments])
    assert (code, out) == (2, "")
    assert word.lower() in err.lower() and err.count("\n") == 1


def test_environment(tessera, monkeypatch):
    monkeypatch.setenv("TESSERA_DUMP", "llvm")
    told = json.loads(tessera("env", "--json")[1])
    assert told.keys() == env.VARIABLES.keys() and told["TESSERA_DUMP"] == "llvm"
    assert "TESSERA_CACHE_DIR" in tessera("env")[1]


def test_unreadable_environment(tessera, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE_MB", "lots")
    code, _, err = tessera("env")
    assert code == 2 and "TESSERA_CACHE_MB='lots'" in err
