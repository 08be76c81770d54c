"""vmath against float64 libm: the stated ulp bounds over all of f32, special values, equal bits at every width."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from tessera.errors import CompileError
from tessera.kernel.backends import interp_math
from tessera.kernel.backends.cpu import host, jit, vmath
from tessera.kernel.backends.cpu.emit import F32, F64, I32, I64, PTR, VOID, Module, elem, vec

F32_MAX = float(np.finfo(np.float32).max)
INF, NAN = math.inf, math.nan
_DTYPES = {F32: np.float32, F64: np.float64, I32: np.int32, I64: np.int64}


def compile_loop(function, n, types, result=F32, target=None):
    """A callable on numpy arrays that applies `function` to vectors of n lanes (0: scalars) in a loop."""
    module = Module()
    f = module.function("loop", VOID, [*((f"x{i}", PTR) for i in range(len(types))), ("out", PTR), ("n", I64)])
    b, (*xs, out, count) = f.builder, f.args
    with b.for_(0, count, max(n, 1)) as loop:
        values = [b.load(b.gep(x, loop.i, ty), vec(n, ty)) for x, ty in zip(xs, types)]
        b.store(function(b, *values), b.gep(out, loop.i, result))
    b.ret()
    target = target or host.target()
    library = jit.load_object(jit.compile_to_object(module.text(), target), target)
    entry = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (len(types) + 1), ctypes.c_int64)(library.address("loop"))

    def run(*arrays):
        size = arrays[0].size
        assert size % max(n, 1) == 0
        arrays = [np.ascontiguousarray(a, _DTYPES[ty]) for a, ty in zip(arrays, types)]
        y = np.empty(size, _DTYPES[result])
        entry(*(a.ctypes.data for a in arrays), y.ctypes.data, size)
        assert library is not None  # the code must outlive the call
        return y

    return run


def through_torch(function):
    return lambda x: function(torch.from_numpy(x)).numpy()


def reference_sigmoid(x):
    return np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


REFERENCE = {
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log1p": np.log1p,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "erf": through_torch(torch.erf), "sigmoid": reference_sigmoid,
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


def ulp_error(got, exact):
    """|got - exact| in units of the spacing of f32 at exact; infinite where one is NaN or infinite alone."""
    rounded = exact.astype(np.float32)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    finite = np.isfinite(got) & np.isfinite(rounded)
    spacing = np.where(finite, np.spacing(np.abs(np.where(finite, rounded, 1))), 1).astype(np.float64)
    return np.where(finite, np.abs(got - exact) / spacing, np.where(same, 0, np.inf))


def samples(seed, count):
    """Every exponent of f32 evenly (NaN and infinity too), and more of where the functions turn."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ranges = [rng.uniform(-r, r, count // 4).astype(np.float32) for r in (1, 5, 20, 110)]
    edges = np.array([0.0, -0.0, INF, -INF, NAN, 1, -1, F32_MAX, -F32_MAX, 2**-126, -(2**-149), 1e5, 1e-45])
    x = np.concatenate([words, *ranges, edges.astype(np.float32)])
    return x[: x.size // 16 * 16]


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("name", vmath.UNARY)
def test_error_is_within_the_stated_bound(name):
    x = samples(seed=11, count=1 << 20)
    exact = REFERENCE[name](x.astype(np.float64))
    got = compile_loop(vmath.UNARY[name], 16, [F32])(x)
    error = ulp_error(got, exact)
    worst = np.nanargmax(error)
    assert error[worst] <= vmath.MAX_ULP[name], f"{name}({x[worst]!r}) = {got[worst]!r}: {error[worst]} ulp"
    both = ~np.isnan(got) & ~np.isnan(exact)
    assert np.array_equal(np.signbit(got[both]), np.signbit(exact[both]))


def test_error_of_pow_is_within_the_stated_bound():
    rng = np.random.default_rng(5)
    x, y = samples(seed=1, count=1 << 18), samples(seed=2, count=1 << 18)
    bases = np.exp2(rng.uniform(-8, 8, x.size)) * rng.choice([-1, 1], x.size)
    x = np.concatenate([x, bases, np.abs(bases)]).astype(np.float32)
    y = np.concatenate([y, rng.integers(-20, 20, y.size), rng.uniform(-17, 17, y.size)]).astype(np.float32)
    got = compile_loop(vmath.pow, 8, [F32, F32])(x, y)
    error = ulp_error(got, np.power(x.astype(np.float64), y.astype(np.float64)))
    worst = error.argmax()
    assert error[worst] <= vmath.MAX_ULP["pow"], f"pow({x[worst]!r}, {y[worst]!r}) = {got[worst]!r}"


def test_pow_edges_are_those_of_c():
    edges = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 0.5, -0.5, 0.7, 3.0, -3.0, 2.0**24, 2.0**24 - 1, 2.0**-149,
             F32_MAX, -F32_MAX, 1 - 2**-24]  # fmt: skip
    x, y = (a.ravel().astype(np.float32) for a in np.meshgrid(edges, edges))
    got, expected = compile_loop(vmath.pow, 4, [F32, F32])(x, y), np.power(x.astype(np.float64), y).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))


