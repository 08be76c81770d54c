"""A tiny random model with a byte-level tokenizer and a chat template, as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import tessera as ts
from tessera.cli import main
from tessera.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer() -> Tokenizer:
    """256 single-byte tokens, "th", then SPECIAL."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, {"eos": "<|end|>"}, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a context of 128 tokens."""
    config = ts.GPTConfig(
        n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ffn=48, max_seq_len=128, vocab_size=261, family="llama",
        eos_token_id=257)
    model = ts.GPTModel(config)
    model.init_weights(seed=11)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ts.save_model(model, folder, tokenizer=byte_tokenizer())
    return folder


@pytest.fixture
def tessera(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`tessera("info", path)` -> (exit code, stdout, stderr) of the command line, run in this process."""
    monkeypatch.setenv("TESSERA_DEBUG", "0")  # --debug sets it; this puts it back

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
