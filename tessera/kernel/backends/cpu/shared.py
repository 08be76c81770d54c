"""Collectives of several processes over memory that they share, as native code.

In: the address where a process has mapped the segment, its rank, and for each call two addresses. Out: `Channel`,
one process's end of it, and `Collective`, a call that can be repeated, directly or as a step of a replay. Called by
dist.shared, which makes the segment, watches over the other ranks and turns a status into an error.

A collective moves chunks of at most `SLOT` bytes. For each a rank copies its piece into its slot, raises its flag
to the number of the round, waits for all other flags, and reads from the slots what it needs. There are two slots a
rank, used by turns: who has seen all flags of a chunk knows that everyone has done with the one before, so one wait
a chunk is enough. Beside its flag a rank writes what it is calling; all compare.

Long sums over three ranks or more take two rounds a chunk: each rank sums one part of it in place, in its slot, and
after the second round all copy the parts. A rank then reads 2 - 1 / n chunks rather than n.

A waiting rank first spins, then sleeps (futex) in short turns, between which it looks whether `give_up` was called.
Spinning pays while the others are running too: where it is in vain several times (cores are shared, or work is
uneven), a rank goes to sleep at once, and tries it again only now and then.
Sums are taken in the fixed tree of ops.invariant.tree_sum over the ranks, each element by itself, so that their
bits depend on nothing else; 16-bit types are summed in f32 and rounded once.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tessera.kernel.backends.cpu import jit, storage
from tessera.kernel.backends.cpu.context import storage_type
from tessera.kernel.backends.cpu.emit import I32, I64, PTR, VOID, Builder, Function, Module, Val, vec
from tessera.kernel.backends.cpu.host import target
from tessera.kernel.cache import cached
from tessera.types import DType

SLOT = 256 << 10  # bytes: what a rank publishes stays in its caches until the others have read it
LONG = 128 << 10  # bytes from which sums over three ranks or more take two rounds a chunk
LINE = 128  # bytes: two cache lines, which processors fetch together
MAX_RANKS = 64
SPINS = 20_000  # looks at a flag before sleeping, about 500 us: some times what uneven work of ranks makes them wait
_FEW_SPINS = 20
_TRUST, _LOSS, _RETRY = 8, -4, 64  # most credit, what a sleep costs, rounds between trials without credit
_NAP = 50_000_000  # ns of sleep between two looks whether to give up

# A rank's line in the segment.
_FLAG, _SLEEPERS, _CALLING = 0, 4, 8  # u32 round, u32 ranks that sleep for it, two u64: what it calls, by turns

# A channel's state, of its process alone: i64 each.
_BASE, _RANK, _ROUND, _STARTED, _FINISHED, _GIVEN_UP, _SPINS, _CREDIT, _CHUNK = range(9)

# The arguments of a call: i64 each, packed in this order.
_CHANNEL, _SOURCE, _OUT, _NBYTES, _LOW, _HIGH, _FIRST, _LAST, _PUBLISHES, _SAYS, _STATUS = range(11)

GAVE_UP, DIFFERS = 1, 2  # a call's status other than 0; from DIFFERS on: rank status - DIFFERS calls something else
OPS = ("sum", "max", "min", "prod")
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYONE = 0, 1, 0x7FFFFFFF
_FOREVER = 1 << 62


def is_available() -> bool:
    """Whether this machine has the system call that sleepers are woken with."""
    return bool(_FUTEX) and platform.system() == "Linux"


def segment_bytes(n_ranks: int) -> int:
    """The size of a segment: the ranks' lines, then two slots a rank."""
    return _slots_offset(n_ranks) + 2 * n_ranks * SLOT


