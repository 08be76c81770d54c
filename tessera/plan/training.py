"""Seconds of a training step, by where they go.

In: a GPTConfig, a layout, a run, a machine. Out: a `StepTime`. Called by plan.search and plan.published.

A micro-batch's pass through a rank is the sum of: the matmuls, 2 FLOPs a parameter and token forward and 4 backward,
at the speed that large matmuls reach; attention's two products; everything elementwise, as the memory traffic of
the saved activations (2 passes over them forward, 4 backward); what is recomputed; tensor-parallel all-reduces, two a
layer each way (Shoeybi et al. 2019, arXiv:1909.08053; sequence parallelism moves the same bytes). The step is the
slowest rank's micro-batches, a bubble of (pp - 1) / v of them (Narayanan et al. 2021, arXiv:2104.04473), what of the
data-parallel traffic does not hide behind computation, and the optimizer's pass over its state.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tessera.models.config import GPTConfig
from tessera.plan.collectives import all_reduce_time, group_of, reduce_scatter_time, send_time
from tessera.plan.layout import Layout, Share, TrainingRun, stage_layers, stage_params
from tessera.plan.machine import Machine
from tessera.plan.memory import layer_activation_bytes, optimizer_bytes, score_bytes

# Passes over the saved activations' bytes: written and read forward, and twice that backward.
_PASSES_FORWARD, _PASSES_BACKWARD = 2, 4
_UNFUSED = 2  # operations that are not fused read and write what lies between them as well


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step on the slowest rank; they add up to `total`.

    Attributes:
        matmul, attention, elementwise: forward and backward passes.
        recompute: what the backward pass computes again.
        tensor_comm, pipeline_comm, data_comm: transfers that nothing hides.
        bubble: waiting for the pipeline to fill and drain.
        optimizer: Adam's pass over its state.
    """

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    recompute: float = 0.0
    tensor_comm: float = 0.0
    pipeline_comm: float = 0.0
    data_comm: float = 0.0
    bubble: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def scaled(self, factor: float) -> StepTime:
        """Every part times `factor`."""
        return StepTime(**{name: value * factor for name, value in self.parts().items()})

    def plus(self, other: StepTime) -> StepTime:
        """Part by part."""
        mine, others = self.parts(), other.parts()
        return StepTime(**{name: mine[name] + others[name] for name in mine})


def mean_keys(config: GPTConfig, seq_len: int) -> float:
    """Keys that attention multiplies for a token, averaged over tokens and layers: all of them without flash
    attention, which computes masked scores too; else those that a causal mask and the window leave."""
    if not config.use_flash_attention:
        return seq_len
    total = 0.0
    for layer in range(config.n_layers):
        window = min(config.window(layer) or seq_len, seq_len)
        total += window * (seq_len - window) + window * (window + 1) / 2
    return total / (seq_len * config.n_layers)


def model_flops(config: GPTConfig, run: TrainingRun) -> float:
    """FLOPs of a step that the model needs: 6 a matrix parameter and token, and attention; nothing recomputed."""
    matrices = config.n_layers * Share.of(config, 1).matmul_params(config) + config.vocab_size * config.d_model
    attention = 12 * config.n_layers * config.n_heads * config.d_head * mean_keys(config, run.seq_len)
    return run.global_batch * run.seq_len * (6 * matrices + attention)


