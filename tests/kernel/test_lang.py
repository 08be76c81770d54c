"""Every builtin against torch in float64, on the interp backend."""

import math
import sys
from pathlib import Path

import pytest
import torch

import tessera as ts
from tessera import Tensor, Tile, bf16, f32, f64, int8, int32, tile
from tessera.errors import InputError
from tests.kernel.backends import BACKENDS, launch

ELEMENTWISE = {
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2,
    "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sin": torch.sin, "cos": torch.cos,
    "tanh": torch.tanh, "erf": torch.erf, "floor": torch.floor, "ceil": torch.ceil, "round": torch.round,
    "sigmoid": torch.sigmoid, "softplus": torch.nn.functional.softplus, "relu": torch.relu, "abs": torch.abs,
    "neg": torch.neg, "silu": torch.nn.functional.silu, "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "maximum": torch.maximum, "minimum": torch.minimum, "mod": torch.remainder,
    "floordiv": lambda a, b: torch.floor(a / b),
}
REDUCTIONS = {
    "sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin, "argmax": torch.argmax,
    "argmin": torch.argmin,
}


@pytest.fixture(autouse=True)
def interp(monkeypatch):
    """Run on the reference backend."""
    monkeypatch.setenv("TESSERA_BACKEND", "interp")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@ts.kernel
def unary(x: Tensor["S", "D"], o: Tensor["S", "D"], name: str):
    for known, function in FUNCTIONS:
        if known == name:
            o[:] = function(x)


@ts.kernel
def tanh_gelu(x: Tensor["N", f32], o: Tensor["N", f32]):
    o[:] = tile.gelu(x, approximate="tanh")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_by_tanh_keeps_its_tail(backend):
    x = torch.linspace(-9, 9, 999)
    out = torch.empty_like(x)
    launch(tanh_gelu, backend, x, out)
    u = x.double() + 0.044715 * x.double() ** 3
    expected = x.double() * torch.sigmoid(math.sqrt(8 / math.pi) * u)
    torch.testing.assert_close(out.double(), expected, rtol=3e-5, atol=0)


@ts.kernel
def binary(x: Tensor["S", "D"], y: Tensor["S", "D"], o: Tensor["S", "D"], name: str):
    for known, function in FUNCTIONS:
        if known == name:
            o[:] = function(x, y)


def reduced(x, name, axis):
    for known, function in FUNCTIONS:
        if known == name:
            tile.static_assert(function(x, axis=axis, keepdim=True).ndim == x.ndim)
            return function(x, axis=axis)


@ts.kernel
def reduce_first(x: Tile["A", "B", "C", f32], o: Tensor["B", "C"], name: str):
    o[:] = reduced(x, name, 0)


@ts.kernel
def reduce_middle(x: Tile["A", "B", "C", f32], o: Tensor["A", "C"], name: str):
    o[:] = reduced(x, name, 1)


@ts.kernel
def reduce_last(x: Tile["A", "B", "C", f32], o: Tensor["A", "B"], name: str):
    o[:] = reduced(x, name, -1)


FUNCTIONS = tuple((name, getattr(tile, name)) for name in (*ELEMENTWISE, *BINARY, *REDUCTIONS))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise(name, dtype):
    x = (rand(3, 17).abs() + 0.1 if "log" in name or "sqrt" in name else rand(3, 17) * 2).to(dtype)
    o = torch.empty_like(x)
    unary(x, o, name)
    torch.testing.assert_close(o, ELEMENTWISE[name](x.double()).to(dtype))


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    x, y = rand(3, 9).abs() + 0.5, rand(3, 9, seed=1).abs() + 0.5
    o = torch.empty_like(x)
    binary(x, y, o, name)
    torch.testing.assert_close(o, BINARY[name](x.double(), y.double()).float())


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_reductions(name, axis):
    x = rand(3, 4, 70)
    expected = REDUCTIONS[name](x.double(), dim=axis)
    expected = expected.to(torch.int32 if name.startswith("arg") else torch.float32)
    o = torch.empty_like(expected)
    kernel = {0: reduce_first, 1: reduce_middle, -1: reduce_last}[axis]
    kernel(x, o, name)
    torch.testing.assert_close(o, expected)


def test_shapes():
    x = rand(3, 5)
    o, parts, flat = torch.empty(5, 3), torch.empty(3, 5), torch.empty(15)

    @ts.kernel
    def run(x: Tile["S", "D", f32], o: Tile["D", "S", f32], parts: Tile["S", "D", f32], flat: Tile["S*D", f32]):
        tile.store(o, tile.transpose(x))
        first, second = tile.split(tile.concat([x, x * 2.0], axis=1), 2, axis=1)
        a, b = tile.split(second, (1, tile.context().D - 1), dim=1)
        tile.store(parts, first + tile.concat([a, b], axis=-1))
        flat[:] = x.reshape(-1)

    run(x, o, parts, flat)
    assert torch.equal(o, x.T) and torch.equal(flat, x.flatten())
    torch.testing.assert_close(parts, 3 * x)