def _slots_offset(n_ranks: int) -> int:
    return -(-n_ranks * LINE // 4096) * 4096


class Channel:
    """A process's end of a segment.

    Args:
        address: where this process has mapped it; zeros at first.
        rank, n_ranks: which of how many; at most MAX_RANKS.
        spins: most looks at a flag before sleeping.
        fail: raises the error for a call's status; called with it.
    """

    def __init__(
        self, address: int, rank: int, n_ranks: int, *, spins: int = SPINS, fail: Callable[[int], None],
    ) -> None:
        self.rank, self.n_ranks, self.fail, self._base = rank, n_ranks, fail, address
        self._state = (ctypes.c_int64 * 9)(address, rank, 0, 0, 0, 0, spins, _TRUST, 0)
        self.address = ctypes.addressof(self._state)

    @property
    def call_in_progress(self) -> int | None:
        """The number of the call that this process is in."""
        started = self._state[_STARTED]
        return None if started == self._state[_FINISHED] else started

    def give_up(self, call: int) -> None:
        """Have a call, if it still waits, return with status GAVE_UP. For other threads."""
        self._state[_GIVEN_UP] = call

    def says(self, rank: int) -> int:
        """What a rank has said that it calls in this rank's latest round."""
        turn = self._state[_ROUND] & 1
        return ctypes.c_uint64.from_address(self._base + rank * LINE + _CALLING + 8 * turn).value


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A call of all ranks of a channel, for any addresses: `run(source, out)`, or packed as a step of a replay.

    Attributes:
        channel: this process's end.
        reduce: dtype and op (one of OPS), to combine what the ranks publish; None to copy it.
        nbytes: what each rank publishes; the same on all.
        low, high: the bytes of it that this rank reads of each rank.
        ranks: first and last + 1 of those that it reads from. Copies of their parts lie one behind the other.
        publishes: whether this rank's own bytes are read by anyone.
        says: a number that must be the same on all ranks.
    """

    channel: Channel
    reduce: tuple[DType, str] | None
    nbytes: int
    low: int
    high: int
    ranks: tuple[int, int]
    publishes: bool = True
    says: int = 0

    def run(self, source: int, out: int) -> None:
        """Do it; `source` has nbytes bytes, `out` room for what is read."""
        status = _library(self.channel.n_ranks, self.reduce).run(self._packed(source, out))
        if status:
            self.channel.fail(status)

    def _packed(self, source: int, out: int) -> bytes:
        return _PACK(self.channel.address, source, out, self.nbytes, self.low, self.high, *self.ranks,
                     self.publishes, self.says, 0)

    # -- a step of backends.cpu.replay ----------------------------------------------------------------

    has_asserts = True

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The addresses of `items` and `body`."""
        return [_library(self.channel.n_ranks, self.reduce).segment]

    def pack(self, args: Sequence[torch.Tensor], sizes: Sequence[int], threads: int) -> bytes:
        """The arguments of a step: the source and the result."""
        return self._packed(*[x.data_ptr() for x in args])

    def slot(self, argument: int) -> int:
        """Where the source (0) or the result (1) stands in the packed arguments."""
        return _SOURCE + argument

    def is_small(self, packed: bytes) -> bool:
        """One thread does it."""
        return True

    def check(self, status: int) -> None:
        """Raise what a step's status stands for."""
        if status:
            self.channel.fail(status)


_PACK = struct.Struct("3Q8q").pack


class _Native:
    """The loaded code of one kind of collective."""

    def __init__(self, n_ranks: int, reduce: tuple[DType, str] | None) -> None:
        host = target()
        module = Module(has_f16=host.has_f16)
        _emit(module, n_ranks, reduce)
        text = module.text()
        code = cached(f"cpu {host.key}\n{text}", lambda: jit.compile_to_object(text, host))
        self._library = jit.load_object(code, host)
        self.run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(self._library.address("run"))
        self.segment = self._library.address("items_0"), self._library.address("body_0")


_lock = threading.Lock()
_libraries: dict[tuple[int, tuple[DType, str] | None], _Native] = {}


def _library(n_ranks: int, reduce: tuple[DType, str] | None) -> _Native:
    found = _libraries.get((n_ranks, reduce))
    if found is None:
        with _lock:  # one for all threads: code that runs must not be dropped
            found = _libraries.get((n_ranks, reduce)) or _Native(n_ranks, reduce)
            _libraries[n_ranks, reduce] = found
    return found


# -- LLVM text -------------------------------------------------------------------------------------------


def _emit(module: Module, n_ranks: int, reduce: tuple[DType, str] | None) -> None:
    """`run(args) -> status`, and `items_0` and `body_0`, which leave the status in the arguments."""
    run = _emit_run(module, n_ranks, reduce)
    items = module.function("items_0", I64, [("args", PTR)])
    items.builder.ret(items.builder.value(1, I64))
    body = module.function("body_0", VOID, [("args", PTR), ("begin", I64), ("end", I64)])
    body.builder.store(body.builder.call(run, body.args[0]), body.builder.gep(body.args[0], _STATUS, I64))
    body.builder.ret()


def _emit_run(module: Module, n_ranks: int, reduce: tuple[DType, str] | None) -> Function:
    function = module.function("run", I64, [("args", PTR)])
    b, args = function.builder, function.args[0]
    arg = [b.load(b.gep(args, k, I64), I64) for k in range(_STATUS)]
    channel, source, out = (b.cast("inttoptr", arg[k], PTR) for k in (_CHANNEL, _SOURCE, _OUT))
    rank, started = b.load(b.gep(channel, _RANK, I64), I64), b.gep(channel, _STARTED, I64)
    call = b.add(b.load(started, I64), 1)
    b.atomic_store(call, started)
    takes_turns = b.and_(b.cmp("eq", b.sub(arg[_HIGH], arg[_LOW]), arg[_NBYTES]),
                         b.cmp("ge", arg[_NBYTES], LONG if n_ranks > 2 else _FOREVER))
    # At least one chunk, for those that wait and move nothing.
    with b.for_(0, b.max(arg[_NBYTES], 1), SLOT, carry=[b.value(0, I64)]) as loop:
        size = b.min(b.sub(arg[_NBYTES], loop.i), SLOT)
        turn = _next_slots(b, channel, n_ranks)
        with b.if_(b.cmp("ne", arg[_PUBLISHES], 0)):
            b.copy(b.gep(turn, b.mul(rank, SLOT), "i8"), b.gep(source, loop.i, "i8"), size)
        status = _emit_round(b, n_ranks, channel, call, arg)
        low = b.max(arg[_LOW], loop.i)
        count = b.max(b.sub(b.min(arg[_HIGH], b.add(loop.i, size)), low), 0)
        place, first = b.gep(out, b.sub(low, arg[_LOW]), "i8"), b.gep(turn, b.sub(low, loop.i), "i8")
        if reduce is None:
            with b.if_(b.cmp("eq", status, 0), likely=True):
                _copy_all(b, first, place, count, arg)
        else:
            with b.if_(b.and_(b.cmp("eq", status, 0), takes_turns)) as branch:
                _combine_part(b, _slots(b, turn, n_ranks), rank, size, *reduce)
                last = _emit_round(b, n_ranks, channel, call, arg)
                with b.if_(b.cmp("eq", last, 0), likely=True):
                    _copy_parts(b, _slots(b, turn, n_ranks), place, size)
                branch.give([last])
            with branch.else_():
                with b.if_(b.cmp("eq", status, 0), likely=True):
                    _combine_all(b, _slots(b, first, n_ranks), place, count, *reduce)
                branch.give([status])
            status = branch.results[0]
        loop.next([status])
        loop.next_i = b.select(b.cmp("eq", status, 0), b.add(loop.i, SLOT), _FOREVER)
    b.atomic_store(call, b.gep(channel, _FINISHED, I64))
    b.ret(loop.results[0])
    return function


def _next_slots(b: Builder, channel: Val, n_ranks: int) -> Val:
    """The ranks' slots for one more chunk."""
    chunk = b.gep(channel, _CHUNK, I64)
    number = b.add(b.load(chunk, I64), 1)
    b.store(number, chunk)
    slots = b.gep(b.load(b.gep(channel, _BASE, I64), PTR), _slots_offset(n_ranks), "i8")
    return b.gep(slots, b.mul(b.and_(number, 1), n_ranks * SLOT), "i8")


def _emit_round(b: Builder, n_ranks: int, channel: Val, call: Val, arg: Sequence[Val]) -> Val:
    """Meet the other ranks; a status."""
    number = b.add(b.load(b.gep(channel, _ROUND, I64), I64), 1)
    b.store(number, b.gep(channel, _ROUND, I64))
    return b.call(_emit_sync(b.module, n_ranks), channel, number, call, arg[_SAYS])


def _slots(b: Builder, first: Val, n_ranks: int) -> list[Val]:
    return [b.gep(first, r * SLOT, "i8") for r in range(n_ranks)]


def _part(b: Builder, rank: Val | int, n_ranks: int, size: Val) -> tuple[Val, Val]:
    """Where a rank's part of a chunk begins, and how many bytes it has: whole lines, the last ones what is left."""
    step = b.mul(b.div(b.add(size, n_ranks * LINE - 1), n_ranks * LINE), LINE)
    start = b.min(b.mul(step, rank), size)
    return start, b.min(b.sub(size, start), step)


def _combine_part(b: Builder, slots: Sequence[Val], rank: Val, size: Val, dtype: DType, op: str) -> None:
    """Combine this rank's part of a chunk into its own slot, where nobody else reads that part of what it gave."""
    start, count = _part(b, rank, len(slots), size)
    own = b.gep(slots[0], b.mul(rank, SLOT), "i8")
    _combine_all(b, [b.gep(slot, start, "i8") for slot in slots], b.gep(own, start, "i8"), count, dtype, op)


def _copy_parts(b: Builder, slots: Sequence[Val], place: Val, size: Val) -> None:
    """Each rank's part of a chunk, out of its slot."""
    for rank, slot in enumerate(slots):
        start, count = _part(b, rank, len(slots), size)
        b.copy(b.gep(place, start, "i8"), b.gep(slot, start, "i8"), count)


def _copy_all(b: Builder, first: Val, place: Val, count: Val, arg: Sequence[Val]) -> None:
    """The parts of ranks FIRST .. LAST - 1, each HIGH - LOW bytes from the one before."""
    step = b.sub(arg[_HIGH], arg[_LOW])
    with b.for_(arg[_FIRST], arg[_LAST]) as rank:
        to = b.gep(place, b.mul(b.sub(rank.i, arg[_FIRST]), step), "i8")
        b.copy(to, b.gep(first, b.mul(rank.i, SLOT), "i8"), count)


def _combine_all(b: Builder, parts: Sequence[Val], place: Val, nbytes: Val, dtype: DType, op: str) -> None:
    ty, width = storage_type(dtype), 4 * target().lanes(max(32, dtype.bits))
    count = b.div(nbytes, dtype.bits // 8)
    whole = b.sub(count, b.rem(count, width))
    for start, end, lanes in ((0, whole, width), (whole, count, 0)):
        with b.for_(start, end, max(1, lanes)) as loop:
            terms = [storage.from_storage(b, b.load(b.gep(part, loop.i, ty), vec(lanes, ty)), dtype) for part in parts]
            total = _tree(terms, lambda x, y: _apply(b, op, x, y))
            b.store(storage.to_storage(b, total, dtype), b.gep(place, loop.i, ty))


def _tree(terms: Sequence[Val], combine: Callable[[Val, Val], Val]) -> Val:
    """As ops.invariant.tree_sum: the first half, which is the larger, with the second."""
    if len(terms) == 1:
        return terms[0]
    middle = (len(terms) + 1) // 2
    return combine(_tree(terms[:middle], combine), _tree(terms[middle:], combine))


def _apply(b: Builder, op: str, x: Val, y: Val) -> Val:
    combine: dict[str, Callable[[Val, Val], Val]] = {"sum": b.add, "max": b.max, "min": b.min, "prod": b.mul}
    return combine[op](x, y)


def _emit_sync(module: Module, n_ranks: int) -> Function:
    """Raise this rank's flag, wait for the others', compare what is being called; a status."""
    if "sync" in module.functions:
        return module.functions["sync"]
    function = module.function("sync", I64, [("channel", PTR), ("round", I64), ("call", I64), ("says", I64)],
                               internal=True)
    b, (channel, number, call, says) = function.builder, function.args
    base = b.load(b.gep(channel, _BASE, I64), PTR)
    own = b.gep(base, b.mul(b.load(b.gep(channel, _RANK, I64), I64), LINE), "i8")
    said = b.add(b.mul(b.and_(number, 1), 8), _CALLING)
    b.store(says, b.gep(own, said, "i8"))
    flag = b.cast("trunc", number, I32)
    # Sequentially consistent, as the sleepers' side: one of the two sees the other.
    b.atomic_store(flag, own, order="seq_cst")
    with b.if_(b.cmp("ne", b.atomic_load(b.gep(own, _SLEEPERS, "i8"), I32, order="seq_cst"), 0), likely=False):
        _futex(b, own, _FUTEX_WAKE, _EVERYONE, b.value(0, PTR))
    credit_at = b.gep(channel, _CREDIT, I64)
    credit, most = b.load(credit_at, I64), b.load(b.gep(channel, _SPINS, I64), I64)
    trusts = b.or_(b.cmp("gt", credit, 0), b.cmp("eq", b.urem(number, _RETRY), 0))
    spins = b.select(trusts, most, b.min(most, _FEW_SPINS))
    wait, none = _emit_wait(module), b.value(0, I64)
    with b.for_(0, n_ranks, carry=[none, none]) as rank:
        line, naps = b.gep(base, b.mul(rank.i, LINE), "i8"), rank.carry[1]
        found = b.call(wait, channel, line, flag, call, spins)
        status, naps = b.and_(found, GAVE_UP), b.add(naps, b.lshr(found, 1))
        differs = b.and_(b.cmp("eq", status, 0), b.cmp("ne", b.load(b.gep(line, said, "i8"), I64), says))
        status = b.select(differs, b.add(rank.i, DIFFERS), status)
        rank.next([status, naps])
        rank.next_i = b.select(b.cmp("eq", status, 0), b.add(rank.i, 1), n_ranks)
    earned = b.select(b.cmp("eq", rank.results[1], 0), b.value(1, I64), _LOSS)
    with b.if_(trusts):
        b.store(b.max(b.min(b.add(credit, earned), _TRUST), 0), credit_at)
    b.ret(rank.results[0])
    return function


def _emit_wait(module: Module) -> Function:
    """Wait until the flag at `line` has come to `flag`; 0 or GAVE_UP, plus twice the number of naps."""
    function = module.function("wait", I64, [("channel", PTR), ("line", PTR), ("flag", I32), ("call", I64),
                                             ("spins", I64)], internal=True)
    b, (channel, line, flag, call, spins) = function.builder, function.args

    def has_come(seen: Val) -> Val:
        return b.cmp("ge", b.sub(seen, flag), 0)  # rounds are numbered modulo 2**32

    with b.for_(0, spins) as spin:
        _pause(b)
        spin.next_i = b.select(has_come(b.atomic_load(line, I32)), spins, b.add(spin.i, 1))
    pause = b.alloca(I64, 2)
    b.store(b.value(0, I64), pause)
    b.store(b.value(_NAP, I64), b.gep(pause, 1, I64))
    given_up, sleepers = b.gep(channel, _GIVEN_UP, I64), b.gep(line, _SLEEPERS, "i8")
    with b.for_(0, _FOREVER, carry=[b.value(0, I64)]) as turn:
        seen = b.atomic_load(line, I32)
        is_over = b.cmp("eq", b.atomic_load(given_up), call)
        with b.if_(b.not_(b.or_(has_come(seen), is_over))):
            b.atomic_add(sleepers, 1, I32, order="seq_cst")
            _futex(b, line, _FUTEX_WAIT, seen, pause)
            b.atomic_add(sleepers, -1, I32, order="seq_cst")
        status = b.select(has_come(seen), 0, b.cast("zext", is_over, I64))
        turn.next([b.or_(status, b.shl(turn.i, 1))])
        turn.next_i = b.select(b.or_(has_come(seen), is_over), _FOREVER, b.add(turn.i, 1))
    b.ret(turn.results[0])
    return function


def _futex(b: Builder, address: Val, operation: int, value: Val | int, timeout: Val) -> None:
    syscall = b.module.declare("syscall", I64, [I64, PTR, I32, I32, PTR])
    b.call(syscall, _FUTEX, address, operation, value, timeout)


def _pause(b: Builder) -> None:
    """Tell the processor that this is a waiting loop."""
    name, args = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}[platform.machine()]
    b.call(b.module.declare(name, VOID, [I32 for _ in args]), *args)
