"""Captured functions: replays give the bits of eager launches, and what cannot be replayed is refused."""

import functools
import threading
from array import array
from collections import deque
from typing import NamedTuple

import numpy as np
import pytest
import torch

import tessera as ts
from tessera import Tensor, Tile, bf16, f32, graph, profile, tile
from tessera.errors import InputError, LaunchError, UnsupportedError
from tessera.kernel.recording import Described


@ts.kernel
def normalise(x: Tile["S", "D", f32], o: Tile["S", "D", f32], eps: float = 1e-5):
    v = tile.load(x)
    tile.store(o, v * tile.rsqrt(tile.reduce_mean(v * v, axis=-1) + eps)[:, None])


@ts.kernel
def matmul(a: Tile["M", "K", f32], b: Tile["K", "N", f32], o: Tile["M", "N", f32]):
    tile.store(o, tile.mma(a, b))


@ts.kernel
def add(x: Tile["S", "D", f32], y: Tile["S", "D", f32], o: Tile["S", "D", f32]):
    tile.store(o, tile.load(x) + tile.load(y))


@ts.kernel
def accumulate(x: Tile["S", "D", f32], state: Tile["S", "D", f32]):
    tile.store(state, tile.load(state) + tile.load(x))


@ts.kernel
def narrow(x: Tile["S", "D", f32], o: Tile["S", "D", bf16]):
    tile.store(o, tile.cast(x, bf16))


