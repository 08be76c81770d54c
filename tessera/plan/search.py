"""Meshes that fit, the best first.

In: a GPTConfig, a machine, a number of devices, a batch. Out: plans in the order of their speed, and what was left
out for which reason. Called by the command line and by programs that choose a mesh; plan.words explains the result.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tessera.errors import InputError
from tessera.models.config import GPTConfig
from tessera.models.gpt_plan import MESH_AXES
from tessera.plan.inference import InferenceTime, inference_time
from tessera.plan.layout import RECOMPUTE, InferenceRun, Layout, TrainingRun
from tessera.plan.machine import GB200_NVL72, Machine
from tessera.plan.memory import Memory, inference_memory, training_memory
from tessera.plan.training import StepTime, model_flops, training_time

_MOST_DEVICES = 100_000
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_PIECES = (1, 2, 3, 4, 6, 8)
_MOST_IDLE = 0.1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout with what it needs and what it does.

    Attributes:
        config, machine, layout, run: what was asked.
        memory: bytes of the fullest rank.
        time: seconds, a StepTime for a TrainingRun and an InferenceTime for an InferenceRun.
    """

    config: GPTConfig
    machine: Machine
    layout: Layout
    run: TrainingRun | InferenceRun
    memory: Memory
    time: StepTime | InferenceTime

    @property
    def fits(self) -> bool:
        """The fullest rank's bytes are there."""
        return self.memory.total <= self.machine.memory_bytes

    @property
    def seconds(self) -> float:
        """Of an optimizer step, or of all the requests."""
        if isinstance(self.time, StepTime):
            return self.time.total
        assert isinstance(self.run, InferenceRun)
        return self.time.total(self.run, self.layout)

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens, or generated ones with the prompts' time counted, of all devices."""
        run = self.run
        tokens = run.global_batch * run.seq_len if isinstance(run, TrainingRun) else run.batch * run.new_tokens
        return tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of a device in training: nothing recomputed is counted.

        Raises:
            InputError: the plan is not one of training.
        """
        if not isinstance(self.run, TrainingRun):
            raise InputError("tflops: a plan of inference given; expected one of training")
        return model_flops(self.config, self.run) / (self.seconds * self.layout.devices) / 1e12


@dataclass(frozen=True, kw_only=True)
class Search:
    """Result of a search.

    Attributes:
        plans: those that fit, the fastest first.
        refused: shapes that were not considered, with the reason.
        too_large: of the plans that do not fit, the one that needs least memory for each shape (tp, pp, dp).
    """

    plans: list[Plan]
    refused: dict[tuple[int, int, int], str] = field(default_factory=dict)
    too_large: dict[tuple[int, int, int], Plan] = field(default_factory=dict)

    @property
    def best(self) -> Plan:
        """The fastest plan that fits.

        Raises:
            InputError: none fits; the message says why.
        """
        if self.plans:
            return self.plans[0]
        if self.too_large:
            least = min(self.too_large.values(), key=lambda plan: plan.memory.total)
            raise InputError(
                f"devices: {least.layout.devices} of {least.machine.name} given; none of the layouts fits: the "
                f"smallest ({least.layout.sizes}) needs {least.memory.total / 1e9:.1f} GB of "
                f"{least.machine.memory_bytes / 1e9:.1f} GB a device")
        (reason, count), = Counter(self.refused.values()).most_common(1) or [("no mesh of these sizes", 1)]
        raise InputError(f"devices: no mesh to consider; {count} of {max(1, len(self.refused))} shapes refused with: "
                         f"{reason}")


def plan_training(config: GPTConfig, layout: Layout, run: TrainingRun, machine: Machine) -> Plan:
    """The plan of one given layout, whether it fits or not.

    Raises:
        InputError: the model or the batch cannot be cut this way.
    """
    return Plan(config=config, machine=machine, layout=layout, run=run,
                memory=training_memory(config, layout, run, machine),
                time=training_time(config, layout, run, machine))


def plan_inference(config: GPTConfig, layout: Layout, run: InferenceRun, machine: Machine) -> Plan:
    """The plan of one given layout, whether it fits or not.

    Raises:
        InputError: the model cannot be cut this way, or the context is too long for it.
    """
    return Plan(config=config, machine=machine, layout=layout, run=run,
                memory=inference_memory(config, layout, run, machine),
                time=inference_time(config, layout, run, machine))


def search_training(
    config: GPTConfig, machine: Machine, devices: int, *, global_batch: int, seq_len: int | None = None,
    matmul_dtype: str = "", tp: int | None = None, pp: int | None = None, dp: int | None = None,
    virtual_stages: int | None = None, micro_batch: int | None = None, recompute: str | None = None,
    zero: int | None = None,
) -> Search:
    """Layouts for training, by seconds of a step.

    Args:
        devices: to use, all of them.
        global_batch, seq_len: sequences of a step and their tokens; default the model's longest.
        matmul_dtype: of the layers' matmuls; default compute_dtype.
        tp, pp, dp, virtual_stages, micro_batch, recompute, zero: fix one instead of trying several. A fixed tp or pp
            may cut unevenly; of what is tried, tp divides heads and neurons, and the fullest stage has at most a
            tenth more than the mean.

    Raises:
        InputError: a value that cannot be.
    """
    pieces, micros = _choices(virtual_stages, _PIECES), _choices(micro_batch, _MICRO_BATCHES)
    if recompute is not None and recompute not in RECOMPUTE:
        raise InputError(f"recompute: {recompute!r} given; expected one of {', '.join(RECOMPUTE)}")
    policies = ("none", "full") if config.use_flash_attention else RECOMPUTE
    runs = [TrainingRun(
        global_batch=global_batch, seq_len=seq_len or config.max_seq_len, micro_batch=micro, recompute=policy,
        matmul_dtype=matmul_dtype) for micro in micros for policy in _choices(recompute, policies)]
    runs[0].check(config)
    found = Search(plans=[])
    for shape in _shapes(config, devices, (tp, pp, dp), found):
        layouts = list(_layouts(config, shape, pieces, (zero,) if zero is not None else (0, 1, 3)))
        for layout, run in itertools.product(layouts, runs):
            if _suits(config, layout, run, is_free=virtual_stages is None):
                _sort_in(found, plan_training(config, layout, run, machine))
        if not any(global_batch % (shape[2] * run.micro_batch) == 0 for run in runs):
            found.refused[shape] = f"a batch of {global_batch} does not divide among dp={shape[2]}"
    return _finish(found)


def search_inference(
    config: GPTConfig, machine: Machine, devices: int, run: InferenceRun, *, tp: int | None = None,
    pp: int | None = None, dp: int | None = None,
) -> Search:
    """Layouts for generation, by seconds until all requests are done.

    Args:
        devices: to use, all of them.
        tp, pp, dp: fix one instead of trying several.

    Raises:
        InputError: a value that cannot be.
    """
    run.check(config)
    found = Search(plans=[])
    for shape in _shapes(config, devices, (tp, pp, dp), found):
        layout = Layout(tp=shape[0], pp=shape[1], dp=shape[2])
        _sort_in(found, plan_inference(config, layout, run, machine))
    return _finish(found)


def choose_mesh(
    config: GPTConfig, *, machine: Machine = GB200_NVL72, devices: int = 72, global_batch: int = 256,
    seq_len: int | None = None,
) -> tuple[tuple[str, str, str], tuple[int, int, int]]:
    """Axes and shape of the mesh that trains fastest, for `dist.mesh(devices, axes, shape)`.

    Raises:
        InputError: no mesh fits.
    """
    layout = search_training(config, machine, devices, global_batch=global_batch, seq_len=seq_len).best.layout
    return MESH_AXES, (layout.pp, layout.dp, layout.tp)


def _sort_in(found: Search, plan: Plan) -> None:
    shape = plan.layout.shape
    if plan.fits:
        found.plans.append(plan)
    elif shape not in found.too_large or plan.memory.total < found.too_large[shape].memory.total:
        found.too_large[shape] = plan


def _finish(found: Search) -> Search:
    """Plans in order, and shapes of which some plan fits no longer among those that are too large."""
    found.plans.sort(key=lambda plan: (plan.seconds, plan.memory.total))
    for plan in found.plans:
        found.too_large.pop(plan.layout.shape, None)
    return found


def _choices(fixed, free: Iterable) -> tuple:
    return tuple(free) if fixed is None else (fixed,)


def _shapes(
    config: GPTConfig, devices: int, fixed: tuple[int | None, int | None, int | None], found: Search,
) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, dp) with `devices` ranks that the model can be cut over; the reasons of the others go to `found`."""
    if isinstance(devices, bool) or not isinstance(devices, int) or not 1 <= devices <= _MOST_DEVICES:
        raise InputError(f"devices: {devices!r} given; expected 1..{_MOST_DEVICES}")
    for name, size in zip(("tp", "pp", "dp"), fixed):
        if size is not None and (size < 1 or devices % size):
            raise InputError(f"{name}: {size} given; expected a divisor of devices = {devices}")
    for tp, pp in itertools.product(_divisors(devices), repeat=2):
        if devices % (tp * pp):
            continue
        shape = (tp, pp, devices // (tp * pp))
        if any(wanted is not None and wanted != size for wanted, size in zip(fixed, shape)):
            continue
        reason = _uneven_tp(config, tp) if fixed[0] is None else ""
        if fixed[1] is None:
            reason = reason or _uneven_pp(config, pp)
        if reason:
            found.refused[shape] = reason
        else:
            Layout(tp=tp, pp=pp).check(config)
            yield shape


def _uneven_tp(config: GPTConfig, tp: int) -> str:
    """Why tensor-parallel ranks would have unequal parts, or ""."""
    if config.n_heads % tp:
        return f"{config.n_heads} query heads do not divide among tp={tp}"
    if config.n_kv_heads % tp and tp % config.n_kv_heads:
        return f"{config.n_kv_heads} key/value heads do not divide among tp={tp}, nor tp among them"
    if config.vocab_size < tp:
        return f"{config.vocab_size} tokens of vocabulary are fewer than tp={tp}"
    return f"{config.d_ffn} neurons do not divide among tp={tp}" if config.d_ffn % tp else ""


def _uneven_pp(config: GPTConfig, pp: int) -> str:
    """Why pipeline stages would be too unequal, or ""."""
    fullest = -(-config.n_layers // pp)
    if pp > config.n_layers:
        return f"{config.n_layers} layers are fewer than pp={pp}"
    if fullest * pp > (1 + _MOST_IDLE) * config.n_layers:
        return f"{config.n_layers} layers among pp={pp}: the fullest stage has over {_MOST_IDLE:.0%} more than the mean"
    return ""


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _layouts(
    config: GPTConfig, shape: tuple[int, int, int], pieces: tuple[int, ...], zeros: tuple[int, ...],
) -> Iterator[Layout]:
    tp, pp, dp = shape
    for v, zero in itertools.product(pieces, zeros):
        if (v > 1 and pp == 1) or pp * v > config.n_layers:
            continue
        if len(zeros) > 1 and ((zero and dp == 1) or (zero == 3 and pp > 1)):  # ZeRO 3 gathers for every micro-batch
            continue
        yield Layout(tp=tp, pp=pp, dp=dp, virtual_stages=v, sequence_parallel=tp > 1, zero=zero)


def _suits(config: GPTConfig, layout: Layout, run: TrainingRun, *, is_free: bool) -> bool:
    """The batch divides; pieces that are free to choose divide the layers, and micro-batches come in rounds of pp."""
    if run.global_batch % (layout.dp * run.micro_batch):
        return False
    v = layout.virtual_stages
    if v == 1 or not is_free:
        return True
    return config.n_layers % (layout.pp * v) == 0 and run.n_micro(layout) % layout.pp == 0
