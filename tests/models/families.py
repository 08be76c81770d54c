"""Tiny random transformers models of each family, and their weights as a GPTModel.

The mapping is written out here, apart from the loaders', so that the two check each other.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import tessera as ts

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "attn_implementation": "eager"}
COMMON = {"n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "d_model": 48, "d_ffn": 80, "max_seq_len": 64,
          "vocab_size": 97, "norm_eps": 1e-6}


def reference(family: str, seed: int, **fields: Any) -> Any:
    """A random transformers model; norms and biases are random too, so that none is tested by accident at 0 or 1."""
    torch.manual_seed(seed)
    prefix = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT2"}[family]
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=97, n_embd=48, n_layer=3, n_head=6, n_positions=64, n_inner=80, attn_implementation="eager",
            bos_token_id=None, eos_token_id=None, **fields)
    else:
        extra = {"head_dim": 12} if family == "qwen3" else {}
        extra = {"sliding_window": 7} if family == "mistral" else extra
        config = getattr(transformers, f"{prefix}Config")(**{
            **SIZES, "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None, **extra, **fields})
    name = "GPT2LMHeadModel" if family == "gpt2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"attn_qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "gpt2": {"n_kv_heads": 6, "norm": "layernorm", "norm_eps": 1e-5, "activation": "gelu_tanh", "use_gated_mlp": False,
             "use_rotary_embeddings": False, "attn_qkv_bias": True, "attn_out_bias": True, "mlp_bias": True,
             "tie_embeddings": True},
}


def config(family: str, **fields: Any) -> ts.GPTConfig:
    """The GPTConfig of `reference(family)`."""
    return ts.GPTConfig(**{**COMMON, **FIELDS[family], "family": family, **fields})


def state(model: Any, family: str) -> dict[str, Tensor]:
    """The weights of a transformers model under GPTModel's names."""
    weights = model.state_dict()
    return _gpt2_state(weights) if family == "gpt2" else {
        _llama_name(name): weight for name, weight in weights.items() if "rotary" not in name}


def _llama_name(name: str) -> str:
    for theirs, ours in (("model.layers.", "blocks."), ("self_attn.", "attn."), ("input_layernorm", "attn_norm"),
                         ("post_attention_layernorm", "mlp_norm"), ("model.embed_tokens", "embed"),
                         ("model.norm", "final_norm")):
        name = name.replace(theirs, ours)
    return name


def _gpt2_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {"embed.weight": weights["transformer.wte.weight"], "pos_embed.weight": weights["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = weights[f"transformer.ln_f.{kind}"]
        for i in range(3):
            theirs, block = f"transformer.h.{i}.", f"blocks.{i}."
            ours[f"{block}attn_norm.{kind}"] = weights[f"{theirs}ln_1.{kind}"]
            ours[f"{block}mlp_norm.{kind}"] = weights[f"{theirs}ln_2.{kind}"]
            for piece, projection in zip(weights[f"{theirs}attn.c_attn.{kind}"].chunk(3, -1), "qkv"):
                ours[f"{block}attn.{projection}_proj.{kind}"] = piece.mT if kind == "weight" else piece
            for conv, name in (("attn.c_proj", "attn.o_proj"), ("mlp.c_fc", "mlp.up_proj"),
                               ("mlp.c_proj", "mlp.down_proj")):
                piece = weights[f"{theirs}{conv}.{kind}"]
                ours[f"{block}{name}.{kind}"] = piece.mT if kind == "weight" else piece
    return ours


def pair(family: str, seed: int, ours: dict[str, Any] | None = None, **theirs: Any) -> tuple[Any, ts.GPTModel]:
    """(transformers model, GPTModel) with the same random weights, both in eval mode, f32."""
    expected = reference(family, seed, **theirs)
    model = ts.GPTModel(config(family, **(ours or {}))).eval()
    model.load_state_dict(state(expected, family))
    return expected, model


def padded_batch(seed: int, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask) of random tokens in rows of the given lengths, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(0, 97, (len(lengths), width), generator=generator)
    place = torch.arange(width)
    length = torch.tensor(lengths)[:, None]
    mask = place < length if side == "right" else place >= width - length
    return ids, mask.long()
