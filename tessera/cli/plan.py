"""`tessera plan`: which mesh to train or serve a model on, and why; `--check` compares with published figures.

In: PlanOptions. Out: tables and sentences, or JSON, on stdout. Called by cli.app.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tessera.cli.info import read_headers
from tessera.cli.loading import resolve
from tessera.errors import InputError
from tessera.formats.json import read_json_object
from tessera.models.config import GPTConfig
from tessera.plan import InferenceRun, Machine, Plan, Search, machine_named, search_inference, search_training
from tessera.plan.inference import InferenceTime
from tessera.plan.layout import TrainingRun
from tessera.plan.presets import MODELS, model_named
from tessera.plan.published import Row, Size, error_summary, rows, sizes
from tessera.plan.words import explain

_WIDTH = 120  # of a table when stdout is not a terminal


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the command line asks; a layout's parts are None where several are to be tried.

    Attributes:
        model: a preset, a model's path, or a JSON file with GPTConfig's fields.
        machine: a preset's name or "cpu".
        devices: how many of it.
        inference: plan generation, not training.
        batch: sequences of a step, or requests at once; default 256 or 1.
        seq_len: tokens of a sequence or of a prompt; default the model's most, or 1024.
        new_tokens: to generate for each request.
        matmul_dtype: of training's matmuls; "" for the model's.
        top: shapes to show.
    """

    model: str
    machine: str
    devices: int
    inference: bool
    batch: int | None
    seq_len: int | None
    new_tokens: int
    matmul_dtype: str
    tp: int | None
    pp: int | None
    dp: int | None
    virtual_stages: int | None
    micro_batch: int | None
    recompute: str | None
    zero: int | None
    top: int


def run(options: PlanOptions, *, as_json: bool) -> None:
    """Search, and tell what was found.

    Raises:
        InputError: no mesh fits, or a value that cannot be.
    """
    if options.top < 1:
        raise InputError(f"--top: {options.top} given; expected at least 1")
    config, machine = read_config(options.model), machine_named(options.machine)
    search = _search(config, machine, options)
    words = explain(search)
    plans = _best_of_shapes(search)[: options.top]
    if as_json:
        print(json.dumps({
            "model": options.model, "parameters": config.n_params, "machine": dataclasses.asdict(machine),
            "plans": [_as_json(plan) for plan in plans], "explanation": words}))
        return
    print(f"{options.model}: {config.n_params / 1e9:.1f}e9 parameters on {options.devices} x {machine.name}")
    _show(_plan_table(plans))
    for line in words:
        print(line)
    print(f"Assumed, not from a data sheet: {', '.join(machine.assumed)}.")


def read_config(model: str) -> GPTConfig:
    """The configuration that a name or a path stands for.

    Raises:
        InputError: it is no preset, and no model's path or JSON file.
    """
    if model in MODELS:
        return model_named(model)
    path = resolve(model)
    if path.suffix == ".json":
        return GPTConfig.from_dict(read_json_object(path))
    if model != "smollm2" and not Path(model).exists():
        raise InputError(f"model: {model!r} given; expected {', '.join(MODELS)}, or the path of a model, or of a "
                         "JSON file with a configuration")
    return read_headers(path).config


def _search(config: GPTConfig, machine: Machine, options: PlanOptions) -> Search:
    shape = {"tp": options.tp, "pp": options.pp, "dp": options.dp}
    if options.inference:
        wanted = InferenceRun(
            batch=_default(options.batch, 1), new_tokens=options.new_tokens,
            prompt=_default(options.seq_len, min(1024, max(1, config.max_seq_len - options.new_tokens))))
        return search_inference(config, machine, options.devices, wanted, **shape)
    return search_training(
        config, machine, options.devices, global_batch=_default(options.batch, 256), seq_len=options.seq_len,
        matmul_dtype=options.matmul_dtype, virtual_stages=options.virtual_stages, micro_batch=options.micro_batch,
        recompute=options.recompute, zero=options.zero, **shape)