def block(x, w, *, eps=1e-5):
    """Three kernels, a view between them, one intermediate each."""
    normal = torch.empty_like(x)
    normalise(x, normal, eps)
    product = x.new_empty(x.shape[0], w.shape[1])
    matmul(normal, w, product)
    out = torch.empty(x.shape[0], w.shape[1] // 2)
    add(product[:, ::2], product[:, 1::2], out)
    return out


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("s, d, n", [(1, 8, 4), (7, 33, 10), (129, 64, 254), (300, 200, 512)])
def test_replays_have_the_bits_of_eager_launches(threads, s, d, n):
    captured = graph.capture(block)
    w = draw(d, n, seed=100)
    results = []
    for seed in range(4):
        x = draw(s, d, seed=seed)
        results.append(captured(x, w))
        assert torch.equal(results[-1], block(x, w))
    assert [b.kernels for b in captured.buckets] == [("normalise", "matmul", "add")]
    assert len({r.data_ptr() for r in results}) == 4, "results are new at each call"
    for seed, result in enumerate(results):
        assert torch.equal(result, block(draw(s, d, seed=seed), w)), "later replays leave earlier results alone"
    other = draw(d, n, seed=101)  # another weight tensor
    assert torch.equal(captured(x, other), block(x, other))
    assert len(captured.buckets) == 1


def test_whatever_differs_makes_a_bucket():
    captured = graph.capture(block)
    x, w = draw(7, 16), draw(16, 12, seed=1)
    calls = [(x, w), (draw(8, 16), w), (draw(14, 16)[::2], w), (x, draw(16, 14)), (x, draw(12, 16).T)]
    for times in range(2):
        for a, b in calls:
            assert torch.equal(captured(a, b), block(a, b))
        assert torch.equal(captured(x, w, eps=0.5), block(x, w, eps=0.5))
        assert len(captured.buckets) == len(calls) + 1, times
    with pytest.raises(LaunchError, match=r"D=16|K=16"):
        captured(x, draw(15, 12))
    with pytest.raises(LaunchError, match="f64"):
        captured(x.double(), w)
    assert len(captured.buckets) == len(calls) + 1
    assert torch.equal(captured(x=x, w=w), block(x, w))


def test_numbers_that_compare_equal_are_apart():
    keys = []
    for value in (0, 0.0, -0.0, False, "0", None, (0,), [0]):
        described = Described()
        described.add(value)
        keys.append(tuple(described.key))
    assert len(set(keys)) == len(keys)


class Config(dict):
    """A container with an attribute."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __call__(self):
        return self.factor


class Private:
    """State that Python stores under another name."""

    __slots__ = ("__factor",)

    def __init__(self, factor):
        self.__factor = factor

    def __call__(self):
        return self.__factor


class Scale:
    def __init__(self, factor):
        self.weight = torch.full((3,), factor)

    @ts.kernel
    def run(self, x: Tile["S", "D", f32], o: Tile["S", "D", f32]):
        o[:] = x * self.weight


@ts.kernel
def scaled(x: Tile["S", "D", f32], o: Tile["S", "D", f32], factor: float):
    o[:] = x * factor


@pytest.mark.parametrize("make, read", [
    (lambda n: functools.partial(float, n), lambda value: value()),
    (lambda n: Config(n).__call__, lambda value: value()),
    (Config, lambda value: value()),
    (Private, lambda value: value()),
    (lambda n: {n}, lambda value: value.copy().pop()),
    (lambda n: deque([n]), lambda value: value[0]),
    (lambda n: array("d", [n]), lambda value: value[0]),
    (lambda n: np.array([n]), lambda value: float(value[0])),
    (np.float32, float),
], ids=["partial", "bound method", "container's attribute", "private slot", "set", "deque", "array", "numpy", "number"])
def test_every_value_of_an_argument_is_in_the_key(make, read):
    @graph.capture
    def step(x, value):
        out = torch.empty_like(x)
        scaled(x, out, read(value))
        return out

    for factor in (2.0, 3.0, 2.0):
        assert step(torch.ones(1, 3), make(factor)).tolist() == [[factor] * 3]
    assert len(step.buckets) == 2


def test_a_kernel_of_an_object_as_an_argument():
    @graph.capture
    def step(x, run):
        out = torch.empty_like(x)
        run(x, out)
        return out

    scale = Scale(2.0)
    run = scale.run
    for factor in (2.0, 3.0, 2.0):
        scale.weight = torch.full((3,), factor)
        assert step(torch.ones(1, 3), run).tolist() == [[factor] * 3]
    assert len(step.buckets) == 1


FACTOR = 2.0


def factor():
    return FACTOR


def test_names_that_come_to_mean_something_else(monkeypatch):
    @graph.capture
    def step(x):
        outs = [torch.empty_like(x) for _ in range(FACTORS)]
        for out in [o for o in outs if FACTOR]:
            scaled(x, out, [factor() * FACTOR for _ in (1,)][0])
        return outs[-1]

    monkeypatch.setitem(globals(), "FACTORS", 2)
    assert step(torch.ones(1, 1)).item() == 4
    monkeypatch.setitem(globals(), "FACTOR", 3.0)  # named only inside comprehensions
    assert step(torch.ones(1, 1)).item() == 9
    monkeypatch.setitem(globals(), "factor", lambda: 5.0)  # another function
    assert step(torch.ones(1, 1)).item() == 15


def test_the_default_dtype_is_in_the_key():
    @ts.kernel
    def copied(x: Tile["N", f32], o: Tile["N"]):
        o[:] = tile.load(x)

    @graph.capture
    def step(x):
        out = torch.empty(x.shape)
        copied(x, out)
        return out

    assert step(torch.ones(3)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert step(torch.ones(3, dtype=torch.float32)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_arguments_are_written_in_place():
    @graph.capture
    def step(x, state):
        accumulate(x, state)
        accumulate(x, state[:])
        return state

    for seed in range(3):
        x, state = draw(5, 9, seed=seed), draw(5, 9, seed=seed + 10)
        want = state + x + x
        result = step(x, state)
        assert torch.equal(state, want)
        assert result.data_ptr() == state.data_ptr() and torch.equal(result, state)


def test_shared_memory_is_part_of_the_key():
    @graph.capture
    def total(x, y):
        out = torch.empty_like(x)
        add(x, y, out)
        return out

    base = draw(6, 4)
    for _ in range(2):
        assert torch.equal(total(base, base), base + base)
        assert torch.equal(total(base[:3], base[3:]), base[:3] + base[3:])
        assert torch.equal(total(base[3:], base[:3]), base[:3] + base[3:])
        x, y = draw(6, 4, seed=1), draw(6, 4, seed=2)
        assert torch.equal(total(x, y), x + y)
        assert torch.equal(total(x[:3], y[2:5]), x[:3] + y[2:5])
    assert len(total.buckets) == 5  # shared as a whole, before, behind; apart with 6 rows, with 3


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_structures_views_and_dtypes_of_results():
    @graph.capture
    def several(x):
        out = torch.empty(2, *x.shape)
        add(x, x, out[0])
        normalise(x, out[1])
        small = torch.empty(x.shape, dtype=torch.bfloat16)
        narrow(x, small)
        return {"pair": Pair(out[1], out[0].T), "list": [small, x[1:], 3, None], "empty": torch.empty(0, 4)}

    for seed in range(3):
        x = draw(5, 7, seed=seed)
        result = several(x)
        pair, (small, tail, three, none) = result["pair"], result["list"]
        normal = torch.empty_like(x)
        normalise(x, normal)
        assert isinstance(pair, Pair) and torch.equal(pair.first, normal) and torch.equal(pair.second, (x + x).T)
        assert pair.second.stride() == (1, 7)
        assert pair.first.untyped_storage().data_ptr() == pair.second.untyped_storage().data_ptr()
        assert torch.equal(small, x.bfloat16()) and (three, none) == (3, None)
        assert torch.equal(tail, x[1:]) and tail.data_ptr() == x[1:].data_ptr()
        assert result["empty"].shape == (0, 4)


def test_closures_globals_and_objects():
    weight, scale = draw(4, 4), 2

    class State:
        def __init__(self):
            self.items = [draw(3, 4, seed=5)]
            self.offset = 0

    @graph.capture
    def run(x, state):
        out = torch.empty_like(x)
        matmul(x, weight, out)
        for _ in range(scale):
            accumulate(state.items[0], out)
        return out

    def expected(x, state):
        return x.double() @ weight.double() + scale * state.items[0].double()

    x, state = draw(3, 4, seed=1), State()
    for change in (lambda: None, lambda: None, lambda: state.items.__setitem__(0, draw(3, 4, seed=9))):
        change()
        torch.testing.assert_close(run(x, state).double(), expected(x, state), rtol=1e-5, atol=1e-5)
    assert len(run.buckets) == 1
    weight = draw(4, 4, seed=7)
    torch.testing.assert_close(run(x, state).double(), expected(x, state), rtol=1e-5, atol=1e-5)
    assert len(run.buckets) == 1
    scale = 3
    torch.testing.assert_close(run(x, state).double(), expected(x, state), rtol=1e-5, atol=1e-5)
    state.offset = 1
    run(x, state)
    assert len(run.buckets) == 3


def test_memory_behind_objects_in_the_closure_is_that_of_the_recording():
    class Holder:
        weight = torch.nn.Parameter(torch.eye(256), requires_grad=False)

    holder = Holder()

    @graph.capture
    def run(x):
        out = torch.empty_like(x)
        matmul(x, holder.weight, out)
        return out

    x = draw(3, 256)
    assert torch.equal(run(x), x)
    holder.weight.data = torch.zeros(256, 256)  # lets go of the recorded memory, which must stay valid
    junk = [torch.full((256, 256), 7.0) for _ in range(8)]
    assert torch.equal(run(x), x) and len(junk) == 8


@ts.kernel
def mirror(x: Tile["S", "D", f32], middle: Tile["S", "D", f32], o: Tile["S", "D", f32]):
    ctx = tile.context()
    for i in tile.grid(ctx.S):
        middle[i, :] = x[i, :] * 3.0
    for i in tile.grid(ctx.S):
        o[i, :] = middle[ctx.S - 1 - i, :]


@pytest.mark.parametrize("s, d", [(2, 3), (301, 100), (1000, 130)])
def test_kernels_of_several_parallel_loops(threads, s, d):
    """Each loop reads what other threads wrote in the one before: the barriers hold, small and large alike."""
    @graph.capture
    def run(x):
        middle, once, twice = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        mirror(x, middle, once)
        mirror(once, middle, twice)
        mirror(twice, middle, once)
        return once

    for seed in range(4):
        x = draw(s, d, seed=seed)
        assert torch.equal(run(x), (x * 3 * 3 * 3).flip(0))


def test_methods_and_nested_graphs():
    class Model:
        def __init__(self, seed):
            self.w = draw(6, 6, seed=seed)

        @graph.capture
        def project(self, x):
            out = torch.empty_like(x)
            matmul(x, self.w, out)
            return out

        @graph.capture
        def forward(self, x):
            return self.project(self.project(x))

    x = draw(2, 6)
    for seed in (1, 2):
        model = Model(seed)
        once, twice = torch.empty_like(x), torch.empty_like(x)
        matmul(x, model.w, once)
        matmul(once, model.w, twice)
        for _ in range(2):
            assert torch.equal(model.forward(x), twice)
    assert [b.kernels for b in Model.forward.buckets] == [("matmul", "matmul")]
    assert Model.project.buckets == []


def refused(function, *args, match):
    captured = graph.capture(function)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=match):
            captured(*args)
    assert captured.buckets == []


def test_what_cannot_be_replayed_is_refused():
    x = draw(3, 4)
    refused(lambda x: x + 1, x, match=r"aten::add at .*test_graph.py:\d+ is an operation of torch")
    refused(lambda x: torch.zeros(3), x, match="aten::zeros")
    refused(lambda x: x.mul_(2), x, match="aten::mul_")
    refused(lambda x: x[0, 0].item(), x, match="aten::_local_scalar_dense")
    refused(lambda x: 1 if x[0, 0] > 0 else 2, x, match="aten::gt")
    refused(lambda x: x.T.contiguous(), x, match="aten::clone")
    refused(lambda x: x.tolist(), x, match=r"Tensor.tolist at .*test_graph.py:\d+ is an operation of torch")
    refused(lambda x: x.numpy(), x, match="Tensor.numpy")
    refused(lambda x: np.asarray(x), x, match="Tensor.__array__")
    refused(lambda x: {1, 2}, x, match="a set is returned")
    refused(lambda x: x, x.to_sparse(), match="expected a dense torch.Tensor")
    refused(lambda x: x.view(-1), x.clone().requires_grad_(), match="carries a gradient")
    refused(lambda x, state: state.append(1), x, [], match="changes an argument")
    counter = [0]

    def count(x):
        counter[0] += 1

    refused(count, x, match="changes an argument, or what it reads")


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TESSERA_BACKEND", "interp")
    refused(block, draw(3, 4), draw(4, 4), match="kernel normalise runs on the backend interp")


def test_a_failed_assertion_is_raised_at_each_replay():
    @ts.kernel
    def checked(x: Tile["N", f32], o: Tile["N", f32]):
        for i in tile.grid(tile.context().N):
            tile.device_assert(x[i] < 100.0, "too large")
            o[i] = x[i] * 2.0

    @graph.capture
    def run(x):
        out = torch.empty_like(x)
        checked(x, out)
        return out

    good = torch.arange(5.0)
    assert torch.equal(run(good), 2 * good) and torch.equal(run(good + 1), 2 * good + 2)
    for _ in range(2):
        with pytest.raises(LaunchError, match="too large"):
            run(good + 99)
        assert torch.equal(run(good), 2 * good)
    assert len(run.buckets) == 1


def test_buckets_by_name():
    @graph.capture(bucket_by=["seq_len"], max_buckets=2)
    def double(x: Tensor["seq_len", "D"], w: Tensor["D"]):
        out = torch.empty_like(x)
        add(x, x, out)
        return out

    for n in (3, 4, 5, 4, 5, 3):
        x = draw(n, 2, seed=n)
        assert torch.equal(double(x, torch.ones(2)), 2 * x)
        assert len(double.buckets) <= 2
    with pytest.warns(RuntimeWarning, match=r"recorded anew because w changed, which bucket_by=\['seq_len'\]"):
        double(x, torch.ones(3))

    @graph.capture(bucket_by=["seq_len"])  # the name of a dim that no annotation shows: any tensor may vary
    def plain(x):
        return double.function(x, None)

    for n in (2, 3):
        assert torch.equal(plain(draw(n, 2)), 2 * draw(n, 2))
    with pytest.raises(InputError, match="expected a list of names"):
        graph.capture(bucket_by="seq_len")
    with pytest.raises(InputError, match="max_buckets"):
        graph.capture(max_buckets=0)


def test_several_threads_replay_one_graph():
    captured = graph.capture(block)
    w = draw(32, 64, seed=1)
    wrong = []

    def work(seed):
        for k in range(20):
            x = draw(40, 32, seed=100 * seed + k)
            if not torch.equal(captured(x, w), block(x, w)):
                wrong.append((seed, k))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_kernels_are_seen_one_by_one_while_profiled():
    captured = graph.capture(block)
    x, w = draw(5, 8), draw(8, 6)
    want = captured(x, w)
    limits = {"cpu": profile.Limits(bytes_per_s=1e9, flops_per_s={"f32": 1e9})}
    with profile.session(limits=limits) as session:
        assert torch.equal(captured(x, w), want)
    assert {row.kernel: row.calls for row in session.rows} == {"normalise": 1, "matmul": 1, "add": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graphs():
    captured = graph.capture(block)
    w = draw(64, 32).cuda()

    def on_gpu(x, w):
        return block(x, w)

    for seed in range(3):
        x = draw(17, 64, seed=seed).cuda()
        assert torch.equal(captured(x, w), on_gpu(x, w))
    assert len(captured.buckets) == 1
