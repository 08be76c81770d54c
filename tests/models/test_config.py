"""GPTConfig: what it refuses, what it derives, and that every field does something."""

import dataclasses
import json

import pytest
import torch

import tessera as ts
from tessera.errors import InputError, UnsupportedError

BASE = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "d_ffn": 40, "max_seq_len": 24, "vocab_size": 31}
DOCUMENTED_120B = {
    "n_layers": 96, "n_heads": 96, "n_kv_heads": 8, "d_model": 12288, "d_ffn": 49152, "max_seq_len": 8192,
    "vocab_size": 50257, "use_flash_attention": True, "use_rotary_embeddings": True, "use_parallel_attention": True,
    "use_gated_mlp": True, "gradient_checkpointing": True, "tp_size": 9, "pp_size": 2, "dp_size": 4,
    "weight_dtype": "fp8_e4m3 @accum(fp32)", "compute_dtype": "bf16 @accum(fp32)", "kv_cache_dtype": "fp8_e5m2"}


def config(**fields):
    return ts.GPTConfig(**{**BASE, **fields})


def test_documented_120b_is_planned_on_meta():
    with torch.device("meta"):
        model = ts.GPTModel(ts.GPTConfig(**DOCUMENTED_120B))
    M, F, V, L = 12288, 49152, 50257, 96
    closed = L * (2 * M * M + 2 * M * 8 * 128 + 3 * M * F + M) + M + 2 * V * M
    assert sum(parameter.numel() for parameter in model.parameters()) == closed == model.config.n_params
    assert model.config.d_head == 128
    assert model.blocks[95].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    assert model.embed.weight.dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"mesh: None given; tp_size=9, pp_size=2, dp_size=4 need a mesh of 72"):
        ts.GPTModel(model.config)


