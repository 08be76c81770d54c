"""Loading, prefill and decode of SmolLM2-135M beside transformers.

    python bench/generate.py [--repetitions N] [--no-bf16]

Five systems, each in a process of its own, take turns: tessera and transformers in f32 and in bf16, and tessera
with the file's weights kept quantized (Q4_1, Q8_0), computing in the type that the processor is fastest in. tessera
reads the Q4_1 GGUF file; transformers reads the dequantized weights from safetensors. Greedy tokens in f32 must
be equal before anything is timed. Where a system would take too long for 512 tokens or 32 steps (bf16 on a
processor that has no instructions for it), it gets fewer and the table says so.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import Worker, machine, print_table, serve, write_results

import tessera as ts
from tessera.ops.linear import has_products_of

PREFILL, STEPS, BATCHES = 512, 32, (1, 8)
PROMPT = 4  # tokens before the decode steps; few, for the sake of systems with slow prefill
BUDGET = 6.0  # seconds for one measurement
CHECKED = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,")
SYSTEMS = ("tessera f32", "transformers f32", "tessera q4_1", "tessera bf16", "transformers bf16")
PEER = {"tessera f32": "transformers f32", "tessera bf16": "transformers bf16", "tessera q4_1": "transformers bf16"}


class Tessera:
    """tessera, from the GGUF file."""

    def __init__(self, path: str, dtype: str) -> None:
        start = time.perf_counter()
        is_quantized = dtype == "q4_1"
        if is_quantized:
            dtype = "bf16" if has_products_of(torch.bfloat16) else "f32"
        self.model = ts.load_model(path, dtype=dtype, keep_quantized=is_quantized)
        self.load_seconds = time.perf_counter() - start
        self.engine = ts.GPTInference(self.model)

    def prefill(self, ids: torch.Tensor) -> None:
        self.model(ids, use_cache=True, logits_to_keep=1)

    def generate(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        return self.engine.generate(ids, count, do_sample=False, eos_token_id=())


class Transformers:
    """transformers, from the same weights as safetensors."""

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype={"f32": "float32", "bf16": "bfloat16"}[dtype])
        self.load_seconds = time.perf_counter() - start
        self.model.generation_config.eos_token_id = None

    def prefill(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def generate(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)


class Timed:
    """What the parent asks of a system; runs in the worker."""

    def __init__(self, name: str, path: str) -> None:
        library, dtype = name.split()
        self.system = (Tessera if library == "tessera" else Transformers)(path, dtype)

    def load_seconds(self) -> float:
        return self.system.load_seconds

    def tokens(self, ids: list[int], count: int) -> list[int]:
        return self.system.generate(torch.tensor([ids]), count)[0, len(ids):].tolist()

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        return _seconds(lambda: self.system.prefill(_ids(1, tokens)))

    def decode(self, batch: int, steps: int) -> float:
        """Seconds of `steps` decode steps: a long generation minus one that ends with the prompt's own token."""
        ids = _ids(batch, PROMPT)
        return _seconds(lambda: self.system.generate(ids, steps + 1)) - _seconds(lambda: self.system.generate(ids, 1))

    def peak_bytes(self) -> int:
        return _peak_bytes()


def _ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1000, 40000, (batch, tokens), generator=torch.Generator().manual_seed(0))


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_equal(workers: dict[str, Worker], tokenizer: Any) -> None:
    """Greedy tokens of both libraries in f32, or the end."""
    for text in CHECKED:
        ids = tokenizer.encode(text)
        expected = workers["transformers f32"].ask("tokens", ids=ids, count=32)
        for name in ("tessera f32",) if has_products_of(torch.bfloat16) else ("tessera f32", "tessera q4_1"):
            found = workers[name].ask("tokens", ids=ids, count=32)
            if found != expected:
                raise SystemExit(f"greedy tokens of {name} differ for {text!r}: {found} {expected}")
    print(f"greedy tokens equal transformers float32: {len(CHECKED)} prompts x 32 tokens")


def affordable(seconds: float, done: int, wanted: int) -> int:
    """How many tokens or steps fit the budget when `done` took `seconds`."""
    return max(1, min(wanted, int(BUDGET * done / seconds)))


