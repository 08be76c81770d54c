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
    assert report.errors == [] and (report.functions, report.kernels) == (25, 0)
    # They need a mesh, read a number out of a tensor, or use the object's model.
    assert [f.message.split(":")[0] for f in report.findings] == [
        "distributed_rms_norm", "dynamic_rope", "GPTTrainer.train_step", "GPTTrainer._compute_loss"]


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


def test_norms() -> None:
    x, weight = randn(2, 5, 8), randn(8)
    for function, factor in ((d.rms_norm, 1.0), (d.stable_rms_norm, 1e30)):
        wide = x.double() * factor
        want = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        torch.testing.assert_close(function(x * factor, weight).double(), want, atol=1e-5, rtol=1e-5)
    mesh = ts.Mesh(axes=["model"], devices=range(1))
    torch.testing.assert_close(d.distributed_rms_norm(x, weight, mesh), d.rms_norm(x, weight))


def test_swiglu_in_chunks_and_in_8_bits() -> None:
    x, gate, up, down = randn(2, 3, 8), randn(8, 20), randn(8, 20, seed=1), randn(20, 8)
    leaves = [t.requires_grad_() for t in (x, gate, up, down)]
    want = (F.silu(x @ gate) * (x @ up)) @ down
    got = d.swiglu_memory_efficient(*leaves, 6)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    weights = {"gate_weight": gate, "up_weight": up, "down_weight": down}
    scales = {"input": 0.02, "hidden": 0.5, **{name: w.abs().max().item() / 127 for name, w in weights.items()}}
    codes = [(w.detach() / scales[name]).round().to(torch.int8) for name, w in weights.items()]
    rounded = d.swiglu_quantized(ts.cast(x.detach() / scales["input"], ts.fp8), *codes, scales)
    assert rounded.dtype is torch.float8_e4m3fn
    assert (rounded.float() - want.detach()).abs().max() < 0.15 * want.detach().abs().max()
    with pytest.raises(ShapeError, match=r"x is torch\.float32"):
        d.swiglu_quantized(x.detach(), *codes, scales)


def test_block_with_a_cache() -> None:
    """Part 2 of GPT-OSS-120B, token by token beside the whole sequence in float64."""
    shapes = ((16, 48), (16, 16), (16, 24), (16, 24), (24, 16))
    weights = [randn(*shape, seed=i) * 0.2 for i, shape in enumerate(shapes)]
    x = randn(2, 5, 16)
    cache = ts.KVCache(batch_size=2, max_seq_len=8, n_layers=1, n_kv_heads=4, d_head=4, dtype="f32")
    got = torch.cat([d.transformer_block(x[:, i:i + 1], cache, *weights, 4, 4) for i in range(5)], 1)
    qkv, out, up, gate, down = (w.double() for w in weights)
    normed = F.rms_norm(x.double(), (16,), eps=1e-5)
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (normed @ qkv).chunk(3, -1))
    h = normed + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ out
    torch.testing.assert_close(got.double(), h + (F.silu(h @ gate) * (h @ up)) @ down, atol=0.05, rtol=0.05)


def test_captured_decode_step() -> None:
    """Its recording serves all places: what it appends to is a StepCache."""
    place = torch.zeros(1, dtype=torch.int64)
    step = ts.nn.StepCache([torch.zeros(2, 4, 8, 16) for _ in range(2)], place, None)
    cache = ts.KVCache(batch_size=2, max_seq_len=8, n_layers=1, n_kv_heads=4, d_head=16, dtype="f32")

    @ts.graph.capture(bucket_by=["seq_len"])
    def decode_step(q, k, v, cache):
        return ts.op.flash_attention(q, k, v, cache=cache)

    for i in range(4):
        place.fill_(i)
        q, k, v = (randn(2, 4, 1, 16, seed=3 * i + j) for j in range(3))
        torch.testing.assert_close(decode_step(q, k, v, step), ts.op.flash_attention(q, k, v, cache=cache))
    assert len(decode_step.buckets) == 1


def test_losses() -> None:
    logits, targets = randn(2, 5, 11), torch.tensor([[0, 3, -100, 10, 7], [1, -100, 2, 2, 9]])
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum", "none"):
            want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction,
                                   label_smoothing=smoothing)
            got = d.stable_cross_entropy(logits, targets, -100, smoothing, reduction)
            torch.testing.assert_close(got.flatten(), want.flatten())
    torch.testing.assert_close(d.log_softmax_stable(logits[0] * 1e3), (logits[0] * 1e3).log_softmax(-1))
    torch.testing.assert_close(d.softmax_cross_entropy(logits[0], targets[0].relu()),
                               F.cross_entropy(logits[0], targets[0].relu()))
    x, labels = randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(d.stable_contrastive_loss(x, labels), ts.ops.stable_contrastive_loss(x, labels))
    learned = d.LearnedPositionalEmbedding(9, 4)
    assert torch.equal(learned(labels[None]), learned.embeddings.weight[labels][None])
    scores = randn(2, 3, 4)
    seen = torch.arange(2, 6) <= torch.arange(3, 6)[:, None]
    assert torch.equal(ts.ops.apply_causal_mask(scores, 3, 2), scores.masked_fill(~seen, float("-inf")))


def test_positions_and_margin() -> None:
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