def training_time(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> StepTime:
    """Seconds of one optimizer step (module docstring).

    Raises:
        InputError: the model or the batch cannot be cut this way, or the machine lacks the type.
    """
    layout.check(config, run)
    n_micro = run.n_micro(layout)
    layers = _layer_time(config, layout, run, machine).scaled(stage_layers(config, layout))
    per_pass = layers.plus(StepTime(pipeline_comm=_stage_sends(config, layout, run, machine)))
    slowest = per_pass.plus(_head_time(config, layout, run, machine))
    bubble = per_pass.total * (layout.pp - 1) / layout.virtual_stages
    return slowest.scaled(n_micro).plus(StepTime(
        bubble=bubble, data_comm=_data_comm(config, layout, run, machine, compute=layers.total),
        optimizer=_optimizer_time(config, layout, run, machine)))


def _layer_time(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> StepTime:
    """A micro-batch through one layer, forward and backward."""
    share, tokens = Share.of(config, layout.tp), run.micro_batch * run.seq_len
    matmul = 2 * tokens * share.matmul_params(config) / machine.matmul_flops(run.dtype(config))
    flops = 4 * tokens * mean_keys(config, run.seq_len) * share.heads * config.d_head
    flash = config.use_flash_attention
    attention = flops / machine.attention_flops(flash=flash, dtype=run.dtype(config))
    speed = machine.memory_speed / (1 if run.fused else _UNFUSED)
    saved = layer_activation_bytes(config, layout, run, recompute="none") / speed
    n_reduce = 1 if config.use_parallel_attention else 2
    reduce = n_reduce * _tensor_reduce(config, layout, run, machine)
    again = 0.0
    if run.recompute == "full":
        again = matmul + attention + _PASSES_FORWARD * saved
    elif run.recompute == "selective" and not flash:
        again = attention + _PASSES_FORWARD * score_bytes(config, layout, run) / speed
    return StepTime(
        matmul=3 * matmul, attention=attention * (3.5 if flash else 3),  # flash computes the scores again
        elementwise=(_PASSES_FORWARD + _PASSES_BACKWARD) * saved, recompute=again,
        tensor_comm=reduce * (3 if run.recompute == "full" else 2))


def _tensor_reduce(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> float:
    """Visible seconds of an all-reduce of a micro-batch's activations."""
    seconds = all_reduce_time(run.activation_bytes(config), group_of("tp", layout, machine), machine)
    return seconds / layout.tp if run.overlap_tp else seconds


def _head_time(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> StepTime:
    """A micro-batch through the output projection and the loss, forward and backward, in compute_dtype."""
    tokens, vocab = run.micro_batch * run.seq_len, Share.of(config, layout.tp).vocab
    logits = tokens * vocab * (config.compute.bits / 8 + 4)
    return StepTime(
        matmul=6 * tokens * vocab * config.d_model / machine.matmul_flops(config.compute.name),
        elementwise=2 * logits / machine.memory_speed)


def _stage_sends(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> float:
    """Activations to the next stage and gradients back, once a piece; tensor-parallel ranks send a part each."""
    n_bytes = run.activation_bytes(config) / layout.tp
    return 2 * layout.virtual_stages * send_time(n_bytes, group_of("pp", layout, machine), machine)


def _data_comm(
    config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine, *, compute: float,
) -> float:
    """Visible seconds of gathering weights and summing gradients over the data-parallel ranks.

    Args:
        compute: seconds of a micro-batch's layers, behind which transfers hide.
    """
    if layout.dp == 1:
        return 0.0
    group = group_of("dp", layout, machine)
    params, e = stage_params(config, layout, 0), config.compute.bits // 8
    gather = reduce_scatter_time(params * e, group, machine)
    if layout.zero == 3:  # weights forward and backward, gradients in e bytes; every micro-batch
        return run.n_micro(layout) * max(0.0, 3 * gather - compute)
    seconds = all_reduce_time(params * run.grad_bytes, group, machine)
    if layout.zero:  # gradients to their owners, updated weights back
        seconds = seconds / 2 + gather
    return max(0.0, seconds - (compute * 2 / 3 if run.overlap_dp else 0.0))


def _optimizer_time(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> float:
    """Gradients read, state read and written, weights written."""
    params = stage_params(config, layout, 0) / (layout.dp if layout.zero else 1)
    return params * (run.grad_bytes + 2 * optimizer_bytes(config) + config.compute.bits / 8) / machine.memory_speed
