"""`tessera chat --tp N`: a conversation with a model that several ranks share.

In: this process's stdin, which the first rank takes over. Out: as `chat`. Called by cli.app.

All ranks hold the same conversation. The first one reads, sends each line to the others, and speaks; they wait for
lines at a pipe, as long as it takes. Ctrl-C reaches the first rank alone; the ranks agree after each piece of an
answer whether it ends there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from tessera import dist, env
from tessera.cli.chat import Conversation, converse
from tessera.cli.loading import be_silent, load
from tessera.cli.options import ModelOptions, SamplingOptions
from tessera.errors import TesseraError


def run(model: ModelOptions, sampling: SamplingOptions, *, system: str | None) -> None:
    """Converse until the input ends.

    Raises:
        CollectiveError: a rank failed; the message begins with the first one's.
    """
    # The first has nobody to hear from: its pipe stays unused.
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(model.tp)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        dist.spawn(_on_rank, model.tp, _Stdin(), pipes, model, sampling, system, threads=model.threads,
                   traces=env.get("TESSERA_DEBUG"))
    finally:
        signal.signal(signal.SIGINT, before)
        for pipe in pipes:
            for end in pipe:
                end.close()


def _on_rank(
    stdin: _Stdin, pipes: Sequence[tuple[Connection, Connection]], model: ModelOptions, sampling: SamplingOptions,
    system: str | None,
) -> None:
    dist.init()
    rank = dist.get_rank()
    if rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        be_silent()
    session = load(model)
    stop = Interrupt(session.engine.mesh)
    conversation = Conversation(session, sampling, system, stop.is_agreed)
    if rank > 0:
        while (line := pipes[rank][0].recv()) is not None:
            with suppress(TesseraError):  # the first rank has it too, and deals with it
                conversation.take(line)
        return

    def take(line: str) -> bool:
        _send(pipes, line)
        with stop.heard():
            return conversation.take(line)

    stdin.open()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    converse(take)
    _send(pipes, None)


def _send(pipes: Sequence[tuple[Connection, Connection]], line: str | None) -> None:
    for _, end in pipes[1:]:
        end.send(line)


class Interrupt:
    """Ctrl-C during an answer: the first rank of a mesh hears it, and all end the answer at the same piece."""

    def __init__(self, mesh: dist.Mesh) -> None:
        self._mesh, self._is_heard = mesh, False

    def hear(self, *_: Any) -> None:
        """What the signal does meanwhile: an exception would leave the others alone in a collective."""
        self._is_heard = True

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Around an answer on the rank that hears."""
        self._is_heard = False
        before = signal.signal(signal.SIGINT, self.hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def is_agreed(self) -> bool:
        """Whether the first rank has heard it; all ranks ask together."""
        return bool(dist.broadcast(torch.tensor([self._is_heard]), self._mesh, axis="tp"))


class _Stdin:
    """This process's stdin, on its way to a rank's process, whose own is closed."""

    def __getstate__(self) -> Any:
        return reduction.DupFd(0)

    def __setstate__(self, handle: Any) -> None:
        self._descriptor = handle.detach()

    def open(self) -> None:
        """Make it the stdin of this process."""
        os.dup2(self._descriptor, 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
