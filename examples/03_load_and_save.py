"""Build a small model, save it as a Hugging Face folder, load it again: the logits are the same bits."""

import tempfile

import torch

import tessera as ts

config = ts.GPTConfig(
    n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_ffn=128, max_seq_len=128, vocab_size=1000, family="llama")
model = ts.GPTModel(config).eval()
print(f"{config.n_params:,} parameters")

ids = torch.randint(config.vocab_size, (2, 9))
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    ts.save_model(model, f"{folder}/tiny")  # transformers' AutoModelForCausalLM reads it too
    again = ts.load_model(f"{folder}/tiny", dtype="f32")
    print("equal logits:", torch.equal(model(ids)["logits"], again(ids)["logits"]))

    half = ts.load_model(f"{folder}/tiny", dtype="bf16")
    print("as bf16:", half(ids)["logits"].dtype)
