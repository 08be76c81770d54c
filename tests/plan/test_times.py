"""Seconds: against hand-worked values, brute force, and laws."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.plan import InferenceRun, Layout, Machine, TrainingRun, inference_time, machine_named, training_time
from tessera.plan.collectives import all_reduce_time, group_of, reduce_scatter_time, send_time
from tessera.plan.memory import kv_cache_bytes
from tessera.plan.presets import gpt_120b, llama3, megatron_gpt, model_named
from tessera.plan.training import mean_keys, model_flops

# Round numbers and no latency, so that times can be worked out by hand; 4 devices a node.
PLAIN = Machine(
    name="plain", peak_f32=1e12, peak_bf16=1e12, peak_fp8=2e12, memory_bytes=1e12, memory_bandwidth=1e12,
    devices_per_node=4, intra_bandwidth=1e9, inter_bandwidth=1e8, intra_latency=0, inter_latency=0,
    matmul_efficiency=1, fp8_efficiency=1, attention_efficiency=1, memory_efficiency=1, link_efficiency=1)
FAST_LINKS = dataclasses.replace(PLAIN, intra_bandwidth=1e30, inter_bandwidth=1e30, memory_bandwidth=1e30)


def brute_force(axis: str, layout: Layout, per_node: int) -> int:
    """Fewest members in any node that a group along an axis touches; ranks numbered (pp, dp, tp), tp fastest."""
    tp, pp, dp = layout.shape
    places = {(t, p, d): (p * dp + d) * tp + t for t in range(tp) for p in range(pp) for d in range(dp)}
    groups: dict[tuple, list[int]] = {}
    for (t, p, d), rank in places.items():
        key = {"tp": (p, d), "dp": (t, p), "pp": (t, d)}[axis]
        groups.setdefault(key, []).append(rank // per_node)
    return min(nodes.count(node) for nodes in groups.values() for node in nodes)


@settings(max_examples=150, deadline=None)
@given(tp=st.integers(1, 9), pp=st.integers(1, 6), dp=st.integers(1, 6), per_node=st.integers(1, 12),
       axis=st.sampled_from(["tp", "pp", "dp"]))
def test_groups_are_those_of_the_numbering(tp, pp, dp, per_node, axis):
    layout = Layout(tp=tp, pp=pp, dp=dp)
    group = group_of(axis, layout, dataclasses.replace(PLAIN, devices_per_node=per_node))
    assert group.size == getattr(layout, axis)
    assert group.per_node == brute_force(axis, layout, per_node)


def test_ring_within_a_node():
    group = group_of("tp", Layout(tp=4), PLAIN)
    assert reduce_scatter_time(8e9, group, PLAIN) == pytest.approx(3 / 4 * 8)
    assert all_reduce_time(8e9, group, PLAIN) == pytest.approx(2 * 3 / 4 * 8)


def test_two_levels_across_nodes():
    group = group_of("dp", Layout(dp=12), PLAIN)
    assert (group.per_node, group.nodes) == (4, 3)
    assert reduce_scatter_time(8e9, group, PLAIN) == pytest.approx(3 / 4 * 8 + 2 / 3 * 8e9 / 4 / 1e8)


def test_short_messages_take_doubling():
    slow = dataclasses.replace(PLAIN, intra_latency=1e-3, devices_per_node=8)
    assert all_reduce_time(8, group_of("tp", Layout(tp=8), slow), slow) == pytest.approx(3e-3, rel=1e-3)


def test_sends():
    assert send_time(1e9, group_of("pp", Layout(), PLAIN), PLAIN) == 0
    assert send_time(1e9, group_of("pp", Layout(pp=2), PLAIN), PLAIN) == 1
    assert send_time(1e9, group_of("pp", Layout(pp=2, tp=4), PLAIN), PLAIN) == 10


@given(n_bytes=st.floats(1, 1e12), n=st.integers(1, 40))
def test_laws_of_collectives(n_bytes, n):
    machine = machine_named("h100")
    group = group_of("dp", Layout(dp=n), machine)
    assert all_reduce_time(n_bytes, group, machine) <= 2 * reduce_scatter_time(n_bytes, group, machine)
    assert all_reduce_time(2 * n_bytes, group, machine) >= all_reduce_time(n_bytes, group, machine)
    assert (all_reduce_time(n_bytes, group, machine) == 0) == (n == 1)


@pytest.mark.parametrize("tp, pp, dp", [(1, 1, 1), (4, 1, 1), (2, 4, 2)])
def test_arithmetic_is_six_flops_a_parameter_and_token(tp, pp, dp):
    config = megatron_gpt(n_layers=8, d_model=512, n_heads=8)
    config = dataclasses.replace(config, vocab_size=8)  # the head counts for next to nothing
    run = TrainingRun(global_batch=16, seq_len=256)
    time = training_time(config, Layout(tp=tp, pp=pp, dp=dp), run, FAST_LINKS)
    tokens, matrices = 16 * 256, 12 * 512 * 512 * 8
    assert time.matmul == pytest.approx(6 * tokens * matrices / (tp * pp * dp) / 1e12, rel=0.01)
    assert time.attention == pytest.approx(12 * 8 * tokens * 256 * 512 / (tp * pp * dp) / 1e12, rel=1e-6)
    assert time.tensor_comm + time.data_comm + time.pipeline_comm < 1e-9


@pytest.mark.parametrize("p, v, n_micro", [(4, 1, 8), (4, 2, 8), (2, 4, 16)])
def test_bubble(p, v, n_micro):
    """(p - 1) / (v m) of the ideal time: arXiv:2104.04473, section 2.2."""
    config = dataclasses.replace(megatron_gpt(n_layers=16, d_model=256, n_heads=4), vocab_size=2)
    run = TrainingRun(global_batch=n_micro, seq_len=128)
    time = training_time(config, Layout(pp=p, virtual_stages=v), run, FAST_LINKS)
    assert time.bubble / (time.matmul + time.attention) == pytest.approx((p - 1) / (v * n_micro), rel=1e-2)


def test_flops_of_a_step_are_those_of_the_paper():
    """72 B s L h^2 (1 + s / (6 h) + V / (12 L h)): arXiv:2104.04473, appendix, without recomputation."""
    n_layers, h, s, batch, v = 24, 2304, 2048, 512, 51200
    config, run = megatron_gpt(n_layers=n_layers, d_model=h, n_heads=24), TrainingRun(global_batch=batch, seq_len=s)
    expected = 72 * batch * s * n_layers * h * h * (1 + s / (6 * h) + v / (12 * n_layers * h))
    assert model_flops(config, run) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seq_len, window", [(8, None), (8, 3), (8, 8), (8, 20), (1, 1)])
def test_mean_keys_counts_the_mask(seq_len, window):
    config = dataclasses.replace(llama3(n_layers=2, d_model=64, n_heads=8, d_ffn=64), sliding_window=window)
    seen = [min(i + 1, window or seq_len) for i in range(seq_len)]
    assert mean_keys(config, seq_len) == pytest.approx(sum(seen) / seq_len)


@settings(max_examples=60, deadline=None)
@given(tp=st.sampled_from([1, 2, 8]), pp=st.sampled_from([1, 4]), dp=st.sampled_from([1, 2, 16]),
       zero=st.integers(0, 3), recompute=st.sampled_from(["none", "full"]),
       name=st.sampled_from(["h100", "nvl72", "a100"]))
def test_laws_of_a_step(tp, pp, dp, zero, recompute, name):
    config, machine = gpt_120b(), machine_named(name)
    layout = Layout(tp=tp, pp=pp, dp=dp, zero=zero)
    run = TrainingRun(global_batch=64, seq_len=2048, recompute=recompute)

    def seconds(machine: Machine = machine, run: TrainingRun = run) -> float:
        return training_time(config, layout, run, machine).total

    time = training_time(config, layout, run, machine)
    assert time.total == pytest.approx(sum(dataclasses.asdict(time).values()))
    assert min(dataclasses.asdict(time).values()) >= 0
    assert seconds(dataclasses.replace(machine, peak_bf16=2 * machine.peak_bf16)) < seconds()
    assert seconds(dataclasses.replace(machine, inter_bandwidth=machine.inter_bandwidth / 9)) >= seconds()
    assert seconds(run=dataclasses.replace(run, global_batch=128)) > seconds()
    # no machine is faster than its peak
    assert time.total > model_flops(config, run) / (machine.peak_bf16 * layout.devices)


def test_decoding_reads_weights_and_cache():
    config = model_named("llama3-70b")
    run = InferenceRun(batch=4, prompt=1000, new_tokens=2)
    time = inference_time(config, Layout(tp=8), run, dataclasses.replace(PLAIN, devices_per_node=8))
    read = 2 * (config.n_params - 128256 * 8192)  # all but the embedding, in bf16
    assert time.weights == pytest.approx(read / 8 / 1e12, rel=1e-3)  # norms are whole on every rank
    assert time.kv_cache == pytest.approx(kv_cache_bytes(config, Layout(tp=8), rows=4, context=1001) / 1e12)
    assert time.tensor_comm == pytest.approx(2 * 80 * 2 * 7 / 8 * 4 * 8192 * 2 / 1e9)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 64), tp=st.sampled_from([1, 2, 8]), pp=st.sampled_from([1, 2, 4]))
def test_laws_of_decoding(batch, tp, pp):
    config, machine = model_named("llama3-70b"), machine_named("h100")
    run, layout = InferenceRun(batch=batch, prompt=500, new_tokens=20), Layout(tp=tp, pp=pp)
    time = inference_time(config, layout, run, machine)
    more = inference_time(config, layout, dataclasses.replace(run, batch=batch + 1), machine)
    alone = inference_time(config, Layout(tp=tp), run, machine)
    assert more.per_token > time.per_token and more.weights == time.weights
    assert time.per_token >= time.weights + time.kv_cache
    assert time.per_token >= alone.per_token * (1 - 1e-9)  # stages follow one another
    assert time.prefill > 0 and time.bound in ("weights", "kv_cache", "compute", "communication")
    assert time.total(run, layout) == pytest.approx(batch * time.prefill + 20 * time.per_token)
