"""Float64 values with running error bounds: the fuzzer's own meaning of the operations of the tile IR.

In: numbers with a bound on how far a backend's may be off (`Approx`). Out: the same of every operation. What
IEEE rounds correctly (+ - * / sqrt, casts, comparisons, moves) is rounded here too, so its error stays zero;
functions, sums and products of matrices get the error that their order and their approximation allow
(Higham, "Accuracy and Stability of Numerical Algorithms", chapter 3). Independent of the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tessera.types import DType, bf16, bool_, f16, f32, f64, fp8_e4m3, fp8_e5m2

UNIT = {f64: 2.0**-53, f32: 2.0**-24, f16: 2.0**-11, bf16: 2.0**-8, fp8_e4m3: 2.0**-4, fp8_e5m2: 2.0**-3}
TINY = {f64: 0.0, f32: 2.0**-147, f16: 2.0**-24, bf16: 2.0**-131, fp8_e4m3: 2.0**-9, fp8_e5m2: 2.0**-16}
_LOW = np.uint64(0xFFFFFFFF)
FUNCTION_ULPS = 8  # of the unit roundoff: what a vector math library may be off

MONOTONE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2,
    "log1p": torch.log1p, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "erf": torch.erf,
    "rsqrt": torch.rsqrt, "softplus": lambda x: torch.log1p(torch.exp(x)),
}
STEPS: dict[str, Callable[[Tensor], Tensor]] = {"floor": torch.floor, "ceil": torch.ceil, "round": torch.round}


@dataclass
class Approx:
    """Values (float64, int64 or bool) and, for floats, how far off a backend may be."""

    x: Tensor
    e: Tensor

    def move(self, function: Callable[[Tensor], Tensor]) -> Approx:
        """The same elements in another place."""
        return Approx(function(self.x), function(self.e))


def exact(x: Tensor) -> Approx:
    """Values as a tensor holds them."""
    if x.dtype == torch.bool:
        return Approx(x, torch.zeros(x.shape, dtype=torch.float64))
    return Approx(x.double() if x.is_floating_point() else x.long(), torch.zeros(x.shape, dtype=torch.float64))


def rounded(x: Tensor, e: Tensor, dtype: DType, ulps: float = 0) -> Approx:
    """A float result brought to its dtype; `ulps` units off where the operation does not round correctly."""
    x = x.to(torch.float32).to(dtype.torch).double() if dtype not in (f32, f64) else x.to(dtype.torch).double()
    size = x.abs() + e
    e = e + ulps * UNIT[dtype] * size
    return Approx(x, torch.where(e > 0, e + 2 * UNIT[dtype] * size + TINY[dtype], 0.0))


def wrapped(x: Tensor, bits: int, signed: bool = True) -> Approx:
    """An int result in two's complement."""
    if bits < 64:
        x = x % 2**bits
        x = torch.where(x >= 2 ** (bits - 1), x - 2**bits, x) if signed else x
    return exact(x)


def cast(a: Approx, dtype: DType) -> Approx:
    """To a float rounded; to an int truncated and saturated (exact values only); to bool `!= 0`."""
    if dtype == bool_:
        return exact(a.x != 0)
    if dtype.is_float:
        return rounded(a.x.double(), a.e, dtype)
    if a.x.is_floating_point():
        limits = torch.iinfo(dtype.torch)
        return exact(a.x.trunc().clamp(limits.min, limits.max).long())
    return wrapped(a.x.long(), dtype.bits, dtype.kind == "int")


def unary(name: str, a: Approx, dtype: DType) -> Approx:
    """A function of one tile."""
    if name == "not":
        return exact(~a.x)
    if name in ("neg", "abs"):
        x = -a.x if name == "neg" else a.x.abs()
        return Approx(x, a.e) if dtype.is_float else wrapped(x, dtype.bits)
    if name == "sqrt":
        x = torch.sqrt(a.x)
        return rounded(x, a.e / x, dtype)
    if name in ("sin", "cos"):
        return rounded(getattr(torch, name)(a.x), a.e, dtype, FUNCTION_ULPS)
    if name in STEPS:
        return Approx(STEPS[name](a.x), a.e)
    function = MONOTONE[name]
    x = function(a.x)
    spread = torch.maximum((function(a.x + a.e) - x).abs(), (function(a.x - a.e) - x).abs())
    return rounded(x, spread, dtype, FUNCTION_ULPS)


def power(a: Approx, exponent: float, dtype: DType) -> Approx:
    """a ** exponent, a > 0: monotone in a."""
    x = a.x**exponent
    spread = torch.maximum(((a.x + a.e) ** exponent - x).abs(), ((a.x - a.e) ** exponent - x).abs())
    return rounded(x, spread, dtype, FUNCTION_ULPS)


INTEGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.maximum, "min": torch.minimum,
    "floordiv": lambda x, y: (x - x % y) // y, "mod": torch.remainder, "and": torch.bitwise_and,
    "or": torch.bitwise_or, "xor": torch.bitwise_xor, "shl": lambda x, y: x * 2**y, "shr": lambda x, y: x >> y,
}
COMPARE = {name: getattr(torch, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


def binary(name: str, a: Approx, b: Approx, dtype: DType, contracted: bool = False) -> Approx:
    """An operation of two tiles of one shape; `contracted`: a product that is added may stay unrounded."""
    if name in COMPARE:
        return exact(COMPARE[name](a.x, b.x))
    if dtype == bool_:
        return exact({"and": a.x & b.x, "or": a.x | b.x, "xor": a.x ^ b.x}[name])
    if not dtype.is_float:
        return wrapped(INTEGER[name](a.x, b.x), dtype.bits)
    if name in ("max", "min"):
        return Approx(INTEGER[name](a.x, b.x), torch.maximum(a.e, b.e))
    if name in ("add", "sub"):
        e = a.e + b.e + (2 * UNIT[dtype] * (a.x.abs() + b.x.abs()) if contracted else 0)
        return rounded(INTEGER[name](a.x, b.x), e, dtype)
    if name == "mul":
        return rounded(a.x * b.x, a.x.abs() * b.e + b.x.abs() * a.e + a.e * b.e, dtype)
    quotient = a.x / b.x
    if name == "div":
        return rounded(quotient, (a.e + quotient.abs() * b.e) / (b.x.abs() - b.e), dtype)
    whole = torch.floor(quotient.to(dtype.torch).double())
    return exact(whole) if name == "floordiv" else exact(a.x - whole * b.x)


def fma(a: Approx, b: Approx, c: Approx, dtype: DType) -> Approx:
    """a * b + c."""
    if not dtype.is_float:
        return wrapped(a.x * b.x + c.x, dtype.bits)
    return rounded(a.x * b.x + c.x, a.x.abs() * b.e + b.x.abs() * a.e + a.e * b.e + c.e, dtype)


def where(c: Approx, a: Approx, b: Approx) -> Approx:
    """a where c, else b."""
    return Approx(torch.where(c.x, a.x, b.x), torch.where(c.x, a.e, b.e))


def reduce(kind: str, a: Approx, axis: int, dtype: DType) -> Approx:
    """One axis reduced."""
    if kind in ("any", "all"):
        return exact(getattr(a.x, kind)(axis))
    if kind.startswith("arg"):
        return exact(getattr(a.x, kind)(axis))
    if kind in ("max", "min"):
        return Approx(getattr(a.x, f"a{kind}")(axis), a.e.amax(axis))
    if not dtype.is_float:
        return wrapped(a.x.sum(axis), dtype.bits)
    count = a.x.shape[axis]
    e = a.e.sum(axis) + 2 * count * UNIT[dtype] * (a.x.abs() + a.e).sum(axis)
    total = a.x.sum(axis)
    return rounded(total, e, dtype) if kind == "sum" else rounded(total / count, e / count, dtype, 2)


def scan(kind: str, a: Approx, axis: int, dtype: DType) -> Approx:
    """cumsum or cummax."""
    if kind == "cummax":
        return Approx(torch.cummax(a.x, axis).values, torch.cummax(a.e, axis).values)
    if not dtype.is_float:
        return wrapped(a.x.cumsum(axis), dtype.bits)
    e = a.e.cumsum(axis) + 2 * a.x.shape[axis] * UNIT[dtype] * (a.x.abs() + a.e).cumsum(axis)
    return rounded(a.x.cumsum(axis), e, dtype)


def rand(seed: int, offset: Tensor, bits: int = 32) -> Tensor:
    """Philox4x32-10 of (seed, offset): the first word, sign folded, times the f32 nearest to 2^-31 (Triton's rand)."""
    where = offset.numpy().astype(np.uint64)
    c0, c1 = where & _LOW, where >> np.uint64(32) if bits == 64 else np.zeros_like(where)
    c2 = c3 = np.zeros_like(c0)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = b >> np.uint64(32) ^ c1 ^ k0, b & _LOW, a >> np.uint64(32) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    word = c0.astype(np.uint32).view(np.int32)
    folded = np.where(word < 0, ~word, word).astype(np.float32)
    return torch.from_numpy(folded * np.float32(4.6566127342e-10)).double()


def sort(a: Approx, axis: int, descending: bool) -> tuple[Approx, Approx]:
    """Sorted values, and the indices, which mean something for exact values only."""
    values, indices = torch.sort(a.x, dim=axis, descending=descending, stable=True)
    worst = a.e.amax(axis, keepdim=True).expand(a.e.shape) if a.e.numel() else a.e
    return Approx(values, worst), exact(indices)


def mma(a: Approx, b: Approx, c: Approx | None, dtype: DType) -> Approx:
    """a @ b + c."""
    if not dtype.is_float:
        return wrapped(a.x @ b.x + (c.x if c else 0), 32)
    x = a.x @ b.x
    size_a, size_b = a.x.abs() + a.e, b.x.abs() + b.e
    e = size_a @ b.e + a.e @ size_b + 2 * (a.x.shape[-1] + 1) * UNIT[dtype] * (size_a @ size_b)
    if c is not None:
        x, e = x + c.x, e + c.e + 2 * (a.x.shape[-1] + 1) * UNIT[dtype] * c.x.abs()
    return rounded(x, e, dtype)