VARIANTS = [
    {}, {"tie_embeddings": True}, {"use_rotary_embeddings": False}, {"use_gated_mlp": False, "mlp_bias": True},
    {"attn_qkv_bias": True, "mlp_bias": True}, {"attn_out_bias": True, "norm": "layernorm"},
    {"qk_norm": True, "head_dim": 6},
    {"use_parallel_attention": True}, {"norm_placement": "post"}, {"weight_dtype": "int8"}, {"n_kv_heads": None},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_n_params_is_exact(fields):
    model = ts.GPTModel(config(**fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.n_params


@pytest.mark.parametrize("fields, message", [
    ({"n_layers": 0}, r"n_layers: 0 given; expected 1\.\.10000"),
    ({"n_layers": 10**9}, r"n_layers: 1000000000 given; expected 1\.\.10000"),
    ({"rope_theta": 1.0}, "rope_theta: 1.0 given; expected a number above 1"),
    ({"n_kv_heads": 3}, "n_kv_heads: 3 given; expected a divisor of n_heads = 4"),
    ({"d_model": 30}, "d_model: 30 given; expected a multiple of n_heads = 4"),
    ({"d_model": 32.0}, "d_model: 32.0 given; expected int"),
    ({"d_model": True}, "d_model: True given; expected int"),
    ({"use_gated_mlp": 1}, "use_gated_mlp: 1 given; expected bool"),
    ({"norm_eps": float("nan")}, "norm_eps: nan given"),
    ({"norm_eps": 0.0}, "norm_eps: 0.0 given; expected a number above 0"),
    ({"activation": "swish9"}, "activation: 'swish9' given; expected one of silu"),
    ({"norm": "batchnorm"}, "norm: 'batchnorm' given; expected one of rmsnorm, layernorm"),
    ({"norm_placement": "middle"}, "norm_placement: 'middle' given"),
    ({"norm_placement": "post", "use_parallel_attention": True}, "norm_placement: 'post' given with use_parallel"),
    ({"head_dim": 5}, "rope_fraction: 1.0 of d_head = 5 is 5 dims; expected an even number"),
    ({"rope_fraction": 1.5}, r"rope_fraction: 1.5 given; expected a number in \(0, 1\]"),
    ({"use_rotary_embeddings": False, "rope_theta": 5e5}, "rope_theta: given with use_rotary_embeddings=False"),
    ({"sliding_window_layers": (0,)}, "sliding_window_layers: given without sliding_window"),
    ({"sliding_window": 4, "sliding_window_layers": (2,)}, r"sliding_window_layers: 2 given; expected layers 0\.\.1"),
    ({"eos_token_id": (1, 31)}, r"eos_token_id: 31 given; expected 0\.\.vocab_size - 1 = 30"),
    ({"bos_token_id": -1}, "bos_token_id: -1 given"),
    ({"n_kv_heads": 4, "use_kv_cache_compression": True}, "use_kv_cache_compression: True.*n_kv_heads < n_heads = 4"),
    ({"weight_dtype": "bf16 @sum(fp32)"}, 'dtype: \'bf16 @sum.* expected "dtype" or "dtype @accum'),
    ({"family": ""}, "family: '' given"),
])
def test_refused(fields, message):
    with pytest.raises(InputError, match=message):
        config(**fields)


@pytest.mark.parametrize("fields, message", [
    ({"weight_dtype": "int4"}, "weight_dtype: int4 given; supported: f32"),
    ({"weight_dtype": "bf16 @accum(bf16)"}, "weight_dtype: sums in bf16 given; supported: f32"),
    ({"compute_dtype": "fp8_e4m3"}, "compute_dtype: fp8_e4m3 given; supported: f32, bf16, f16"),
    ({"kv_cache_dtype": "int8"}, "kv_cache_dtype: int8 given; supported"),
])
def test_unsupported(fields, message):
    with pytest.raises(UnsupportedError, match=message):
        config(**fields)


@pytest.mark.parametrize("fields, message", [
    ({"kind": "ntk"}, "rope_scaling.kind: 'ntk' given; expected one of linear, dynamic, llama3, yarn"),
    ({"kind": "linear", "factor": "8"}, "rope_scaling.factor: '8' given; expected a number above 0"),
    ({"kind": "yarn", "original_max_seq_len": 8, "mscale": float("nan")}, "rope_scaling.mscale: nan given"),
    ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor: 0.5 given; expected a number >= 1"),
    ({"kind": "yarn", "factor": 2.0}, "rope_scaling.original_max_seq_len: None given; kind 'yarn' needs"),
    ({"kind": "llama3", "original_max_seq_len": 8, "high_freq_factor": 1.0}, "high_freq_factor: 1.0 given"),
    ({"kind": "yarn", "original_max_seq_len": 8, "beta_fast": 0.5}, "rope_scaling.beta_fast: 0.5 given"),
])
def test_rope_scaling_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ts.RopeScaling(**fields)
    with pytest.raises(UnsupportedError, match="longrope"):
        ts.RopeScaling(kind="longrope")


def test_dict_roundtrip_through_json():
    original = config(
        sliding_window=5, sliding_window_layers=(1,), eos_token_id=(3, 4),
        rope_scaling=ts.RopeScaling(kind="yarn", factor=2.0, original_max_seq_len=12))
    assert ts.GPTConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_from_dict_names_the_keys():
    with pytest.raises(InputError, match=r"GPTConfig: unknown d_modell, n_layer; known are n_layers, "):
        ts.GPTConfig.from_dict({**BASE, "n_layer": 3, "d_modell": 2})
    with pytest.raises(InputError, match="GPTConfig: d_ffn missing; needed are n_layers"):
        ts.GPTConfig.from_dict({key: value for key, value in BASE.items() if key != "d_ffn"})
    with pytest.raises(InputError, match="GPTConfig: list given; expected a dict"):
        ts.GPTConfig.from_dict([1])
    with pytest.raises(InputError, match="rope_scaling: unknown type; known are kind"):
        ts.GPTConfig.from_dict({**BASE, "rope_scaling": {"kind": "linear", "type": "linear"}})


# How each field shows: "logits" (a changed value changes them), "shape" (of a parameter or of the logits), or the
# name of the test that demands its effect.
YARN = ts.RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=6)
EFFECTS = {
    "n_layers": ("shape", 3), "n_heads": ("shape", 8), "n_kv_heads": ("shape", 4), "head_dim": ("shape", 12),
    "d_model": ("shape", 48), "d_ffn": ("shape", 44), "vocab_size": ("shape", 33), "use_gated_mlp": ("shape", False),
    "use_parallel_attention": ("shape", True), "use_rotary_embeddings": ("shape", False), "mlp_bias": ("shape", True),
    "attn_qkv_bias": ("shape", True), "attn_out_bias": ("shape", True), "qk_norm": ("shape", True),
    "norm": ("shape", "layernorm"), "tie_embeddings": ("shape", True), "weight_dtype": ("shape", "fp8_e4m3"),
    "compute_dtype": ("shape", "bf16 @accum(fp32)"),
    "activation": ("logits", "gelu"), "norm_eps": ("logits", 0.1), "norm_placement": ("logits", "post"),
    "attn_scale": ("logits", 3.0), "attn_softcap": ("logits", 0.01), "logit_softcap": ("logits", 0.5),
    "sliding_window": ("logits", 3), "embed_scale": ("logits", 5.0), "rope_theta": ("logits", 10.0),
    "rope_scaling": ("logits", YARN), "rope_fraction": ("logits", 0.5),
    "max_seq_len": "test_gpt.test_too_long", "sliding_window_layers": "test_gpt.test_window_on_some_layers",
    "use_flash_attention": "test_gpt.test_flash_is_a_path", "gradient_checkpointing": "test_gpt.test_checkpointing",
    "tp_size": "test_documented_120b_is_planned_on_meta", "pp_size": "test_documented_120b_is_planned_on_meta",
    "dp_size": "test_documented_120b_is_planned_on_meta", "kv_cache_dtype": "test_gpt.test_cache_follows_the_config",
    "use_kv_cache_compression": "test_gpt.test_cache_follows_the_config",
    "bos_token_id": "test_refused", "eos_token_id": "test_refused", "pad_token_id": "test_pad_token_is_checked",
    "family": "test_refused",
}


def test_every_field_has_an_effect_listed():
    assert set(EFFECTS) == {field.name for field in dataclasses.fields(ts.GPTConfig)}
    from . import test_gpt
    for name in (effect for effect in EFFECTS.values() if isinstance(effect, str)):
        assert hasattr(test_gpt, name[9:]) if name.startswith("test_gpt.") else name in globals(), name


@pytest.mark.parametrize("field", [name for name, effect in EFFECTS.items() if isinstance(effect, tuple)])
def test_field_has_its_effect(field):
    """With equal weights the logits differ; or the parameters' names, shapes and types, or the logits' own, do."""
    kind, value = EFFECTS[field]
    torch.manual_seed(0)
    plain, changed = ts.GPTModel(config()), ts.GPTModel(config(**{field: value}))
    ids = torch.arange(9)[None]

    def form(model):
        logits = model(ids)["logits"]
        return {name: (p.shape, p.dtype) for name, p in model.named_parameters()}, logits.shape, logits.dtype

    if kind == "shape":
        assert form(plain) != form(changed)
        return
    weights = {name: torch.randn_like(p) * 0.3 for name, p in plain.state_dict().items()}
    plain.load_state_dict(weights), changed.load_state_dict(weights)
    difference = (plain(ids)["logits"] - changed(ids)["logits"]).abs().max()
    assert difference > 1e-3


def test_pad_token_is_checked():
    with pytest.raises(InputError, match="pad_token_id: 99 given"):
        config(pad_token_id=99)
