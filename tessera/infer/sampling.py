"""From logits to the next token: penalty, filters and exact sampling.

In: logits [B, V] and the sampling parameters. Out: token ids [B]. Called by infer.engine for every token.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p. Everything after the
penalty works on candidates sorted from the likeliest down; with top-k that is one partial sort, and
top-p alone first looks at the 1024 likeliest tokens, since they almost always hold the nucleus.

Legend: B rows, V vocabulary, C candidates, L history length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NUCLEUS = 1024


def repetition_penalty(logits_BV: Tensor, history_BL: Tensor, penalty: float) -> Tensor:
    """Make tokens that already stand in the text less likely (CTRL, arXiv:1909.05858).

    Args:
        logits_BV: [B, V].
        history_BL: [B, L] ids of each row's text so far.
        penalty: positive logits are divided by it, negative ones multiplied.

    Returns:
        [B, V], a new tensor unless penalty is 1.
    """
    if penalty == 1:
        return logits_BV
    seen = logits_BV.gather(1, history_BL)
    return logits_BV.scatter(1, history_BL, torch.where(seen < 0, seen * penalty, seen / penalty))


def candidates(
    logits_BV: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens that sampling may choose, likeliest first.

    Args:
        logits_BV: [B, V], any float dtype.
        temperature: above 0; logits are divided by it.
        top_k: keep this many; None or 0 for all. Of equal logits at the border only as many as fit are kept.
        top_p: of these, keep the smallest set with at least this probability (arXiv:1904.09751).
        min_p: of these, keep what has at least min_p times the likeliest token's probability (arXiv:2407.01082).

    Returns:
        (logits [B, C] float32, -inf where a filter took the candidate out; ids [B, C]). The first candidate
        always stays.
    """
    logits_BV = logits_BV.float() if temperature == 1 else logits_BV.float() / temperature
    n_vocab = logits_BV.shape[-1]
    if top_k or top_p in (None, 1.0):
        kept_BC, ids_BC = logits_BV.topk(min(top_k or n_vocab, n_vocab), dim=-1)
        norm_B1 = kept_BC.logsumexp(-1, keepdim=True)
    else:
        kept_BC, ids_BC = logits_BV.topk(min(_NUCLEUS, n_vocab), dim=-1)
        norm_B1 = logits_BV.logsumexp(-1, keepdim=True)
        if bool(((kept_BC - norm_B1).exp().sum(-1) < top_p).any()):
            kept_BC, ids_BC = logits_BV.sort(dim=-1, descending=True)
    drop_BC = torch.zeros_like(kept_BC, dtype=torch.bool)
    if top_p is not None and top_p < 1:
        probs_BC = (kept_BC - norm_B1).exp()
        before_BC = probs_BC.cumsum(-1) - probs_BC  # probability of everything likelier
        drop_BC |= before_BC >= top_p
    if min_p:
        drop_BC |= kept_BC < kept_BC[:, :1] + math.log(min_p)
    drop_BC[:, 0] = False
    return kept_BC.masked_fill(drop_BC, -torch.inf), ids_BC


def filtered(logits_BV: Tensor, **parameters: float | None) -> Tensor:
    """`candidates` laid out over the vocabulary: [B, V] float32, -inf for tokens that cannot be chosen."""
    kept_BC, ids_BC = candidates(logits_BV, **parameters)  # type: ignore[arg-type]
    return torch.full(logits_BV.shape, -torch.inf, device=logits_BV.device).scatter_(1, ids_BC, kept_BC)


def choose(kept_BC: Tensor, ids_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """Sample one token a row by inverting the distribution function.

    Args:
        kept_BC, ids_BC: from `candidates`.
        uniform_B: [B] float64 in [0, 1), one number a row. Equal numbers choose equal tokens, so that a
            row's text depends on its own random numbers only, not on the batch or the device.

    Returns:
        ids [B] int64.
    """
    cumulative_BC = kept_BC.double().softmax(-1).cumsum(-1)
    place_B1 = torch.searchsorted(cumulative_BC, uniform_B[:, None] * cumulative_BC[:, -1:], right=True)
    return ids_BC.gather(1, place_B1)[:, 0]


def uniforms(seeds: list[int], count: int) -> Tensor:
    """Random numbers for `choose`: [B, count] float64, row i from a generator seeded with seeds[i]."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
