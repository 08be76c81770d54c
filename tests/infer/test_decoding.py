"""Recorded decode steps against the model called step by step."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera import ops
from tessera.infer.decoding import Decoder, Step

SHAPE = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "d_ffn": 48, "max_seq_len": 400, "vocab_size": 50}
FAMILIES = {
    "llama": {}, "window": {"sliding_window": 7}, "qk norm and biases": {"qk_norm": True, "attn_qkv_bias": True},
    "partial rotation": {"rope_fraction": 0.5}, "parallel": {"use_parallel_attention": True},
    "post norm": {"norm_placement": "post"}, "softcaps": {"attn_softcap": 5.0, "logit_softcap": 3.0},
    "gpt2": {"norm": "layernorm", "activation": "gelu_tanh", "use_gated_mlp": False, "use_rotary_embeddings": False,
             "attn_qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    "bf16": {"compute_dtype": "bf16", "weight_dtype": "bf16"}, "fp8 weights": {"weight_dtype": "fp8_e4m3"},
}


def model_of(seed=0, **fields):
    torch.manual_seed(seed)
    return ts.GPTModel(ts.GPTConfig(**{**SHAPE, **fields})).eval()


def tokens(seed, *shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def both(model, ids, mask=None):
    """(recorded steps, plain steps), each on a cache that holds the prompt."""
    caches = [model.new_cache(len(ids)) for _ in range(2)]
    for cache in caches:
        model(ids, attention_mask=mask, kv_cache=cache)
    decoder = Decoder(model)
    return decoder, decoder.begin(caches[0]), Step(model, caches[1], None)


def agree(model, recorded, plain, n_rows, n_steps, seed=5):
    tolerance = 1e-5 if model.config.compute.name == "f32" else 0.05
    for step in range(n_steps):
        token = tokens(seed + step, n_rows)
        torch.testing.assert_close(recorded(token), plain(token), rtol=tolerance, atol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_are_recorded(name):
    model = model_of(1, **FAMILIES[name])
    decoder, recorded, plain = both(model, tokens(2, 2, 9))
    agree(model, recorded, plain, 2, 4)
    assert decoder.refusal is None and len(decoder._step.buckets) == 1


@torch.inference_mode()
def test_padded_rows():
    model = model_of(3)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]])
    decoder, recorded, plain = both(model, tokens(4, 3, 9), mask)
    agree(model, recorded, plain, 3, 3)
    assert decoder.refusal is None


@torch.inference_mode()
def test_past_the_capacity_and_with_other_caches():
    model = model_of(5)
    decoder, recorded, plain = both(model, tokens(6, 1, 60))
    agree(model, recorded, plain, 1, 10)  # 64 places, then 128
    assert len(decoder._step.buckets) == 2
    other = model.new_cache(1)
    model(tokens(7, 1, 3), kv_cache=other)
    again = model.new_cache(1)
    model(tokens(7, 1, 3), kv_cache=again)
    agree(model, decoder.begin(other), Step(model, again, None), 1, 2)
    assert len(decoder._step.buckets) == 2  # the recording of 64 places serves the other cache


@torch.inference_mode()
def test_new_parameters_are_seen():
    model = model_of(8)
    decoder, recorded, plain = both(model, tokens(9, 1, 5))
    agree(model, recorded, plain, 1, 1)
    model.lm_head.weight.mul_(2)
    agree(model, recorded, plain, 1, 1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    caches = [model.new_cache(1) for _ in range(2)]
    for cache in caches:
        model(tokens(9, 1, 5), kv_cache=cache)
    agree(model, decoder.begin(caches[0]), Step(model, caches[1], None), 1, 2)


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_as_it_is():
    """A factor on the embedding is torch's; so is a cache in fp8; the deterministic mode has operations of its own."""
    model = model_of(10, embed_scale=3.0)
    decoder, recorded, plain = both(model, tokens(11, 1, 5))
    agree(model, recorded, plain, 1, 3)
    assert "is an operation of torch" in decoder.refusal
    model = model_of(12, kv_cache_dtype="fp8_e4m3")
    decoder, recorded, plain = both(model, tokens(13, 1, 5))
    agree(model, recorded, plain, 1, 3)
    with ts.dist.deterministic():
        assert decoder.begin(model.new_cache(1))._decoder is None
    with ops.implementation("reference"):
        assert decoder.begin(model.new_cache(1))._decoder is None


def test_generation_is_the_same_with_and_without():
    model = model_of(14)
    ids = tokens(15, 3, 6)
    engine = ts.GPTInference(model)
    recorded = engine.generate(ids, 20, do_sample=True, temperature=0.8, seed=3, eos_token_id=())
    assert engine._decoder.refusal is None and engine._decoder._step.buckets
    with ops.implementation("reference"):
        assert torch.equal(engine.generate(ids, 20, do_sample=True, temperature=0.8, seed=3, eos_token_id=()), recorded)
