"""A real model: SmolLM2-135M-Instruct writes what transformers writes, token for token."""

from __future__ import annotations

import pytest
import torch

import tessera as ts

PLAIN = ["The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n    ",
         "The three laws of thermodynamics are:\n1.", "2 + 2 = 4\n3 + 5 =", "Water boils at 100", "A haiku:\n",
         "import numpy as np\n\nx = np.", "La capitale de l'Italie est", "Q: Who wrote Hamlet?\nA:"]
CHAT = ["Hello!", "What is 12 * 12?", "Write a short poem about the moon.", "Explain photosynthesis in one sentence.",
        "Name three programming languages.", "Translate 'good morning' into Spanish.", "Who are you?",
        "Give me a recipe for pancakes.", "What is the tallest mountain?", "Say something with an emoji 🙂"]


def prompt_ids(tokenizer) -> list[list[int]]:
    return [*(tokenizer.encode(text) for text in PLAIN),
            *(tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in CHAT)]


def check(model, reference, prompts: list[list[int]], n_new: int) -> None:
    engine = ts.GPTInference(model)
    for ids in prompts:
        expected = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=n_new, do_sample=False,
            pad_token_id=2, eos_token_id=2)
        assert engine.generate([ids], n_new, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("weights", ["smollm2", "smollm2_quantized"])
def test_greedy_equals_transformers(weights, request, smollm2_reference, tokenizer):
    prompts = prompt_ids(tokenizer)
    check(request.getfixturevalue(weights), smollm2_reference, [prompts[0], prompts[2], prompts[11]], 16)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["smollm2", "smollm2_quantized"])
def test_greedy_equals_transformers_on_20_prompts(weights, request, smollm2_reference, tokenizer):
    check(request.getfixturevalue(weights), smollm2_reference, prompt_ids(tokenizer), 64)


def test_batch_equals_single_prompts(smollm2, tokenizer):
    """Left-padded rows of 5 to 12 tokens write what they write alone."""
    engine = ts.GPTInference(smollm2)
    batch = tokenizer.batch(PLAIN[:4])
    result = engine.generate_detailed(**batch, max_new_tokens=10, do_sample=False, tokenizer=tokenizer)
    for text, new, written in zip(PLAIN, result.new_tokens, result.texts):
        alone = engine.generate([tokenizer.encode(text)], 10, do_sample=False)
        assert new == alone[0, len(tokenizer.encode(text)):].tolist()
        assert written == tokenizer.decode(new)


def test_stream_is_the_text_of_generate(smollm2, tokenizer):
    engine = ts.GPTInference(smollm2)
    result = engine.generate_detailed(
        [tokenizer.encode(PLAIN[0])], 16, seed=4, temperature=1.5, tokenizer=tokenizer)
    pieces = list(engine.stream(PLAIN[0], 16, seed=4, temperature=1.5, tokenizer=tokenizer))
    assert "".join(pieces) == result.texts[0] and len(pieces) > 8


def test_stop_text(smollm2, tokenizer):
    """" Paris" ends in the middle of what the model says."""
    engine = ts.GPTInference(smollm2)
    free = engine.generate_detailed([tokenizer.encode(PLAIN[0])], 16, do_sample=False, tokenizer=tokenizer).texts[0]
    stop = free[9:14]  # within and across tokens
    result = engine.generate_detailed(
        [tokenizer.encode(PLAIN[0])], 16, do_sample=False, tokenizer=tokenizer, stop=stop)
    assert result.texts == [free[: free.index(stop)]] and result.finish_reasons == ["stop"]
    assert len(result.new_tokens[0]) < 16
    pieces = engine.stream(PLAIN[0], 16, do_sample=False, tokenizer=tokenizer, stop=stop)
    assert "".join(pieces) == result.texts[0]
