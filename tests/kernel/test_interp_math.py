"""Every arithmetic operation of the interpreter, through hand-built IR, against float64 or exact integers."""

import math
import zlib

import numpy as np
import pytest
import torch

from tessera import types as ts
from tessera.kernel import ir
from tessera.kernel.backends import interp_math

from .programs import Program, apply

SIZES = [1, 7, 33, 1000]
FLOATS = [ts.f32, ts.bf16, ts.f16, ts.fp8_e4m3, ts.fp8_e5m2, ts.f64]


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(key).encode()))


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def unary(name: str, dtype: ts.DType, x: torch.Tensor) -> torch.Tensor:
    program = Program()
    value = program.load(program.tensor("x", ["N"], dtype))
    return apply(program, program.unary(name, value), x, N=x.numel())


REFERENCE = {
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2,
    "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "sin": torch.sin, "cos": torch.cos, "erf": torch.erf, "floor": torch.floor, "ceil": torch.ceil,
    "round": torch.round, "softplus": lambda x: torch.log1p(torch.exp(x)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(ir.UNARY_FLOAT))
def test_float_functions(name, dtype):
    x = torch.randn(257, generator=generator(name, dtype)).mul(3).to(dtype.torch)
    if name in ("log", "log2", "log1p", "sqrt", "rsqrt"):
        x = x.double().abs().add(0.125).to(dtype.torch)
    result = unary(name, dtype, x)
    assert result.dtype == (torch.float64 if dtype == ts.f64 else torch.float32)
    near(result, REFERENCE[name](x.double()), 1e-14 if dtype == ts.f64 else 5e-7)


def test_every_unary_is_known():
    assert set(interp_math.UNARY) == ir.UNARY and set(interp_math.BINARY) == ir.BINARY


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "max", "min", "pow", "floordiv", "mod"])
@pytest.mark.parametrize("size", SIZES)
def test_float_arithmetic(name, size):
    x, y = (torch.randn(size, generator=generator(name, size, i)) for i in range(2))
    if name == "pow":
        x = x.abs()
    program = Program()
    a, b = program.load(program.tensor("x", ["N"], ts.f32)), program.load(program.tensor("y", ["N"], ts.f32))
    result = apply(program, program.binary(name, a, b), x, y, N=size)
    x64, y64 = x.double(), y.double()
    if name == "floordiv":
        assert torch.equal(result, torch.floor(x / y))
    else:
        expected = {"add": x64 + y64, "sub": x64 - y64, "mul": x64 * y64, "div": x64 / y64, "pow": x64**y64,
                    "max": torch.maximum(x64, y64), "min": torch.minimum(x64, y64),
                    "mod": x64 - torch.floor(x64 / y64) * y64}[name]
        near(result, expected, 2e-7 if name == "pow" else 1.2e-7)


PYTHON_INTS = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "floordiv": lambda x, y: x // y,
    "mod": lambda x, y: x % y, "max": max, "min": min, "and": lambda x, y: x & y, "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y, "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y, "eq": lambda x, y: x == y, "ne": lambda x, y: x != y,
    "shl": lambda x, y: x << (y % 31), "shr": lambda x, y: x >> (y % 31),
}


@pytest.mark.parametrize("name", sorted(PYTHON_INTS))
def test_int32_wraps_as_two_complement(name):
    draw = generator(name)
    x = torch.randint(-2**31, 2**31 - 1, (101,), generator=draw).int()
    y = torch.randint(-2**31, 2**31 - 1, (101,), generator=draw).int()
    y[y == 0] = 1
    y[::2] = y[::2] % 50 + 1
    if name in ("shl", "shr"):
        y = y % 31
    program = Program()
    a, b = program.load(program.tensor("x", ["N"], ts.int32)), program.load(program.tensor("y", ["N"], ts.int32))
    result = apply(program, program.binary(name, a, b), x, y, N=101)
    exact = [PYTHON_INTS[name](p, q) for p, q in zip(x.tolist(), y.tolist())]
    assert result.tolist() == [(v + 2**31) % 2**32 - 2**31 if not isinstance(v, bool) else v for v in exact]


