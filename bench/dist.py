"""Collectives by size, tensor-parallel generation, and the cost of the deterministic mode.

    python bench/dist.py [--layers N] [--repetitions N]

1. all_reduce on two and on four ranks of this host: ours (shared memory; checks, watchdog and a new result included)
   beside torch.distributed's own on a gloo group of the same processes, in place and with a new result, taking turns.
2. Tokens a second of a model of SmolLM2's widths, TP 1 with two threads beside TP 2 with one each, at batch 1
   and 8, fast and deterministic; jobs of one and of two ranks take turns. Greedy tokens must be equal before
   anything is timed, and in the deterministic mode logits must be equal to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from common import machine, print_table, write_results

import tessera as ts
from tessera.infer.decoding import Decoder

SIZES = tuple(1 << bits for bits in range(10, 27, 2))  # bytes: 1 KiB to 64 MiB
RANKS, BATCHES = (2, 4), (1, 8)
PROMPT, STEPS, TURNS = 32, 16, 3


def config(n_layers: int) -> ts.GPTConfig:
    return ts.GPTConfig(n_layers=n_layers, n_heads=9, n_kv_heads=3, d_model=576, d_ffn=1536, max_seq_len=256,
                        vocab_size=49152, tie_embeddings=True)


def collectives(repetitions: int) -> dict[str, Any]:
    """Median seconds of one all_reduce, by size; all take turns."""
    ts.init()
    mesh, out = ts.dist.mesh(), {}
    for size in SIZES:
        x, place = torch.ones(size // 4), torch.zeros(size // 4)
        assert torch.equal(ts.dist.all_reduce(x, mesh), x * mesh.size())
        runs: dict[str, Callable[[], object]] = {
            "ours": functools.partial(ts.dist.all_reduce, x, mesh),
            "gloo": functools.partial(torch_dist.all_reduce, place),
            "gloo new": lambda x=x: torch_dist.all_reduce(x.clone())}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(2 * repetitions if size < 1 << 22 else repetitions):
            for name, run in runs.items():
                times[name].append(_seconds(run, 50 if size < 1 << 20 else 3))
        out[str(size)] = {name: statistics.median(values) for name, values in times.items()}
    return out


def generation(n_layers: int) -> dict[str, Any]:
    """Seconds of decode steps by batch and mode, with the tokens and logits for comparison."""
    ts.init()
    model = ts.GPTModel(config(n_layers), ts.dist.mesh()).eval()
    model.init_weights(seed=0)
    engine, decoder, out = ts.GPTInference(model), Decoder(model), {}
    for batch in BATCHES:
        ids = torch.randint(0, 49152, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
        modes: dict[str, Callable[[], Any]] = {"fast": contextlib.nullcontext, "deterministic": ts.dist.deterministic}
        found: dict[str, Any] = {}
        for name, mode in modes.items():
            with mode(), torch.no_grad():
                found[name] = {"tokens": engine.generate(ids, 4, do_sample=False, eos_token_id=()).tolist(),
                               "logits": model(ids)["logits"][:, -1, :512].tolist(), "seconds": list[float]()}
        for _ in range(TURNS):
            for name, mode in modes.items():
                with mode():
                    found[name]["seconds"].append(_decode(model, decoder, ids))
        out.update({f"{name}, batch {batch}": values for name, values in found.items()})
    return out


@torch.inference_mode()
def _decode(model: ts.GPTModel, decoder: Decoder, ids: torch.Tensor) -> float:
    """Seconds of STEPS steps behind a prompt, as the engine takes them."""
    step = decoder.begin(model(ids, use_cache=True, logits_to_keep=1)["kv_cache"])
    step(ids[:, 0])
    start = time.perf_counter()
    for _ in range(STEPS):
        step(ids[:, 0])
    return time.perf_counter() - start


def _seconds(run: Callable[[], object], count: int) -> float:
    run()
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    reduced = {}
    for n in RANKS:
        reduced[str(n)] = ts.dist.spawn(collectives, n, options.repetitions, threads=1)[0]
        print_table((f"all_reduce, {n} ranks", "ours us", "gloo us", "gloo/ours", "with a new result", "ours GB/s"), [
            (f"{int(size) >> 10} KiB", f"{t['ours'] * 1e6:.0f}", f"{t['gloo'] * 1e6:.0f}",
             f"{t['gloo'] / t['ours']:.2f}", f"{t['gloo new'] / t['ours']:.2f}", f"{int(size) / t['ours'] / 1e9:.2f}")
            for size, t in reduced[str(n)].items()])
    results = decode(options.layers, options.repetitions)
    print_table(("decode, tokens/s", "TP 1 x 2 threads", "TP 2 x 1 thread", "TP 2 / TP 1"), [
        (name, f"{found['tp1']:.1f}", f"{found['tp2']:.1f}", f"{found['tp2'] / found['tp1']:.2f}")
        for name, found in results.items()])
    print_table(("fast / deterministic", "TP 1", "TP 2"), [
        (f"batch {batch}", *(f"{results[f'fast, batch {batch}'][tp] / results[f'deterministic, batch {batch}'][tp]:.2f}"
                             for tp in ("tp1", "tp2"))) for batch in BATCHES])
    print("written:", write_results("dist", {"machine": machine(), "all_reduce": reduced, "decode": results}))


def decode(n_layers: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Tokens a second at TP 1 and TP 2, by mode and batch; medians over jobs that take turns."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(repetitions):
        found = {tp: ts.dist.spawn(generation, n, n_layers, threads=2 // n)[0] for tp, n in (("tp1", 1), ("tp2", 2))}
        for name, one in found["tp1"].items():
            two = found["tp2"][name]
            assert one["tokens"] == two["tokens"], f"{name}: different tokens"
            assert one["logits"] == two["logits"] or "deterministic" not in name, f"{name}: different bits"
            for tp in found:
                seconds.setdefault((name, tp), []).extend(found[tp][name]["seconds"])
    rates: dict[str, dict[str, float]] = {}
    for (name, tp), values in seconds.items():
        batch = int(name.rpartition(" ")[2])
        rates.setdefault(name, {})[tp] = batch * STEPS / statistics.median(values)
    return rates


if __name__ == "__main__":
    main()
