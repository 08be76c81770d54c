"""Memory that the ranks of one host share, for collectives that pay no sockets.

In: the ranks of a line of a mesh and the job's store. Out: a `SharedLine` when all of them run on this host and can
map one segment; None otherwise, for all alike. Called by dist.world; its methods by dist.collectives.

The first rank of the line makes the segment (memfd: it has no name in any folder, and is gone with the last process
that maps it, however that ends) and tells the others its number; they open it through /proc, and must find the
nonce in it that was told them. How data moves is in kernel.backends.cpu.shared.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tessera import env
from tessera.dist.watchdog import Mismatch, Watchdog
from tessera.errors import CollectiveError
from tessera.kernel import recording
from tessera.kernel.backends.cpu import shared as native
from tessera.types import DTYPES, dtype_of

_NONCE_BYTES = 16
_KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "ring_exchange", "barrier")
_NAMES = {dtype.torch: name for name, dtype in DTYPES.items() if name != "int4"}
_REDUCED = frozenset(DTYPES[name].torch for name in "f32 f64 bf16 f16 int8 uint8 int32 int64".split())
_MAX_PLANS = 4096
_LONG, _PAGE = 4 << 20, 4096  # bytes
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
if _madvise is not None:
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


@dataclass
class Rehearsal:
    """How many collectives were recorded without being run."""

    n_left_out: int = 0


_REHEARSAL: contextvars.ContextVar[Rehearsal | None] = contextvars.ContextVar("tessera_rehearsal", default=None)


@contextlib.contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """Inside, collectives over shared memory that a graph records do not run, and what they give is undefined.

    For functions that can be done again: the ranks record, agree whether all of them could, and replay. Without this a
    rank that finds something it cannot record would leave the others waiting in a collective.
    """
    found = Rehearsal()
    token = _REHEARSAL.set(found)
    try:
        yield found
    finally:
        _REHEARSAL.reset(token)


class SharedLine:
    """The ranks of a line and the memory between them.

    Args:
        memory: the mapped segment.
        ranks: of the job, in the order of the line.
        here: this process's place among them.
        watchdog: has waiting calls give up when a rank will not come, and finds the words for it.
    """

    def __init__(self, memory: mmap.mmap, ranks: Sequence[int], here: int, watchdog: Watchdog) -> None:
        self.ranks, self.here, self._watchdog = tuple(ranks), here, watchdog
        self._memory = memory
        self._first = ctypes.c_char.from_buffer(memory)  # holds the mapping
        cores = os.cpu_count() or 1  # not those of this process: ranks may be pinned to one each
        self.channel = native.Channel(
            ctypes.addressof(self._first), here, len(ranks), fail=self._fail,
            spins=native.SPINS if len(ranks) <= cores else 0)
        self._plans: dict[Any, native.Collective] = {}
        self.gave_up_because = ""
        self._failure: CollectiveError | None = None
        watchdog.guard(self)

    def takes(self, x: Tensor, *, sums: bool) -> bool:
        """Whether x can be moved (and combined with others) so."""
        return x.device.type == "cpu" and x.layout == torch.strided and (not sums or x.dtype in _REDUCED)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum (max, min, prod) of the ranks' x; 16-bit types in f32, rounded once."""
        out = _empty(x.shape, x.dtype)
        self._move("all_reduce", x.contiguous(), out, reduce=op, low=0, high=x.numel())
        return out

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's part, of sizes[here] elements, of the sum of the ranks' x, a vector."""
        out, start = _empty((sizes[self.here],), x.dtype), sum(sizes[: self.here])
        self._move("reduce_scatter", x, out, reduce="sum", low=start, high=start + sizes[self.here])
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: what each rank gave."""
        out = _empty((len(self.ranks), *x.shape), x.dtype)
        self._move("all_gather", x.contiguous(), out, low=0, high=x.numel())
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        """[ranks, ...]: row `here` of what each rank gave, [ranks, ...], dense."""
        out = _empty(x.shape, x.dtype)
        row = x.numel() // len(self.ranks)
        self._move("all_to_all", x, out, low=self.here * row, high=(self.here + 1) * row)
        return out

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """What the rank at place `source` gave."""
        out = _empty(x.shape, x.dtype)
        self._move("broadcast", x.contiguous(), out, low=0, high=x.numel(), source=source, root=source)
        return out

    def ring_exchange(self, x: Tensor, shift: int) -> Tensor:
        """What the rank `shift` places before gave."""
        out, n_ranks = _empty(x.shape, x.dtype), len(self.ranks)
        self._move("ring_exchange", x.contiguous(), out, low=0, high=x.numel(), root=shift,
                   source=(self.here - shift) % n_ranks)
        return out

    def barrier(self) -> None:
        """Return once every rank has come here."""
        nothing = torch.empty(0, dtype=torch.uint8)
        self._move("barrier", nothing, nothing, low=0, high=0)

    def _move(
        self, kind: str, x: Tensor, out: Tensor, *, low: int, high: int, reduce: str | None = None,
        source: int | None = None, root: int = 0,
    ) -> None:
        """One collective; low and high count elements, `source` is the only place read from, `root` common to all."""
        if self._failure is not None:
            raise self._failure
        key = kind, reduce, x.dtype, x.numel(), low, high, source
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(kind, x, low, high, reduce, source, root)
        rehearsal = _REHEARSAL.get() if recording.is_recording() else None
        if rehearsal is not None:
            rehearsal.n_left_out += 1
        else:
            plan.run(x.data_ptr(), out.data_ptr())
        if recording.is_recording():
            recording.add(recording.NativeStep(name=kind, compiled=plan, outputs=(1,)), (x, out))

    def _plan(
        self, kind: str, x: Tensor, low: int, high: int, op: str | None, source: int | None, root: int,
    ) -> native.Collective:
        dtype, itemsize = dtype_of(x.dtype) if op else None, x.element_size()
        return native.Collective(
            channel=self.channel, reduce=(dtype, op) if dtype and op else None, nbytes=x.nbytes, low=low * itemsize,
            high=high * itemsize, ranks=(0, len(self.ranks)) if source is None else (source, source + 1),
            publishes=kind != "broadcast" or source == self.here, says=_say(kind, x, op, root))

    def _fail(self, status: int) -> None:
        """Raise the error for a call's status; the line cannot be used any more."""
        doing = _understand(self.channel.says(self.here))
        error: RuntimeError
        if status >= native.DIFFERS:
            other = status - native.DIFFERS
            error = Mismatch(f"rank {self.ranks[other]} calls {_understand(self.channel.says(other))}, "
                             f"this rank {doing}")
        else:
            error = RuntimeError(self.gave_up_because)
        self._failure = self._watchdog.failure(error, doing, self.ranks)
        raise self._failure

    def give_up(self, call: int, reason: str) -> None:
        """Have a call that still waits fail; called by the watchdog's thread."""
        self.gave_up_because = reason
        self.channel.give_up(call)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room for a result. Long ones ask for huge pages: to take a new page of 4 KiB costs as much as to fill it."""
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= _LONG and _madvise is not None:
        begin, end = -(-out.data_ptr() // _PAGE) * _PAGE, (out.data_ptr() + out.nbytes) // _PAGE * _PAGE
        _madvise(begin, end - begin, mmap.MADV_HUGEPAGE)  # advice: where it is not taken, nothing is lost
    return out


def _say(kind: str, x: Tensor, op: str | None, root: int) -> int:
    """A collective as a number: its kind, op, dtype, root and the elements that a rank gives."""
    name, count = _NAMES.get(x.dtype, "uint8"), x.numel() if x.dtype in _NAMES else x.nbytes
    how = _KINDS.index(kind) | (native.OPS.index(op) if op else 0) << 4 | list(DTYPES).index(name) << 8
    return how | root << 16 | (count & 0x7FFFFFFF) << 32


def _understand(number: int) -> str:
    """The words for what `_say` made."""
    kind, op, dtype = _KINDS[number & 15], native.OPS[number >> 4 & 15], list(DTYPES)[number >> 8 & 255]
    root = number >> 16 & 0xFFFF
    how = {"all_reduce": f" ({op})", "broadcast": f" (src {root})", "ring_exchange": f" (shift {root})"}.get(kind, "")
    return kind if kind == "barrier" else f"{kind}{how} of {number >> 32} {dtype}"


class Store(Protocol):
    """What is used of torch's TCPStore."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


