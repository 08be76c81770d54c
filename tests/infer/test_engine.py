"""GPTInference against transformers: greedy, sampled, beams, padding, ends, and arguments that do not fit."""

from __future__ import annotations

import pytest
import torch

import tessera as ts
from tessera.errors import InputError
from tessera.infer.config import GenerationConfig

transformers = pytest.importorskip("transformers")
VOCAB, PAD = 97, 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers model, GPTInference) with the same random weights."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, ts.GPTInference(ts.load_model(folder))


@pytest.fixture(scope="module")
def engine(pair):
    return pair[1]


def prompts(seed: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(seed: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompts(seed, len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids, mask.long()


def theirs(model, ids, mask=None, **options) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"pad_token_id": PAD, "do_sample": False, **options})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers(pair, seed, penalty):
    model, engine = pair
    ids = prompts(seed, 3, 5)
    expected = theirs(model, ids, max_new_tokens=20, repetition_penalty=penalty)
    assert torch.equal(
        engine.generate(ids, 20, do_sample=False, repetition_penalty=penalty, pad_token_id=PAD), expected)
    assert torch.equal(engine.generate(ids, 20, temperature=0, repetition_penalty=penalty, pad_token_id=PAD), expected)


@pytest.mark.parametrize("seed", range(4))
def test_rows_end_on_their_own(pair, seed):
    """eos is chosen so that rows do end, at different places; the others go on, and stop with the last."""
    model, engine = pair
    ids, mask = left_padded(seed, [3, 7, 1, 5])
    free = theirs(model, ids, mask, max_new_tokens=20)[:, 7:]
    eos = [int(free[0, 2]), int(free[1, 9]), int(free[2, 5]), int(free[3, 6])]
    expected = theirs(model, ids, mask, max_new_tokens=20, eos_token_id=eos)
    got = engine.generate(ids, 20, do_sample=False, eos_token_id=eos, attention_mask=mask, pad_token_id=PAD)
    assert torch.equal(got, expected)
    assert got.shape[1] < 7 + 20
    result = engine.generate_detailed(ids, 20, do_sample=False, eos_token_id=eos, attention_mask=mask)
    assert result.finish_reasons == ["stop"] * 4
    for row, new in enumerate(result.new_tokens):
        assert new == free[row, : len(new)].tolist() and new[-1] in eos and not set(new[:-1]) & set(eos)


def test_a_row_does_not_depend_on_its_neighbours(engine):
    ids, mask = left_padded(9, [4, 8])
    together = engine.generate(ids, 12, seed=5, attention_mask=mask, temperature=2.0)
    alone = engine.generate(ids[1:], 12, seed=6, temperature=2.0)  # row 1 of the batch samples with seed 5 + 1
    assert torch.equal(together[1], alone[0])
    alone = engine.generate(ids[:1, 4:], 12, seed=5, temperature=2.0)
    assert torch.equal(together[0, 8:], alone[0, 4:])


def test_seeds(engine):
    ids = prompts(1, 2, 4)
    options = {"max_new_tokens": 16, "temperature": 3.0, "top_k": None, "top_p": None}
    first, again, other = (engine.generate(ids, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    first = engine.generate(ids, **options)
    second = engine.generate(ids, **options)
    torch.manual_seed(0)
    assert torch.equal(first, engine.generate(ids, **options)) and not torch.equal(first, second)


def test_sampled_tokens_follow_the_model(engine):
    """2000 rows of one prompt: the first token's counts against the model's own filtered probabilities."""
    ids = prompts(2, 1, 6)
    with torch.no_grad():
        logits = engine.model(ids)["logits"][:, -1].double() / 1.5
    kept = logits.topk(6)
    probs = kept.values.softmax(-1)[0]
    drawn = engine.generate(ids.expand(2000, -1), 1, temperature=1.5, top_k=6, top_p=None, seed=0)[:, -1]
    counts = torch.stack([(drawn == token).sum() for token in kept.indices[0]]).double()
    assert counts.sum() == 2000
    assert ((counts - 2000 * probs) ** 2 / (2000 * probs)).sum() < 5 + 6 * 10**0.5  # chi-square, 5 degrees


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beams_equal_transformers(pair, num_beams, length_penalty, early_stopping):
    model, engine = pair
    ids, mask = left_padded(num_beams, [6, 3, 5])
    common = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    likely = theirs(model, ids, mask, max_new_tokens=12, num_beams=2)[:, 6:]
    for eos in (None, int(likely[0, 3]), [int(likely[0, 6]), int(likely[1, 1]), int(likely[2, 8])]):
        for penalty in (1.0, 1.3):
            options = {**common, "eos_token_id": eos, "repetition_penalty": penalty}
            # transformers applies the repetition penalty to padding too: rows without any, then
            padded = penalty == 1.0
            expected = theirs(model, ids, mask if padded else None, max_new_tokens=12, **options)
            got = engine.generate(
                ids, 12, attention_mask=mask if padded else None, pad_token_id=PAD, **options)
            assert torch.equal(got, expected), options


def test_stop_ids(engine):
    ids = prompts(4, 1, 5)
    free = engine.generate(ids, 20, do_sample=False)[0, 5:].tolist()
    result = engine.generate_detailed(ids, 20, do_sample=False, stop=[free[6:9], [96, 95, 94]])
    first = next(i for i in range(3, 21) if free[i - 3:i] == free[6:9])
    assert result.new_tokens == [free[:first]] and result.finish_reasons == ["stop"]


@pytest.mark.parametrize("options, message", [
    ({"temperature": -0.1}, "temperature: -0.1"), ({"temperature": float("nan")}, "temperature: nan"),
    ({"top_p": 0.0}, r"top_p: 0.0 .* \(0, 1\]"), ({"top_p": 1.01}, "top_p: 1.01"), ({"top_k": -1}, "top_k: -1"),
    ({"top_k": 2.5}, "top_k: 2.5"), ({"min_p": -1}, "min_p: -1"), ({"num_beams": 0}, "num_beams: 0"),
    ({"num_beams": 90}, "num_beams: 90"), ({"repetition_penalty": 0}, "repetition_penalty: 0"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0"), ({"max_new_tokens": 60}, "at most 59 fit"),
    ({"eos_token_id": 97}, "eos_token_id: token 97"), ({"eos_token_id": "x"}, "eos_token_id: 'x'"),
    ({"pad_token_id": 97}, "pad_token_id: token 97"), ({"stop": ["x"]}, "tokenizer: needed"),
    ({"stop": [""]}, "stop: "), ({"stop": [[1, 99]]}, "stop: token 99"), ({"stop": 3}, "stop: 3"),
    ({"stop": [[1]], "num_beams": 2}, "stop: given with num_beams"), ({"seed": -1}, "seed: -1"),
    ({"length_penalty": float("inf")}, "length_penalty: inf"), ({"tempreature": 1}, "tempreature: no such option"),
    ({"attention_mask": torch.ones(1, 4)}, "attention_mask: "),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "padded on the left"),
], ids=str)
def test_options_that_do_not_fit(engine, options, message):
    with pytest.raises(InputError, match=message):
        engine.generate(prompts(0, 1, 5), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize("ids, message", [
    (torch.zeros(1, 0, dtype=torch.int64), "at least one token"), (torch.zeros(5, dtype=torch.int64), "input_ids"),
    (torch.zeros(1, 5), "integers"), ([[1, 2], [3]], "all rows of one length"), ([], "at least one"),
    (torch.tensor([[1, 97]]), "token 97"), (torch.tensor([[-1]]), "token -1"),
    (torch.zeros(1, 64, dtype=torch.int64), "fewer than max_seq_len = 64")], ids=str)
def test_prompts_that_do_not_fit(engine, ids, message):
    with pytest.raises(InputError, match=message):
        engine.generate(ids, 4)


def test_the_whole_context_can_be_used(engine):
    assert engine.generate(prompts(0, 1, 4), 60, do_sample=False).shape == (1, 64)


def test_result_takes_part_in_training(engine):
    """Generated in inference mode, but an ordinary tensor."""
    ids = engine.generate([[1, 2, 3]], 3)
    assert not ids.is_inference()


def test_config_is_frozen_and_checked():
    config = GenerationConfig(eos_token_id=3, stop=["a", [1, 2]])
    assert config.eos_ids == (3,) and config.stop_texts == ("a",) and config.stop_ids == ((1, 2),)
    assert config.pad_id == 3
    with pytest.raises(AttributeError):
        config.top_k = 3  # type: ignore[misc]
