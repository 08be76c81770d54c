"""Training beside transformers: from the same weights, on the same tokens, the losses take the same way down."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tessera as ts

CONFIG = ts.GPTConfig(
    family="llama", n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ffn=48, vocab_size=61, max_seq_len=24,
    tie_embeddings=True)
STEPS = 30


def batches() -> list[torch.Tensor]:
    """Sequences [5, 25] in which each token follows from the one before, but for noise: there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(CONFIG.vocab_size, (5, 25), generator=generator)
        for place in range(1, 25):
            follows = torch.rand(5, generator=generator) < 0.8
            ids[:, place] = torch.where(follows, (ids[:, place - 1] * 3 + 1) % CONFIG.vocab_size, ids[:, place])
        made.append(ids)
    return made


def train(model: torch.nn.Module, loss_of) -> torch.Tensor:
    """The losses of all steps."""
    model.train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True), []
    for ids in batches():
        loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More would wait for each other: the products are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("toy") / "model"
    ts.save_model(ts.GPTModel(CONFIG), path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return train(model, lambda ids, targets: model(
        input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss)


@pytest.mark.parametrize("dtype, at_a_step, in_the_mean", [("f32", 1e-3, 1e-4), ("bf16", 3e-2, 5e-3)])
def test_losses_are_those_of_transformers(folder, expected, dtype, at_a_step, in_the_mean):
    """f32 weights, products in either type: as in bench/train_step.py, which trains 17 million parameters."""
    loaded = ts.load_model(folder)
    model = ts.GPTModel(replace(loaded.config, compute_dtype=dtype))
    model.load_state_dict(loaded.state_dict())
    assert all(weight.dtype is torch.float32 for weight in model.parameters())
    losses = train(model, model.loss)
    assert losses[0] > 4 and losses[-5:].mean() < 3.3, losses
    off = (losses - expected) / expected
    assert off.abs().max() <= at_a_step and off[STEPS // 2:].mean().abs() <= in_the_mean, off
