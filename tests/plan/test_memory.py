"""What a rank holds: against real models, the deal of models.gpt_plan, closed forms, and laws."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tessera as ts
from tessera.errors import InputError
from tessera.models.gpt_plan import share
from tessera.plan import InferenceRun, Layout, TrainingRun, machine_named, training_memory
from tessera.plan.layout import Share, stage_params
from tessera.plan.memory import (
    inference_memory,
    kv_cache_bytes,
    layer_activation_bytes,
    optimizer_bytes,
    pieces_in_flight,
    weight_bytes,
)
from tessera.plan.presets import MODELS, gpt_120b, megatron_gpt, model_named

H100 = machine_named("h100")


def small(**changes) -> ts.GPTConfig:
    fields = {"n_layers": 4, "n_heads": 6, "n_kv_heads": 3, "d_model": 48, "d_ffn": 80, "max_seq_len": 64,
              "vocab_size": 101}
    return ts.GPTConfig(**{**fields, **changes})


VARIANTS = [
    small(), small(tie_embeddings=True), small(use_gated_mlp=False, norm="layernorm", mlp_bias=True),
    small(attn_qkv_bias=True, attn_out_bias=True, qk_norm=True), small(use_parallel_attention=True, n_kv_heads=6),
    small(use_rotary_embeddings=False, head_dim=10),
]


@pytest.mark.parametrize("config", [*VARIANTS, *map(model_named, MODELS)])
def test_one_rank_holds_every_parameter(config):
    assert stage_params(config, Layout(), 0) == config.n_params


@pytest.mark.parametrize("weight", ["f32", "bf16", "fp8_e4m3", "int8"])
@pytest.mark.parametrize("config", VARIANTS)
def test_weight_bytes_are_those_of_a_model(config, weight):
    config = dataclasses.replace(config, weight_dtype=weight, compute_dtype="bf16")
    model = ts.GPTModel(config)
    stored = [*model.parameters(), *(b for name, b in model.named_buffers() if "scale" in name or "weight" in name)]
    assert weight_bytes(config, Layout(), 0) == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "fp8_e5m2"])
def test_cache_bytes_are_those_of_a_cache(dtype):
    config = small(kv_cache_dtype=dtype)
    cache = ts.KVCache(3, 64, n_layers=4, n_kv_heads=3, d_head=8, dtype=dtype)
    for layer in range(4):
        cache.update(layer, torch.zeros(3, 3, 64, 8), torch.zeros(3, 3, 64, 8))
    assert kv_cache_bytes(config, Layout(), rows=3, context=64) == cache.nbytes


@pytest.mark.parametrize("heads, kv_heads", [(96, 8), (24, 24), (9, 3), (12, 1), (64, 8)])
def test_busiest_rank_is_the_one_that_is_dealt_most(heads, kv_heads):
    config = small(n_heads=heads, n_kv_heads=kv_heads, d_model=8 * heads, d_ffn=200, vocab_size=1003)
    for tp in {1, 2, 3, 4, 5, 7, 8, 9, heads // 3, heads}:
        dealt, expected = Share.of(config, tp), [share(config, tp, rank) for rank in range(tp)]
        assert dealt.heads == max(part.heads.size for part in expected), tp
        assert dealt.kv_heads == max(part.kv_heads.size for part in expected), tp
        assert dealt.vocab == max(part.vocab.size for part in expected), tp


@given(s=st.integers(1, 4096), b=st.integers(1, 16), heads=st.sampled_from([8, 16, 64]),
       d_head=st.sampled_from([32, 128]), t=st.sampled_from([1, 2, 4, 8]))
def test_activations_of_a_layer_are_the_closed_forms(s, b, heads, d_head, t):
    """Table 2 of arXiv:2205.05198."""
    h = heads * d_head
    config = dataclasses.replace(megatron_gpt(n_layers=2, d_model=h, n_heads=heads), max_seq_len=4096)

    def kept(recompute: str, *, cut: bool) -> float:
        run = TrainingRun(global_batch=b, micro_batch=b, seq_len=s, dropout=True, recompute=recompute)
        return layer_activation_bytes(config, Layout(tp=t, sequence_parallel=cut), run)

    sbh, scores = s * b * h, 5 * heads * s / h
    assert kept("none", cut=False) == pytest.approx(sbh * (10 + 24 / t + scores / t))
    assert kept("none", cut=True) == pytest.approx(sbh / t * (34 + scores))
    assert kept("selective", cut=True) == pytest.approx(34 * sbh / t)
    assert kept("full", cut=False) == 2 * sbh


@pytest.mark.parametrize("p, v, m", [(8, 3, 64), (4, 2, 8), (35, 3, 280), (64, 1, 512)])
def test_first_stage_keeps_one_micro_batch_of_every_layer(p, v, m):
    layout = Layout(pp=p, virtual_stages=v)
    interleaved = 1 + (p - 1) / (p * v) if v > 1 else 1
    assert pieces_in_flight(layout, m, 0) / p == pytest.approx(interleaved)
    assert pieces_in_flight(layout, 1, 0) == 1


@pytest.mark.parametrize("zero, per_param", [(0, 18), (1, 6 + 12 / 4), (2, 2 + 16 / 4), (3, 18 / 4)])
def test_zero_shares_state_out(zero, per_param):
    config = model_named("llama3-8b")
    run = TrainingRun(global_batch=8, seq_len=1024)
    memory = training_memory(config, Layout(dp=4, zero=zero), run, H100)
    assert memory.state == pytest.approx(per_param * config.n_params)
    assert optimizer_bytes(config) == 12 and optimizer_bytes(small()) == 8


@settings(max_examples=60, deadline=None)
@given(micro=st.sampled_from([1, 2, 4]), tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4]),
       zero=st.integers(0, 3), recompute=st.sampled_from(["none", "selective", "full"]))
def test_laws_of_memory(micro, tp, pp, zero, recompute):
    config = gpt_120b(use_flash_attention=False)

    def need(**changes) -> float:
        asked = {"micro": micro, "tp": tp, "zero": zero, "recompute": recompute, **changes}
        layout = Layout(tp=asked["tp"], pp=pp, dp=4, zero=asked["zero"], sequence_parallel=True)
        run = TrainingRun(global_batch=64, seq_len=2048, micro_batch=asked["micro"], recompute=asked["recompute"])
        return training_memory(config, layout, run, H100).total

    assert need(tp=2 * tp) < need()
    assert need(micro=2 * micro) >= need()  # equal where half as many are then in flight
    assert need(zero=3) <= need(zero=1) < need(zero=0)
    assert need(recompute="full") < need(recompute="selective") < need(recompute="none")


def test_memory_is_the_sum_of_its_parts():
    run = InferenceRun(batch=6, prompt=40, new_tokens=24)
    memory = inference_memory(small(), Layout(dp=4), run, H100)
    assert memory.total == sum(dataclasses.asdict(memory).values())
    assert memory.kv_cache == kv_cache_bytes(small(), Layout(), rows=2, context=64)


@pytest.mark.parametrize("make, word", [
    (lambda: Layout(tp=0), "tp: 0"), (lambda: Layout(zero=4), "zero: 4"), (lambda: Layout(pp=True), "pp: True"),
    (lambda: Layout(virtual_stages=2), "virtual_stages: 2"),
    (lambda: TrainingRun(global_batch=1, seq_len=0), "seq_len: 0"),
    (lambda: TrainingRun(global_batch=1, seq_len=1, recompute="some"), "recompute: 'some'"),
    (lambda: InferenceRun(batch=0), "batch: 0"),
    (lambda: Layout(tp=7).check(small()), "n_heads is 6"), (lambda: Layout(pp=5).check(small()), "n_layers = 4"),
    (lambda: TrainingRun(global_batch=6, seq_len=1).n_micro(Layout(dp=4)), "multiple of dp x micro_batch = 4 x 1"),
    (lambda: TrainingRun(global_batch=1, seq_len=65).check(small()), "at most 64"),
    (lambda: InferenceRun(prompt=60, new_tokens=5).check(small()), "60 + 5"),
    (lambda: machine_named("h900"), "machine: 'h900'"),
    (lambda: dataclasses.replace(H100, memory_bytes=-1), "memory_bytes: -1"),
    (lambda: dataclasses.replace(H100, link_efficiency=1.5), "at most 1"),
    (lambda: dataclasses.replace(H100, peak_bf16=0), "peak_bf16: 0"),
    (lambda: machine_named("a100").matmul_flops("fp8"), "a100 multiplies f32, bf16, f16"),
    (lambda: model_named("gpt-5"), "model: 'gpt-5'"),
])
def test_errors(make, word):
    with pytest.raises(InputError) as caught:
        make()
    assert word in str(caught.value) and "\n" not in str(caught.value)