def attach(store: Store, name: str, ranks: Sequence[int], here: int, watchdog: Watchdog) -> SharedLine | None:
    """Map one segment into all ranks of a line; each of them calls this.

    Args:
        store: where the ranks find each other; `get` waits for a key.
        name: of this line, the same on its ranks and on no others.
        ranks: of the job, in order; here: this process's place among them.
        watchdog: of this process.

    Returns:
        None on all ranks when one of them cannot or, by TESSERA_SHARED_MEMORY=0, will not.
    """
    memory = handle = None
    wants = env.get("TESSERA_SHARED_MEMORY") and native.is_available() and len(ranks) <= native.MAX_RANKS
    size = native.segment_bytes(len(ranks)) + _NONCE_BYTES
    if here == 0:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        handle = _create(size, nonce) if wants else None
        store.set(name, json.dumps({} if handle is None else {
            "boot": _boot_id(), "pid": os.getpid(), "handle": handle, "nonce": nonce.hex()}))
        memory = None if handle is None else _map(handle, size)
    elif wants:
        memory = _open(json.loads(store.get(name)), size)
    store.set(f"{name}/{here}", str(int(memory is not None)))
    is_common = all(store.get(f"{name}/{place}") == b"1" for place in range(len(ranks)))
    if here == 0 and handle is not None:
        os.close(handle)
    return SharedLine(memory, ranks, here, watchdog) if is_common and memory is not None else None


def _create(size: int, nonce: bytes) -> int | None:
    """A segment with its memory set aside, so that no later write finds none; None where there is not enough."""
    try:
        handle = os.memfd_create("tessera", os.MFD_CLOEXEC)
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, size)
        os.pwrite(handle, nonce, size - _NONCE_BYTES)
    except OSError:
        os.close(handle)
        return None
    return handle


def _open(told: dict[str, Any], size: int) -> mmap.mmap | None:
    """The segment that the first rank has made, if it is on this host and may be opened."""
    if told.get("boot") != _boot_id():
        return None
    path = f"/proc/{int(told['pid'])}/fd/{int(told['handle'])}"
    with contextlib.suppress(OSError):
        if not os.readlink(path).startswith("/memfd:tessera"):
            return None
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(handle).st_size == size and os.pread(
                    handle, _NONCE_BYTES, size - _NONCE_BYTES).hex() == told["nonce"]:
                return _map(handle, size)
        finally:
            os.close(handle)
    return None


def _map(handle: int, size: int) -> mmap.mmap | None:
    try:
        return mmap.mmap(handle, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError:
        return None


def _boot_id() -> str:
    """Tells hosts apart, whatever they are called."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return secrets.token_hex()
