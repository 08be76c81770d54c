"""Bytes that the fullest rank needs, by purpose.

In: a GPTConfig, a layout and a run. Out: a `Memory`. Called by plan.search; the closed forms of plan.published.

Activations follow Korthikanti et al. 2022 (arXiv:2205.05198), section 4, with the widths of the configuration in
place of 4 h and one h: what a layer keeps for its backward pass is, in bytes per token with elements of e bytes,
    e (4 d + 2 q + 2 k + m f) + e a s        d: width, q, k: width of all query and of all key/value heads,
                                             m: 2, or 3 with a gate, f: neurons, a s: heads times keys
(plus a byte per element and mask of dropout); with q = k = d, f = 4 d, e = 2 and dropout this is 34 d + 5 a s.
State is ZeRO's (Rajbhandari et al. 2020, arXiv:1910.02054): weights, f32 gradients, and Adam's f32 copy and moments.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from tessera.models.config import GPTConfig
from tessera.plan.layout import InferenceRun, Layout, Share, TrainingRun, stage_layers, stage_params
from tessera.plan.machine import Machine
from tessera.types import dtype_of


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer: state of training.
        activations: what layers keep for the backward pass, or the widest layer's in inference.
        logits: embedding and output projection's activations.
        kv_cache: cached keys and values.
        buffers: the driver's and the collectives' memory, gathered weights of ZeRO 3.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def state(self) -> float:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


def layer_activation_bytes(config: GPTConfig, layout: Layout, run: TrainingRun, *, recompute: str = "") -> float:
    """Bytes that one layer keeps for the backward pass of one micro-batch (module docstring).

    Args:
        recompute: in place of run.recompute.
    """
    recompute = recompute or run.recompute
    share, e = Share.of(config, layout.tp), config.compute.bits // 8
    tokens, d = run.micro_batch * run.seq_len, config.d_model
    shards = layout.tp if layout.sequence_parallel else 1
    if recompute == "full":
        return tokens * e * d / shards
    whole = e * d * (2 if config.use_parallel_attention else 4) + (2 * d if run.dropout else 0)
    q, kv = share.heads * config.d_head, share.kv_heads * config.d_head
    cut = e * (2 * q + 2 * kv + (3 if config.use_gated_mlp else 2) * share.ffn)
    cut += e * (q + kv) if config.qk_norm else 0
    return tokens * (whole / shards + cut) + score_bytes(config, layout, run, recompute=recompute)


def score_bytes(config: GPTConfig, layout: Layout, run: TrainingRun, *, recompute: str = "none") -> float:
    """Bytes of what attention keeps of its scores: all of them, or one f32 a row with flash attention."""
    heads, tokens = Share.of(config, layout.tp).heads, run.micro_batch * run.seq_len
    if config.use_flash_attention:
        return 4 * heads * tokens
    e = config.compute.bits // 8
    return 0 if recompute == "selective" else heads * run.seq_len * tokens * (e + (1 + e if run.dropout else 0))


def pieces_in_flight(layout: Layout, n_micro: int, stage: int) -> float:
    """Micro-batches' worth of a stage's layers that are kept at once.

    1F1B keeps pp - stage; interleaving keeps (v - 1) pp + 2 (pp - stage - 1) + 1 of v pieces (Megatron-LM), which
    for the first stage is the factor 1 + (pp - 1) / (pp v) of Korthikanti et al.
    """
    p, v = layout.pp, layout.virtual_stages
    pieces = p - stage if v == 1 else (v - 1) * p + 2 * (p - stage - 1) + 1
    return min(n_micro * v, pieces) / v


def training_memory(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> Memory:
    """Memory of the fullest pipeline stage.

    Raises:
        InputError: the model or the batch cannot be cut this way.
    """
    layout.check(config, run)
    stages = {0, layout.pp - 1}
    return max((_stage_memory(config, layout, run, machine, stage) for stage in stages), key=lambda m: m.total)


def _stage_memory(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine, stage: int) -> Memory:
    params, e = stage_params(config, layout, stage), config.compute.bits // 8
    share, tokens, d = Share.of(config, layout.tp), run.micro_batch * run.seq_len, config.d_model
    shards = layout.tp if layout.sequence_parallel else 1
    in_flight = pieces_in_flight(layout, run.n_micro(layout), stage)
    activations = stage_layers(config, layout) * in_flight * layer_activation_bytes(config, layout, run)
    if run.recompute == "full":  # the layer that is being computed again
        activations += layer_activation_bytes(config, layout, run, recompute="none")
    logits = tokens * d / shards * math.ceil(in_flight) if stage == 0 and run.dropout else 0.0
    if stage == layout.pp - 1:  # final norm's and projection's inputs, logits, their f32 copy for the loss
        logits += tokens * (2 * e * d / shards + (e + 4) * share.vocab)
    gathered = 2 * e * share.layer_params(config) if layout.zero == 3 else 0
    return Memory(
        weights=e * params / (layout.dp if layout.zero >= 3 else 1),
        gradients=run.grad_bytes * params / (layout.dp if layout.zero >= 2 else 1),
        optimizer=optimizer_bytes(config) * params / (layout.dp if layout.zero >= 1 else 1),
        activations=activations, logits=logits, buffers=machine.reserved_bytes + gathered)


def optimizer_bytes(config: GPTConfig) -> int:
    """Bytes a parameter of Adam's state: two f32 moments, and an f32 copy of narrower weights."""
    return 12 if config.compute.bits < 32 else 8


