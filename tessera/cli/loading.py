"""Models for the command line: names, types, progress.

In: ModelOptions. Out: a loaded model with its tokenizer. Called by cli.generate and cli.chat.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera import dist
from tessera.cli.options import ModelOptions
from tessera.data.tokenizer import Tokenizer, load_tokenizer
from tessera.infer.engine import GPTInference
from tessera.models import hub
from tessera.models.load import load_model
from tessera.ops.linear import has_products_of

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model that is ready to speak.

    Attributes:
        engine, tokenizer: the model and its vocabulary.
        dtype: what it computes in.
        load_seconds: what reading both took.
    """

    engine: GPTInference
    tokenizer: Tokenizer
    dtype: str
    load_seconds: float


def resolve(path: str) -> Path:
    """The path that a --model argument stands for.

    Raises:
        NotFoundError: "smollm2" is asked for and its package is not installed.
    """
    return hub.smollm2() if path == "smollm2" else Path(path)


def load(options: ModelOptions) -> Session:
    """Load model and tokenizer, with a progress bar on a terminal. With several ranks, each calls this."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path = resolve(options.path)
    dtype = fastest_dtype() if options.dtype == "auto" else options.dtype
    start = time.perf_counter()
    with progress_bar(f"loading {path.name}") as progress:
        model = load_model(
            path, dtype=dtype, progress=progress, mesh=dist.mesh(options.tp) if options.tp > 1 else None,
            keep_quantized=options.tp == 1 and not options.dequantize)
    tokenizer = load_tokenizer(path)
    return Session(
        engine=GPTInference(model), tokenizer=tokenizer, dtype=model.config.compute.name,
        load_seconds=time.perf_counter() - start)


def fastest_dtype() -> str:
    """bf16 where the processor has instructions for its products, else f32."""
    return "bf16" if has_products_of(torch.bfloat16) else "f32"


def be_silent() -> None:
    """Send what this process prints to nowhere from now on, what its libraries print too: another rank speaks."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress | None]:
    """A bar on stderr for load_model's `progress`; None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)
