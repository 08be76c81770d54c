"""Sine and cosine of f32 for generated CPU code; `vmath.py` states what is promised and re-exports them.

Comes in: a `Builder` and a float or vector of floats. Goes out: a value of the same type. Up to |x| = 1e5 the
reduction to |r| <= pi/4 is branchless (Cody & Waite, 1980); beyond, lanes take turns in a scalar routine that is
exact for every float (Payne & Hanek, 1983).
"""

from __future__ import annotations

import math

from tessera.kernel.backends.cpu.emit import F32, F64, I32, I64, Builder, Function, Val, lanes, vec
from tessera.kernel.backends.cpu.vmath_core import (
    add,
    at_least,
    at_most,
    bits_of,
    float_of,
    horner,
    is_f64,
    libm,
    mul,
    round_to_integer,
    sub,
)

_I128 = "i128"
_HALF_PI = (1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15)  # their sum is pi/2 to 2^-75
_TWO_OVER_PI = 0.6366197466850281
_TWO_OVER_PI_WORDS = (0x00000000, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041,
                      0xFE5163AB, 0xDEBBC561)  # 32 zero bits, then 2/pi from the binary point on
_SIN = (-0.16666655242443085, 0.008332191035151482, -0.00019518620683811605)  # (sin(r)/r - 1) / r^2 [3.7e-9]
_COS = (-0.5, 0.04166664555668831, -0.0013887310633435845, 2.4432561986031942e-05)  # (cos(r) - 1) / r^2 [1.2e-10]


def _reduce_large_body(function: Function) -> None:
    """i64 (q << 32 | bits of r) for f32 x, 1e5 < x < inf: x = r + q pi/2 modulo 2 pi, |r| <= pi/4.

    x = m 2^e with an integer m < 2^24. Bits of 2/pi worth 4 or more after the scaling by 2^e cannot change
    the result; the next 96 times m leave 2 bits of quadrant and 94 of fraction (Payne & Hanek, 1983).
    """
    b, (x,) = function.builder, function.args
    word = b.bitcast(x, I32)
    mantissa = b.cast("zext", b.or_(b.and_(word, 0x7FFFFF), 0x800000), _I128)
    first = b.cast("zext", b.sub(b.lshr(word, 23), 150 + 2 - 32), I64)  # bit e - 1 of 2/pi in the table
    table = b.module.table("vmath.two_over_pi", _TWO_OVER_PI_WORDS, I32)
    window = b.value(0, _I128)
    for i in range(4):
        part = b.load(b.gep(table, b.add(b.lshr(first, 5), i), I32), I32, invariant=True)
        window = b.or_(b.shl(window, 32), b.cast("zext", part, _I128))
    window = b.lshr(b.shl(window, b.cast("zext", b.and_(first, 31), _I128)), 32)
    turns = b.cast("trunc", b.lshr(b.mul(mantissa, window), 32), I64)  # quarter turns modulo 4, times 2^62
    q = b.lshr(b.add(turns, 1 << 61), 62)
    r = mul(b, b.cast("sitofp", b.sub(turns, b.shl(q, 62)), F64), math.pi / 2 * 2.0**-62)
    low = b.cast("zext", b.bitcast(b.cast("fptrunc", r, F32), I32), I64)
    b.ret(b.or_(b.shl(q, 32), low))


def _reduce_large(b: Builder, a: Val) -> tuple[Val, Val]:
    """The reduction of `_reduce_trig` for |x| > 1e5, lane by lane in a loop; other lanes get anything."""
    reduce = b.module.helper("vmath.reduce_large", I64, [("x", F32)], _reduce_large_body, inline=False)
    n, a = lanes(a.ty), at_least(b, a, 1e5)
    count, word = max(n, 1), vec(n, I32)
    xs, rs, qs = b.alloca(F32, count), b.alloca(F32, count), b.alloca(I32, count)
    b.store(at_most(b, a, 3.4028234663852886e38), xs)
    with b.for_(0, count) as lane:
        packed = b.call(reduce, b.load(b.gep(xs, lane.i, F32), F32))
        b.store(b.bitcast(b.cast("trunc", packed, I32), F32), b.gep(rs, lane.i, F32))
        b.store(b.cast("trunc", b.lshr(packed, 32), I32), b.gep(qs, lane.i, I32))
    return b.load(rs, a.ty), b.load(qs, word)


def _reduce_trig(b: Builder, a: Val) -> tuple[Val, Val]:
    """r, q with a = r + q pi/2 modulo 2 pi and |r| <= pi/4, for a >= 0; r is NaN for inf and NaN.

    Up to 1e5 three fmas subtract q pi/2 (q < 2^16; the first is exact).
    """
    n, q = round_to_integer(b, a, _TWO_OVER_PI)
    r = a
    for part in _HALF_PI:
        r = b.fma(n, -part, r)
    large = b.cmp("gt", a, 1e5)
    some = b.cmp("ne", b.bitcast(large, f"i{lanes(a.ty)}"), 0) if lanes(a.ty) else large
    with b.if_(some, likely=False) as branch:
        slow_r, slow_q = _reduce_large(b, a)
        slow_r = add(b, slow_r, sub(b, a, a))  # NaN for inf
        branch.give([b.select(large, slow_r, r), b.select(large, slow_q, q)])
    with branch.else_():
        branch.give([r, q])
    return branch.results[0], branch.results[1]


def _sin_or_cos(b: Builder, r: Val, q: Val) -> Val:
    """sin(r + q pi/2)."""
    s = mul(b, r, r)
    sine = b.fma(mul(b, r, s), horner(b, s, _SIN), r)
    cosine = b.fma(s, horner(b, s, _COS), 1.0)
    y = b.select(b.cmp("ne", b.and_(q, 1), 0), cosine, sine)
    return float_of(b, b.xor(bits_of(b, y), b.shl(b.and_(q, 2), 30)))


def sin(b: Builder, x: Val) -> Val:
    """The sine of x radians."""
    if is_f64("sin", x):
        return libm(b, "sin", x)
    y = _sin_or_cos(b, *_reduce_trig(b, b.abs(x)))
    return float_of(b, b.xor(bits_of(b, y), b.and_(bits_of(b, x), -(2**31))))


def cos(b: Builder, x: Val) -> Val:
    """The cosine of x radians."""
    if is_f64("cos", x):
        return libm(b, "cos", x)
    r, q = _reduce_trig(b, b.abs(x))
    return _sin_or_cos(b, r, b.add(q, 1))
