"""NVL72Optimizer: a plan for a rack, its mesh, and what it does to a model."""

import dataclasses

import pytest

import tessera as ts
from tessera.plan import gpt_120b, machine_named, search_training

RACK = dataclasses.replace(machine_named("nvl72"), name="four", devices_per_node=4)


def tiny(**fields):
    return ts.GPTConfig(**{"n_layers": 2, "n_heads": 4, "d_model": 16, "d_ffn": 32, "max_seq_len": 64,
                           "vocab_size": 64, **fields})


def test_a_configuration_that_fills_the_rack_is_taken_as_it_is():
    config = gpt_120b(tp_size=9, pp_size=2, dp_size=4)
    optimizer = ts.NVL72Optimizer(config)
    mesh = optimizer.create_optimized_mesh()
    assert mesh.axes == ts.create_model_mesh(config).axes == ("pp", "dp", "tp") and mesh.shape == (2, 4, 9)
    assert mesh.is_abstract and optimizer.plan.fits
    assert mesh.ranks("tp") == tuple(range(9))  # neighbours


@pytest.mark.parametrize(("memory", "recomputes"), [(186e9, False), (0.0, True)])
def test_models_recompute_where_memory_asks_for_it(memory, recomputes):
    config = tiny(dp_size=4, n_layers=8, max_seq_len=2048)
    if not memory:  # between what the plans with and without recomputing need
        needs = [search_training(config, RACK, 4, global_batch=8, tp=1, pp=1, dp=4, micro_batch=2, recompute=policy,
                                 zero=3).best.memory.total for policy in ("none", "full")]
        least = min(search_training(config, RACK, 4, global_batch=8, tp=1, pp=1, dp=4, recompute="none").plans,
                    key=lambda plan: plan.memory.total).memory.total
        assert needs[1] < least
        memory = (needs[1] + least) / 2
    rack = dataclasses.replace(RACK, memory_bytes=memory)
    optimizer = ts.NVL72Optimizer(config, machine=rack, global_batch=8)
    model = ts.GPTModel(config, optimizer.create_optimized_mesh())
    assert optimizer.optimize_model(model) is model
    assert model.config.gradient_checkpointing is recomputes


def test_what_does_not_fit_together_is_refused():
    optimizer = ts.NVL72Optimizer(tiny(), machine=RACK, global_batch=8)
    with pytest.raises(ts.InputError, match=r"the plan has tp=\d, pp=\d, dp=\d; make it with the mesh of"):
        optimizer.optimize_model(ts.GPTModel(tiny()))
    with pytest.raises(ts.InputError, match="none of the layouts fits"):
        ts.NVL72Optimizer(tiny(dp_size=4), machine=dataclasses.replace(RACK, memory_bytes=1e6))
