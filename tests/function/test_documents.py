"""The documents' uses of the decorators run, compute what plain torch computes, and pass tessera check."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tessera as ts
from tessera.errors import ShapeError
from tessera.function import compiling
from tessera.function.checker import check
from tests.function import documents as d


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def uncompiled(monkeypatch):
    """The inductor takes seconds for a graph, and another test has it."""
    monkeypatch.setattr(compiling, "_no_compiler", "not in this test")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_all_pass_the_checker() -> None:
    report = check(str(Path(d.__file__)))
    assert report.errors == [] and (report.functions, report.kernels) == (15, 0)
    # The first reads a number out of a tensor, the others the object's model and vocabulary.
    assert [f.message.split(":")[0] for f in report.findings] == [
        "dynamic_rope", "GPTTrainer.train_step", "GPTTrainer._compute_loss"]


def test_swiglu() -> None:
    x, gate, up, down = randn(2, 3, 8), randn(8, 20), randn(8, 20, seed=1), randn(20, 8)
    torch.testing.assert_close(d.swiglu(x, gate, up, down), (F.silu(x @ gate) * (x @ up)) @ down)
    with pytest.raises(ShapeError, match="W_up has D_ff=8"):
        d.swiglu(x, gate, randn(8, 8), down)


@pytest.mark.parametrize("seq_len", [1, 5])
def test_attention(seq_len) -> None:
    q, k, v = (randn(2, 4, seq_len, 8, seed=i) for i in range(3))
    want = torch.softmax(q.double() @ k.double().mT / math.sqrt(8), -1) @ v.double()
    torch.testing.assert_close(d.attention(q, k, v).double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(d.MemoryEfficientAttention.chunked_attention(q, k, v, 2).double(), want, atol=1e-5,
                               rtol=1e-5)
    grouped = d.grouped_query_attention(q, k[:, :2], v[:, :2])
    torch.testing.assert_close(grouped, F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True,
                                                                       enable_gqa=True))
    single = d.multi_query_attention(q, k[:, 0], v[:, 0])
    torch.testing.assert_close(single, F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True,
                                                                      enable_gqa=True))
    with pytest.raises(ShapeError, match=rf"mask has S=3 .* but q has S={seq_len}"):
        d.attention(q, k, v, torch.zeros(3, 3))


def test_rotary() -> None:
    x = randn(2, 5, 3, 8)
    ids = torch.arange(5).expand(2, -1)
    angles = ids[..., None].double() / 10000.0 ** (torch.arange(0, 8, 2).double() / 8)
    turned = torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1)) * torch.polar(
        torch.ones_like(angles), angles)[:, :, None]
    want = torch.cat([turned.real, turned.imag], -1).float()
    for got in (d.rotary_embedding(x), d.rotary_embedding(x, ids), d.dynamic_rope(x, ids)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeError, match="2 does not divide"):
        d.apply_rotary_pos_emb(x[..., :7], x[:, :, :1, :3], x[:, :, :1, :3])


def test_positions_and_losses() -> None:
    cos, sin = d.cos_sin_embedding(7, 6)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(7, 6))
    bias = d.alibi_bias(5, 4)
    assert bias.shape == (4, 5, 5) and bias[0, 3, 1].item() == pytest.approx(-2 * 2 ** -2)
    scores, targets = randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    others = scores.scatter(1, targets[:, None], float("-inf")).max(1).values
    torch.testing.assert_close(d.stable_max_margin_loss(scores, targets),
                               (others + 1 - scores.gather(1, targets[:, None])[:, 0]).relu().mean())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, which looks at the loss between two graphs
def test_pipeline_stages_and_trainer(uncompiled) -> None:
    first, second = d.PipelineParallelGPT(0), d.PipelineParallelGPT(1)
    ids = torch.tensor([[1, 4, 10], [0, 2, 2]], dtype=torch.int32)
    hidden = first(ids)
    torch.testing.assert_close(hidden, first.block(first.token_embedding[ids.long()]))
    torch.testing.assert_close(second(hidden, position_ids=None), second.block(hidden))
    with pytest.raises(ShapeError, match="x is a tensor"):
        second(hidden.double())
    metrics = d.GPTTrainer(first).train_step({"input_ids": ids, "labels": ids.long()})
    logits = first(ids) @ first.token_embedding.T
    assert metrics["loss"] == pytest.approx(
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].long().flatten()).item())
    assert first.token_embedding.grad is not None and ts.function(first.forward.__func__) is first.forward.__func__