def test_low_precision_ints_compute_in_int32():
    x = torch.tensor([127, -128, 100], dtype=torch.int8)
    program = Program()
    value = program.load(program.tensor("x", [3], ts.int8))
    assert apply(program, program.binary("mul", value, value), x).tolist() == [127 * 127, 128 * 128, 10000]


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_float_casts_round_to_nearest_even(source, target):
    x = torch.randn(500, generator=generator(source, target), dtype=torch.float64).to(source.torch)
    program = Program()
    value = program.cast(program.load(program.tensor("x", ["N"], source)), target)
    result = apply(program, value, x, N=500)
    candidates = np.unique(all_values(target)) if target.bits <= 16 else None
    if candidates is None:
        assert torch.equal(result, x.to(target.torch))
        return
    exact = x.double().numpy()
    right = np.clip(np.searchsorted(candidates, exact), 1, len(candidates) - 1)
    low, high = candidates[right - 1], candidates[right]
    got = result.double().numpy()
    assert np.all(np.abs(got - exact) <= np.minimum(np.abs(low - exact), np.abs(high - exact)))


def all_values(dtype: ts.DType) -> np.ndarray:
    codes = torch.arange(2**dtype.bits, dtype=torch.int32).to(torch.uint8 if dtype.bits == 8 else torch.int16)
    values = codes.view(dtype.torch).double().numpy()
    return values[np.isfinite(values)]


@pytest.mark.parametrize("target", [ts.int8, ts.uint8, ts.int32, ts.int64], ids=str)
def test_float_to_int_truncates_and_saturates(target):
    limits = torch.iinfo(target.torch)
    x = [0.0, 1.9, -1.9, 126.5, -127.5, 254.99, 3e9, -3e9, 1e19, -1e19, math.inf, -math.inf, math.nan, 2147483520.0]
    program = Program()
    value = program.cast(program.load(program.tensor("x", ["N"], ts.f32)), target)
    result = apply(program, value, torch.tensor(x), N=len(x))
    expected = [0 if math.isnan(v) else limits.max if v == math.inf else limits.min if v == -math.inf
                else max(limits.min, min(limits.max, int(torch.tensor(v).item()))) for v in x]
    assert result.tolist() == expected


