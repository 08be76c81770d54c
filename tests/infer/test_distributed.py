"""SPMDGeneration on real ranks, against GPTInference in one process."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera.kernel import recording
from tessera.models import hub

CONFIG = ts.GPTConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ffn=48, max_seq_len=32, vocab_size=64)
PROMPTS = ["The capital of France is", "Once upon a time, in a land far away,"]


def on_ranks(path: str) -> dict:
    """The documents' high-level API; what each rank gets."""
    ts.init(timeout=60)
    mesh = ts.dist.mesh(2)
    model = ts.dist.load_model(path, mesh=mesh)
    tokenizer = ts.load_tokenizer(path)
    generator = ts.SPMDGeneration.build(
        model, tokenizer, {"do_sample": False, "max_new_tokens": 8}, batch_size=2, max_length=64)
    ids = torch.tensor([tokenizer.encode(PROMPTS[0])])
    with torch.no_grad():
        logits = model(ids)["logits"]
        with ts.dist.deterministic(reduce_tree="fixed"):
            exact = model(ids)["logits"]
    return {"one": generator.run(PROMPTS[0]), "two": generator.run(PROMPTS), "logits": logits, "exact": exact,
            "stream": list(ts.SPMDGeneration.stream(generator, PROMPTS[0])),
            "nbytes": sum(p.nbytes for p in model.parameters())}


@pytest.mark.slow  # tests/dist/test_tensor_parallel.py has every shape at toy size
def test_smollm2_on_two_ranks():
    """The published 135M model: 9 query heads and 3 key/value heads, which two ranks share 6 + 3 and 2 + 1."""
    path = hub.smollm2()
    tokenizer, model = ts.load_tokenizer(path), ts.load_model(path)
    engine = ts.GPTInference(model)
    expected = engine.generate_detailed(
        **tokenizer.batch(PROMPTS), max_new_tokens=8, do_sample=False, tokenizer=tokenizer).texts
    ids = torch.tensor([tokenizer.encode(PROMPTS[0])])
    with torch.no_grad():
        logits = model(ids)["logits"]
        with ts.dist.deterministic(reduce_tree="fixed"):
            exact = model(ids)["logits"]
    whole = sum(p.nbytes for p in model.parameters())
    for result in ts.dist.spawn(on_ranks, 2, str(path)):
        assert [generated.text for generated in result["two"]] == expected
        assert result["one"].text == expected[0] == "".join(result["stream"])
        # Sums in another order leave 3e-6 of the largest logit, which is above 20 (docs/determinism.md).
        assert float((result["logits"] - logits).abs().max()) <= 1e-5 * float(logits.abs().max())
        assert torch.equal(result["exact"], exact)
        assert result["nbytes"] < 0.6 * whole


def one_rank_cannot_record() -> tuple[list[int], str | None]:
    """Two ranks, of which the second finds a step that it cannot record, in its middle."""
    ts.init(timeout=60)
    model = ts.GPTModel(CONFIG, ts.dist.mesh(2))
    model.init_weights(3)
    if ts.dist.get_rank() == 1:
        norm = model.blocks[1].mlp_norm.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if recording.is_recording():
                raise ts.errors.UnsupportedError("not here")
            return norm(x)

        model.blocks[1].mlp_norm.add = lambda x, residual: (forward(x + residual), x + residual)
    engine = ts.GPTInference(model)
    tokens = engine.generate([[1, 2, 3]], 6, do_sample=False, eos_token_id=())
    return tokens.tolist(), engine._decoder.refusal


def test_ranks_agree_whether_they_record():
    model = ts.GPTModel(CONFIG)
    model.init_weights(3)
    expected = ts.GPTInference(model).generate([[1, 2, 3]], 6, do_sample=False, eos_token_id=()).tolist()
    (first, other), (second, own) = ts.dist.spawn(one_rank_cannot_record, 2)
    assert first == second == expected
    assert other == "another rank cannot record them" and own is not None


def test_options_that_do_not_fit_are_refused():
    model = ts.GPTModel(ts.GPTConfig(n_layers=1, n_heads=2, d_model=8, d_ffn=8, max_seq_len=16, vocab_size=32))
    with pytest.raises(ts.InputError, match="batch_size: 0 given"):
        ts.SPMDGeneration.build(model, None, batch_size=0)
    with pytest.raises(ts.InputError, match=r"max_length: 17 given; expected 2..16"):
        ts.SPMDGeneration.build(model, None, max_length=17)
    with pytest.raises(ts.InputError, match=r"prompt: 2 given; expected 1..1"):
        ts.SPMDGeneration.build(model, None).run(["a", "b"])
