"""How a model is laid over devices, and what a run asks of it.

In: a GPTConfig and the sizes of a mesh. Out: checked layouts and runs, and what the busiest rank of each axis holds.
Called by plan.memory, plan.training, plan.inference and plan.search.

Ranks are numbered with "tp" fastest, then "dp", then "pp" (Megatron-LM's order): tensor-parallel neighbours share a
node where they can, pipeline neighbours are far apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.errors import InputError
from tessera.models.config import GPTConfig

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A mesh and how its axes are used.

    Attributes:
        tp, pp, dp: tensor, pipeline and data parallel ranks.
        virtual_stages: pieces of the model that each pipeline rank holds (interleaved 1F1B); 1 for plain 1F1B.
        sequence_parallel: norms and residuals are cut over the sequence among tensor-parallel ranks.
        zero: what data-parallel ranks share out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights.

    Raises:
        InputError: a size below 1, or options that contradict each other.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    virtual_stages: int = 1
    sequence_parallel: bool = False
    zero: int = 0

    def __post_init__(self) -> None:
        _check_counts(self, "tp", "pp", "dp", "virtual_stages")
        if self.zero not in (0, 1, 2, 3):
            raise InputError(f"zero: {self.zero!r} given; expected 0, 1, 2 or 3")
        if self.virtual_stages > 1 and self.pp == 1:
            raise InputError(f"virtual_stages: {self.virtual_stages} given with pp=1; expected 1")

    @property
    def devices(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.dp

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tp, pp, dp)."""
        return self.tp, self.pp, self.dp

    @property
    def sizes(self) -> str:
        """The axes for a reader."""
        return f"tp={self.tp}, pp={self.pp}, dp={self.dp}"

    def check(self, config: GPTConfig, run: TrainingRun | InferenceRun | None = None) -> None:
        """Refuse a model that cannot be cut this way, and a run that it cannot take.

        Raises:
            InputError: fewer heads, neurons or tokens than tp, or fewer layers than pipeline pieces; see run.check.
        """
        if run is not None:
            run.check(config)
        for name in ("n_heads", "d_ffn", "vocab_size"):
            if self.tp > getattr(config, name):
                raise InputError(f"tp: {self.tp} given; every rank needs its own part, and {name} is "
                                 f"{getattr(config, name)}")
        pieces = self.pp * self.virtual_stages
        if pieces > config.n_layers:
            raise InputError(f"pp x virtual_stages: {self.pp} x {self.virtual_stages} given; expected at most "
                             f"n_layers = {config.n_layers}")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One optimizer step with Adam.

    Attributes:
        global_batch, micro_batch: sequences of a step, and of one pass through a rank.
        seq_len: tokens of a sequence.
        recompute: what the backward pass computes again: "none", "selective" (attention's scores) or "full"
            (each layer from its input).
        matmul_dtype: type that the layers' matmuls multiply; "" for the configuration's compute type.
        dropout: dropout masks are kept (models of 2022 and before).
        fused: elementwise operations are fused, so that each saved tensor is written and read once.
        overlap_tp: tensor-parallel transfers are cut up and run under the matmuls; 1/tp of them stays visible.
        overlap_dp: gradients travel while the last backward pass runs.
        grad_bytes: bytes of one accumulated gradient.

    Raises:
        InputError: a value that cannot be.
    """

    global_batch: int
    seq_len: int
    micro_batch: int = 1
    recompute: str = "none"
    matmul_dtype: str = ""
    dropout: bool = False
    fused: bool = True
    overlap_tp: bool = False
    overlap_dp: bool = True
    grad_bytes: int = 4

    def __post_init__(self) -> None:
        _check_counts(self, "global_batch", "seq_len", "micro_batch", "grad_bytes")
        if self.recompute not in RECOMPUTE:
            raise InputError(f"recompute: {self.recompute!r} given; expected one of {', '.join(RECOMPUTE)}")

    def n_micro(self, layout: Layout) -> int:
        """Micro-batches that each rank runs in a step.

        Raises:
            InputError: the batch does not divide.
        """
        part = layout.dp * self.micro_batch
        if self.global_batch % part:
            raise InputError(f"global_batch: {self.global_batch} given; expected a multiple of dp x micro_batch = "
                             f"{layout.dp} x {self.micro_batch}")
        return self.global_batch // part

    def activation_bytes(self, config: GPTConfig) -> float:
        """A micro-batch's tensor of the residual stream."""
        return self.micro_batch * self.seq_len * config.d_model * config.compute.bits / 8

    def check(self, config: GPTConfig) -> None:
        """Refuse sequences that the model cannot take.

        Raises:
            InputError: seq_len is above the model's.
        """
        if self.seq_len > config.max_seq_len:
            raise InputError(f"seq_len: {self.seq_len} given; expected at most {config.max_seq_len}, the model's")

    def dtype(self, config: GPTConfig) -> str:
        """Type of the layers' matmuls."""
        return self.matmul_dtype or config.compute.name


@dataclass(frozen=True, kw_only=True)
class InferenceRun:
    """Generation for a batch of requests, spread over the data-parallel replicas.

    Attributes:
        batch: requests in all.
        prompt: tokens of each prompt.
        new_tokens: tokens to generate for each.

    Raises:
        InputError: a count below 1.
    """

    batch: int = 1
    prompt: int = 1024
    new_tokens: int = 128

    def __post_init__(self) -> None:
        _check_counts(self, "batch", "prompt", "new_tokens")

    @property
    def context(self) -> int:
        """Tokens in the cache at the end."""
        return self.prompt + self.new_tokens

    def rows(self, layout: Layout) -> int:
        """Requests of the busiest replica."""
        return math.ceil(self.batch / layout.dp)

    def check(self, config: GPTConfig) -> None:
        """Refuse contexts that the model cannot take.

        Raises:
            InputError: prompt + new_tokens is above the model's.
        """
        if self.context > config.max_seq_len:
            raise InputError(f"prompt + new_tokens: {self.prompt} + {self.new_tokens} given; expected at most "
                             f"{config.max_seq_len}, the model's")


def _check_counts(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: {value!r} given; expected an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the busiest tensor-parallel rank has of every layer: query heads, key/value heads, neurons, tokens."""

    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @classmethod
    def of(cls, config: GPTConfig, tp: int) -> Share:
        """The largest part, dealt as models.gpt_plan deals: whole groups that share a key/value head, and with more
        ranks than groups, groups cut over several ranks that each keep a copy of the key/value head."""
        group = config.n_heads // config.n_kv_heads
        if tp <= config.n_kv_heads:
            kv_heads = math.ceil(config.n_kv_heads / tp)
            heads = kv_heads * group
        else:
            kv_heads, heads = 1, math.ceil(group / (tp // config.n_kv_heads))
        return cls(heads=heads, kv_heads=kv_heads, ffn=math.ceil(config.d_ffn / tp),
                   vocab=math.ceil(config.vocab_size / tp))

    def matmul_params(self, config: GPTConfig) -> int:
        """Parameters of a layer's matrices."""
        attention = 2 * config.d_model * config.d_head * (self.heads + self.kv_heads)
        return attention + (3 if config.use_gated_mlp else 2) * config.d_model * self.ffn

    def small_params(self, config: GPTConfig) -> int:
        """Parameters of a layer's norms and biases."""
        q, kv, d = self.heads * config.d_head, self.kv_heads * config.d_head, config.d_model
        count = d * (2 if config.norm == "layernorm" else 1) * (1 if config.use_parallel_attention else 2)
        count += 2 * config.d_head if config.qk_norm else 0
        count += q + 2 * kv if config.attn_qkv_bias else 0
        count += d if config.attn_out_bias else 0
        return count + ((2 if config.use_gated_mlp else 1) * self.ffn + d if config.mlp_bias else 0)

    def layer_params(self, config: GPTConfig) -> int:
        """Parameters of a layer."""
        return self.matmul_params(config) + self.small_params(config)


def stage_layers(config: GPTConfig, layout: Layout) -> int:
    """Layers of the fullest pipeline rank."""
    return math.ceil(config.n_layers / (layout.pp * layout.virtual_stages)) * layout.virtual_stages


def stage_params(config: GPTConfig, layout: Layout, stage: int) -> int:
    """Parameters that a rank of a pipeline stage holds before ZeRO shares them out; stages that are not the last
    count as full, and with tied embeddings the last stage has a copy of the first one's table."""
    share = Share.of(config, layout.tp)
    count = stage_layers(config, layout) * share.layer_params(config)
    table = share.vocab * config.d_model
    if stage == 0:
        count += table + (0 if config.use_rotary_embeddings else config.max_seq_len * config.d_model)
    if stage == layout.pp - 1:
        count += config.d_model * (2 if config.norm == "layernorm" else 1)
        count += 0 if config.tie_embeddings and layout.pp == 1 else table
    return count
