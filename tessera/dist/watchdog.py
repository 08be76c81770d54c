"""Watchdog: who is missing when a collective does not come to its end.

In: a key-value store that all ranks reach, and a note of each collective as it begins. Out: errors that name
the rank that died, left, or is in another collective; the end of waiting over shared memory for ranks that will
not come; and the end of this process when a rank has died while it waits where no error reaches it. Called by
dist.world and by every collective.

Each rank publishes twice a second where it is. A rank on the same host is dead when its process is gone, a
rank elsewhere when it has published nothing for `_SILENCE` seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tessera.errors import CollectiveError, TesseraError

_PERIOD = 0.5  # seconds between looks
_SILENCE = 8.0  # seconds after which a rank of another host counts as dead
_GRACE = 3.0  # seconds that a waiting collective has to fail by itself after a death
_WARN = 20.0  # seconds of waiting after which the wait is reported
EXIT_CODE = 75  # of a process that ends because another rank died


@dataclass
class _Place:
    """Where a rank is: its count-th collective, or between two."""

    count: int = 0
    op: str = ""
    axis: str = ""
    shape: tuple[int, ...] = ()
    ranks: Sequence[int] = ()
    since: float = field(default_factory=time.monotonic)
    is_warned: bool = False

    def __str__(self) -> str:
        return f"{self.op} #{self.count} on axis {self.axis!r}" + (f" of {list(self.shape)}" if self.shape else "")


class Mismatch(RuntimeError):
    """Ranks called different collectives; the text says which."""


class Guarded(Protocol):
    """A line of ranks whose collectives wait until they are told to give up (dist.shared)."""

    ranks: Sequence[int]
    channel: Any

    def give_up(self, call: int, reason: str) -> None: ...


class Watchdog:
    """Publishes where this rank is and looks after the others.

    Args:
        store: torch's TCPStore, a client of its own.
        rank, size: this rank, and how many there are.
        timeout: seconds after which collectives give up, for messages.
    """

    def __init__(self, store: Any, rank: int, size: int, *, timeout: float) -> None:
        self._store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self._lock = threading.Lock()
        self._place: _Place | None = None
        self._counts: dict[tuple[str, Sequence[int]], int] = {}  # collectives so far, by axis and ranks
        self._beat = 0
        self._end = ""  # why this rank left, once it has
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (its beat, when it last changed)
        self._known: dict[int, dict[str, Any]] = {}  # what the ranks have published, as last read
        self._store_is_gone = False
        self._guarded: list[tuple[Guarded, list[Any]]] = []  # a line, its call in progress and since when
        self._identity = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid())}
        self._stopping = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._watch, name="tessera-watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watching(self, op: str, axis: str, shape: Sequence[int], ranks: Sequence[int]) -> Iterator[None]:
        """Around a collective: its errors come out as CollectiveError, with the rank that is to blame."""
        count = self._counts[axis, ranks] = self._counts.get((axis, ranks), 0) + 1
        self._place = _Place(count, op, axis, tuple(shape), ranks)
        try:
            yield
        except TesseraError:
            raise
        except RuntimeError as error:
            raise self.failure(error) from error
        finally:
            self._place = None

    def failure(self, error: RuntimeError, doing: str = "", ranks: Sequence[int] = ()) -> CollectiveError:
        """The error to raise for one of transport: it says which rank is to blame, and the others are told.

        Args:
            error: what happened.
            doing, ranks: the collective, where it is not inside `watching` (replays of captured graphs).
        """
        place = self._place or _Place(op=doing, axis="(captured)", ranks=ranks)
        message = self._end = self._explain(place, error)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._publish()
        return CollectiveError(message)

    def guard(self, line: Guarded) -> None:
        """From now on, end the waiting of a line's collectives for ranks that will not come."""
        self._guarded.append((line, [None, 0.0]))

    def stop(self) -> None:
        """Tell the others that this rank is done."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._end = self._end or "it has finished"
            with contextlib.suppress(Exception):  # the store may be gone already
                self._publish()

    def _publish(self) -> None:
        place = self._place
        self._beat += 1
        state = {**self._identity, "beat": self._beat, "end": self._end,
                 "place": str(place) if place else ""}
        with self._lock:
            self._store.set(f"tessera/{self.rank}", json.dumps(state))

    def _states(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """What the ranks have published, as far as it can be known; a rank that has not begun is missing."""
        try:
            with self._lock:
                known = [r for r in ranks if self._store.check([f"tessera/{r}"])]
                texts = self._store.multi_get([f"tessera/{r}" for r in known]) if known else []
            self._known.update((r, json.loads(text)) for r, text in zip(known, texts))
        except RuntimeError:
            self._store_is_gone = True
        return {r: self._known[r] for r in ranks if r in self._known}

    def _explain(self, place: _Place, error: RuntimeError) -> str:
        """One line that says which rank is to blame, after giving its death a moment to show."""
        where = f"rank {self.rank}: {place}"
        if isinstance(error, Mismatch):
            return f"{where} failed: {error}"
        others = [r for r in range(self.size) if r != self.rank]
        deadline = time.monotonic() + _GRACE
        while True:
            states = self._states(others)
            dead = self._dead(states)
            if dead:
                return f"{where} failed: {', '.join(dead.values())}"
            if _is_timeout(error) or self._store_is_gone or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if self._store_is_gone:
            return f"{where} failed: the launcher, or rank 0 with the job's store, is gone"
        late = [_lateness(r, states.get(r), place) for r in place.ranks if r != self.rank]
        reasons = [text for text in late if text] or [str(error).splitlines()[0]]
        waited = f" after {time.monotonic() - place.since:.0f} s" if _is_timeout(error) else ""
        return f"{where} failed{waited}: {'; '.join(reasons)}"

    def _dead(self, states: dict[int, dict[str, Any]]) -> dict[int, str]:
        """Ranks whose process ended without a word."""
        now, dead = time.monotonic(), {}
        for rank, state in states.items():
            if state["end"]:
                continue
            doing = f" (last in {state['place']})" if state["place"] else ""
            if state["host"] == self._identity["host"]:
                if _start_time(state["pid"]) != state["start"]:
                    dead[rank] = f"rank {rank} (process {state['pid']}) died{doing}"
                continue
            beat, changed = self._seen.get(rank, (-1, now))
            if state["beat"] != beat:
                self._seen[rank] = (state["beat"], now)
            elif now - changed > _SILENCE and not self._store_is_gone:
                dead[rank] = f"rank {rank} on {state['host']} has been silent for {now - changed:.0f} s{doing}"
        return dead

    def _watch(self) -> None:
        others = [r for r in range(self.size) if r != self.rank]
        dead_since: float | None = None
        while not self._stopping.wait(self._until_next_look()):
            with contextlib.suppress(RuntimeError):
                self._publish()
            states = self._states(others)
            place, dead = self._place, self._dead(states)
            self._release(place, states, dead)
            if place is None or not dead or self._store_is_gone:
                dead_since = None
                self._warn(place, states)
                continue
            dead_since = dead_since or time.monotonic()
            if time.monotonic() - max(dead_since, place.since) > _GRACE:
                print(f"tessera: rank {self.rank} ends in {place}: {', '.join(dead.values())}",
                      file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    def _until_next_look(self) -> float:
        """Seconds: a period, or to the moment when this rank's collective has taken too long."""
        place = self._place
        left = _PERIOD if place is None else place.since + self.timeout - time.monotonic()
        return min(_PERIOD, left + 0.01) if left > 0 else _PERIOD

    def _release(self, place: _Place | None, states: dict[int, dict[str, Any]], dead: dict[int, str]) -> None:
        """End the waiting over shared memory, where nothing breaks when a rank goes."""
        for line, waiting in self._guarded:
            call, now = line.channel.call_in_progress, time.monotonic()
            if call != waiting[0]:
                waiting[:] = call, place.since if place else now
            if call is None:
                continue
            is_lost = dead and not self._store_is_gone  # without the store nobody can tell a death from an end
            if is_lost or any(rank in dead or states.get(rank, {}).get("end") for rank in line.ranks):
                line.give_up(call, "gave up")
            elif now - waiting[1] >= self.timeout:
                line.give_up(call, "timed out")

    def _warn(self, place: _Place | None, states: dict[int, dict[str, Any]]) -> None:
        if place is None or place.is_warned or time.monotonic() - place.since < _WARN:
            return
        place.is_warned = True
        late = [_lateness(r, states.get(r), place) for r in place.ranks if r != self.rank]
        if any(late):
            print(f"tessera: rank {self.rank} has waited {_WARN:.0f} s in {place}: {'; '.join(filter(None, late))}; "
                  f"it gives up after {self.timeout:.0f} s", file=sys.stderr, flush=True)


def _lateness(rank: int, state: dict[str, Any] | None, place: _Place) -> str:
    """Why a rank may be what `place` waits for; empty when it is in the same collective."""
    if state is None:
        return f"rank {rank} has not begun"
    if state["end"]:
        return f"rank {rank} has left ({state['end']})" if "rank" not in state["end"] else state["end"]
    if state["place"] == str(place):
        return ""
    return f"rank {rank} is in {state['place']}" if state["place"] else f"rank {rank} is missing (in no collective)"


def _is_timeout(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def _start_time(pid: int) -> str:
    """When a process began, as the kernel counts; empty when it is gone (a zombie is). Tells reused ids apart."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
