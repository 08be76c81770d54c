"""Collectives by size, tensor-parallel generation, and the cost of the deterministic mode.

    python bench/dist.py [--layers N] [--repetitions N]

1. all_reduce on two ranks: ours (checks, watchdog, gradients) beside torch.distributed's own on the same gloo
   group, taking turns.
2. Tokens a second of a model of SmolLM2's widths, TP 1 with two threads beside TP 2 with one each, at batch 1
   and 8, fast and deterministic. Greedy tokens must be equal before anything is timed, and in the deterministic
   mode logits must be equal to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from common import machine, print_table, write_results

import tessera as ts

SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 20, 1 << 23)  # bytes
BATCHES = (1, 8)
PROMPT, STEPS = 32, 16


def config(n_layers: int) -> ts.GPTConfig:
    return ts.GPTConfig(n_layers=n_layers, n_heads=9, n_kv_heads=3, d_model=576, d_ffn=1536, max_seq_len=256,
                        vocab_size=49152, tie_embeddings=True)


def collectives(repetitions: int) -> dict[str, Any]:
    """Median seconds of one all_reduce, by size; the two take turns."""
    ts.init()
    mesh, out = ts.dist.mesh(), {}
    for size in SIZES:
        x = torch.ones(size // 4)

        def theirs(x: torch.Tensor = x) -> None:
            torch_dist.all_reduce(x.clone())

        def ours(x: torch.Tensor = x) -> None:
            ts.dist.all_reduce(x, mesh)

        assert torch.equal(ts.dist.all_reduce(x, mesh), x * mesh.size())
        times: dict[str, list[float]] = {"ours": [], "gloo": []}
        for _ in range(repetitions):
            for name, run in (("ours", ours), ("gloo", theirs)):
                times[name].append(_seconds(run, 20 if size < 1 << 20 else 3))
        out[str(size)] = {name: statistics.median(values) for name, values in times.items()}
    return out


def generation(n_layers: int, repetitions: int) -> dict[str, Any]:
    """Tokens a second of decode steps by batch and mode, with the tokens and logits for comparison."""
    ts.init()
    model = ts.GPTModel(config(n_layers), ts.dist.mesh()).eval()
    model.init_weights(seed=0)
    engine, out = ts.GPTInference(model), {}
    for batch in BATCHES:
        ids = torch.randint(0, 49152, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
        modes: dict[str, Callable[[], Any]] = {"fast": contextlib.nullcontext, "deterministic": ts.dist.deterministic}
        found: dict[str, Any] = {}
        for name, mode in modes.items():
            with mode(), torch.no_grad():
                found[name] = {"tokens": engine.generate(ids, 4, do_sample=False, eos_token_id=()).tolist(),
                               "logits": model(ids)["logits"][:, -1, :512].tolist(), "seconds": []}
        for _ in range(repetitions):
            for name, mode in modes.items():
                with mode():
                    found[name]["seconds"].append(_decode(model, ids))
        for name, values in found.items():
            values["tokens_per_second"] = batch * STEPS / statistics.median(values.pop("seconds"))
            out[f"{name}, batch {batch}"] = values
    return out


@torch.inference_mode()
def _decode(model: ts.GPTModel, ids: torch.Tensor) -> float:
    cache = model(ids, use_cache=True, logits_to_keep=1)["kv_cache"]
    start = time.perf_counter()
    for _ in range(STEPS):
        model(ids[:, :1], kv_cache=cache)
    return time.perf_counter() - start


def _seconds(run: Callable[[], None], count: int) -> float:
    run()
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    reduced = ts.dist.spawn(collectives, 2, options.repetitions, threads=1)[0]
    print_table(("all_reduce, 2 ranks", "ours us", "gloo us", "gloo/ours", "ours GB/s"), [
        (f"{int(size) >> 10} KiB", f"{t['ours'] * 1e6:.0f}", f"{t['gloo'] * 1e6:.0f}", f"{t['gloo'] / t['ours']:.2f}",
         f"{int(size) / t['ours'] / 1e9:.2f}") for size, t in reduced.items()])
    one = ts.dist.spawn(generation, 1, options.layers, options.repetitions, threads=2)[0]
    two = ts.dist.spawn(generation, 2, options.layers, options.repetitions, threads=1)[0]
    for name in one:
        assert one[name]["tokens"] == two[name]["tokens"], f"{name}: different tokens"
        if "deterministic" in name:
            assert one[name]["logits"] == two[name]["logits"], f"{name}: different bits"
    print_table(("decode, tokens/s", "TP 1 x 2 threads", "TP 2 x 1 thread", "TP 2 / TP 1"), [
        (name, f"{one[name]['tokens_per_second']:.1f}", f"{two[name]['tokens_per_second']:.1f}",
         f"{two[name]['tokens_per_second'] / one[name]['tokens_per_second']:.2f}") for name in one])
    results = {name: {"tp1": one[name]["tokens_per_second"], "tp2": two[name]["tokens_per_second"]} for name in one}
    print("written:", write_results("dist", {"machine": machine(), "all_reduce": reduced, "decode": results}))


if __name__ == "__main__":
    main()
