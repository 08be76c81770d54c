"""The tensor-parallel examples: attention, a block, a whole model."""

import runpy
from pathlib import Path

import pytest

import tessera as ts

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["tp_attention", "tp_transformer_block"])
def test_ranks_agree_with_one_device(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # Imported by name, as ranks import it.
    __import__(name).main()
    out = capsys.readouterr().out
    assert out.count("equal to one device: True") == 4 and "False" not in out


def test_the_whole_model_runs_on_one_rank_without_a_launcher(tmp_path, capsys, byte_model):
    runpy.run_path(str(EXAMPLES / "tp_full_model.py"))["main"](str(byte_model))
    assert "Mesh(tp=1): rank 0 holds 100% of the weights" in capsys.readouterr().out


@pytest.fixture
def byte_model(tmp_path):
    """A tiny random model with a byte-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    from tessera.data.tokenizer import Tokenizer

    vocabulary = {token: i for i, token in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    model = ts.GPTModel(ts.GPTConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ffn=48, max_seq_len=512,
                                     vocab_size=256, family="llama"))
    ts.save_model(model, tmp_path / "tiny", tokenizer=Tokenizer(backend, {}))
    return tmp_path / "tiny"
