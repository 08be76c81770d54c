"""Seconds of a prompt and of a generated token, by a roofline.

In: a GPTConfig, a layout, a run, a machine. Out: an `InferenceTime`. Called by plan.search.

A generated token reads every weight of a rank and every cached key and value once; it takes the longer of that
traffic and of the arithmetic (Williams, Waterman, Patterson 2009; Pope et al. 2022, arXiv:2211.05102), and after it
two all-reduces a layer, which at such sizes are latency. Pipeline stages run one after the other for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.models.config import GPTConfig
from tessera.plan.collectives import all_reduce_time, group_of, send_time
from tessera.plan.layout import InferenceRun, Layout, Share, stage_layers
from tessera.plan.machine import Machine
from tessera.plan.memory import kv_cache_bytes, weight_bytes
from tessera.plan.training import mean_keys


@dataclass(frozen=True, kw_only=True)
class InferenceTime:
    """Seconds of a replica.

    Attributes:
        prefill: one request's prompt through all stages.
        weights, kv_cache, compute: a token's weight traffic, cache traffic and arithmetic, for all its requests.
        tensor_comm, pipeline_comm: its transfers.
    """

    prefill: float
    weights: float
    kv_cache: float
    compute: float
    tensor_comm: float
    pipeline_comm: float

    @property
    def per_token(self) -> float:
        """Seconds from one generated token to the next, in the middle of a generation."""
        return max(self.weights + self.kv_cache, self.compute) + self.tensor_comm + self.pipeline_comm

    @property
    def bound(self) -> str:
        """The part that is longest: "weights", "kv_cache", "compute" or "communication"."""
        comm = self.tensor_comm + self.pipeline_comm
        if comm > max(self.weights + self.kv_cache, self.compute):
            return "communication"
        if self.compute > self.weights + self.kv_cache:
            return "compute"
        return "weights" if self.weights >= self.kv_cache else "kv_cache"

    def total(self, run: InferenceRun, layout: Layout) -> float:
        """Seconds until the busiest replica's requests are done: prompts one by one, then tokens together."""
        return run.rows(layout) * self.prefill + run.new_tokens * self.per_token


def inference_time(config: GPTConfig, layout: Layout, run: InferenceRun, machine: Machine) -> InferenceTime:
    """Seconds of a prompt and of a token (module docstring).

    Raises:
        InputError: the model cannot be cut this way, or the context is too long for it.
    """
    layout.check(config, run)
    rows, middle = run.rows(layout), run.prompt + run.new_tokens / 2
    keys = sum(min(config.window(layer) or middle, middle) for layer in range(config.n_layers)) / config.n_layers
    cache = kv_cache_bytes(config, layout, rows=rows, context=1) * keys * layout.pp
    # the head reads its table and multiplies with it; of the embedding a token reads one row
    stages = range(layout.pp)
    embedding = Share.of(config, layout.tp).vocab * config.d_model * config.param.bits / 8
    tied = config.tie_embeddings and layout.pp == 1
    weights = sum(weight_bytes(config, layout, stage) for stage in stages) - (0 if tied else embedding)
    tensor_comm, pipeline_comm = _transfers(config, layout, machine, tokens=rows)
    return InferenceTime(
        prefill=_prefill(config, layout, run, machine),
        weights=weights / machine.memory_speed, kv_cache=cache / machine.memory_speed,
        compute=_compute(config, layout, machine, tokens=rows, keys=keys, heads=rows),
        tensor_comm=tensor_comm, pipeline_comm=pipeline_comm)


def _compute(config: GPTConfig, layout: Layout, machine: Machine, *, tokens: int, keys: float, heads: int) -> float:
    """Arithmetic of all stages: `tokens` with `keys` to look at each, `heads` of them through the output projection.

    8-bit weights are expanded to compute_dtype, so that the products run at its speed.
    """
    share, dtype = Share.of(config, layout.tp), config.compute.name
    layers = layout.pp * stage_layers(config, layout)
    matmul = 2 * (tokens * layers * share.matmul_params(config) + heads * share.vocab * config.d_model)
    attention = 4 * tokens * layers * keys * share.heads * config.d_head
    speed = machine.attention_flops(flash=config.use_flash_attention, dtype=dtype)
    return matmul / machine.matmul_flops(dtype) + attention / speed


def _prefill(config: GPTConfig, layout: Layout, run: InferenceRun, machine: Machine) -> float:
    """One prompt: arithmetic, or the weights' traffic where that is longer, and transfers."""
    compute = _compute(config, layout, machine, tokens=run.prompt, keys=mean_keys(config, run.prompt), heads=1)
    traffic = layout.pp * weight_bytes(config, layout, 0) / machine.memory_speed
    return max(compute, traffic) + sum(_transfers(config, layout, machine, tokens=run.prompt))


def _transfers(config: GPTConfig, layout: Layout, machine: Machine, *, tokens: int) -> tuple[float, float]:
    """Tensor-parallel all-reduces of all layers, and sends between the stages."""
    n_bytes = tokens * config.d_model * config.compute.bits / 8
    n_reduce = (1 if config.use_parallel_attention else 2) * layout.pp * stage_layers(config, layout)
    reduce = all_reduce_time(n_bytes, group_of("tp", layout, machine), machine)
    send = send_time(n_bytes / layout.tp, group_of("pp", layout, machine), machine)
    return n_reduce * reduce, (layout.pp - 1) * send
