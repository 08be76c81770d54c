"""GPTInference: generate text with a GPTModel.

In: prompts as token ids (or text, with a tokenizer) and the options of GenerationConfig. Out: token ids,
finish reasons, text, or a stream of pieces of text. Called by users, the command line and examples.

Legend: B rows, S prompt places, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tessera import dist
from tessera.data.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.infer import sampling
from tessera.infer.beam import beam_search
from tessera.infer.config import GenerationConfig
from tessera.infer.decoding import Decoder
from tessera.infer.stream import TextStream
from tessera.models import gpt_plan
from tessera.models.config import GPTConfig
from tessera.models.gpt import GPTModel

FinishReason = Literal["stop", "length"]
_MAX_SEED = 1 << 62
_MAX_RESERVED = 4096  # new tokens that the cache has room for at once; it grows when more come


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What `generate_detailed` returns.

    Attributes:
        sequences: [B, S + N] int64: prompts, new tokens, padding after each row's end.
        new_tokens: each row's new tokens, the one that ended it included, without padding.
        finish_reasons: "stop" (eos or a stop text or id list) or "length", for each row.
        texts: each row's new text, cut before its stop text; None without a tokenizer.
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    texts: list[str] | None


class GPTInference:
    """Greedy, sampled and beam-searched generation.

    Args:
        model: the model; put into evaluation mode.
        config: its configuration; default model.config.
        mesh: the ranks that the model is cut over; every one of them calls the same methods with the same
            arguments and gets the same results. Default the model's.
    """

    def __init__(self, model: GPTModel, config: GPTConfig | None = None, mesh: Any = None) -> None:
        self.model, self.config, self.mesh = model.eval(), config or model.config, mesh or model.mesh
        self._decoder = Decoder(self.model)

    def generate(
        self, input_ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int = 100, *,
        attention_mask: Tensor | None = None, tokenizer: Tokenizer | None = None, **options: Any,
    ) -> Tensor:
        """Continue every prompt.

        Args:
            input_ids: [B, S] integers; shorter prompts are padded on the left (see Tokenizer.batch).
            max_new_tokens: at most this many tokens are added.
            attention_mask: [B, S], 0 for padding.
            tokenizer: needed for stop texts.
            options: temperature, top_k, top_p, min_p, do_sample, num_beams, repetition_penalty, eos_token_id,
                stop, seed, length_penalty, early_stopping, pad_token_id: see GenerationConfig. Without
                eos_token_id the model's own ends a row; pass () to go on to max_new_tokens.

        Returns:
            [B, S + N] int64: the prompts and N <= max_new_tokens new tokens, as many as the longest row has.

        Raises:
            InputError: a value out of range, an empty prompt, a token outside the vocabulary, or a text
                that would be longer than config.max_seq_len.
        """
        return self.generate_detailed(
            input_ids, max_new_tokens, attention_mask=attention_mask, tokenizer=tokenizer, **options).sequences

    def generate_detailed(
        self, input_ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int = 100, *,
        attention_mask: Tensor | None = None, tokenizer: Tokenizer | None = None, **options: Any,
    ) -> GenerationResult:
        """`generate` with finish reasons and texts; the same arguments."""
        config = self._options(max_new_tokens, options, tokenizer)
        ids_BS = self._prompt(input_ids, attention_mask, config)
        rows = _Rows(ids_BS.shape[0], config, tokenizer)
        if config.num_beams > 1:
            self._search(ids_BS, attention_mask, config, rows)
        else:
            for tokens in self._steps(ids_BS, attention_mask, config, rows):
                rows.push(tokens)
        n_new = max(len(row) for row in rows.tokens)
        new = [row + [config.pad_id] * (n_new - len(row)) for row in rows.tokens]
        sequences = torch.cat((ids_BS, torch.tensor(new, dtype=torch.int64, device=ids_BS.device)), 1)
        return GenerationResult(
            sequences=sequences, new_tokens=rows.tokens, texts=rows.texts(),
            finish_reasons=["stop" if ended else "length" for ended in rows.ended])

    def stream(
        self, prompt: str | Tensor | Sequence[int], max_new_tokens: int = 100, *, tokenizer: Tokenizer,
        **options: Any,
    ) -> Iterator[str]:
        """Continue one prompt and yield its new text piece by piece.

        A piece never ends within a character, and a stop text is never shown, not even in part.

        Args:
            prompt: text, or ids as [S] or [1, S].
            max_new_tokens, options: as for `generate`, without beams.
            tokenizer: whose tokens the model speaks.

        Raises:
            InputError: as for `generate`; at once, not at the first piece.
        """
        config = self._options(max_new_tokens, options, tokenizer)
        if config.num_beams > 1:
            raise InputError(f"num_beams: {config.num_beams} given; a stream shows tokens as they are chosen, "
                             "expected 1")
        ids = torch.as_tensor(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        ids_BS = self._prompt(ids[None] if ids.dim() == 1 else ids, None, config)
        if len(ids_BS) > 1:
            raise InputError(f"prompt: {len(ids_BS)} rows given; a stream has one")
        return self._pieces(ids_BS, config, tokenizer)

    def _pieces(self, ids_BS: Tensor, config: GenerationConfig, tokenizer: Tokenizer) -> Iterator[str]:
        rows = _Rows(1, config, tokenizer)
        for tokens in self._steps(ids_BS, None, config, rows):
            piece = rows.push(tokens)[0]
            if piece:
                yield piece
        rest = rows.finish()[0]
        if rest:
            yield rest

    @torch.inference_mode()
    def _steps(
        self, ids_BS: Tensor, mask_BS: Tensor | None, config: GenerationConfig, rows: _Rows,
    ) -> Iterator[list[int]]:
        """The next token of every row, step by step, until `rows` says that all have ended."""
        n_rows = ids_BS.shape[0]
        cache = self.model.new_cache(n_rows)
        cache.reserve(ids_BS.shape[1] + min(config.max_new_tokens, _MAX_RESERVED))
        history = _History(ids_BS, mask_BS, config)
        uniform_NB = None if config.is_greedy else self._uniforms(n_rows, config).to(ids_BS.device)
        logits_BV = self.model(ids_BS, attention_mask=mask_BS, kv_cache=cache, logits_to_keep=1)["logits"][:, -1]
        advance = self._decoder.begin(cache)
        for step in range(config.max_new_tokens):
            logits_BV = history.penalize(logits_BV)
            if uniform_NB is None:
                next_B = logits_BV.argmax(-1)
            else:
                kept_BC, ids_BC = sampling.candidates(
                    logits_BV, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                    min_p=config.min_p)
                next_B = sampling.choose(kept_BC, ids_BC, uniform_NB[step])
            next_B = self._agree(next_B)
            yield next_B.tolist()
            if rows.is_done or step == config.max_new_tokens - 1:
                return
            history.append(next_B)
            logits_BV = advance(next_B)

    @torch.inference_mode()
    def _search(self, ids_BS: Tensor, mask_BS: Tensor | None, config: GenerationConfig, rows: _Rows) -> None:
        """Beam search: the prompts run once, then every row of the cache becomes num_beams rows."""
        cache = self.model.new_cache(ids_BS.shape[0])
        history = _History(ids_BS, mask_BS, config)
        logits_BV = self.model(ids_BS, attention_mask=mask_BS, kv_cache=cache, logits_to_keep=1)["logits"][:, -1]

        def advance(tokens: Tensor, sources: Tensor) -> Tensor:
            cache.reorder(sources)
            return self.model(tokens[:, None], kv_cache=cache)["logits"][:, -1]

        best_BN, lengths_B = beam_search(logits_BV, advance, config, history.prompt)
        for i, (text, length) in enumerate(zip(best_BN.tolist(), lengths_B.tolist())):
            rows.extend(i, text[:length])

    def _agree(self, tokens_B: Tensor) -> Tensor:
        """The first rank's choice, on every rank: a rank that went on alone would wait for the others for ever."""
        if self.mesh is None or not self.mesh.has_axis(gpt_plan.AXIS):
            return tokens_B
        return dist.broadcast(tokens_B, self.mesh, axis=gpt_plan.AXIS)

    @staticmethod
    def _uniforms(n_rows: int, config: GenerationConfig) -> Tensor:
        """Random numbers for every step and row, [N, B]."""
        seed = config.seed
        if seed is None:
            seed = int(torch.randint(_MAX_SEED, ()))
        return sampling.uniforms([seed + i for i in range(n_rows)], config.max_new_tokens).T.contiguous()

    def _options(
        self, max_new_tokens: int, options: dict[str, Any], tokenizer: Tokenizer | None,
    ) -> GenerationConfig:
        unknown = options.keys() - GenerationConfig.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(GenerationConfig.__dataclass_fields__)
            raise InputError(f"{min(unknown)}: no such option; expected {known}")
        if options.get("eos_token_id") is None:
            options = {**options, "eos_token_id": self.config.eos_token_id}
        config = GenerationConfig(max_new_tokens=max_new_tokens, **options)
        if config.stop_texts and tokenizer is None:
            raise InputError("tokenizer: needed for stop texts (or give stop as lists of token ids)")
        if config.stop and config.num_beams > 1:
            raise InputError("stop: given with num_beams > 1; beams end with eos_token_id only")
        for name, ids in (("eos_token_id", config.eos_ids), ("pad_token_id", (config.pad_id,)),
                          *(("stop", ids) for ids in config.stop_ids)):
            self._check_vocab(name, ids)
        if config.num_beams * max(2, 1 + len(config.eos_ids)) > self.config.vocab_size:
            raise InputError(f"num_beams: {config.num_beams} given; too many for {self.config.vocab_size} tokens")
        return config

    def _check_vocab(self, name: str, ids: Sequence[int]) -> None:
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise InputError(f"{name}: token {wrong} given; expected 0..{self.config.vocab_size - 1}")

    def _prompt(
        self, input_ids: Tensor | Sequence[Sequence[int]], mask_BS: Tensor | None, config: GenerationConfig,
    ) -> Tensor:
        """[B, S] int64 on the model's device, checked."""
        try:
            ids_BS = torch.as_tensor(input_ids)
        except (ValueError, TypeError) as error:
            raise InputError("input_ids: expected [batch, tokens] integers, all rows of one length "
                             f"({error})") from error
        if ids_BS.dim() != 2 or not ids_BS.numel() or ids_BS.is_floating_point() or ids_BS.dtype == torch.bool:
            raise InputError(f"input_ids: {tuple(ids_BS.shape)} {ids_BS.dtype} given; expected [batch, tokens] "
                             "integers, at least one token")
        self._check_vocab("input_ids", (int(ids_BS.min()), int(ids_BS.max())))
        n_prompt, limit = ids_BS.shape[1], self.config.max_seq_len
        if n_prompt >= limit:
            raise InputError(f"input_ids: {n_prompt} tokens given; expected fewer than max_seq_len = {limit}")
        if n_prompt + config.max_new_tokens > limit:
            raise InputError(f"max_new_tokens: {config.max_new_tokens} given; with {n_prompt} prompt tokens at most "
                             f"{limit - n_prompt} fit into max_seq_len = {limit}")
        if mask_BS is not None:
            if mask_BS.shape != ids_BS.shape:
                raise InputError(f"attention_mask: {tuple(mask_BS.shape)} given; expected {tuple(ids_BS.shape)}")
            if not bool((mask_BS[:, -1] != 0).all()):
                raise InputError("attention_mask: a row ends with padding; expected prompts padded on the left")
        return ids_BS.to(next(self.model.parameters()).device, torch.int64)