def measure(workers: dict[str, Worker], repetitions: int) -> dict[str, dict[str, Any]]:
    """Rates of every system; repetitions by turns, medians."""
    plan: dict[str, list[tuple[str, str, dict[str, int], int]]] = {}
    for name, worker in workers.items():
        probe = min(worker.ask("prefill", tokens=16) for _ in range(2))
        n_prefill = affordable(probe, 16, PREFILL)
        plan[name] = [("prefill", "prefill", {"tokens": n_prefill}, n_prefill)]
        for batch in BATCHES:
            n_steps = affordable(max(worker.ask("decode", batch=batch, steps=1), 1e-4), 1, STEPS)
            plan[name].append((f"decode {batch}", "decode", {"batch": batch, "steps": n_steps}, batch * n_steps))
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(repetitions):
        for row in range(1 + len(BATCHES)):
            for name, worker in workers.items():
                metric, call, values, _count = plan[name][row]
                times.setdefault((name, metric), []).append(worker.ask(call, **values))
    results: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        results[name] = {"load_seconds": worker.ask("load_seconds"), "peak_bytes": worker.ask("peak_bytes")}
        for metric, _call, values, count in plan[name]:
            seconds = statistics.median(times[name, metric])
            results[name][metric] = {"tokens_per_second": count / seconds, **values}
    return results


def limits(config: ts.GPTConfig, computer: dict[str, Any], flops: float, step_bytes: float) -> dict[str, float]:
    """Tokens a second that the machine allows at most: arithmetic for prefill, reading the weights for decode."""
    matrices = config.n_params - config.vocab_size * config.d_model
    attention = 2 * config.n_layers * config.n_heads * config.d_head * PREFILL / 2
    found = {"prefill": flops / (2 * (matrices + attention))}
    return found | {f"decode {batch}": batch * computer["read_bytes_per_second"] / step_bytes for batch in BATCHES}


def report(results: dict[str, dict[str, Any]], ceilings: dict[str, dict[str, float]]) -> None:
    """Print the table: each rate, how it compares with transformers, and its share of the limit."""
    rows = []
    for name, found in results.items():
        peer = results.get(PEER.get(name, ""))
        row = [name, f"{found['load_seconds']:.2f}", f"{found['peak_bytes'] / 2**20:.0f}"]
        for metric in ("prefill", *(f"decode {batch}" for batch in BATCHES)):
            rate = found[metric]["tokens_per_second"]
            ratio = f"{rate / peer[metric]['tokens_per_second']:.2f}x" if peer else ""
            is_short = found[metric].get("tokens", PREFILL) < PREFILL or found[metric].get("steps", STEPS) < STEPS
            row += [f"{rate:.1f}{'*' if is_short else ''}", ratio, f"{rate / ceilings[name.split()[1]][metric]:.0%}"]
        rows.append(row)
    header = ["system", "load s", "peak MiB"]
    for title in (f"prefill {PREFILL} tok/s", *(f"decode b{batch} tok/s" for batch in BATCHES)):
        header += [title, "ratio", "limit"]
    print_table(header, rows)
    print("ratio: to transformers in the same type, of q4_1 to its bf16. "
          "limit: share of what memory or matmul speed allows.")
    if any("*" in cell for row in rows for cell in row):
        print(f"*: fewer tokens or steps, to stay within {BUDGET:.0f} s a measurement.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-bf16", action="store_true", help="leave out the two bf16 systems")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(Timed(*options.worker))
        return
    path = ts.hub.smollm2()
    computer = machine()
    print(f"{computer['cpu']}, {computer['threads']} threads, {computer['simd']}: "
          f"{computer['read_bytes_per_second'] / 1e9:.1f} GB/s read, {computer['f32_flops'] / 1e9:.0f} GFLOP/s f32, "
          f"{computer['bf16_flops'] / 1e9:.0f} GFLOP/s bf16")
    with tempfile.TemporaryDirectory() as folder:
        model = ts.load_model(path)
        ts.save_model(model, f"{folder}/model")
        config = model.config
        del model
        paths = {"tessera": str(path), "transformers": f"{folder}/model"}
        workers = {}
        for name in SYSTEMS[: 3 if options.no_bf16 else None]:
            workers[name] = Worker(__file__, ["--worker", name, paths[name.split()[0]]])
            workers[name].ask("load_seconds")  # one after the other: loading is timed
        check_equal(workers, ts.load_tokenizer(path))
        results = measure(workers, options.repetitions)
        for worker in workers.values():
            worker.close()
    f32, bf16 = computer["f32_flops"], max(computer["f32_flops"], computer["bf16_flops"])  # bf16 can run as f32
    ceilings = {"f32": limits(config, computer, f32, 4 * config.n_params),
                "bf16": limits(config, computer, bf16, 2 * config.n_params),
                "q4_1": limits(config, computer, bf16, os.path.getsize(path))}
    report(results, ceilings)
    print("written:", write_results("generate", {"machine": computer, "systems": results, "limits": ceilings}))


if __name__ == "__main__":
    main()
