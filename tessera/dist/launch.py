"""Starting a job's processes on this host, and ending them together.

In: a function or a script, and a count. Out: each rank's result, or one error that names the rank that
failed. Called by `tessera launch`, `--tp`, examples and tests. Jobs over several hosts use torchrun; both set
the same environment.

The ranks are forked from a server that has imported torch once, so that four ranks start as fast as one.
The job's store lives in this process and outlives every rank. When a rank fails, the others have `_GRACE`
seconds to say what they saw, and are then ended; when this process ends, all ranks end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist

from tessera.errors import CollectiveError, InputError, NotFoundError

_GRACE = 4.0  # seconds: more than a watchdog needs to explain a death
_MOST_RANKS = 1024


def spawn(
    function: Callable[..., Any], nproc: int, *args: Any, threads: int | None = None, traces: bool = True,
) -> list[Any]:
    """Run function(*args) on nproc ranks and return what each returned, in order of rank.

    Args:
        function: importable by name; it calls ts.init() to join the job.
        nproc: ranks.
        args: picklable, the same for every rank.
        threads: torch's threads a rank; default this machine's cores divided by nproc.
        traces: a rank prints the traceback of what it raises (never of a CollectiveError: one line says it all).

    Raises:
        InputError: nproc out of range.
        CollectiveError: a rank raised, exited or was killed; the message begins with the first one's.
    """
    ranks = _start(nproc, threads, function, args, traces)
    try:
        failure = _supervise(ranks)
    finally:
        _end(ranks)
    if failure is not None:
        raise CollectiveError(failure)
    return [rank.result for rank in ranks]


def launch(script: str, args: Sequence[str] = (), nproc: int = 1, threads: int | None = None) -> int:
    """Run a Python script (or, as "-m", a module: args[0]) on nproc ranks.

    Returns:
        0 when every rank ended well; else the first failing rank's exit status, after its error was printed.

    Raises:
        NotFoundError: there is no such script.
        InputError: nproc out of range.
    """
    if script != "-m" and not os.path.isfile(script):
        raise NotFoundError(f"script: no file at {script!r}")
    ranks = _start(nproc, threads, _run_script, (script, list(args)), True)
    try:
        failure = _supervise(ranks)
    except KeyboardInterrupt:
        print("tessera: interrupted; ending all ranks", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        _end(ranks)
    if failure is None:
        return 0
    print(f"tessera: {failure}", file=sys.stderr)
    status = next((rank.status for rank in ranks if rank.is_first_failure), 1)
    return status if status > 0 else 128 - status


class _Rank:
    """One process: its handle, its result, and how it ended."""

    def __init__(self, number: int, process: Any, results: Any) -> None:
        self.number, self.process, self.results = number, process, results
        self.result: Any = None
        self.error = ""
        self.is_done, self.is_first_failure = False, False

    @property
    def waits_for(self) -> list[Any]:
        """What becomes ready when the process says something or ends."""
        return [self.process.sentinel] if self.results.closed else [self.process.sentinel, self.results]

    @property
    def status(self) -> int:
        return self.process.exitcode if self.process.exitcode is not None else 0

    def read(self) -> None:
        """Take what the process has sent: its result or its error."""
        try:
            is_good, value = pickle.loads(self.results.recv_bytes())  # from our own process
        except (EOFError, OSError):
            self.results.close()
            return
        if is_good:
            self.result = value
        else:
            self.error = value

    def finish(self) -> bool:
        """Note that the process has ended; returns whether it ended well."""
        self.is_done = True
        self.process.join()
        while not self.results.closed and self.results.poll():
            self.read()
        return self.status == 0 and not self.error

    def why(self) -> str:
        if self.error:
            return f"rank {self.number} failed: {self.error}"
        if self.status < 0:
            return f"rank {self.number} (process {self.process.pid}) was killed by {signal.Signals(-self.status).name}"
        return f"rank {self.number} (process {self.process.pid}) exited with status {self.status}"


def _start(
    nproc: int, threads: int | None, function: Callable[..., Any], args: tuple[Any, ...], traces: bool,
) -> list[_Rank]:
    if not isinstance(nproc, int) or not 1 <= nproc <= _MOST_RANKS:
        raise InputError(f"nproc: {nproc} given; expected 1..{_MOST_RANKS}")
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tessera.dist"])
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks: list[_Rank] = []
    try:
        for number in range(nproc):
            receiver, sender = context.Pipe(duplex=False)
            own = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
            process = context.Process(target=_main, args=(sender, own, threads, function, args, traces))
            process.start()
            sender.close()
            ranks.append(_Rank(number, process, receiver))
    except BaseException:
        _end(ranks)
        raise
    ranks[0].store = store  # type: ignore[attr-defined]  # lives as long as the job
    return ranks


def _main(
    results: Any, environment: dict[str, str], threads: int, function: Any, args: tuple[Any, ...], traces: bool,
) -> None:
    """What a rank's process does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # even inside a collective, where Python would not look
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    _end_with_parent()
    try:
        value = function(*args)
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, CollectiveError):
            print(f"tessera: {error}", file=sys.stderr)
        elif traces and not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        with contextlib.suppress(OSError):
            results.send_bytes(pickle.dumps((False, f"{type(error).__name__}: {error}")))
        _leave(1)
    with contextlib.suppress(OSError):
        results.send_bytes(pickle.dumps((True, value)))
    from tessera.dist import world

    world.shutdown()


def _leave(status: int) -> None:
    """Exit without destructors: a process group whose peers are gone can take minutes to close."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_script(script: str, args: list[str]) -> None:
    if script == "-m":
        sys.argv = args
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *args]
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")


def _end_with_parent() -> None:
    """A thread that ends this process when the one that started the job is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="tessera-parent", daemon=True).start()


def _supervise(ranks: list[_Rank]) -> str | None:
    """Wait until all ranks have ended; returns what failed first, or None."""
    failure, deadline = None, float("inf")
    while running := [rank for rank in ranks if not rank.is_done]:
        timeout = None if failure is None else max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait([x for rank in running for x in rank.waits_for], timeout)
        for rank in running:
            if rank.results in ready:
                rank.read()
        ended = [rank for rank in running if rank.process.sentinel in ready]
        for rank in sorted(ended, key=lambda rank: rank.process.exitcode != -signal.SIGKILL):
            if not rank.finish() and failure is None:
                failure, rank.is_first_failure = rank.why(), True
                deadline = time.monotonic() + _GRACE
        if failure is not None and time.monotonic() >= deadline:
            break
    return failure


def _end(ranks: list[_Rank]) -> None:
    """End what still runs: SIGTERM, and a second later SIGKILL."""
    running = [rank.process for rank in ranks if rank.process.is_alive()]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + 1
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    for rank in ranks:
        rank.results.close()
