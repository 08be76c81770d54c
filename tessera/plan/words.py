"""A plan in words: why this mesh, what binds it, what stands behind it.

In: a Search or a Plan. Out: sentences. Called by the command line.
"""

from __future__ import annotations

from collections import Counter

from tessera.plan.collectives import group_of
from tessera.plan.inference import InferenceTime
from tessera.plan.layout import Share, TrainingRun, stage_layers
from tessera.plan.search import Plan, Search
from tessera.plan.training import StepTime

_PART_WORDS = {
    "matmul": "matmuls", "attention": "attention", "elementwise": "elementwise traffic", "recompute": "recomputation",
    "tensor_comm": "tensor-parallel all-reduces", "pipeline_comm": "sends between stages",
    "data_comm": "data-parallel gradients and weights", "bubble": "the pipeline's bubble",
    "optimizer": "the optimizer's pass"}
_MEMORY_WORDS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "activations": "activations",
    "logits": "logits", "kv_cache": "keys and values", "buffers": "buffers"}
_WORK = ("matmul", "attention", "elementwise")


def explain(search: Search) -> list[str]:
    """Sentences about the best plan of a search: its axes, what binds it, the next mesh, what was left out."""
    best = search.best
    said = [*describe(best), *_runner_up(search)]
    if search.too_large:
        least = min(search.too_large.values(), key=lambda plan: plan.memory.total)
        kind, n_bytes = max(vars(least.memory).items(), key=lambda item: item[1])
        said.append(
            f"Shapes that do not fit: {len(search.too_large)}; the smallest of them ({least.layout.sizes}) needs "
            f"{least.memory.total / 1e9:.0f} GB, {n_bytes / 1e9:.0f} GB of it {_MEMORY_WORDS[kind]}.")
    if search.refused:
        reasons = [reason for reason, _ in Counter(search.refused.values()).most_common(2)]
        more = "; and so on." if len(set(search.refused.values())) > 2 else "."
        said.append(f"Shapes that were not considered: {len(search.refused)}; {'; '.join(reasons)}{more}")
    return said


def describe(plan: Plan) -> list[str]:
    """Sentences about one plan: its axes, its memory, its time."""
    return [*_axes(plan), _memory(plan), _time(plan)]


def _axes(plan: Plan) -> list[str]:
    layout, config, machine = plan.layout, plan.config, plan.machine
    said = []
    if layout.tp > 1:
        inside = "within a node" if group_of("tp", layout, machine).nodes == 1 else "across nodes, on slow links"
        said.append(f"tp={layout.tp}: every layer is cut among {layout.tp} devices {inside}.")
    heads = Share.of(config, layout.tp).heads
    if heads * layout.tp > config.n_heads:
        group = config.n_heads // config.n_kv_heads
        said.append(
            f"tp={layout.tp} does not divide {config.n_heads} query heads in groups of {group} to "
            f"{config.n_kv_heads} key/value heads: the busiest rank has {heads} heads, as with tp="
            f"{-(-config.n_heads // heads)}, where an even cut has {config.n_heads / layout.tp:.1f}.")
    if layout.pp > 1:
        pieces = f", in {layout.virtual_stages} pieces each" if layout.virtual_stages > 1 else ""
        fullest = stage_layers(config, layout)
        most = f", {fullest} on the fullest" if fullest * layout.pp > config.n_layers else ""
        said.append(f"pp={layout.pp}: {config.n_layers} layers on {layout.pp} stages{most}{pieces}.")
    if layout.dp > 1:
        kept = ("everything whole on each", "optimizer state shared out", "optimizer state and gradients shared out",
                "weights, gradients and optimizer state shared out")[layout.zero]
        training = isinstance(plan.run, TrainingRun)
        said.append(f"dp={layout.dp}: {f'parts of the batch, {kept}' if training else 'replicas'}.")
    if isinstance(plan.run, TrainingRun):
        policy = {"none": "nothing is recomputed", "selective": "attention's scores are recomputed",
                  "full": "every layer is recomputed"}[plan.run.recompute]
        said.append(f"{plan.run.n_micro(layout)} micro-batches of {plan.run.micro_batch} a step; {policy}.")
    return said


def _memory(plan: Plan) -> str:
    memory, room = plan.memory, plan.machine.memory_bytes
    largest = sorted(vars(memory).items(), key=lambda item: -item[1])[:2]
    parts = " and ".join(f"{n_bytes / 1e9:.1f} GB of {_MEMORY_WORDS[kind]}" for kind, n_bytes in largest)
    verdict = "" if plan.fits else ": it does not fit"
    return f"Memory: {memory.total / 1e9:.1f} of {room / 1e9:.0f} GB a device{verdict}; first {parts}."


def _time(plan: Plan) -> str:
    time = plan.time
    if isinstance(time, InferenceTime):
        links = time.tensor_comm + time.pipeline_comm
        return (f"A token takes {1e3 * time.per_token:.2f} ms, bound by {time.bound.replace('_', ' ')}: "
                f"weights {1e3 * time.weights:.2f}, cache {1e3 * time.kv_cache:.2f}, arithmetic "
                f"{1e3 * time.compute:.2f}, transfers {1e3 * links:.2f} ms.")
    lost = {name: seconds for name, seconds in time.parts().items() if name not in _WORK}
    name, seconds = max(lost.items(), key=lambda item: item[1])
    work = sum(time.parts()[part] for part in _WORK) / time.total
    if not seconds:
        return f"Time: {time.total:.3g} s a step, all of it the model's arithmetic and memory traffic."
    return (f"Time: {time.total:.3g} s a step, {work:.0%} of it the model's arithmetic and memory traffic; the most is "
            f"lost to {_PART_WORDS[name]}, {seconds / time.total:.1%}.")


def _runner_up(search: Search) -> list[str]:
    """The best plan of another shape, and where it is slower."""
    best = search.best
    others = [plan for plan in search.plans if plan.layout.shape != best.layout.shape]
    if not others:
        return ["No other shape of those considered fits."]
    other = others[0]
    slower = f"The next shape is {other.layout.sizes}, {other.seconds / best.seconds - 1:.1%} slower"
    if not isinstance(best.time, StepTime) or not isinstance(other.time, StepTime):
        return [slower + "."]
    mine, its = best.time.parts(), other.time.parts()
    name = max(its, key=lambda part: its[part] - mine[part])
    more = its[name] - mine[name]
    return [slower + (f", with {more:.3g} s more for {_PART_WORDS[name]}." if more > 0 else ".")]
