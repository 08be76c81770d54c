"""Shared memory between ranks: the native collectives among threads, and the segment among processes."""

import functools
import operator
import os
import threading

import pytest
import torch

import tessera as ts
from tessera.dist import shared
from tessera.kernel.backends.cpu import shared as native
from tessera.ops.invariant import tree_sum
from tessera.types import dtype_of
from tests.dist import ranks

DTYPES = "f32 f64 bf16 f16 int8 uint8 int32 int64".split()


def fail(status):
    raise RuntimeError(f"status {status}")


class Threads:
    """n ranks as threads of this process: native code knows no difference."""

    def __init__(self, n, spins=50):
        self.n, self.memory = n, torch.zeros(native.segment_bytes(n) + 4096, dtype=torch.uint8)
        address = -(-self.memory.data_ptr() // 4096) * 4096
        self.channels = [native.Channel(address, r, n, spins=spins, fail=fail) for r in range(n)]

    def run(self, work):
        """work(rank) on each; what they return, or the first error."""
        found, errors = [None] * self.n, []

        def one(rank):
            try:
                found[rank] = work(rank)
            except RuntimeError as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found

    def move(self, rank, x, out, **fields):
        plan = {"channel": self.channels[rank], "reduce": None, "nbytes": x.nbytes, "low": 0, "high": x.nbytes,
                "ranks": (0, self.n), **fields}
        native.Collective(**plan).run(x.data_ptr(), out.data_ptr())
        return out


def draw(name, count, rank):
    generator = torch.Generator().manual_seed(100 * count + rank)
    if dtype_of(name).is_float:
        return torch.randn(count, generator=generator).to(dtype_of(name).torch)
    return torch.randint(-100, 100, (count,), generator=generator).to(dtype_of(name).torch)


def combined(op, xs):
    """In f32 for 16-bit types, rounded once; sums in the fixed tree."""
    wide = [x.float() if x.dtype.itemsize == 2 else x for x in xs]
    if op == "sum":
        return tree_sum(wide).to(xs[0].dtype)
    step = {"max": torch.maximum, "min": torch.minimum, "prod": operator.mul}[op]
    return functools.reduce(step, wide).to(xs[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 5])
def test_sums(dtype, n):
    """To the bit; long ones of three ranks and more go by parts, the last size in several chunks."""
    threads, itemsize = Threads(n), dtype_of(dtype).torch.itemsize
    for count in (0, 1, 37, 1003, native.LONG // itemsize, 2 * native.SLOT // itemsize + 77):
        xs = [draw(dtype, count, r) for r in range(n)]
        outs = threads.run(lambda r, xs=xs: threads.move(
            r, xs[r], torch.empty_like(xs[r]), reduce=(dtype_of(dtype), "sum")))
        assert all(torch.equal(out, combined("sum", xs)) for out in outs)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "uint8", "int8"])
