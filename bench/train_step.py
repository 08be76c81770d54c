"""One training step of a Llama shape with 17 million parameters, beside transformers under torch.compile.

    python bench/train_step.py [--dtype bf16|f32|both] [--repetitions N] [--curve STEPS] [--twin] [--rows N]

d_model 384, 8 layers, 6 heads, d_ffn 1024, vocabulary 8192 (tied), batch 8 x 256; f32 weights, AdamW, gradients clipped
to norm 1. Each library computes in each type: tessera by `compute_dtype`, transformers compiled (inductor), in bf16
under autocast. Each has a process of its own; they take turns. All start from the same weights and see the same
batches, cut from the sources of Python's standard library; the losses of the first STEPS steps must agree before
anything is timed. First steps are those of a fresh process that finds compiled code on disk, unless `--cold`.

Where the processor has no instructions for products of bf16, torch emulates them, and a step of transformers in bf16
takes minutes: it is then timed by one step of one row of the batch, and its losses are not compared.

Curves agree when the first steps do, and the rest is as close as the curves of two runs of one program whose weights
differ by a rounding (`--twin` trains the second one): training amplifies roundings, so that single steps drift apart.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import Worker, machine, print_table, serve, write_results

import tessera as ts
from tessera.ops.matmul import has_products_of

CONFIG = ts.GPTConfig(
    family="llama", n_layers=8, n_heads=6, n_kv_heads=6, d_model=384, d_ffn=1024, vocab_size=8192, max_seq_len=256,
    tie_embeddings=True)
BATCH, SEQ_LEN = 8, 256
LEARNING_RATE, CLIP = 3e-4, 1.0
EARLY = 20  # steps whose losses must agree one by one
# Most that curves may be apart, relative: each early loss; root mean square over all steps; mean over the last half.
# A twin, after 160 steps of 2 x 256 tokens: 0.00001, 0.009 and 0.009; bf16 there: 0.011, 0.015 and 0.016.
AGREEMENT = {"f32": (1e-3, 2e-2, 2e-2), "bf16": (3e-2, 3e-2, 3e-2)}
LIBRARIES = ("tessera", "transformers")


def batches(rows: int) -> torch.Tensor:
    """Tokens of the standard library's sources, [n, rows, SEQ_LEN + 1]: pairs of bytes, folded to the vocabulary."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    pairs = text[: len(text) // 2 * 2].view(-1, 2)
    tokens = (pairs[:, 0] * 256 + pairs[:, 1]) * 2654435761 % (1 << 32) % CONFIG.vocab_size
    size = rows * (SEQ_LEN + 1)
    return tokens[: len(tokens) // size * size].view(-1, rows, SEQ_LEN + 1)


class Trainer:
    """A model with its optimizer; `step` takes one step on the next batch.

    Args:
        library: "tessera", "transformers", or "twin": tessera with its weights off by a rounding.
        folder: of the weights.
        dtype: bf16 or f32.
        rows: of a batch.
    """

    def __init__(self, library: str, folder: str, dtype: str, rows: str) -> None:
        self.batches, self.done = batches(int(rows)), 0
        self.model = self._theirs(folder, dtype) if library == "transformers" else self._ours(folder, dtype)
        if library == "twin":
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.mul_(1 + 2.0**-23)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def _ours(self, folder: str, dtype: str) -> torch.nn.Module:
        loaded = ts.load_model(folder)
        model = ts.GPTModel(replace(loaded.config, compute_dtype=f"{dtype} @accum(fp32)"))
        model.load_state_dict(loaded.state_dict())
        self._loss = model.loss
        return model

    def _theirs(self, folder: str, dtype: str) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        compiled, is_bf16 = torch.compile(model), dtype == "bf16"

        def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                return compiled(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss

        self._loss = loss
        return model

    def step(self) -> tuple[float, float]:
        """(loss, seconds)."""
        batch = self.batches[self.done % len(self.batches)]
        self.done += 1
        start = time.perf_counter()
        loss = self._loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), time.perf_counter() - start


@dataclass(kw_only=True)
class System:
    """A library in a type, and what was measured of it."""

    library: str
    dtype: str
    rows: int
    worker: Worker
    first_step: float = 0.0
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.library} {self.dtype}"

    @property
    def tokens_per_second(self) -> float:
        return self.rows * SEQ_LEN / statistics.median(self.times)

    def step(self) -> float:
        """Seconds of one step; its loss is noted."""
        loss, seconds = self.worker.ask("step")
        self.losses.append(loss)
        return seconds