SPECIAL = {
    "exp": [(-INF, 0.0), (INF, INF), (-103.97, 1e-45), (-104.0, 0.0), (88.8, INF), (-0.0, 1.0)],
    "expm1": [(-INF, -1.0), (INF, INF), (-0.0, -0.0), (1e-45, 1e-45)],
    "log": [(0.0, -INF), (-0.0, -INF), (-1.0, NAN), (-INF, NAN), (INF, INF), (1.0, 0.0)],
    "log2": [(2.0**-149, -149.0), (2.0**127, 127.0), (0.0, -INF), (-1.0, NAN), (INF, INF)],
    "log1p": [(-1.0, -INF), (-1.5, NAN), (-0.0, -0.0), (INF, INF), (1e-45, 1e-45)],
    "sin": [(INF, NAN), (-INF, NAN), (-0.0, -0.0), (1e-45, 1e-45)],
    "cos": [(INF, NAN), (0.0, 1.0)],
    "tanh": [(INF, 1.0), (-INF, -1.0), (-0.0, -0.0), (50.0, 1.0), (-1e-45, -1e-45)],
    "erf": [(INF, 1.0), (-INF, -1.0), (-0.0, -0.0), (4.5, 1.0)],
    "sigmoid": [(-INF, 0.0), (INF, 1.0), (0.0, 0.5)],
    "softplus": [(-INF, 0.0), (INF, INF), (200.0, 200.0)],
    "sqrt": [(-1.0, NAN), (-0.0, -0.0), (INF, INF)],
    "rsqrt": [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-1.0, NAN)],
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name):
    x, expected = np.array([*SPECIAL[name], (NAN, NAN)], np.float32).T
    got = compile_loop(vmath.UNARY[name], 0, [F32])(x)
    np.testing.assert_array_equal(got, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("name", ["exp", "log", "sin", "tanh", "erf", "softplus", "pow"])
def test_same_bits_at_every_width_and_lane(name):
    """3 x 5 x 16 divides the size, so that an argument meets every lane."""
    x = samples(seed=3, count=1 << 13)[: 240 * 40]
    two = name == "pow"
    function, types = (vmath.BINARY if two else vmath.UNARY)[name], [F32] * (1 + two)
    arguments = [x, x[::-1]] if two else [x]
    runs = [compile_loop(function, n, types)(*arguments) for n in (0, 1, 3, 5, 8, 16)]
    runs += [compile_loop(function, 8, types, target=host.target("generic"))(*arguments)]
    rotated = [np.roll(a, 1) for a in arguments]
    runs += [np.roll(compile_loop(function, 16, types)(*rotated), -1)]
    for other in runs[1:]:
        same = (runs[0].view(np.uint32) == other.view(np.uint32)) | (np.isnan(runs[0]) & np.isnan(other))
        assert same.all(), (x[~same][:4], runs[0][~same][:4], other[~same][:4])


@pytest.mark.parametrize("name", vmath.UNARY)
def test_f64_agrees_with_libm(name):
    x = np.random.default_rng(8).uniform(-30, 30, 4096)
    got, exact = compile_loop(vmath.UNARY[name], 4, [F64], F64)(x), REFERENCE[name](x)
    np.testing.assert_allclose(got, exact, rtol=3e-14, atol=1e-300)


def test_pow_of_f64():
    x, y = np.random.default_rng(9).uniform(0, 30, (2, 512))
    np.testing.assert_allclose(compile_loop(vmath.pow, 4, [F64, F64], F64)(x, y), np.power(x, y), rtol=1e-15)


def test_other_types_are_refused():
    builder = Module().function("f", VOID, [("x", I32)]).builder
    for function in vmath.UNARY.values():
        with pytest.raises(CompileError, match="float or double"):
            function(builder, builder.function.args[0])


def philox_uniform(seed, offset, wide):
    """tl.rand in Python integers: triton/language/random.py, line by line."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = offset & mask, (offset >> 32) & mask if wide else 0, 0, 0
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        b, a = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    x = c0 - 2**32 if c0 >> 31 else c0
    return np.float32(~x if x < 0 else x) * np.float32(4.6566127342e-10)


@pytest.mark.parametrize("seed_type", [I32, I64])
@pytest.mark.parametrize("offset_type", [I32, I64])
@pytest.mark.parametrize("n", [0, 3, 8, 16])
def test_rand_has_the_bits_of_triton(seed_type, offset_type, n):
    rng = np.random.default_rng(n)
    wide = elem(offset_type) == I64
    offset = rng.integers(-(2**62) if wide else -(2**31), 2**62 if wide else 2**31, 240)
    seed = rng.integers(-(2**62) if seed_type == I64 else -(2**31), 2**62 if seed_type == I64 else 2**31, 240)
    offset[:2], seed[:2] = 0, (0, -1)
    got = compile_loop(vmath.rand, n, [seed_type, offset_type])(seed, offset)
    expected = [philox_uniform(int(s), int(o), wide) for s, o in zip(seed, offset)]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
    dtype = torch.int64 if wide else torch.int32
    interpreted = interp_math.rand(torch.from_numpy(seed), torch.from_numpy(offset).to(dtype))
    np.testing.assert_array_equal(got, interpreted.numpy())


def test_rand_is_uniform():
    got = compile_loop(vmath.rand, 8, [I64, I32])(np.full(1 << 16, 1234), np.arange(1 << 16)).astype(np.float64)
    assert got.min() >= 0 and got.max() < 1
    counts = np.histogram(got, 64, (0, 1))[0]
    assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 5 * math.sqrt(2 * 63)  # chi-square, 63 degrees of freedom
