"""Elementary functions for generated CPU code: `exp(builder, x)` emits the instructions and returns the result.

Comes in: a `Builder` and a value of type float, double, or a vector <n x float>, <n x double> of any n. Goes out:
a value of the same type. Called by the lowering of elementwise operations, which finds the functions by name in
`UNARY` and `BINARY`.

What is promised for f32 (tests/kernel/cpu/test_vmath.py measures it):
- The largest error, in units in the last place of the exact result, is `MAX_ULP[name]` over every float, denormal
  arguments and results included: underflow is gradual, nothing is flushed to zero.
- NaN gives NaN, and infinities, zeros (their signs too), poles and domain errors give what IEEE 754 and torch give.
- A value gives the same bits in any lane of a vector of any length, and on every target: only IEEE operations, fma
  and integer operations are emitted, none with a fast-math flag. A target without FMA instructions gets the same
  bits from calls of libm's fmaf, slowly.

Code is branchless, except that sine and cosine of |x| > 1e5 take a per-lane path (Payne & Hanek, 1983).
For f64 the elementary functions call libm lane by lane (slow, right to about 1 ulp); the rest is composed of them.

How: arguments are reduced exactly with fma (Cody & Waite, 1980), then a minimax polynomial with coefficients rounded
to f32 one after the other, lowest first (each time the rest is fitted anew), is evaluated by Horner's rule
(that of exp2 by Estrin's).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tessera.kernel.backends.cpu.emit import F32, F64, I32, I64, Builder, Val, elem, lanes, vec
from tessera.kernel.backends.cpu.vmath_core import (
    add,
    at_least,
    at_most,
    bits_of,
    f32_bits,
    float_of,
    horner,
    is_f64,
    libm,
    mul,
    power_of_two,
    round_to_integer,
    sub,
    with_sign,
)
from tessera.kernel.backends.cpu.vmath_trig import cos, sin

MAX_ULP: dict[str, float] = {
    "exp": 1.0, "exp2": 1.0, "expm1": 1.5, "log": 1.0, "log2": 1.1, "log1p": 1.6, "sin": 1.6, "cos": 1.6,
    "tanh": 2.0, "erf": 1.5, "sigmoid": 2.5, "softplus": 2.0,
    "sqrt": 0.5, "rsqrt": 1.5, "pow": 0.51,
}  # fmt: skip

_INF, _NAN = float("inf"), float("nan")
_ROUND64 = 1.5 * 2.0**52
_LOG2_E = 1.4426950216293335
_LOG2_E_LO = 1.925963033500011e-08
_LN2_HI, _LN2_LO = 0.6931471824645996, -1.9046542121259336e-09
_SMALLEST_NORMAL = 2.0**-126

# Polynomials, lowest coefficient first. In brackets: the largest relative error of the approximated function.
_EXP = (0.4999999403953552, 0.1666652113199234, 0.04166826233267784, 0.00836867094039917,
        0.001382104237563908)  # (e^r - 1 - r) / r^2, |r| <= ln2/2 [3.1e-9]
_EXPM1 = (0.5, 0.1666666716337204, 0.04166648909449577, 0.008333207108080387, 0.00139326648786664,
          0.0001994510821532458)  # the same, relative to e^r - 1 [4.2e-10]
_EXP2 = (0.6931471824645996, 0.24022647738456726, 0.05550359562039375, 0.00961849931627512,
         0.0013390970416367054, 0.00015329310554079711)  # (2^r - 1) / r, |r| <= 1/2 [2.9e-9]
_LOG = (0.3333321511745453, -0.24999800324440002, 0.2001044601202011, -0.1668037623167038,
        0.14005306363105774, -0.12185713648796082, 0.13986897468566895,
        -0.1288565695285797)  # (ln(1+f) - f + f^2/2) / f^3, |f| <= 1/3 [4.7e-9]
_LOG2 = (-0.7213475108146667, 0.4808967113494873, -0.3606714904308319, 0.28868651390075684, -0.24063371121883392,
         0.2020983248949051, -0.17592233419418335, 0.20159517228603363,
         -0.18551479279994965)  # (log2(1+f) - f/ln2) / f^2, |f| <= 1/3 [4.7e-9]
_TANH = (-0.3333328068256378, 0.1333141028881073, -0.05373714119195938, 0.02063082531094551,
         -0.0056958128698170185)  # (tanh(x)/x - 1) / x^2, |x| <= 5/8 [4.5e-9]
_ERF = (0.12837916612625122, -0.3761262893676758, 0.11283625662326813, -0.026855729520320892,
        0.005192393437027931, -0.0008049544994719326, 7.995286432560533e-05)  # erf(x)/x - 1 in x^2, x < 0.92 [9e-10]
_ERFC = (-0.12864848971366882, -0.6351513266563416, -0.10623684525489807, 0.023762019351124763,
         -0.0036424295976758003, 0.0003227940178476274, -1.1230014024476986e-05)  # ln(erfc t)/t + 1, t <= 4 [7e-10]
_POW_LOG2 = (2.885390081777416, 0.9617966948365113, 0.5770777531851606, 0.41222635652481204, 0.31927938323327615,
             0.2908920809247769)  # log2((1+s)/(1-s)) / s in s^2, |s| <= 1/5 [5e-13]
_POW_EXP2 = (0.693147180548212, 0.24022650698110573, 0.05550410935267313, 0.009618128616129363,
             0.0013333454859751775, 0.0001540382545830256, 1.5309156351837156e-05,
             1.3178934492689465e-06)  # (2^r - 1) / r, |r| <= 1/2 [8e-13]


# -- exponentials -------------------------------------------------------------------------------------------------


def _reduce_exp(b: Builder, x: Val) -> tuple[Val, Val]:
    """r, k with x = r + k ln2 and |r| <= ln2/2; the first fma is exact."""
    n, k = round_to_integer(b, x, _LOG2_E)
    return b.fma(n, -_LN2_LO, b.fma(n, -_LN2_HI, x)), k


def _exp_reduced(b: Builder, x: Val) -> tuple[Val, Val]:
    """p, k with e^x = p 2^k and 0.7 < p < 1.42, for |x| < 2^21."""
    r, k = _reduce_exp(b, x)
    high = add(b, r, 1.0)
    low = sub(b, r, sub(b, high, 1.0))  # 1 + r = high + low, exactly
    return add(b, high, b.fma(mul(b, r, r), horner(b, r, _EXP), low)), k


def _two_scales(b: Builder, k: Val) -> tuple[Val, Val]:
    """Normal floats s1, s2 with s1 s2 = 2^k: p s1 is exact, so p s1 s2 rounds once, however small it gets."""
    half = b.ashr(k, 1)
    return power_of_two(b, half), power_of_two(b, b.sub(k, half))


def _exp_parts(b: Builder, x: Val) -> tuple[Val, Val]:
    """y, s with e^x = y s: y is normal, the product under- or overflows where e^x does. Any x."""
    p, k = _exp_reduced(b, at_most(b, at_least(b, x, -120.0), 89.0))
    s1, s2 = _two_scales(b, k)
    return mul(b, p, s1), s2


def exp(b: Builder, x: Val) -> Val:
    """e^x."""
    if is_f64("exp", x):
        return libm(b, "exp", x)
    y, s = _exp_parts(b, x)
    return mul(b, y, s)


def exp2(b: Builder, x: Val) -> Val:
    """2^x."""
    if is_f64("exp2", x):
        return libm(b, "exp2", x)
    x = at_most(b, at_least(b, x, -151.0), 129.0)
    n, k = round_to_integer(b, x, 1.0)
    r = sub(b, x, n)
    s1, s2 = _two_scales(b, k)
    # Attention waits for this chain: by Estrin's scheme it is 4 multiply-adds long instead of 6, and scaling by s1,
    # which is exact, stands beside it.
    low, middle, high = (b.fma(r, _EXP2[i + 1], _EXP2[i]) for i in (0, 2, 4))
    square = mul(b, r, r)
    p = b.fma(square, b.fma(square, high, middle), low)
    return mul(b, b.fma(mul(b, r, s1), p, s1), s2)


def expm1(b: Builder, x: Val) -> Val:
    """e^x - 1 without cancellation: with x = r + k ln2 it is 2^k (e^r - 1) + (2^k - 1)."""
    if is_f64("expm1", x):
        return libm(b, "expm1", x)
    r, k = _reduce_exp(b, at_most(b, at_least(b, x, -18.0), 89.0))
    s = power_of_two(b, b.sub(k, 1))  # half of 2^k, which would overflow where the result does not
    tail = mul(b, mul(b, r, r), horner(b, r, _EXPM1))
    y = b.fma(tail, s, b.fma(r, s, sub(b, s, 0.5)))
    tiny = b.cmp("lt", b.abs(x), 2.0**-25)  # e^x - 1 rounds to x, denormals and -0 included
    return b.select(tiny, x, add(b, y, y))


# -- logarithms ---------------------------------------------------------------------------------------------------


def _split(b: Builder, x: Val) -> tuple[Val, Val]:
    """f, e with x = (1 + f) 2^e and -1/3 <= f < 1/3, exactly; both f32, x positive and finite."""
    denormal = b.cmp("lt", x, _SMALLEST_NORMAL)
    word = bits_of(b, b.select(denormal, mul(b, x, 2.0**25), x))
    e = b.ashr(b.sub(word, f32_bits(2 / 3)), 23)
    f = sub(b, float_of(b, b.sub(word, b.shl(e, 23))), 1.0)
    return f, add(b, b.cast("sitofp", e, F32), b.select(denormal, b.value(-25.0, x.ty), b.value(0.0, x.ty)))


def _log_split(b: Builder, f: Val, e: Val) -> Val:
    """ln((1 + f) 2^e)."""
    y = b.fma(mul(b, f, f), b.fma(f, horner(b, f, _LOG), -0.5), f)
    return b.fma(e, _LN2_HI, y)


def _log_edges(b: Builder, x: Val, y: Val, pole: float) -> Val:
    """y where pole < x < inf; -inf at the pole, inf at infinity, NaN below the pole and for NaN."""
    edge = b.select(b.cmp("eq", x, pole), b.value(-_INF, x.ty), b.value(_NAN, x.ty))
    return b.select(b.cmp("gt", x, pole), b.select(b.cmp("eq", x, _INF), x, y), edge)


def log(b: Builder, x: Val) -> Val:
    """The natural logarithm."""
    if is_f64("log", x):
        return libm(b, "log", x)
    return _log_edges(b, x, _log_split(b, *_split(b, x)), 0.0)


def log2(b: Builder, x: Val) -> Val:
    """The logarithm to base 2; exact for powers of two."""
    if is_f64("log2", x):
        return libm(b, "log2", x)
    f, e = _split(b, x)
    tail = b.fma(mul(b, f, f), horner(b, f, _LOG2), mul(b, f, _LOG2_E_LO))
    y = b.fma(f, _LOG2_E, e)
    rest = b.fma(f, _LOG2_E, sub(b, e, y))  # what the rounding of y lost
    return _log_edges(b, x, add(b, y, add(b, rest, tail)), 0.0)


def log1p(b: Builder, x: Val) -> Val:
    """ln(1 + x): 1 + x is rounded only to find the exponent e; f = x 2^-e + (2^-e - 1) comes from x itself."""
    if is_f64("log1p", x):
        return libm(b, "log1p", x)
    u = add(b, x, 1.0)
    word = bits_of(b, u)
    e = b.ashr(b.sub(word, f32_bits(2 / 3)), 23)
    s = power_of_two(b, b.sub(0, e))
    f = b.fma(x, s, sub(b, s, 1.0))
    rounded = sub(b, float_of(b, b.sub(word, b.shl(e, 23))), 1.0)
    f = b.select(b.cmp("gt", x, 2.0**26), rounded, f)  # there the 1 is below half an ulp, and 2^-e may be denormal
    y = _log_split(b, f, b.cast("sitofp", e, F32))
    return b.select(b.cmp("lt", b.abs(x), 2.0**-25), x, _log_edges(b, x, y, -1.0))


# -- sigmoids -------------------------------------------------------------------------------------


def tanh(b: Builder, x: Val) -> Val:
    """The hyperbolic tangent: a polynomial below 5/8, 1 - 2 / (e^2|x| + 1) above."""
    if is_f64("tanh", x):
        return libm(b, "tanh", x)
    a = b.abs(x)
    s = mul(b, a, a)
    small = b.fma(mul(b, a, s), horner(b, s, _TANH), a)
    p, k = _exp_reduced(b, at_most(b, add(b, a, a), 20.0))
    large = sub(b, 1.0, b.div(2.0, b.fma(p, power_of_two(b, k), 1.0)))
    return with_sign(b, b.select(b.cmp("lt", a, 0.625), small, large), x)


def erf(b: Builder, x: Val) -> Val:
    """The error function: a polynomial below 0.92, 1 - e^(polynomial) above."""
    if is_f64("erf", x):
        return libm(b, "erf", x)
    a = b.abs(x)
    small = b.fma(a, horner(b, mul(b, a, a), _ERF), a)
    t = at_most(b, a, 4.0)  # erf rounds to 1 from 3.92 on
    p, k = _exp_reduced(b, b.fma(t, horner(b, t, _ERFC), b.neg(t)))
    large = b.fma(p, b.neg(power_of_two(b, k)), 1.0)
    return with_sign(b, b.select(b.cmp("lt", a, 0.92), small, large), x)


def sigmoid(b: Builder, x: Val) -> Val:
    """1 / (1 + e^-x)."""
    if is_f64("sigmoid", x):
        return b.div(1.0, add(b, exp(b, b.neg(x)), 1.0))
    # Both sides of the quotient times 2^-24: e^104, from where on the result is 0, would be beyond f32. Above 30 the
    # power is lost in the sum.
    p, k = _exp_reduced(b, at_most(b, at_least(b, b.neg(x), -30.0), 104.0))
    return b.div(2.0**-24, b.fma(p, power_of_two(b, b.sub(k, 24)), 2.0**-24))


def softplus(b: Builder, x: Val) -> Val:
    """ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|)."""
    tail = log1p(b, exp(b, b.neg(b.abs(x))))
    return add(b, at_least(b, x, 0.0), tail)


# -- roots and powers ---------------------------------------------------------------------------------------------


def sqrt(b: Builder, x: Val) -> Val:
    """The square root, correctly rounded."""
    is_f64("sqrt", x)  # refuses other types
    return b.intrinsic("llvm.sqrt", [x], x.ty)


def rsqrt(b: Builder, x: Val) -> Val:
    """1 / sqrt(x), two correctly rounded steps (no hardware estimate: those differ between processors)."""
    return b.div(1.0, sqrt(b, x))


def _f64_bits(x: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def pow(b: Builder, x: Val, y: Val) -> Val:
    """x^y = 2^(y log2|x|), computed in f64 and rounded once; negative x needs an integer y, else NaN."""
    if is_f64("pow", x):
        return libm(b, "pow", x, y)
    a = b.abs(x)
    f, e = (b.cast("fpext", part, F64) for part in _split(b, a))
    s = b.div(f, add(b, f, 2.0))
    log = b.fma(s, horner(b, mul(b, s, s), _POW_LOG2), e)
    log = b.select(b.cmp("lt", a, _INF), log, b.cast("fpext", a, F64))  # inf and NaN
    log = b.select(b.cmp("eq", a, 0.0), b.value(-_INF, log.ty), log)
    # |y| beyond 2^40 is an even integer and under- or overflows for every |x| but 1, just as 2^40 does
    y64 = at_most(b, at_least(b, b.cast("fpext", y, F64), -(2.0**40)), 2.0**40)
    p = at_most(b, at_least(b, mul(b, y64, log), -160.0), 160.0)
    t = add(b, p, _ROUND64)
    r = sub(b, p, sub(b, t, _ROUND64))
    power = b.fma(r, horner(b, r, _POW_EXP2), 1.0)
    power = mul(b, power, float_of(b, b.shl(b.add(bits_of(b, t), 1023 - _f64_bits(_ROUND64)), 52)))
    out = b.cast("fptrunc", power, F32)
    whole = add(b, y64, _ROUND64)
    is_integer = b.cmp("eq", sub(b, whole, _ROUND64), y64)
    odd = b.select(is_integer, b.cast("trunc", bits_of(b, whole), I32), 0)
    sign = b.and_(bits_of(b, x), b.shl(odd, 31))
    signed = float_of(b, b.or_(bits_of(b, out), sign))
    negative = b.and_(b.cmp("lt", x, 0.0), b.cmp("gt", x, -_INF))
    signed = b.select(b.and_(negative, b.not_(is_integer)), b.value(_NAN, x.ty), signed)
    return b.select(b.or_(b.cmp("eq", y, 0.0), b.cmp("eq", x, 1.0)), b.value(1.0, x.ty), signed)


# -- random numbers -----------------------------------------------------------------------------------------------


def rand(b: Builder, seed: Val, offset: Val) -> Val:
    """Uniform f32 in [0, 1), a function of (seed, offset) alone: the bits of Triton's `tl.rand(seed, offset)`.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the key `seed` and
    the counter (offset, 0, 0); word 0 of the block becomes the float.

    Args:
        seed: i32 or i64 lanes; i32 is sign-extended.
        offset: i32 or i64 lanes, as many as seed has.
    """
    ty = vec(lanes(offset.ty), I32)

    def high(x: Val) -> Val:
        return b.cast("trunc", b.lshr(x, 32), I32)

    def low(x: Val) -> Val:
        return b.cast("trunc", x, I32)

    key = b.cast("sext", seed, I64)
    k0, k1 = low(key), high(key)
    c1 = high(offset) if elem(offset.ty) == I64 else b.value(0, ty)
    c0, c2, c3 = low(offset), b.value(0, ty), b.value(0, ty)
    for step in range(10):
        product_b = b.mul(b.cast("zext", c2, I64), 0xCD9E8D57)
        product_a = b.mul(b.cast("zext", c0, I64), 0xD2511F53)
        c0 = b.xor(b.xor(high(product_b), c1), b.add(k0, step * 0x9E3779B9 & 0xFFFFFFFF))
        c2 = b.xor(b.xor(high(product_a), c3), b.add(k1, step * 0xBB67AE85 & 0xFFFFFFFF))
        c1, c3 = low(product_b), low(product_a)
    folded = b.xor(c0, b.ashr(c0, 31))  # ~c0 where it is negative
    return mul(b, b.cast("sitofp", folded, F32), 4.6566127342e-10)


UNARY: dict[str, Callable[[Builder, Val], Val]] = {
    "exp": exp, "exp2": exp2, "expm1": expm1, "log": log, "log2": log2, "log1p": log1p, "sin": sin, "cos": cos,
    "tanh": tanh, "erf": erf, "sigmoid": sigmoid, "softplus": softplus, "sqrt": sqrt, "rsqrt": rsqrt,
}  # fmt: skip
BINARY: dict[str, Callable[[Builder, Val, Val], Val]] = {"pow": pow}