def _default(value: int | None, default: int) -> int:
    return default if value is None else value


def _best_of_shapes(search: Search) -> list[Plan]:
    best: dict[tuple[int, int, int], Plan] = {}
    for plan in search.plans:
        best.setdefault(plan.layout.shape, plan)
    return list(best.values())


def _plan_table(plans: list[Plan]) -> Table:
    training = isinstance(plans[0].run, TrainingRun)
    last = ["pieces", "micro-batch", "recompute", "ZeRO", "s/step", "tokens/s", "TFLOP/s a device"] if training else [
        "ms/token", "ms/prompt", "tokens/s", "bound by"]
    table = _table("tp", "pp", "dp", "GB a device", *last)
    for plan in plans:
        cells = [*map(str, plan.layout.shape), f"{plan.memory.total / 1e9:.1f}"]
        if isinstance(plan.time, InferenceTime):
            cells += [f"{1e3 * plan.time.per_token:.2f}", f"{1e3 * plan.time.prefill:.1f}",
                      _rate(plan.tokens_per_second), plan.time.bound.replace("_", " ")]
        elif isinstance(plan.run, TrainingRun):
            cells += [str(plan.layout.virtual_stages), str(plan.run.micro_batch), plan.run.recompute,
                      str(plan.layout.zero), f"{plan.seconds:.3f}", _rate(plan.tokens_per_second),
                      f"{plan.tflops:,.0f}"]
        table.add_row(*cells)
    return table


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"


def _as_json(plan: Plan) -> dict[str, Any]:
    told: dict[str, Any] = {
        "layout": dataclasses.asdict(plan.layout), "run": dataclasses.asdict(plan.run),
        "memory_bytes": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
        "seconds": dataclasses.asdict(plan.time), "tokens_per_second": plan.tokens_per_second}
    if isinstance(plan.time, InferenceTime):
        told["seconds"] |= {"per_token": plan.time.per_token, "total": plan.seconds}
        return {**told, "bound": plan.time.bound}
    told["seconds"]["total"] = plan.seconds
    return {**told, "tflops_per_device": plan.tflops}


def check(*, as_json: bool) -> None:
    """Print the planner's figure beside every published one, with the error."""
    times, gib, summary = rows(), sizes(), error_summary()
    if as_json:
        print(json.dumps({
            "times": [{**_row_as_json(row), "error": row.error} for row in times],
            "sizes_GiB": [dataclasses.asdict(size) for size in gib], "summary": summary}))
        return
    _show(_times_table(times))
    _show(_sizes_table(gib))
    print("Error: predicted seconds / published seconds - 1. Fitted rows set a constant; the others are held out.")
    for name, value in summary.items():
        print(f"{name}: {value:.1%}")


def _row_as_json(row: Row) -> dict[str, Any]:
    return {"source": row.source, "name": row.name, "published": row.published, "predicted": row.predict(),
            "unit": row.unit, "fitted": row.fitted, "assumed": row.assumed, "machine": row.machine.name,
            "layout": dataclasses.asdict(row.layout), "run": dataclasses.asdict(row.run)}


def _times_table(times: list[Row]) -> Table:
    table = _table("", "", "published", "predicted", "", "error", "", "assumed inputs", left=(0, 1, 4, 6, 7))
    for row in times:
        digits = 2 if row.unit == "s" else 0
        table.add_row(row.source, row.name, f"{row.published:,.{digits}f}", f"{row.predict():,.{digits}f}", row.unit,
                      f"{row.error:+.1%}", "fitted" if row.fitted else "held out", row.assumed)
    return table


def _sizes_table(gib: list[Size]) -> Table:
    table = _table("GiB a device", "published", "predicted", left=(0,))
    for size in gib:
        table.add_row(size.name, f"{size.published:.2f}", f"{size.predicted:.2f}")
    return table


def _table(*columns: str, left: tuple[int, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in left else "right")
    return table


def _show(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)