@pytest.mark.parametrize("target", [ts.int8, ts.uint8, ts.int32], ids=str)
def test_int_casts_keep_the_low_bits(target):
    x = torch.tensor([300, -300, 2**31, -2**31 - 1, 2**40 + 5, 7])
    program = Program()
    value = program.cast(program.load(program.tensor("x", ["N"], ts.int64)), target)
    span = 2**target.bits
    expected = [v % span - (span if target.kind == "int" and v % span >= span // 2 else 0) for v in x.tolist()]
    assert apply(program, value, x, N=6).tolist() == expected


def test_fma_rounds_once():
    # 1 + 2^-23 squared is 1 + 2^-22 + 2^-46: only a fused operation keeps the last term.
    x = torch.tensor([1 + 2**-23, 3.0, torch.inf, 1e-30])
    z = torch.tensor([-1 - 2**-22, 2**-40, -torch.inf, 1e-38])
    result = interp_math.fma(x, x, z)
    assert result[0] == 2**-46 and result[1] == 9.0 and result[2].isnan()
    exact = np.float32(np.longdouble(x[3].item()) ** 2 + np.longdouble(z[3].item()))
    assert result[3].item() == exact


def test_fma_is_not_rounded_twice():
    # The f64 sum is a tie of f32 although the exact one lies just above it.
    x, z = torch.tensor([1 + 2**-12]), torch.tensor([2.0**-60])
    y = torch.tensor([1 + 2**-12])
    assert interp_math.fma(x, y, z)[0] == torch.tensor(1 + 2**-11 + 2**-23)


def lanes(values: np.ndarray) -> np.float32:
    """The documented order of a sum over the last axis, element by element."""
    partial = np.zeros(64, np.float32)
    for i, value in enumerate(values):
        partial[i % 64] = np.float32(partial[i % 64] + value)
    width = 32
    while width:
        partial[:width] = partial[:width] + partial[width:2 * width]
        width //= 2
    return partial[0]


@pytest.mark.parametrize("size", [*SIZES, 64, 65])
@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_last_axis_sums_follow_the_order_of_the_language(kind, size):
    x = torch.randn(3, size, generator=generator(kind, size)) * 1e3
    program = Program()
    value = program.load(program.tensor("x", ["M", "N"], ts.f32))
    result = apply(program, program.reduce(kind, value), x, M=3, N=size)
    expected = [lanes(row) / np.float32(size if kind == "mean" else 1) for row in x.numpy()]
    assert result.tolist() == [float(v) for v in expected]


@pytest.mark.parametrize("size", SIZES)
def test_other_axis_sums_ascend(size):
    x = torch.randn(size, 5, generator=generator(size)) * 1e3
    program = Program()
    value = program.load(program.tensor("x", ["N", 5], ts.f32))
    total = np.zeros(5, np.float32)
    for row in x.numpy():
        total = total + row
    assert np.array_equal(apply(program, program.reduce("sum", value, 0), x, N=size).numpy(), total)


@pytest.mark.parametrize("dtype", [ts.f32, ts.bf16, ts.fp8_e4m3, ts.int32, ts.uint8], ids=str)
@pytest.mark.parametrize("kind", ["max", "min", "argmax", "argmin"])
@pytest.mark.parametrize("axis", [0, 1])
def test_extremes(kind, dtype, axis):
    x = torch.randint(0, 6, (9, 33), generator=generator(kind, dtype)).to(dtype.torch)  # many ties
    program = Program()
    value = program.load(program.tensor("x", ["M", "N"], dtype))
    result = apply(program, program.reduce(kind, value, axis), x, M=9, N=33)
    rows = x.double().numpy()
    assert np.array_equal(result.double().numpy(), getattr(np, kind)(rows, axis=axis))  # numpy: the first of equals


def test_nan_wins_every_extreme():
    x = torch.tensor([[1.0, torch.nan, 5.0, torch.nan]])
    for kind, expected in (("max", torch.nan), ("min", torch.nan), ("argmax", 1), ("argmin", 1)):
        program = Program()
        value = program.load(program.tensor("x", [1, 4], ts.f32))
        result = apply(program, program.reduce(kind, value), x)
        assert result.isnan() if math.isnan(expected) else result == expected


def test_reductions_of_nothing():
    for kind, expected in (("sum", 0.0), ("max", -torch.inf), ("min", torch.inf), ("mean", torch.nan)):
        program = Program()
        value = program.load(program.tensor("x", ["M", "N"], ts.f32))
        result = apply(program, program.reduce(kind, value), torch.zeros(2, 0), M=2, N=0)
        torch.testing.assert_close(result, torch.full((2,), expected), equal_nan=True)


def test_any_and_all():
    x = torch.tensor([[True, False], [True, True], [False, False]])
    for kind, expected in (("any", [True, True, False]), ("all", [False, True, False])):
        program = Program()
        value = program.load(program.tensor("x", [3, 2], ts.bool_))
        assert apply(program, program.reduce(kind, value), x).tolist() == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["cumsum", "cummax"])
def test_scans_ascend(kind, size):
    x = torch.randn(2, size, generator=generator(kind, size)) * 1e3
    program = Program()
    value = program.load(program.tensor("x", [2, "N"], ts.f32))
    result = apply(program, program.scan(kind, value), x, N=size).numpy()
    step = np.add if kind == "cumsum" else np.maximum
    assert np.array_equal(result, step.accumulate(x.numpy(), axis=1))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [ts.f32, ts.bf16, ts.fp8_e5m2, ts.int32], ids=str)
def test_sort_is_stable(dtype, descending):
    x = torch.randint(0, 9, (4, 33), generator=generator(dtype)).to(dtype.torch)
    program = Program()
    values, indices = program.sort(program.load(program.tensor("x", ["M", "N"], dtype)), -1, descending)
    program.output("sorted", values)
    out, index = torch.zeros_like(x), torch.zeros(4, 33, dtype=torch.int32)
    program.output("indices", indices)
    program.run(x, out, index, M=4, N=33)
    for row, got, where in zip(x.double().tolist(), out.double().tolist(), index.tolist()):
        order = sorted(range(33), key=lambda i: (-row[i] if descending else row[i], i))
        assert where == order and got == [row[i] for i in order]


