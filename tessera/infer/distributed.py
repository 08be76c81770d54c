"""SPMDGeneration: text from a model that several ranks share, with the names of the documents' high-level API.

In: a model that `load_model(path, mesh=...)` has cut, a tokenizer, how to generate. Out: texts, or a stream of
pieces. Every rank calls the same methods with the same arguments; every rank gets the same text, and one of
them prints it.

    ts.init()
    mesh = ts.dist.mesh(4)
    model = ts.dist.load_model(path, mesh=mesh)
    generator = ts.SPMDGeneration.build(model, ts.load_tokenizer(path), {"max_new_tokens": 32})
    text = generator.run("The capital of France is").text
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tessera.data.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.infer.engine import GPTInference
from tessera.models.gpt import GPTModel


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One prompt's continuation.

    Attributes:
        text: the new text.
        tokens: the new tokens.
        finish_reason: "stop" or "length".
    """

    text: str
    tokens: list[int]
    finish_reason: str


class SPMDGeneration:
    """Generation with fixed options on all ranks of a mesh; make it with `build`."""

    def __init__(
        self, engine: GPTInference, tokenizer: Tokenizer, options: Mapping[str, Any], batch_size: int, max_length: int,
    ) -> None:
        self.engine, self.tokenizer, self.options = engine, tokenizer, dict(options)
        self.batch_size, self.max_length = batch_size, max_length

    @classmethod
    def build(
        cls, model: GPTModel, tokenizer: Tokenizer, generation_config: Mapping[str, Any] | None = None, *,
        batch_size: int = 1, max_length: int | None = None,
    ) -> SPMDGeneration:
        """A generator for a model.

        Args:
            model: this rank's part; its mesh says which ranks share it.
            tokenizer: the model's.
            generation_config: options of `GPTInference.generate`.
            batch_size: most prompts in one call.
            max_length: longest text in tokens, prompt included; default the model's max_seq_len.

        Raises:
            InputError: batch_size below 1, or max_length above what the model was made for.
        """
        limit = model.config.max_seq_len
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size} given; expected at least 1")
        if max_length is not None and not 2 <= max_length <= limit:
            raise InputError(f"max_length: {max_length} given; expected 2..{limit} (max_seq_len)")
        return cls(GPTInference(model), tokenizer, generation_config or {}, batch_size, max_length or limit)

    def run(self, prompt: str | list[str]) -> Any:
        """Continue a prompt (one Generated) or several (a list of them).

        Raises:
            InputError: more prompts than batch_size, or a prompt too long for max_length.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not 1 <= len(prompts) <= self.batch_size:
            raise InputError(f"prompt: {len(prompts)} given; expected 1..{self.batch_size} (batch_size)")
        batch = self.tokenizer.batch(prompts)
        result = self.engine.generate_detailed(
            batch["input_ids"], attention_mask=batch["attention_mask"], tokenizer=self.tokenizer,
            **self._options(batch["input_ids"].shape[1]))
        assert result.texts is not None
        found = [Generated(text=text, tokens=tokens, finish_reason=reason)
                 for text, tokens, reason in zip(result.texts, result.new_tokens, result.finish_reasons)]
        return found[0] if isinstance(prompt, str) else found

    def stream(self, prompt: str) -> Iterator[str]:
        """The continuation of a prompt, piece by piece, on every rank alike."""
        ids = self.tokenizer.encode(prompt)
        return self.engine.stream(ids, tokenizer=self.tokenizer, **self._options(len(ids)))

    def _options(self, n_prompt: int) -> dict[str, Any]:
        room = self.max_length - n_prompt
        if room < 1:
            raise InputError(f"prompt: {n_prompt} tokens given; expected fewer than max_length = {self.max_length}")
        return {**self.options, "max_new_tokens": min(self.options.get("max_new_tokens", 100), room)}
