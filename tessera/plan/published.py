"""The planner against published figures: which rows its constants are fitted on, and the error on all.

In: nothing. Out: rows with what was published, what is predicted and the error. Called by `tessera plan --check`.

Times. Three constants are fitted, each by bisection on the rows marked `fitted`, so that the mean of the logarithms
of predicted / published is zero on them:
    MATMUL_EFFICIENCY   A100: four rows of SC21's table 1, four of Korthikanti's times
    FP8_EFFICIENCY      H100: Llama 3 70B in FP8, Megatron Bridge
    HBM2E_CLOCK         H100 with HBM2e at 500 W: Llama 3.1 8B with torch.compile, torchtitan
That is 10 of the 27 published times; the others are held out. All other constants are data-sheet values or named in
`Machine.assumed`. Published GiB of activations and state are closed forms: to match them shows that the algebra is
right, and is no evidence about times.

Sources: Narayanan et al. 2021 (SC21, arXiv:2104.04473) table 1, its layouts from Megatron-LM's examples/sc21;
Korthikanti et al. 2022 (arXiv:2205.05198) tables 3 to 5; Megatron Bridge's performance summary 26.02, layouts from
that of 25.11; torchtitan's benchmarks/llama3_h100_202412_torchtitan.md.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tessera.models.config import GPTConfig
from tessera.plan.layout import Layout, TrainingRun
from tessera.plan.machine import A100, GB200_NVL72, GB300_NVL72, GIB, H100, H100_500W, Machine
from tessera.plan.memory import layer_activation_bytes, optimizer_bytes, pieces_in_flight
from tessera.plan.presets import megatron_gpt, model_named
from tessera.plan.training import training_time


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published time.

    Attributes:
        name, source: what was run, and who published it.
        config, layout, run, machine: the inputs.
        published, unit: the figure: "TFLOP/s", "s" or "tok/s"; the first and the last are per device.
        fitted: "" for a row that is held out, else the constant that was fitted on it.
        assumed: inputs that the source does not state.
    """

    name: str
    source: str
    config: GPTConfig
    layout: Layout
    run: TrainingRun
    machine: Machine
    published: float
    unit: str
    fitted: str = ""
    assumed: str = ""

    def predict(self, machine: Machine | None = None) -> float:
        """The planner's figure in this row's unit, for another machine if one is given."""
        seconds = training_time(self.config, self.layout, self.run, machine or self.machine).total
        if self.unit == "s":
            return seconds
        amount = (_megatron_flops(self.config, self.run) / 1e12 if self.unit == "TFLOP/s"
                  else self.run.global_batch * self.run.seq_len)
        return amount / (seconds * self.layout.devices)

    @property
    def error(self) -> float:
        """Predicted seconds over published seconds, minus 1: above 0 where the planner is too slow."""
        ratio = self.predict() / self.published
        return (ratio if self.unit == "s" else 1 / ratio) - 1


def _megatron_flops(config: GPTConfig, run: TrainingRun) -> float:
    """SC21's F = 96 B s L h^2 (1 + s / (6 h) + V / (16 L h)), recomputation included."""
    n, h, s, v = config.n_layers, config.d_model, run.seq_len, config.vocab_size
    return 96 * run.global_batch * s * n * h * h * (1 + s / (6 * h) + v / (16 * n * h))


