"""Sampling: the filters are transformers', the draws follow the filtered distribution."""

from __future__ import annotations

import pytest
import torch

from tessera.infer import sampling

transformers = pytest.importorskip("transformers")


def logits_of(seed: int, rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def warped(logits: torch.Tensor, temperature=1.0, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """transformers' processors in its own order."""
    steps = []
    if temperature != 1.0:
        steps.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        steps.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        steps.append(transformers.MinPLogitsWarper(min_p))
    for step in steps:
        logits = step(None, logits)
    return logits


@pytest.mark.parametrize("seed, vocab, scale", [
    (0, 50, 3.0), (1, 5000, 3.0), (2, 5000, 0.1), (3, 1, 1.0), (4, 1030, 8.0)])
@pytest.mark.parametrize("parameters", [
    {}, {"temperature": 0.7}, {"top_k": 1}, {"top_k": 50}, {"top_k": 10**6}, {"top_p": 0.9}, {"top_p": 1e-6},
    {"top_p": 1.0}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.5, "top_p": 0.95, "min_p": 0.1}], ids=str)
def test_filters_equal_transformers(seed, vocab, scale, parameters):
    logits = logits_of(seed, 7, vocab, scale)
    ours, theirs = sampling.filtered(logits, **parameters), warped(logits, **parameters)
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3, 5.0])
def test_penalty_equals_transformers(penalty):
    logits = logits_of(5, 4, 60)
    history = torch.randint(0, 60, (4, 30), generator=torch.Generator().manual_seed(6))
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    torch.testing.assert_close(sampling.repetition_penalty(logits, history, penalty), expected)


@pytest.mark.parametrize("parameters", [
    {"top_k": 8}, {"top_p": 0.9}, {"temperature": 0.8, "top_k": 12, "top_p": 0.95}, {"temperature": 2.0, "min_p": 0.1}],
    ids=str)
def test_draws_follow_the_distribution(parameters):
    """Chi-square over 20,000 draws; the bound is the statistic's mean plus 6 standard deviations."""
    n_draws = 20_000
    logits = logits_of(7, 1, 40, 1.5)
    probs = warped(logits.double(), **parameters).softmax(-1)[0]
    kept, ids = sampling.candidates(logits, **parameters)
    uniform = sampling.uniforms([11], n_draws)[0]
    drawn = sampling.choose(kept.expand(n_draws, -1), ids.expand(n_draws, -1), uniform)
    counts = torch.bincount(drawn, minlength=40).double()
    assert not counts[probs == 0].any()
    expected = probs[probs > 0] * n_draws
    chi2 = ((counts[probs > 0] - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom > 3
    assert chi2 < freedom + 6 * (2 * freedom) ** 0.5


def test_extreme_uniforms_choose_candidates():
    kept, ids = sampling.candidates(logits_of(8, 2, 30), top_k=5, top_p=0.5)
    top = sampling.choose(kept, ids, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert top[0] == ids[0, 0]
    assert kept[1, (ids[1] == top[1]).nonzero()].isfinite()


def test_rows_do_not_depend_on_the_batch():
    assert torch.equal(sampling.uniforms([3, 4, 5], 10)[1:], sampling.uniforms([4, 5], 10))