@ts.kernel
def scans(x: Tile["S", "D", f32], sums: Tile["S", "D", f32], tops: Tile["S", "D", f32], ordered: Tile["S", "D", f32],
          order: Tile["S", "D", int32], best: Tile["S", 2, f32]):
    tile.store(sums, tile.cumsum(x))
    tile.store(tops, tile.cummax(x))
    values, indices = tile.sort(x, descending=True)
    tile.store(ordered, values)
    tile.store(order, indices)
    tile.store(best, tile.topk(x, 2)[0])


def test_scans_and_sorts():
    x = rand(3, 9)
    sums, tops, ordered = (torch.empty(3, 9) for _ in range(3))
    order, best = torch.empty(3, 9, dtype=torch.int32), torch.empty(3, 2)
    scans(x, sums, tops, ordered, order, best)
    torch.testing.assert_close(sums, x.double().cumsum(-1).float())
    assert torch.equal(tops, x.cummax(-1).values)
    expected = x.sort(descending=True, stable=True)
    assert torch.equal(ordered, expected.values) and torch.equal(order.long(), expected.indices)
    assert torch.equal(best, expected.values[:, :2])


@ts.kernel
def products(a: Tile["M", "K", f32], b: Tile["K", "N", f32], o: Tile["M", "N", f32], u: Tile["K", f32],
             inner: Tile[1, f32]):
    acc = tile.ones((a.shape[0], b.shape[1]))
    tile.store(o, tile.mma(a, b, acc) + tile.dot(a, b))
    inner[0] = tile.dot(u, a[0])


def test_products():
    a, b, u = rand(3, 7), rand(7, 5, seed=1), rand(7, seed=2)
    o, inner = torch.empty(3, 5), torch.empty(1)
    products(a, b, o, u, inner)
    torch.testing.assert_close(o, (2 * (a.double() @ b.double()) + 1).float())
    torch.testing.assert_close(inner[0], a[0] @ u)


def test_dp4a_is_exact():
    @ts.kernel
    def run(x: Tile["K", int8], w: Tile["N", "K", int8], o: Tile["N", int32]):
        acc = tile.full((w.shape[0],), 3, int32)
        tile.store(o, tile.dp4a(x, w, acc))

    g = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, s, dtype=torch.int8, generator=g) for s in ((33,), (5, 33)))
    o = torch.empty(5, dtype=torch.int32)
    run(x, w, o)
    assert torch.equal(o.long(), w.long() @ x.long() + 3)


def test_rms_norm_softmax_and_rope():
    @ts.kernel
    def run(x: Tile["S", "H", "D", bf16], w: Tile["D", f32], cos: Tile["S", "D/2", f32], sin: Tile["S", "D/2", f32],
            normed: Tile["S", "H", "D", f32], soft: Tile["S", "H", "D", f32], turned: Tile["S", "H", "D", f32]):
        tile.store(normed, tile.rms_norm(x, w, eps=1e-5))
        tile.store(soft, tile.softmax(tile.cast(x, f32), axis=1))
        tile.store(turned, tile.apply_rope(x, cos, sin))

    x, w, angle = rand(5, 3, 8).bfloat16(), rand(8, seed=1), rand(5, 4, seed=2)
    outputs = [torch.empty(5, 3, 8) for _ in range(3)]
    run(x, w, angle.cos(), angle.sin(), *outputs)
    v = x.double()
    cos, sin, (a, b) = angle.double().cos()[:, None], angle.double().sin()[:, None], v.chunk(2, -1)
    expected = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w, v.softmax(1),
                torch.cat([a * cos - b * sin, a * sin + b * cos], -1))
    for got, want in zip(outputs, expected):
        torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 70])
