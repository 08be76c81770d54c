"""`tessera plan` prints what tessera.plan finds."""

from __future__ import annotations

import json

import pytest

import tessera as ts
from tessera.plan import choose_mesh, gpt_120b


def test_json_is_the_search(tessera):
    code, out, _ = tessera("plan", "--json", "--top", 2)
    told = json.loads(out)
    layout = told["plans"][0]["layout"]
    assert code == 0 and told["parameters"] == gpt_120b().n_params and len(told["plans"]) == 2
    assert (layout["pp"], layout["dp"], layout["tp"]) == choose_mesh(gpt_120b())[1]
    assert told["plans"][0]["memory_bytes"]["total"] <= told["machine"]["memory_bytes"]
    assert told["plans"][0]["seconds"]["total"] <= told["plans"][1]["seconds"]["total"]
    assert "inter_latency" in told["machine"]["assumed"]


def test_table(tessera):
    code, out, _ = tessera("plan", "llama3-70b", "--machine", "h100", "-d", 64, "--batch", 128, "--tp", 4, "--pp", 8)
    assert code == 0
    assert "70.6e9 parameters on 64 x h100" in out and "tp=4: every layer" in out and "Assumed" in out
    assert max(map(len, out.splitlines())) < 400


def test_inference(tessera):
    code, out, _ = tessera("plan", "llama3-8b", "--machine", "h200", "-d", 8, "--inference", "--batch", 16, "--json")
    told = json.loads(out)["plans"][0]
    assert code == 0 and told["run"]["batch"] == 16 and told["bound"] == "weights"
    assert told["seconds"]["per_token"] > told["seconds"]["weights"] + told["seconds"]["kv_cache"]


def test_models_from_files(tessera, model_folder, tmp_path):
    config = ts.GPTConfig(n_layers=2, n_heads=2, d_model=32, d_ffn=64, max_seq_len=64, vocab_size=50)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    wanted = ("--machine", "a100", "-d", 2, "--batch", 4, "--json")
    assert json.loads(tessera("plan", tmp_path / "config.json", *wanted)[1])["parameters"] == config.n_params
    model = ts.load_model(model_folder)
    assert json.loads(tessera("plan", model_folder, *wanted)[1])["parameters"] == model.config.n_params


def test_check(tessera):
    code, out, _ = tessera("plan", "--check")
    assert code == 0
    assert out.count("held out") >= 17 and out.count("fitted") >= 10 and "median error, held-out rows" in out
    told = json.loads(tessera("plan", "--check", "--json")[1])
    assert len(told["times"]) == 27 and len(told["sizes_GiB"]) == 12


@pytest.mark.parametrize("arguments, word", [
    (["nothing"], "'nothing' given; expected gpt-120b"), (["--machine", "abacus"], "machine: 'abacus'"),
    (["-d", "0"], "devices: 0"), (["--tp", "5"], "tp: 5"), (["--top", "0"], "--top"),
    (["--batch", "0"], "global_batch: 0"),
    (["gpt-175b", "--machine", "h100", "-d", "8"], "none of the layouts fits"), (["--devices", "x"], "--devices"),
    (["--inference", "--seq-len", "9000"], "at most 8192"),
])
def test_errors(tessera, arguments, word):
    code, out, err = tessera("plan", *arguments)
    assert (code, out) == (2, "")
    assert word in err and err.count("\n") == 1
