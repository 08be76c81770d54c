"""One training step of a Llama shape with 17 million parameters, beside transformers under torch.compile.

    python bench/train_step.py [--dtype bf16|f32|auto] [--repetitions N] [--curve STEPS]

d_model 384, 8 layers, 6 heads, d_ffn 1024, vocabulary 8192 (tied), batch 8 x 256; f32 weights, AdamW, gradients clipped
to norm 1. tessera computes in --dtype; transformers runs compiled (inductor) under autocast to the same type. Each
library has a process of its own; they take turns. Both start from the same weights and see the same batches, cut
from the sources of Python's standard library; the losses of the first STEPS steps must agree before anything is
timed. `auto` is bf16 where the processor has instructions for its products, else f32.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Worker, machine, print_table, serve, write_results

import tessera as ts
from tessera.ops.linear import has_products_of

CONFIG = ts.GPTConfig(
    family="llama", n_layers=8, n_heads=6, n_kv_heads=6, d_model=384, d_ffn=1024, vocab_size=8192, max_seq_len=256,
    tie_embeddings=True)
BATCH, SEQ_LEN = 8, 256
LEARNING_RATE, CLIP = 1e-3, 1.0
AGREEMENT = {"f32": 2e-3, "bf16": 3e-2}  # of the losses of a step, relative
SYSTEMS = ("tessera", "transformers")


def batches() -> torch.Tensor:
    """Tokens of the standard library's sources, [n, BATCH, SEQ_LEN + 1]: pairs of bytes, folded to the vocabulary."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    pairs = text[: len(text) // 2 * 2].view(-1, 2)
    tokens = (pairs[:, 0] * 256 + pairs[:, 1]) * 2654435761 % (1 << 32) % CONFIG.vocab_size
    size = BATCH * (SEQ_LEN + 1)
    return tokens[: len(tokens) // size * size].view(-1, BATCH, SEQ_LEN + 1)


class Trainer:
    """A model with its optimizer; `step` takes one step on the next batch."""

    def __init__(self, library: str, folder: str, dtype: str) -> None:
        self.batches, self.done = batches(), 0
        if library == "tessera":
            loaded = ts.load_model(folder)
            self.model = ts.GPTModel(replace(loaded.config, compute_dtype=f"{dtype} @accum(fp32)"))
            self.model.load_state_dict(loaded.state_dict())
            self._loss = self.model.loss
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            compiled, is_bf16 = torch.compile(self.model), dtype == "bf16"

            def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                    return compiled(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss

            self._loss = loss
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

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


def check_losses(workers: dict[str, Worker], n_steps: int, dtype: str) -> dict[str, list[float]]:
    """The losses of the first steps of both, or the end; the first step's time is noted too."""
    curves: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    for step in range(n_steps):
        for name, worker in workers.items():
            curves[name].append(worker.ask("step")[0])
        ours, theirs = (curves[name][-1] for name in SYSTEMS)
        if abs(ours - theirs) > AGREEMENT[dtype] * abs(theirs):
            raise SystemExit(f"losses differ at step {step}: tessera {ours}, transformers {theirs}")
    print(f"losses agree over {n_steps} steps: {curves['tessera'][0]:.3f} -> {curves['tessera'][-1]:.3f}")
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("auto", "bf16", "f32"), default="auto")
    parser.add_argument("--repetitions", type=int, default=5, help="steps that are timed, by turns")
    parser.add_argument("--curve", type=int, default=20, metavar="STEPS", help="steps whose losses are compared")
    parser.add_argument("--worker", nargs=3, metavar=("LIBRARY", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(Trainer(*options.worker))
        return
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if has_products_of(torch.bfloat16) else "f32"
    computer = machine()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        ts.save_model(ts.GPTModel(CONFIG), f"{folder}/model")
        workers = {name: Worker(__file__, ["--worker", name, f"{folder}/model", dtype]) for name in SYSTEMS}
        for name, worker in workers.items():
            results[name] = {"first_step_seconds": worker.ask("step")[1]}
        curves = check_losses(workers, options.curve, dtype)
        times: dict[str, list[float]] = {name: [] for name in SYSTEMS}
        for _ in range(options.repetitions):
            for name, worker in workers.items():
                times[name].append(worker.ask("step")[1])
        for worker in workers.values():
            worker.close()
    tokens = BATCH * SEQ_LEN
    matrices = CONFIG.n_params  # the tied head's product counts, its look-up does not
    flops = tokens * (6 * matrices + 6 * CONFIG.n_layers * CONFIG.d_model * SEQ_LEN)
    limit = tokens * computer[f"{dtype}_flops"] / flops
    for name in SYSTEMS:
        results[name] |= {"tokens_per_second": tokens / statistics.median(times[name]), "losses": curves[name]}
    peer = results["transformers"]["tokens_per_second"]
    print_table(["system", "first step s", "tokens/s", "ratio", "limit"], [
        [name, f"{found['first_step_seconds']:.1f}", f"{found['tokens_per_second']:.0f}",
         f"{found['tokens_per_second'] / peer:.2f}x", f"{found['tokens_per_second'] / limit:.0%}"]
        for name, found in results.items()])
    print(f"{dtype}; limit: share of what the machine's matmul speed allows ({limit:.0f} tokens/s)")
    print("written:", write_results("train_step", {"machine": computer, "dtype": dtype, "systems": results}))


if __name__ == "__main__":
    main()
