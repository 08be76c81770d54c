"""Configurations that plans are often asked for, by name.

In: nothing. Out: GPTConfigs. Called by plan.published and the command line.
"""

from __future__ import annotations

from tessera.errors import InputError
from tessera.models.config import GPTConfig

_BF16 = "bf16 @accum(fp32)"


def gpt_120b(*, n_kv_heads: int = 8, **changes: object) -> GPTConfig:
    """The documents' "GPT-OSS-120B".

    With its gated d_ffn of 49152 it has 206.6e9 parameters (exact: `n_params`), not 120e9; the name is kept.

    Args:
        n_kv_heads: 8 in the training example, 96 in the overview.
        **changes: other fields of GPTConfig.
    """
    fields: dict = {
        "n_layers": 96, "n_heads": 96, "n_kv_heads": n_kv_heads, "d_model": 12288, "d_ffn": 49152,
        "max_seq_len": 8192, "vocab_size": 50257, "use_parallel_attention": True,
        "weight_dtype": "fp8_e4m3 @accum(fp32)", "compute_dtype": _BF16, "kv_cache_dtype": "fp8_e5m2"}
    return GPTConfig(**{**fields, **changes})


def megatron_gpt(*, n_layers: int, d_model: int, n_heads: int) -> GPTConfig:
    """A GPT as Megatron-LM's papers train it: 4 d neurons, all biases, attention in separate steps, 2048 tokens."""
    return GPTConfig(
        n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_ffn=4 * d_model, max_seq_len=2048, vocab_size=51200,
        use_gated_mlp=False, activation="gelu", norm="layernorm", attn_qkv_bias=True, attn_out_bias=True,
        mlp_bias=True, tie_embeddings=True, use_rotary_embeddings=False, use_flash_attention=False,
        weight_dtype=_BF16, compute_dtype=_BF16)


def llama3(*, n_layers: int, d_model: int, n_heads: int, d_ffn: int) -> GPTConfig:
    """A Llama 3 with sequences of 8192 tokens."""
    return GPTConfig(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=8, d_model=d_model, d_ffn=d_ffn, max_seq_len=8192,
        vocab_size=128256, rope_theta=500000.0, weight_dtype=_BF16, compute_dtype=_BF16, family="llama")


MODELS = {
    "gpt-120b": gpt_120b,
    "gpt-175b": lambda: megatron_gpt(n_layers=96, d_model=12288, n_heads=96),
    "llama3-8b": lambda: llama3(n_layers=32, d_model=4096, n_heads=32, d_ffn=14336),
    "llama3-70b": lambda: llama3(n_layers=80, d_model=8192, n_heads=64, d_ffn=28672),
    "llama3-405b": lambda: llama3(n_layers=126, d_model=16384, n_heads=128, d_ffn=53248),
}


def model_named(name: str) -> GPTConfig:
    """A preset.

    Raises:
        InputError: there is no such preset.
    """
    if name not in MODELS:
        raise InputError(f"model: {name!r} given; expected one of {', '.join(MODELS)}")
    return MODELS[name]()