@pytest.mark.parametrize("op", ["max", "min", "prod"])
def test_other_reductions(dtype, op):
    threads, xs = Threads(2), [draw(dtype, 203, r) for r in range(2)]
    if dtype == "f32":
        xs[1][7] = float("nan")
    outs = threads.run(lambda r: threads.move(r, xs[r], torch.empty_like(xs[r]), reduce=(dtype_of(dtype), op)))
    for out in outs:
        torch.testing.assert_close(out, combined(op, xs), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spins", [0, 5000])
def test_copies_and_parts_in_a_row(spins):
    """Gathers, exchanges and parts of sums of random sizes, one after the other without a pause."""
    n, generator = 3, torch.Generator().manual_seed(spins)
    threads = Threads(n, spins)
    sizes = [int(10 ** (6 * torch.rand((), generator=generator))) for _ in range(40)]
    xs = {size: [draw("uint8", size * n, r) for r in range(n)] for size in sizes}

    def work(rank):
        for size in sizes:
            row = {"low": rank * size, "high": (rank + 1) * size}
            whole = threads.move(rank, xs[size][rank], torch.empty(n, n * size, dtype=torch.uint8))
            assert all(torch.equal(got, x) for got, x in zip(whole, xs[size]))
            part = threads.move(rank, xs[size][rank], torch.empty(n, size, dtype=torch.uint8), **row)
            assert torch.equal(part, whole[:, row["low"]: row["high"]])
            one = threads.move(rank, xs[size][rank], torch.empty(n * size, dtype=torch.uint8),
                               ranks=(1, 2), publishes=rank == 1)
            assert torch.equal(one, xs[size][1])
            total = threads.move(rank, xs[size][rank], torch.empty(size, dtype=torch.uint8),
                                 reduce=(dtype_of("uint8"), "sum"), **row)
            assert torch.equal(total, whole[:, row["low"]: row["high"]].sum(0).to(torch.uint8))

    threads.run(work)


def test_long_results_ask_for_huge_pages():
    """Which the system may refuse; what matters here is that the advice names no memory of others."""
    around = [torch.full((5 << 18,), float(i)) for i in range(2)]
    out = shared._empty((3, 1 << 19), torch.float32).fill_(7)
    assert out.nbytes > shared._LONG and out.shape == (3, 1 << 19) and bool((out == 7).all())
    assert all(bool((x == i).all()) for i, x in enumerate(around))


def test_rounds_are_numbered_beyond_32_bits():
    threads = Threads(2)
    for channel in threads.channels:
        channel._state[2] = 2**32 - 3
    for rank in range(2):  # what the flags would hold by then
        threads.memory.view(-1)[:]
        flags = torch.frombuffer((native.ctypes.c_int32 * 1).from_address(
            threads.channels[0]._base + rank * native.LINE), dtype=torch.int32)
        flags[0] = -3
    for i in range(6):
        x = torch.full((3,), float(i))
        outs = threads.run(lambda r, x=x: threads.move(r, x, torch.empty(3), reduce=(dtype_of("f32"), "sum")))
        assert all(torch.equal(out, 2 * x) for out in outs)


def test_a_call_that_is_given_up_returns():
    threads, x = Threads(2), torch.ones(4)
    channel = threads.channels[0]
    errors = []

    def wait():
        try:
            threads.move(0, x, x.clone(), reduce=(dtype_of("f32"), "sum"))
        except RuntimeError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while channel.call_in_progress is None:
        pass
    channel.give_up(channel.call_in_progress + 1)  # of another call
    waiting.join(0.2)
    assert waiting.is_alive()
    channel.give_up(channel.call_in_progress)
    waiting.join(5)
    assert errors == [f"status {native.GAVE_UP}"] and channel.call_in_progress is None


def test_all_ranks_share_memory_or_none_does():
    before = set(os.listdir("/dev/shm"))
    everyone, names, total = zip(*ts.dist.spawn(ranks.lines, 3, ()))
    assert everyone == ("SharedLine",) * 3
    nobody, _, other = zip(*ts.dist.spawn(ranks.lines, 3, (1,)))
    assert nobody == ("SocketLine",) * 3
    assert all(torch.equal(x, y) for x, y in zip(total, other))  # the same tree
    assert not set().union(*map(set, names), os.listdir("/dev/shm")) - before


@pytest.mark.parametrize(("case", "message"), [
    ("op", "rank 1 calls all_reduce (max) of 6 f32, this rank all_reduce (sum) of 6 f32"),
    ("shape", "rank 1 calls all_reduce (sum) of 7 f32, this rank all_reduce (sum) of 6 f32"),
    ("dtype", "rank 1 calls all_gather of 6 bf16, this rank all_gather of 6 f16"),
    ("root", "rank 1 calls broadcast (src 1) of 6 f32, this rank broadcast (src 0) of 6 f32"),
    ("kind", "rank 1 calls barrier, this rank all_reduce (sum) of 6 f32"),
])
def test_what_does_not_fit_together_is_told_at_once(case, message):
    first, second = ts.dist.spawn(ranks.differs, 2, case)
    assert message in first and "rank 0 calls" in second


def test_a_graph_replays_collectives():
    results = ts.dist.spawn(ranks.captured, 2, 31)
    for result in results:
        assert result["type"] == "SharedLine" and len(result["results"]) == 3
        assert result["kernels"] == [("double", "all_reduce", "double", "all_gather")]
        for i, (out, gathered) in enumerate(result["results"]):
            total = sum(2 * ranks.inputs(31 + i, r, (5, 7)) for r in range(2))
            assert torch.equal(out, 2 * total) and torch.equal(gathered, torch.cat((total, total)))


def test_a_graph_refuses_collectives_that_it_cannot_repeat(monkeypatch):
    monkeypatch.setenv("TESSERA_SHARED_MEMORY", "0")
    for result in ts.dist.spawn(ranks.captured, 2, 31):
        assert result["type"] == "SocketLine" and not result["results"]
        assert "graph step" in result["error"] and "an operation of torch" in result["error"]


def test_a_death_ends_a_replay():
    with pytest.raises(ts.dist.CollectiveError, match=r"rank 1 .* was killed by SIGKILL"):
        ts.dist.spawn(ranks.dies_under_replay, 2)
