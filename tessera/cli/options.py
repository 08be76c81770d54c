"""What the options of `generate` and `chat` say, as frozen values.

In: parsed arguments. Out: ModelOptions for cli.loading, SamplingOptions for GPTInference. Imports nothing
heavy: cli.app builds them before anything is loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tessera.errors import InputError
from tessera.infer.config import GenerationConfig

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it runs.

    Args:
        path: a model folder, a GGUF file, or "smollm2".
        dtype: "f32", "bf16", "f16" or "auto".
        threads: to compute with; None for torch's choice.
        tp: tensor-parallel ranks, processes on this host; `threads` is then of each.
        dequantize: bring quantized weights to dtype on loading, instead of as they are used; so it is with tp > 1.

    Raises:
        InputError: threads or tp below 1.
    """

    path: str
    dtype: str = "auto"
    threads: int | None = None
    tp: int = 1
    dequantize: bool = False

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("tp", self.tp)):
            if value is not None and value < 1:
                raise InputError(f"--{name}: {value} given; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; the fields of infer.GenerationConfig, with `greedy` for its do_sample.

    Raises:
        InputError: a value that GenerationConfig refuses; so it is known before a model is loaded.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.2
    top_k: int = 50
    top_p: float = 0.9
    min_p: float = 0.0
    greedy: bool = False
    num_beams: int = 1
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None

    def __post_init__(self) -> None:
        GenerationConfig(**self.arguments(0, DEFAULT_NEW_TOKENS))

    def arguments(self, n_prompt: int, max_seq_len: int) -> dict[str, Any]:
        """Keyword arguments of GPTInference.generate, for a prompt of n_prompt tokens.

        Without max_new_tokens, 256 or what fits into max_seq_len.
        """
        options = asdict(self)
        options["do_sample"] = not options.pop("greedy")
        if self.max_new_tokens is None:
            options["max_new_tokens"] = max(1, min(DEFAULT_NEW_TOKENS, max_seq_len - n_prompt))
        return options
