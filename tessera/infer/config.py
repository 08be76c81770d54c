"""GenerationConfig: how text is generated, checked once.

In: the keyword arguments of GPTInference.generate and of a request to the server. Out: a frozen description.
Called by infer.engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.errors import InputError

MAX_STOPS = 64


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate.

    Attributes:
        max_new_tokens: at most this many tokens are added.
        temperature: logits are divided by it; 0 means greedy.
        top_k, top_p, min_p: filters of infer.sampling; None (or 0 for top_k, min_p) for none.
        do_sample: sample; otherwise take the likeliest token.
        num_beams: above 1, deterministic beam search; the sampling parameters then have no effect.
        repetition_penalty: above 1 makes tokens of the text so far less likely.
        eos_token_id: one id or several; a row ends with the first of them.
        stop: texts, or lists of token ids, at which a row ends too; texts need a tokenizer.
        seed: for sampling; row i uses seed + i. None draws one from torch's global generator.
        length_penalty: a beam's score is its log probability / length^length_penalty.
        early_stopping: end a row's beam search with its num_beams-th finished beam.
        pad_token_id: fills rows after their end; default the first eos id, else 0.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 0.9
    min_p: float | None = None
    do_sample: bool = True
    num_beams: int = 1
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    stop: str | Sequence[str | Sequence[int]] | None = None
    seed: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1)
        _check_int("num_beams", self.num_beams, 1)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        _check_number("temperature", self.temperature, 0, math.inf, "a number of at least 0 (0 is greedy)")
        _check_number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6, "a number above 0, 1 for none")
        _check_number("length_penalty", self.length_penalty, -100, 100, "a number in [-100, 100]")
        if self.top_p is not None:
            _check_number("top_p", self.top_p, 0, 1, "a number in (0, 1], or None", exclude=0)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, 0, 1, "a number in [0, 1], or None")
        object.__setattr__(self, "eos_token_id", _ids("eos_token_id", self.eos_token_id))
        object.__setattr__(self, "stop", _stops(self.stop))
        if self.pad_token_id is not None:
            _check_int("pad_token_id", self.pad_token_id, 0)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.eos_token_id  # type: ignore[return-value]  # __post_init__ makes it a tuple

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(item for item in self.stop or () if isinstance(item, str))

    @property
    def stop_ids(self) -> tuple[tuple[int, ...], ...]:
        return tuple(item for item in self.stop or () if not isinstance(item, str))  # type: ignore[misc]

    @property
    def pad_id(self) -> int:
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_ids[0] if self.eos_ids else 0

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0 or self.top_k == 1


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: Any, low: int) -> None:
    if not _is_int(value) or not low <= value < 1 << 63:
        raise InputError(f"{name}: {value!r} given; expected an integer of at least {low}")


def _check_number(
    name: str, value: Any, low: float, high: float, expected: str, exclude: float | None = None,
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or value == exclude:
        raise InputError(f"{name}: {value!r} given; expected {expected}")


def _ids(name: str, value: Any) -> tuple[int, ...]:
    values = () if value is None else (value,) if _is_int(value) else value
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(_is_int(i) and i >= 0 for i in values):
        raise InputError(f"{name}: {value!r} given; expected token ids")
    return tuple(values)


def _stops(value: Any) -> tuple[str | tuple[int, ...], ...]:
    items = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or len(items) > MAX_STOPS or any(_is_int(i) or not i for i in items):
        raise InputError(f"stop: {value!r} given; expected at most {MAX_STOPS} texts or lists of token ids, none empty")
    return tuple(item if isinstance(item, str) else _ids("stop", item) for item in items)
