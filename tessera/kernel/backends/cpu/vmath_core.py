"""The steps that the elementary functions of `vmath.py` are made of.

Comes in: a `Builder` and float or integer values, scalars or vectors of any length. Goes out: values of as many
lanes. Called by `vmath.py` and `vmath_trig.py`. No operation here may be contracted: a function must give the same
bits in every lane, at every width, on every target.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tessera.errors import CompileError
from tessera.kernel.backends.cpu.emit import F32, F64, I32, I64, Builder, Operand, Val, elem, lanes, vec

ROUND = 1.5 * 2.0**23  # x + ROUND holds x, rounded to an integer, in its low mantissa bits (|x| < 2^22)


def add(b: Builder, x: Operand, y: Operand) -> Val:
    """x + y with its own rounding, never fused."""
    return b.add(x, y, contract=False)


def sub(b: Builder, x: Operand, y: Operand) -> Val:
    """x - y with its own rounding, never fused."""
    return b.sub(x, y, contract=False)


def mul(b: Builder, x: Operand, y: Operand) -> Val:
    """x y with its own rounding, never fused."""
    return b.mul(x, y, contract=False)


def horner(b: Builder, x: Val, coefficients: Sequence[float]) -> Val:
    """c0 + c1 x + c2 x^2 + ..."""
    y = b.value(coefficients[-1], x.ty)
    for c in reversed(coefficients[:-1]):
        y = b.fma(y, x, c)
    return y


def bits_of(b: Builder, x: Val) -> Val:
    """The bit pattern of f32 or f64 lanes as integers."""
    return b.bitcast(x, vec(lanes(x.ty), I32 if elem(x.ty) == F32 else I64))


def float_of(b: Builder, x: Val) -> Val:
    """The i32 or i64 lanes as the f32 or f64 with that bit pattern."""
    return b.bitcast(x, vec(lanes(x.ty), F32 if elem(x.ty) == I32 else F64))


def f32_bits(x: float) -> int:
    """The bit pattern of a number as f32."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def at_most(b: Builder, x: Val, limit: float) -> Val:
    """The smaller of x and limit; a NaN passes."""
    return b.select(b.cmp("gt", x, limit), limit, x)


def at_least(b: Builder, x: Val, limit: float) -> Val:
    """The larger of x and limit; a NaN passes."""
    return b.select(b.cmp("lt", x, limit), limit, x)


def with_sign(b: Builder, magnitude: Val, sign: Val) -> Val:
    """|magnitude| with the sign of `sign`."""
    return b.intrinsic("llvm.copysign", [magnitude, sign], magnitude.ty)


def power_of_two(b: Builder, k: Val) -> Val:
    """2^k as f32 for integer lanes -126 <= k <= 127."""
    return float_of(b, b.shl(b.add(k, 127), 23))


def is_f64(name: str, x: Val) -> bool:
    """Whether x is f64 rather than f32; `name` stands in the error for any other type."""
    if elem(x.ty) not in (F32, F64):
        raise CompileError(f"{name} is computed in float or double, got a value of type {x.ty}")
    return elem(x.ty) == F64


def libm(b: Builder, name: str, *xs: Val) -> Val:
    """Call libm's `name` on each lane of f64 values."""
    callee = b.module.declare(name, F64, [F64] * len(xs), attrs="nounwind memory(none)")
    n = lanes(xs[0].ty)
    if not n:
        return b.call(callee, *xs)
    out = Val("poison", xs[0].ty)
    for i in range(n):
        out = b.insert(out, b.call(callee, *(b.extract(x, i) for x in xs)), i)
    return out


def round_to_integer(b: Builder, x: Val, scale: float) -> tuple[Val, Val]:
    """n = x * scale rounded to the nearest integer, as f32 and as i32; |x * scale| < 2^22."""
    t = b.fma(x, scale, ROUND)
    return sub(b, t, ROUND), b.sub(bits_of(b, t), f32_bits(ROUND))