def test_flash_attention(causal, length):
    @ts.kernel
    def run(q: Tile["B", "S", "H", "D", f32], k: Tile["B", "S", "H", "D", f32], v: Tile["B", "S", "H", "D", f32],
            o: Tile["B", "S", "H", "D", f32], causal: bool):
        tile.store(o, tile.flash_attention(q, k, v, causal=causal))

    q, k, v = (rand(2, length, 2, 8, seed=s) for s in range(3))
    o = torch.empty_like(q)
    run(q, k, v, o, causal)
    heads_first = [t.double().transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
    torch.testing.assert_close(o, expected.transpose(1, 2).float())


def test_dropout_keeps_the_mean_and_repeats_with_its_seed():
    @ts.kernel
    def run(x: Tile["S", "D", f32], o: Tile["S", "D", f32], p: float, seed: int):
        tile.store(o, tile.dropout(x, p, seed=seed))

    x = torch.ones(64, 100)
    first, again, other = (torch.empty_like(x) for _ in range(3))
    run(x, first, 0.25, 1)
    run(x, again, 0.25, 1)
    run(x, other, 0.25, 2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(first.unique(), torch.tensor([0, 1 / 0.75]))
    assert abs((first == 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / x.numel())


def test_memory_builtins():
    @ts.kernel
    def run(ids: Tile["N", int32], table: Tile["V", "D", f32], rows: Tile["N", "D", f32], put: Tile["V", "D", f32],
            counts: Tile["V", f32]):
        tile.store(rows, tile.gather(table, tile.load(ids)))
        tile.fill(put, 0)
        tile.scatter(put, tile.load(ids), tile.load(rows))
        tile.fill(counts, 0.0)
        for i in tile.grid(ids.shape[0]):
            tile.atomic_add(counts[ids[i]], 1.0)

    ids, table = torch.tensor([3, 0, 4], dtype=torch.int32), rand(6, 4)
    rows, put, counts = torch.empty(3, 4), torch.empty(6, 4), torch.empty(6)
    run(ids, table, rows, put, counts)
    assert torch.equal(rows, table[ids.long()])
    assert torch.equal(put, torch.zeros(6, 4).index_copy(0, ids.long(), rows))
    assert torch.equal(counts, torch.bincount(ids, minlength=6).float())


def test_logic_and_selection():
    @ts.kernel
    def run(x: Tile["N", f32], o: Tile["N", f32], flags: Tile[2, f32]):
        inside = (x > -1.0) & ~(x >= 1.0)
        o[:] = tile.where(inside, tile.clamp(x, low=-0.5, high=0.5), tile.where(tile.isnan(x), 9.0, -9.0))
        flags[0] = 1.0 if tile.any(inside) else 0.0
        flags[1] = 1.0 if tile.all(inside) else 0.0

    x = torch.cat([rand(20), torch.tensor([float("nan"), 1.0])])
    o, flags = torch.empty_like(x), torch.empty(2)
    run(x, o, flags)
    inside = (x > -1) & ~(x >= 1)
    expected = torch.where(inside, x.clamp(-0.5, 0.5), torch.where(x.isnan(), 9.0, -9.0))
    assert torch.equal(o, expected) and flags.tolist() == [1, 0]


@ts.kernel
def tells(x: Tile["N", "D", bf16], y: Tile["N", f64], o: Tile["N", f32], scale: float):
    for i in tile.grid(tile.cdiv(x.shape[0], 2)):
        ragged = tile.load(x[i * 2:i * 2 + 2])
        print("rows {} of {}: {}", i, x.shape[0], ragged, ragged > 0.0)
        o[i * 2:i * 2 + 2] = tile.sum(ragged)
    print("100%", x.ndim - 1, "{braces}", y, scale)
    breakpoint()


@ts.kernel
def tells_of_much(x: Tile["N", "D", f32], o: Tile["N", "D", f32]):
    v = tile.load(x)
    print("v is {}.", v)
    o[:] = v


def test_print_says_the_same_on_interp_and_cpu(capfd, monkeypatch):
    monkeypatch.setattr(sys, "breakpointhook", lambda: None)
    x = rand(5, 3).bfloat16()
    y = rand(5).double()
    said = {}
    for backend in ("interp", "cpu"):
        for kernel, args in ((tells, (x, y, torch.empty(5), 0.1)), (tells_of_much, (torch.arange(1200.0).reshape(3, -1),
                                                                                   torch.empty(3, 400)))):
            launch(kernel, backend, *args)
        sys.stdout.flush()
        said[backend] = sorted(capfd.readouterr().out.splitlines())
    assert said["interp"] == said["cpu"]
    file = Path(__file__).name
    told = [line.split(f"{file}:")[1].split(": ", 1)[1] for line in said["interp"]]
    assert f"program (2,): rows 2 of 5: [[{', '.join(f'{v:.6g}' for v in x[4].tolist())}]] " \
        f"[{[bool(v > 0) for v in x[4].tolist()]}]" in told
    assert f"100% 1 {{braces}} [{', '.join(f'{v:.15g}' for v in y.tolist())}] 0.1" in told
    assert "v is [[0, 1, 2, ..., 397, 398, 399], [400, 401, 402, ..., 797, 798, 799], " \
        "[800, 801, 802, ..., 1197, 1198, 1199]]." in told


def test_every_builtin_is_documented_and_refuses_ordinary_python():
    for name in tile.__all__:
        found = getattr(tile, name)
        assert callable(found) is (name != "warp")
        assert name == "warp" or found.__doc__
    with pytest.raises(InputError, match="outside a kernel"):
        tile.exp(torch.ones(2))
    with pytest.raises(InputError, match="outside a kernel"):
        tile.context()
