"""The milestones of tensor parallelism, each on four ranks: attention layer, block, full forward, single token,
generation, and what a rank has to do for each token.

One job of four processes loads a model of Mistral's proportions from a folder, through the high-level interface; what
its ranks find is compared with the model in this process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tessera as ts
from tessera.data.tokenizer import Tokenizer

RANKS, LAYERS = 4, 3
CONFIG = ts.GPTConfig(
    n_layers=LAYERS, n_heads=8, n_kv_heads=4, head_dim=8, d_model=64, d_ffn=224, max_seq_len=128, vocab_size=256,
    sliding_window=24, family="mistral")
PROMPTS = ["The capital of France is", "Once"]
OPTIONS = {"do_sample": False, "max_new_tokens": 8}


def layers(model: ts.GPTModel) -> dict[str, Tensor]:
    """The first block and its attention, of a prompt's length and wider than the window."""
    x = torch.randn(2, 37, CONFIG.d_model, generator=torch.Generator().manual_seed(1))
    mask = ts.ops.make_mask(37, 37, window=CONFIG.sliding_window)
    rope = ts.ops.rope_tables(torch.arange(37)[None], CONFIG.rope_dim, CONFIG.rope_theta)
    with torch.no_grad():
        return {"attention": model.blocks[0].attn(x, mask, rope), "block": model.blocks[0](x, mask, rope)}


def tokens(model: ts.GPTModel, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Logits of a whole text, and of one token after a cached prompt."""
    ids = torch.tensor([tokenizer.encode(PROMPTS[0] * 2)])
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True)["kv_cache"]
        return {"forward": model(ids)["logits"], "token": model(ids[:, -1:], kv_cache=cache)["logits"],
                "next": model(ids)["logits"][:, -1].argmax(-1)}


def on_rank(path: str) -> dict:
    ts.init(timeout=60)
    model = ts.dist.load_model(path, mesh=ts.dist.mesh(RANKS))
    tokenizer = ts.load_tokenizer(path)
    generator = ts.SPMDGeneration.build(model, tokenizer, OPTIONS, batch_size=2, max_length=64)
    found = {**layers(model), **tokens(model, tokenizer), "texts": [generator.run(prompt).text for prompt in PROMPTS],
             "batch": [each.text for each in generator.run(PROMPTS)], "stream": list(generator.stream(PROMPTS[0]))}
    with ts.dist.deterministic(reduce_tree="fixed"):
        found["exact"] = {**layers(model), **tokens(model, tokenizer)}
    recorded = generator.engine._decoder._step.buckets[0].kernels
    return {**found, "all_reduces": recorded.count("all_reduce"), "nbytes": sum(p.nbytes for p in model.parameters())}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder with a random model and a tokenizer of bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model = ts.GPTModel(CONFIG)
    model.init_weights(seed=4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    folder = tmp_path_factory.mktemp("mistral")
    ts.save_model(model, folder, tokenizer=Tokenizer(backend, {}))
    return folder


@pytest.fixture(scope="module")
def whole(path):
    return ts.load_model(path)


@pytest.fixture(scope="module")
def ranks(path):
    return ts.dist.spawn(on_rank, RANKS, str(path))


@pytest.mark.parametrize("name", ["attention", "block"])
def test_a_layer_equals_one_device(name, whole, ranks):
    with ts.dist.deterministic(reduce_tree="fixed"):
        exact = layers(whole)[name]
    for found in ranks:
        torch.testing.assert_close(found[name], layers(whole)[name], rtol=0, atol=1e-5)
        assert torch.equal(found["exact"][name], exact)


@pytest.mark.parametrize("name", ["forward", "token"])
def test_logits_equal_one_device(name, path, whole, ranks):
    tokenizer = ts.load_tokenizer(path)
    with ts.dist.deterministic(reduce_tree="fixed"):
        exact = tokens(whole, tokenizer)[name]
    expected = tokens(whole, tokenizer)
    for found in ranks:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
        assert torch.equal(found["exact"][name], exact)
        assert torch.equal(found["next"], expected["next"])


def test_generated_text_equals_one_device(path, whole, ranks):
    tokenizer, engine = ts.load_tokenizer(path), ts.GPTInference(whole)
    expected = [engine.generate_detailed(**tokenizer.batch([prompt]), tokenizer=tokenizer, **OPTIONS).texts[0]
                for prompt in PROMPTS]
    for found in ranks:
        assert found["texts"] == found["batch"] == expected and "".join(found["stream"]) == expected[0]


def test_a_rank_does_a_quarter_of_the_work(whole, ranks):
    """Faster than one device: a quarter of the weights a token, two sums a layer and one for the embedding."""
    nbytes = sum(p.nbytes for p in whole.parameters())
    for found in ranks:
        assert found["nbytes"] < 0.3 * nbytes
        assert found["all_reduces"] == 2 * LAYERS + 1