def _sc21() -> list[Row]:
    # parameters, h, L, heads, tp, pp, pieces a rank, micro-batch, GPUs, batch, TFLOP/s
    table = (
        ("1.7B", 2304, 24, 24, 1, 1, 1, 16, 32, 512, 137), ("3.6B", 3072, 30, 32, 2, 1, 1, 16, 64, 512, 138),
        ("7.5B", 4096, 36, 32, 4, 1, 1, 16, 128, 512, 142), ("18B", 6144, 40, 48, 8, 1, 1, 8, 256, 1024, 135),
        ("39B", 8192, 48, 64, 8, 2, 1, 4, 512, 1536, 138), ("76B", 10240, 60, 80, 8, 4, 3, 2, 1024, 1792, 140),
        ("145B", 12288, 80, 96, 8, 8, 2, 2, 1536, 2304, 148), ("310B", 16384, 96, 128, 8, 16, 2, 1, 1920, 2160, 155),
        ("530B", 20480, 105, 128, 8, 35, 3, 1, 2520, 2520, 163), ("1T", 25600, 128, 160, 8, 64, 1, 1, 3072, 3072, 163))
    rows = []
    for name, h, n_layers, heads, tp, pp, pieces, micro, gpus, batch, tflops in table:
        rows.append(Row(
            name=f"GPT {name}", source="SC21", config=megatron_gpt(n_layers=n_layers, d_model=h, n_heads=heads),
            layout=Layout(tp=tp, pp=pp, dp=gpus // (tp * pp), virtual_stages=pieces),
            run=TrainingRun(global_batch=batch, micro_batch=micro, seq_len=2048, recompute="full", dropout=True,
                            overlap_dp=pp == 1),
            machine=A100, published=tflops, unit="TFLOP/s", assumed="overlap",
            fitted="MATMUL_EFFICIENCY" if name in ("1.7B", "18B", "145B", "1T") else ""))
    return rows


# name, L, h, heads, tp, pp, pieces a rank, batch, micro-batch, full and selective s, GiB: without, with both, state
_KORTHIKANTI = (
    ("22B", 48, 6144, 64, 8, 1, 1, 4, 4, 1.42, 1.10, 59.25, 9.56, 45.56),
    ("175B", 96, 12288, 96, 8, 8, 3, 64, 1, 18.13, 13.75, 66.84, 12.35, 45.56),
    ("530B", 105, 20480, 128, 8, 35, 3, 280, 1, 49.05, 37.83, 114.02, 23.08, 31.64),
    ("1T", 128, 25600, 160, 8, 64, 1, 512, 1, 94.42, 71.49, 131.25, 26.56, 32.96))


def _korthikanti() -> list[Row]:
    rows = []
    for name, n_layers, h, heads, tp, pp, pieces, batch, micro, full, selective, *_ in _KORTHIKANTI:
        for recompute, seconds in (("full", full), ("selective", selective)):
            rows.append(Row(
                name=f"GPT {name}, {recompute}", source="Korthikanti",
                config=megatron_gpt(n_layers=n_layers, d_model=h, n_heads=heads),
                layout=Layout(tp=tp, pp=pp, virtual_stages=pieces, sequence_parallel=recompute == "selective"),
                run=TrainingRun(global_batch=batch, micro_batch=micro, seq_len=2048, recompute=recompute, dropout=True),
                machine=A100, published=seconds, unit="s", assumed="overlap",
                fitted="MATMUL_EFFICIENCY" if name in ("22B", "530B") else ""))
    return rows


def _bridge() -> list[Row]:
    table = (
        ("H100", H100, Layout(tp=4, pp=8, dp=2, virtual_stages=5, sequence_parallel=True, zero=1), 128, 1, 1621),
        ("GB200", GB200_NVL72, Layout(dp=64, zero=3), 256, 2, 4040),
        ("GB300", GB300_NVL72, Layout(dp=64, zero=3), 256, 2, 5003))
    return [Row(
        name=f"Llama3 70B FP8, {name}", source="Megatron Bridge", config=model_named("llama3-70b"), layout=layout,
        run=TrainingRun(global_batch=batch, micro_batch=micro, seq_len=8192, matmul_dtype="fp8", overlap_tp=True),
        machine=machine, published=tokens, unit="tok/s", fitted="FP8_EFFICIENCY" if name == "H100" else "",
        assumed="25.11's layout, recompute, overlap")
        for name, machine, layout, batch, micro, tokens in table]


def _torchtitan() -> list[Row]:
    fsdp, two, three = Layout(dp=8, zero=3), Layout(tp=8, dp=32, zero=3, sequence_parallel=True), Layout(
        tp=8, pp=8, dp=8, zero=2, sequence_parallel=True)
    small = TrainingRun(global_batch=16, micro_batch=2, seq_len=8192, recompute="selective")
    large = TrainingRun(
        global_batch=512, micro_batch=16, seq_len=8192, recompute="full", matmul_dtype="fp8", overlap_tp=True)
    piped = dataclasses.replace(large, global_batch=256, micro_batch=4)
    table = (
        ("8B FSDP", "llama3-8b", fsdp, dataclasses.replace(small, fused=False), 5762, "twice the traffic"),
        ("8B FSDP, compiled", "llama3-8b", fsdp, small, 6667, "recompute"),
        ("8B FSDP, compiled, FP8", "llama3-8b", fsdp, dataclasses.replace(small, matmul_dtype="fp8"), 8532,
         "recompute"),
        ("70B FSDP 32 x TP 8", "llama3-70b", two, large, 876, "overlap"),
        ("405B 1F1B", "llama3-405b", three, piped, 100, "micro-batches, ZeRO 2"),
        ("405B interleaved", "llama3-405b", dataclasses.replace(three, virtual_stages=2), piped, 128,
         "pieces, micro-batches, ZeRO 2"))
    return [Row(
        name=name, source="torchtitan", config=model_named(model), layout=layout, run=run, machine=H100_500W,
        published=tokens, unit="tok/s", assumed=assumed, fitted="HBM2E_CLOCK" if name == "8B FSDP, compiled" else "")
        for name, model, layout, run, tokens, assumed in table]


def rows() -> list[Row]:
    """Every published time."""
    return [*_sc21(), *_korthikanti(), *_bridge(), *_torchtitan()]


def fit() -> dict[str, float]:
    """The three constants from the rows that are marked for them, one after the other (module docstring)."""
    found: dict[str, float] = {}
    fields = {"MATMUL_EFFICIENCY": "matmul_efficiency", "FP8_EFFICIENCY": "fp8_efficiency", "HBM2E_CLOCK": "clock"}
    for constant, field in fields.items():
        chosen = [row for row in rows() if row.fitted == constant]
        before = {fields[name]: value for name, value in found.items()}

        def bias(value: float, chosen=chosen, field=field, before=before) -> float:
            logs = []
            for row in chosen:
                machine = dataclasses.replace(row.machine, **{**before, field: value})
                ratio = row.predict(machine) / row.published
                logs.append(math.log(ratio if row.unit == "s" else 1 / ratio))
            return sum(logs)

        found[constant] = _bisect(bias, 0.05, 1.0)
    return found


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def error_summary() -> dict[str, float]:
    """Median of the errors' sizes over the fitted and the held-out rows, by source; and the largest held out."""
    held = [row for row in rows() if not row.fitted]
    found = {"median error, fitted rows": _median([row for row in rows() if row.fitted]),
             "median error, held-out rows": _median(held),
             "largest error, held-out rows": max(abs(row.error) for row in held)}
    for source in dict.fromkeys(row.source for row in held):
        found[f"median error, held-out rows of {source}"] = _median([row for row in held if row.source == source])
    return found


def _median(chosen: list[Row]) -> float:
    return statistics.median(abs(row.error) for row in chosen)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A published number of GiB and the planner's."""

    name: str
    published: float
    predicted: float


def sizes() -> list[Size]:
    """Korthikanti's activations and state: closed forms, to be matched to the printed digits."""
    found = []
    for name, n_layers, h, heads, tp, pp, pieces, batch, micro, _, _, plain, both, state in _KORTHIKANTI:
        config = megatron_gpt(n_layers=n_layers, d_model=h, n_heads=heads)
        policies = (("nothing recomputed", False, "none", plain),
                    ("sequence parallel, selective", True, "selective", both))
        for what, parallel, recompute, published in policies:
            layout = Layout(tp=tp, pp=pp, virtual_stages=pieces, sequence_parallel=parallel)
            run = TrainingRun(global_batch=batch, micro_batch=micro, seq_len=2048, recompute=recompute, dropout=True)
            layers = n_layers / pp * pieces_in_flight(layout, run.n_micro(layout), 0)
            n_bytes = layers * layer_activation_bytes(config, layout, run)
            found.append(Size(name=f"GPT {name}: {what}", published=published, predicted=n_bytes / GIB))
        per_param = config.compute.bits // 8 + run.grad_bytes + optimizer_bytes(config)
        n_bytes = 12 * n_layers * h * h * per_param / (tp * pp)
        found.append(Size(name=f"GPT {name}: state", published=state, predicted=n_bytes / GIB))
    return found
