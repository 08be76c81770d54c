"""Beam search.

In: the prompt's logits, a way to run the model on one more token a beam and to reorder its cache. Out: the
best finished text of each row. Called by infer.engine. The rules, ties included, are transformers'.

Legend: B rows, K beams, V vocabulary, C = (1 + number of eos ids, at least 2) * K candidates, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.infer.config import GenerationConfig
from tessera.infer.sampling import repetition_penalty

_NEVER = -1.0e9  # log probability of what must not be chosen


def beam_search(
    logits_BV: Tensor, advance: Callable[[Tensor, Tensor], Tensor], config: GenerationConfig,
    history_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Search for likely continuations with K = config.num_beams running texts a row.

    Each step extends all beams, moves candidates that end with eos to the finished ones with score
    log p / length^length_penalty, and goes on with the K best others. A row is done when its best running
    beam scores no better than its worst of K finished ones, or with early_stopping as soon as K are finished.

    Args:
        logits_BV: [B, V] of the prompts' last places.
        advance: (tokens [B * K], sources [B * K]) -> logits [B * K, V]: beam i becomes what beam
            sources[i] was (rows of the prompts at first), followed by tokens[i].
        config: num_beams, max_new_tokens, eos ids, length_penalty, early_stopping, repetition_penalty.
        history_BS: the prompts' ids, for the repetition penalty.

    Returns:
        (tokens [B, N], lengths [B]): each row's best text, padded with config.pad_id, and its length with eos.
    """
    B, K, N = logits_BV.shape[0], config.num_beams, config.max_new_tokens
    search = _Search(B, config, logits_BV.device)
    rows_BK = torch.arange(B, device=logits_BV.device)[:, None].expand(B, K)
    logits_BKV = logits_BV[:, None].expand(B, K, -1)
    for step in range(N):
        log_probs_BKV = logits_BKV.float().log_softmax(-1)
        if config.repetition_penalty != 1 and history_BS is not None:
            text = torch.cat((history_BS[:, None].expand(B, K, -1), search.running_BKN[:, :, :step]), -1)
            flat = repetition_penalty(log_probs_BKV.flatten(0, 1), text.flatten(0, 1), config.repetition_penalty)
            log_probs_BKV = flat.view(B, K, -1)
        beams_BK = search.extend(log_probs_BKV, step)
        if step == N - 1 or search.is_done():
            break
        sources_BK = rows_BK if step == 0 else rows_BK * K + beams_BK
        logits = advance(search.running_BKN[:, :, step].flatten(), sources_BK.flatten())
        logits_BKV = logits.view(B, K, -1)
    return search.finished_BKN[:, 0], search.lengths_BK[:, 0]


class _Search:
    """The running and the finished beams of every row, best first."""

    def __init__(self, batch_size: int, config: GenerationConfig, device: torch.device) -> None:
        B, K, N = batch_size, config.num_beams, config.max_new_tokens
        self.config = config
        self.eos = torch.tensor(config.eos_ids, device=device)
        self.running_BKN = torch.full((B, K, N), config.pad_id, device=device)
        self.running_scores_BK = torch.zeros(B, K, device=device)
        self.running_scores_BK[:, 1:] = _NEVER  # all beams are the prompt: extend only the first
        self.finished_BKN = self.running_BKN.clone()
        self.finished_scores_BK = torch.full((B, K), _NEVER, device=device)
        self.is_finished_BK = torch.zeros(B, K, dtype=torch.bool, device=device)
        self.lengths_BK = torch.zeros(B, K, dtype=torch.int64, device=device)
        self.can_improve_B1 = torch.ones(B, 1, dtype=torch.bool, device=device)

    def extend(self, log_probs_BKV: Tensor, step: int) -> Tensor:
        """Add a token to every beam; returns which beam each new running beam comes from, [B, K]."""
        K, n_vocab = self.config.num_beams, log_probs_BKV.shape[-1]
        n_candidates = max(2, 1 + len(self.config.eos_ids)) * K
        totals_BV = (log_probs_BKV + self.running_scores_BK[:, :, None]).flatten(1)
        scores_BC, places_BC = totals_BV.topk(min(n_candidates, totals_BV.shape[1]))
        beams_BC, tokens_BC = places_BC // n_vocab, places_BC % n_vocab
        texts_BCN = _take(self.running_BKN, beams_BC)
        texts_BCN[:, :, step] = tokens_BC
        ends_BC = torch.isin(tokens_BC, self.eos)
        if step == self.config.max_new_tokens - 1:
            ends_BC = torch.ones_like(ends_BC)
        self._finish(texts_BCN, scores_BC, ends_BC, step + 1)
        self.running_scores_BK, best_BK = (scores_BC + ends_BC * _NEVER).topk(K)
        self.running_BKN = _take(texts_BCN, best_BK)
        self._update_hope(step + 1)
        return beams_BC.gather(1, best_BK)

    def _finish(self, texts_BCN: Tensor, scores_BC: Tensor, ends_BC: Tensor, length: int) -> None:
        """Merge the candidates that end now with the finished beams and keep the best K."""
        config = self.config
        ends_BC = ends_BC.clone()
        ends_BC[:, config.num_beams:] = False  # the others are spare, to keep K running
        scores_BC = scores_BC / length**config.length_penalty
        closed_B1 = ~self.can_improve_B1
        if config.early_stopping:
            closed_B1 = closed_B1 | self.is_finished_BK.all(-1, keepdim=True)
        scores_BC = scores_BC + closed_B1 * _NEVER + ~ends_BC * _NEVER
        self.finished_scores_BK, best_BK = torch.cat((self.finished_scores_BK, scores_BC), 1).topk(config.num_beams)
        self.finished_BKN = _take(torch.cat((self.finished_BKN, texts_BCN), 1), best_BK)
        self.is_finished_BK = torch.cat((self.is_finished_BK, ends_BC), 1).gather(1, best_BK)
        lengths_BC = torch.full_like(ends_BC, length, dtype=torch.int64)
        self.lengths_BK = torch.cat((self.lengths_BK, lengths_BC), 1).gather(1, best_BK)

    def _update_hope(self, length: int) -> None:
        """Rows whose best running beam, at its length now, still beats their worst finished one."""
        best_B1 = self.running_scores_BK[:, :1] / length**self.config.length_penalty
        worst_B1 = self.finished_scores_BK.min(1, keepdim=True)[0]
        worst_BK = torch.where(self.is_finished_BK, worst_B1, _NEVER)
        self.can_improve_B1 = self.can_improve_B1 & (best_B1 > worst_BK).any(-1, keepdim=True)

    def is_done(self) -> bool:
        full = self.config.early_stopping and bool(self.is_finished_BK.all())
        return full or not bool(self.can_improve_B1.any())


def _take(x_BKN: Tensor, places_BC: Tensor) -> Tensor:
    return x_BKN.gather(1, places_BC[:, :, None].expand(-1, -1, x_BKN.shape[2]))
