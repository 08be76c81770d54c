"""The search finds what brute force finds, keeps to its constraints, and explains itself."""

from __future__ import annotations

import dataclasses
import itertools
import runpy
from pathlib import Path

import pytest

from tessera.errors import InputError
from tessera.plan import (
    InferenceRun,
    Layout,
    TrainingRun,
    choose_mesh,
    describe,
    explain,
    gpt_120b,
    machine_named,
    plan_inference,
    plan_training,
    search_inference,
    search_training,
)
from tessera.plan.presets import model_named

H100, NVL72 = machine_named("h100"), machine_named("nvl72")


def test_the_best_is_the_best_of_all():
    config = model_named("llama3-8b")
    search = search_training(config, H100, 16, global_batch=16, micro_batch=1, virtual_stages=1, zero=1)
    found = []
    for tp, pp, dp in itertools.product((1, 2, 4, 8, 16), repeat=3):
        if tp * pp * dp != 16:
            continue
        for recompute in ("none", "full"):
            run = TrainingRun(global_batch=16, seq_len=8192, recompute=recompute)
            plan = plan_training(config, Layout(tp=tp, pp=pp, dp=dp, zero=1, sequence_parallel=tp > 1), run, H100)
            if plan.fits:
                found.append(plan.seconds)
    assert search.best.seconds == min(found) and len(found) == len(search.plans)


@pytest.mark.parametrize("devices, batch", [(72, 256), (72, 288), (192, 256)])
def test_plans_are_sound_and_in_order(devices, batch):
    config = gpt_120b()
    search = search_training(config, NVL72, devices, global_batch=batch)
    assert search.plans == sorted(search.plans, key=lambda plan: (plan.seconds, plan.memory.total))
    for plan in search.plans:
        layout = plan.layout
        assert layout.devices == devices and plan.memory.total <= NVL72.memory_bytes
        assert config.n_heads % layout.tp == config.d_ffn % layout.tp == 0
        assert 8 % layout.tp == 0 or layout.tp % 8 == 0
        assert batch % (layout.dp * plan.run.micro_batch) == 0
        assert plan.tokens_per_second == pytest.approx(batch * 8192 / plan.seconds)
        assert plan.tflops * 1e12 < NVL72.peak_bf16
    assert not {plan.layout.shape for plan in search.plans} & set(search.too_large)


def test_the_120b_configuration():
    block = 2 * 12288**2 + 2 * 12288 * 8 * 128 + 3 * 12288 * 49152 + 12288
    assert gpt_120b().n_params == 96 * block + (2 * 50257 + 1) * 12288 == 206_589_431_808  # named 120B
    assert choose_mesh(gpt_120b()) == (("pp", "dp", "tp"), (9, 2, 4))
    given = search_training(gpt_120b(n_kv_heads=96), NVL72, 192, global_batch=256, tp=8, pp=6, dp=4)
    assert given.best.layout.shape == (8, 6, 4)


def test_tp_9_is_planned_with_its_uneven_heads():
    search = search_training(gpt_120b(), NVL72, 72, global_batch=256, tp=9, pp=2, dp=4)
    assert "busiest rank has 12 heads, as with tp=8" in " ".join(explain(search))
    free = search_training(gpt_120b(), NVL72, 72, global_batch=256)
    assert free.refused[9, 2, 4].startswith("96 query heads do not divide among tp=9")


@pytest.mark.parametrize("fixed", [
    {"tp": 2}, {"pp": 4}, {"dp": 8}, {"micro_batch": 2}, {"recompute": "full"}, {"zero": 2},
    {"pp": 2, "virtual_stages": 4}])
def test_what_is_fixed_stays(fixed):
    search = search_training(model_named("llama3-8b"), H100, 16, global_batch=64, **fixed)
    for plan in search.plans:
        told = {**dataclasses.asdict(plan.run), **dataclasses.asdict(plan.layout)}
        assert {name: told[name] for name in fixed} == fixed
    assert search.plans


def test_serving_prefers_tensor_parallel_for_one_request_and_replicas_for_many():
    config = model_named("llama3-8b")
    one = search_inference(config, NVL72, 8, InferenceRun(batch=1)).best
    many = search_inference(config, NVL72, 8, InferenceRun(batch=1024)).best
    assert one.layout.tp > many.layout.tp and many.layout.dp > one.layout.dp
    assert one.time.bound in ("weights", "communication")


def test_words():
    search = search_training(model_named("llama3-70b"), H100, 64, global_batch=128, matmul_dtype="fp8")
    text = " ".join(explain(search))
    assert f"dp={search.best.layout.dp}:" in text and "The next shape is" in text and "Shapes that do not fit" in text
    heavy = plan_training(model_named("llama3-70b"), Layout(), TrainingRun(global_batch=1, seq_len=8192), H100)
    assert not heavy.fits and "it does not fit" in " ".join(describe(heavy))
    served = plan_inference(model_named("llama3-70b"), Layout(tp=8), InferenceRun(), H100)
    assert "bound by weights" in " ".join(describe(served))
    with pytest.raises(InputError, match="one of training"):
        _ = served.tflops


@pytest.mark.parametrize("asked, words", [
    ({"devices": 0}, "devices: 0"), ({"devices": 8.0}, "devices: 8.0"), ({"tp": 3}, "divisor of devices = 8"),
    ({"recompute": "all"}, "recompute: 'all'"), ({"zero": 7}, "zero: 7"), ({"seq_len": 9000}, "at most 8192"),
    ({"global_batch": 0}, "global_batch: 0"), ({"matmul_dtype": "fp4"}, "matmul_dtype: 'fp4'"),
    ({"micro_batch": 0}, "micro_batch: 0"), ({"pp": 8, "virtual_stages": 50}, "no mesh to consider"),
])
def test_errors(asked, words):
    given = {"devices": 8, "global_batch": 8, **asked}
    with pytest.raises(InputError) as caught:
        _ = search_training(model_named("llama3-8b"), H100, **given).best
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_says_what_it_needs():
    with pytest.raises(InputError, match=r"none of the layouts fits: the smallest \(tp=\d+, pp=\d+, dp=\d+\) needs"):
        _ = search_training(model_named("gpt-175b"), H100, 8, global_batch=8).best
    with pytest.raises(InputError, match="none of the layouts fits"):
        _ = search_inference(model_named("llama3-405b"), H100, 4, InferenceRun()).best


def test_this_cpu_is_measured():
    cpu = machine_named("cpu")
    assert 1e9 < cpu.peak_f32 < 1e15 and 1e8 < cpu.memory_bandwidth < 1e13 and cpu.memory_bytes > 2**28
    assert "peak_f32" not in cpu.assumed and "inter_bandwidth" in cpu.assumed


def test_example(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "plan_120b.py"), run_name="__main__")
    out = capsys.readouterr().out
    for text in ("206,589,431,808 parameters", "busiest rank has 12 heads", "axes=('pp', 'dp', 'tp'), shape=(9, 2, 4)"):
        assert text in out