def check_losses(systems: list[System], n_steps: int) -> dict[str, dict[str, float]]:
    """Train all for n_steps; how far their curves are from the first system's, or the end."""
    for done in range(1, n_steps):
        for system in systems:
            system.step()
        if done % 10 == 0:
            print(f"step {done}: " + ", ".join(f"{each.name} {each.losses[-1]:.4f}" for each in systems), flush=True)
    expected, distances, is_close = torch.tensor(systems[0].losses), {}, True
    for system in systems[1:]:
        off = (torch.tensor(system.losses) - expected) / expected
        early, spread = off[:EARLY].abs().max().item(), off.square().mean().sqrt().item()
        drift = off[n_steps // 2:].mean().abs().item()
        distances[system.name] = {"early": early, "spread": spread, "drift": drift}
        print(f"{n_steps} losses of {system.name} beside {systems[0].name} ({expected[0]:.3f} -> {expected[-1]:.3f}): "
              f"early ones at most {early:.3%} apart, all {spread:.2%} (RMS), mean of the last half {drift:.2%}",
              flush=True)
        is_close = is_close and all(
            found <= most for found, most in zip((early, spread, drift), AGREEMENT[system.dtype]))
    if not is_close:
        raise SystemExit(f"losses differ: expected at most {AGREEMENT}: early, RMS, mean of the last half")
    return distances


def fill_caches(arguments: Sequence[Sequence[str]]) -> None:
    """One step of each in a process that ends: compiled code is on disk then, of kernels and of inductor."""
    for given in arguments:
        worker = Worker(__file__, ["--worker", *given])
        worker.ask("step")
        worker.close()


def measure(systems: list[System], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """First steps, losses and times of all systems, by turns; the distances of their curves."""
    for system in systems:
        system.first_step = system.step()
    distances = check_losses([system for system in systems if system.rows == options.rows], options.curve)
    for repetition in range(options.repetitions):
        for system in systems:
            if not repetition or system.rows == options.rows:
                system.times.append(system.step())
    for system in systems:
        system.worker.close()
    return distances


def report(systems: list[System], computer: dict[str, Any]) -> None:
    """A line for each system."""
    flops = 6 * CONFIG.n_params + 6 * CONFIG.n_layers * CONFIG.d_model * SEQ_LEN  # a token; the look-up costs nothing
    lines = []
    for system in systems:
        peer = next((s for s in systems if s.library == "transformers" and s.dtype == system.dtype), system)
        fast = max(computer["f32_flops"], computer[f"{system.dtype}_flops"])
        lines.append([system.name, f"{system.rows} x {SEQ_LEN}", f"{system.first_step:.1f}",
                      f"{system.tokens_per_second:.0f}", f"{system.tokens_per_second / peer.tokens_per_second:.2f}x",
                      f"{system.tokens_per_second * flops / fast:.0%}"])
    print_table(["system", "batch", "first step s", "tokens/s", "ratio", "limit"], lines)
    print("ratio: to transformers in that type; limit: share of what torch's fastest matrix products allow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("both", "bf16", "f32"), default="both")
    parser.add_argument("--repetitions", type=int, default=5, help="steps that are timed, by turns")
    parser.add_argument("--curve", type=int, default=EARLY, metavar="STEPS", help="steps whose losses are compared")
    parser.add_argument("--rows", type=int, default=BATCH, help=f"sequences of a batch (default {BATCH})")
    parser.add_argument("--twin", action="store_true", help="also train tessera with its weights off by a rounding")
    parser.add_argument("--cold", action="store_true", help="do not fill the caches of compiled code first")
    parser.add_argument("--worker", nargs=4, metavar=("LIBRARY", "FOLDER", "DTYPE", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(Trainer(*options.worker))
        return
    dtypes = ("f32", "bf16") if options.dtype == "both" else (options.dtype,)
    libraries = (*reversed(LIBRARIES), *(["twin"] if options.twin else []))  # the first is the reference of the curves
    computer = machine()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        ts.save_model(ts.GPTModel(CONFIG), f"{folder}/model")
        arguments = []
        for dtype, library in itertools.product(dtypes, libraries):
            is_emulated = library == "transformers" and dtype == "bf16" and not has_products_of(torch.bfloat16)
            if library != "twin" or dtype == dtypes[0]:
                arguments.append((library, f"{folder}/model", dtype, "1" if is_emulated else str(options.rows)))
        if not options.cold:
            fill_caches(arguments)
        systems = [System(library=given[0], dtype=given[2], rows=int(given[3]),
                          worker=Worker(__file__, ["--worker", *given])) for given in arguments]
        distances = measure(systems, options)
    report(systems, computer)
    name = "train_step" + f"_{options.rows}_rows" * (options.rows != BATCH) + f"_{options.curve}_steps" * (
        options.curve != EARLY)
    print("written:", write_results(name, {"machine": computer, "curve_steps": options.curve, "systems": {
        system.name: {"rows": system.rows, "first_step_seconds": system.first_step,
                      "tokens_per_second": system.tokens_per_second, "distance": distances.get(system.name),
                      "losses": system.losses} for system in systems}}))


if __name__ == "__main__":
    main()
