"""The memory that operations take at their peak beyond their inputs, in a process of their own: bench/ops.py asks.

Linear cross-entropy is compared with the same over logits in memory. Attention over long sequences must take memory
linear in the length, forward alone and with the backward pass.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Worker, serve
from torch import Tensor

from tessera import ops

MIB = 1 << 20
LENGTHS = (8192, 16384, 32768)
LOSS_SHAPES = ((2048, 384, 8192), (4096, 576, 49152))
LOSS_GOAL = 8.0  # times less than with logits in memory, at the larger shape
LINEAR_GOAL = 2.2  # times the memory for twice the tokens
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "tessera": ops.linear_cross_entropy, "torch": lambda h, w, targets: F.cross_entropy(F.linear(h, w), targets)}
_ATTENTION = {"flash_attention": ops.flash_attention, "chunked_attention": ops.chunked_attention}


class Meter:
    """Answers in the worker: peaks in bytes, from the kernel's high-water mark of resident memory."""

    def loss(self, system: str, rows: int, width: int, classes: int) -> int:
        """Forward and backward of a linear cross-entropy."""
        hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
        targets = torch.randint(classes, (rows,))
        return _peak(lambda: _LOSSES[system](hidden, weight, targets).backward())

    def attention(self, operation: str, length: int, backward: bool) -> int:
        """A causal head of 64 over `length` tokens."""
        q, k, v = (torch.randn(1, 1, length, 64, requires_grad=backward) for _ in range(3))

        def run() -> Tensor | None:
            out = _ATTENTION[operation](q, k, v, is_causal=True)
            return out.sum().backward() if backward else out  # type: ignore[func-returns-value]

        return _peak(run)


def _peak(run: Callable[[], Any]) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed earlier must not serve this run unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return peak


def _status(name: str) -> int:
    found = re.search(name + r":\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """A line each: what was measured, MiB, and whether it is within its goal."""
    worker = Worker(__file__, [])
    worker.ask("loss", system="tessera", rows=256, width=64, classes=1000)  # compiles
    for rows, width, classes in LOSS_SHAPES[:1] if quick else LOSS_SHAPES:
        sizes = {"rows": rows, "width": width, "classes": classes}
        theirs, ours = (worker.ask("loss", system=system, **sizes) / MIB for system in ("torch", "tessera"))
        ratio = theirs / ours
        yield {"case": f"linear_cross_entropy f32 {rows}x{width}x{classes}", "mebibytes": ours, "torch": theirs,
               "met": ratio >= LOSS_GOAL if (rows, width, classes) == LOSS_SHAPES[-1] else None,
               "text": f"{ours:.0f} MiB, with logits in memory {theirs:.0f} MiB: {ratio:.1f} x less"}
    for name in _ATTENTION:
        for backward in (False, True):
            worker.ask("attention", operation=name, length=512, backward=backward)
            lengths = [length // 8 for length in LENGTHS] if quick else LENGTHS
            peaks = [worker.ask("attention", operation=name, length=n, backward=backward) / MIB for n in lengths]
            yield {"case": f"{name} f32 {'forward + backward' if backward else 'forward'}", "tokens": lengths,
                   "mebibytes": peaks, "met": None if quick else peaks[-1] <= LINEAR_GOAL * peaks[-2],
                   "text": ", ".join(f"{n} tokens {peak:.0f} MiB" for n, peak in zip(lengths, peaks))}
    worker.close()


if __name__ == "__main__":
    serve(Meter())