@pytest.mark.parametrize("dtype", [ts.f32, ts.bf16, ts.fp8_e4m3], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 5), (2, 100, 65)], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_mma_is_one_fused_chain(dtype, shape, accumulate):
    m, k, n = shape
    draw = generator(dtype, shape)
    a, b = (torch.randn(s, generator=draw).to(dtype.torch) for s in ((m, k), (k, n)))
    acc = torch.randn(m, n, generator=draw)
    program = Program()
    left, right = program.tensor("a", ["M", "K"], dtype), program.tensor("b", ["K", "N"], dtype)
    start = program.load(program.tensor("acc", ["M", "N"], ts.f32))
    value = program.mma(program.load(left), program.load(right), start if accumulate else None)
    result = apply(program, value, a, b, acc, M=m, K=k, N=n)
    chain = acc.double().numpy() if accumulate else np.zeros((m, n))
    for i in range(k):  # the sum of an exact product and an f32 is exact in an 80-bit float for these magnitudes
        product = np.outer(a[:, i].double().numpy(), b[i].double().numpy()).astype(np.longdouble)
        chain = (chain.astype(np.longdouble) + product).astype(np.float32)
    assert np.array_equal(result.numpy(), chain)


def test_mma_of_batches_and_of_ints():
    draw = generator("batch")
    a, b = (torch.randint(-128, 128, s, generator=draw).to(torch.int8) for s in ((3, 5, 40), (3, 40, 6)))
    program = Program()
    left, right = program.tensor("a", [3, 5, 40], ts.int8), program.tensor("b", [3, 40, 6], ts.int8)
    result = apply(program, program.mma(program.load(left), program.load(right)), a, b)
    assert torch.equal(result.long(), a.long() @ b.long())


def test_mma_of_large_operands_is_summed_in_f64(monkeypatch):
    monkeypatch.setattr(interp_math, "CHAIN_LIMIT", 10)
    a, b = torch.randn(4, 30, generator=generator(1)), torch.randn(30, 4, generator=generator(2))
    assert torch.equal(interp_math.mma(a, b, torch.ones(4, 4)), (a.double() @ b.double() + 1).float())


def test_int4_tensors_unpack_low_nibble_first():
    packed = torch.tensor([[0x21, 0xF8]], dtype=torch.uint8)
    program = Program()
    value = program.cast(program.load(program.tensor("w", [1, 4], ts.int4)), ts.int32)
    assert apply(program, value, packed).tolist() == [[1, 2, -8, -1]]


def test_rand_is_philox_as_triton_computes_it():
    seeds, offsets = [0, 12345, -7], [0, 1, 2**31 - 1, -1]
    for seed in seeds:
        program = Program()
        value = program.rand(program.const(seed), program.load(program.tensor("o", ["N"], ts.int32)))
        result = apply(program, value, torch.tensor(offsets, dtype=torch.int32), N=4)
        assert result.tolist() == [philox(seed, offset % 2**32) for offset in offsets]


def philox(seed: int, offset: int) -> float:
    """tl.rand of one offset in Python integers."""
    c = [offset % 2**32, offset >> 32, 0, 0]
    k = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    signed = c[0] - 2**32 if c[0] >= 2**31 else c[0]
    return float(np.float32(~signed if signed < 0 else signed) * np.float32(4.6566127342e-10))


def test_wide_offsets_use_the_second_counter_word():
    program = Program()
    value = program.rand(program.const(3), program.load(program.tensor("o", ["N"], ts.int64)))
    result = apply(program, value, torch.tensor([2**40 + 9]), N=1)
    assert result.item() == philox(3, 2**40 + 9)


def test_scalars_take_the_type_of_the_tile():
    program = Program()
    x = program.load(program.tensor("x", ["N"], ts.f64))
    value = program.binary("mul", x, program.scalar("s", ts.f32))
    out = torch.zeros(3, dtype=torch.float64)
    program.output("out", value)
    program.run(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 0.1, out, N=3)
    assert torch.equal(out, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * torch.tensor(0.1).double())