def weight_bytes(config: GPTConfig, layout: Layout, stage: int) -> float:
    """Stored weights of a rank in inference: the blocks' matrices in weight_dtype (8-bit ones with an f32 scale a
    row), the rest in the type of `config.param`."""
    share, layers = Share.of(config, layout.tp), stage_layers(config, layout)
    matrices = layers * share.matmul_params(config)
    rest = stage_params(config, layout, stage) - matrices
    rows = (share.heads + 2 * share.kv_heads) * config.d_head + config.d_model  # q, k, v; o
    rows += (2 if config.use_gated_mlp else 1) * share.ffn + config.d_model
    scales = 4 * layers * rows if config.weight.bits == 8 else 0
    return matrices * config.weight.bits / 8 + scales + rest * config.param.bits / 8


def kv_cache_bytes(config: GPTConfig, layout: Layout, *, rows: int, context: int) -> float:
    """Keys and values of a rank for `rows` requests of `context` tokens; 8-bit types have an f32 scale a head."""
    bits = dtype_of(config.kv_cache_dtype).bits
    head = config.d_head * bits / 8 + (4 if bits == 8 else 0)
    return 2 * stage_layers(config, layout) * Share.of(config, layout.tp).kv_heads * rows * context * head


def inference_memory(config: GPTConfig, layout: Layout, run: InferenceRun, machine: Machine) -> Memory:
    """Memory of the fullest pipeline stage at the end of generation; prompts are computed one request at a time.

    Raises:
        InputError: the model cannot be cut this way, or the context is too long for it.
    """
    layout.check(config, run)
    share, e, rows = Share.of(config, layout.tp), config.compute.bits // 8, run.rows(layout)
    tokens = max(rows, run.prompt)
    width = 4 * config.d_model + (share.heads + 2 * share.kv_heads) * config.d_head + 3 * share.ffn
    scores = 0 if config.use_flash_attention else share.heads * run.prompt**2 * e
    stages = (Memory(
        weights=weight_bytes(config, layout, stage),
        kv_cache=kv_cache_bytes(config, layout, rows=rows, context=run.context),
        activations=tokens * e * width + scores,
        logits=rows * 4 * config.vocab_size if stage == layout.pp - 1 else 0,
        buffers=machine.reserved_bytes) for stage in {0, layout.pp - 1})
    return max(stages, key=lambda memory: memory.total)