class _History:
    """The ids of each row's text so far, for the repetition penalty; keeps nothing when there is none."""

    def __init__(self, ids_BS: Tensor, mask_BS: Tensor | None, config: GenerationConfig) -> None:
        self._penalty = config.repetition_penalty
        # Padding is no text: the row's last token stands in for it, where it changes nothing.
        self.prompt = ids_BS if mask_BS is None else torch.where(mask_BS != 0, ids_BS, ids_BS[:, -1:])
        self._length = ids_BS.shape[1]
        self._ids: Tensor | None = None
        if self._penalty != 1:
            self._ids = ids_BS.new_empty(ids_BS.shape[0], self._length + config.max_new_tokens)
            self._ids[:, : self._length] = self.prompt

    def penalize(self, logits_BV: Tensor) -> Tensor:
        if self._ids is None:
            return logits_BV
        return sampling.repetition_penalty(logits_BV.float(), self._ids[:, : self._length], self._penalty)

    def append(self, tokens_B: Tensor) -> None:
        if self._ids is not None:
            self._ids[:, self._length] = tokens_B
            self._length += 1


class _Rows:
    """New tokens of each row, and whether and why it has ended."""

    def __init__(self, n_rows: int, config: GenerationConfig, tokenizer: Tokenizer | None) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n_rows)]
        self.ended = [False] * n_rows
        self._eos, self._stop_ids = frozenset(config.eos_ids), [list(ids) for ids in config.stop_ids]
        self._streams = [TextStream(tokenizer, config.stop_texts) for _ in range(n_rows)] if tokenizer else None
        self._pieces: list[list[str]] = [[] for _ in range(n_rows)]

    @property
    def is_done(self) -> bool:
        return all(self.ended)

    def push(self, tokens: list[int]) -> list[str]:
        """Note one token a row; rows that have ended take none. Returns the text that each row gained."""
        return [self._push(i, token) if not self.ended[i] else "" for i, token in enumerate(tokens)]

    def extend(self, i: int, tokens: list[int]) -> None:
        for token in tokens:
            self._push(i, token)

    def _push(self, i: int, token: int) -> str:
        row = self.tokens[i]
        row.append(token)
        piece = ""
        if token in self._eos:
            self.ended[i] = True
        elif self._streams is not None:
            piece = self._streams[i].push(token)
            self._pieces[i].append(piece)
            self.ended[i] = self._streams[i].is_stopped
        self.ended[i] |= any(row[-len(ids):] == ids for ids in self._stop_ids)
        return piece

    def finish(self) -> list[str]:
        """The text that the streams still held back."""
        rests = [stream.finish() for stream in self._streams or ()]
        for pieces, rest in zip(self._pieces, rests):
            pieces.append(rest)
        return rests

    def texts(self) -> list[str] | None:
        """Each row's text; ends the streams."""
        if self._streams is None:
            return None
        self.finish()
        return ["".join(pieces) for pieces in self._pieces]
