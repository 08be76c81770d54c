"""`//` and `%` of floats as Python has them: the floor of the exact quotient, and what is left.

In: registers of floats. Out: the quotient or the remainder, which has the divisor's sign; exact where the quotient is
below 2^53, and 0 left beyond. f32 is computed in f64, which holds every product of quotient and divisor.
"""

from __future__ import annotations

import math

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.emit import F64, Builder, Val

_EXACT = 2.0**53


def float_floor_div(b: Builder, x: Val, y: Val) -> Val:
    """floor(x / y)."""
    return _back(b, _divide(b, *_wide(b, x, y))[0], x)


def float_floor_mod(b: Builder, x: Val, y: Val) -> Val:
    """x - floor(x / y) * y."""
    return _back(b, _divide(b, *_wide(b, x, y))[1], x)


def _wide(b: Builder, *operands: Val) -> list[Val]:
    return [v if emit.elem(v.ty) == F64 else b.cast("fpext", v, F64) for v in operands]


def _back(b: Builder, v: Val, like: Val) -> Val:
    return v if emit.elem(like.ty) == F64 else b.cast("fptrunc", v, emit.elem(like.ty))


def _divide(b: Builder, x: Val, y: Val) -> tuple[Val, Val]:
    """Quotient and remainder in f64: a first quotient, which is wrong by one at most, then corrected."""
    first = b.intrinsic("llvm.floor", [b.div(x, y)], x.ty)
    left = b.intrinsic("llvm.fma", [b.sub(0.0, first), y, x], x.ty)
    size, of_left = b.intrinsic("llvm.fabs", [y], x.ty), b.intrinsic("llvm.fabs", [left], x.ty)
    signs_differ = b.cmp("ne", b.cmp("lt", left, 0.0), b.cmp("lt", y, 0.0))
    is_above = b.and_(b.cmp("ne", left, 0.0), signs_differ)  # one too many taken away
    is_below = b.and_(b.cmp("ge", of_left, size), b.not_(signs_differ))
    quotient = b.select(is_above, b.sub(first, 1.0), b.select(is_below, b.add(first, 1.0), first))
    remainder = b.select(is_above, b.add(left, y), b.select(is_below, b.sub(left, y), left))
    amount = b.intrinsic("llvm.fabs", [first], x.ty)
    is_huge = b.and_(b.cmp("ge", amount, _EXACT), b.cmp("lt", amount, math.inf))
    quotient, remainder = b.select(is_huge, first, quotient), b.select(is_huge, 0.0, remainder)
    # Of an infinite divisor nothing is taken away, or one where the signs differ.
    is_finite = b.cmp("lt", b.intrinsic("llvm.fabs", [x], x.ty), math.inf)
    is_endless = b.and_(b.cmp("eq", size, math.inf), is_finite)
    crosses = b.and_(b.cmp("ne", x, 0.0), b.cmp("ne", b.cmp("lt", x, 0.0), b.cmp("lt", y, 0.0)))
    quotient = b.select(is_endless, b.select(crosses, -1.0, b.mul(x, 0.0)), quotient)
    remainder = b.select(is_endless, b.select(crosses, y, x), remainder)
    is_undefined = b.and_(b.cmp("ne", remainder, remainder), b.cmp("ne", y, 0.0))
    return b.select(is_undefined, remainder, quotient), remainder
