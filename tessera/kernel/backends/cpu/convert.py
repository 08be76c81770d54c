"""Vector conversions between f32 registers and the low-precision floats in memory.

In: a Builder and a scalar or vector. Out: the converted value, bit for bit what torch's `.to()` gives:
round to nearest even; e4m3fn saturates at 448 (as torch 2.13 does), the others overflow to infinity.
Called by `storage.py` and by the packing of matmul operands. Only integer operations, one add and one
multiplication are used, so any vector width on any processor gives the same bits.

fp8, and f16 where the processor has no instructions for it, is read by placing exponent and mantissa into an
f32 and scaling by the difference of the exponent biases, which is exact and covers denormals; it is written by
adding half an ulp to the bits, denormals by adding a power of two whose ulp is the smallest denormal.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.emit import F16, F32, I8, I16, I32, Builder, Val
from tessera.types import DType


@dataclass(frozen=True, kw_only=True)
class _Small:
    """A float of `width` bits."""

    width: int
    mantissa: int  # bits
    bias: int
    overflow: int  # f32 bits from which on the code is `huge`, or `nan` past f32's infinity
    huge: int
    nan: int
    special: int  # the smallest magnitude code that is infinity or NaN


_SMALL = {
    "fp8_e4m3": _Small(width=8, mantissa=3, bias=7, overflow=0x43E80000, huge=0x7E, nan=0x7F, special=0x7F),
    "fp8_e5m2": _Small(width=8, mantissa=2, bias=15, overflow=143 << 23, huge=0x7C, nan=0x7F, special=0x7C),
    "f16": _Small(width=16, mantissa=10, bias=15, overflow=0x477FF000, huge=0x7C00, nan=0x7E00, special=0x7C00),
}


def to_f32(b: Builder, raw: Val, dtype: DType) -> Val:
    """The f32 values of stored bf16 (as i16), f16 or fp8 (as i8): exact."""
    if dtype.name == "bf16":
        return _as_float(b, b.shl(b.cast("zext", raw, I32), 16))
    if dtype.name == "f16" and b.module.has_f16:
        return b.cast("fpext", raw, F32)
    kind = _SMALL[dtype.name]
    code = b.cast("zext", _as(b, raw, I16) if dtype.name == "f16" else raw, I32)
    sign = 1 << (kind.width - 1)
    magnitude = b.and_(code, sign - 1)
    bits = b.shl(magnitude, 23 - kind.mantissa)
    value = b.mul(_as_float(b, bits), 2.0 ** (127 - kind.bias), contract=False)
    special = b.or_(bits, 0x7FC00000 if kind.special == kind.nan else 0x7F800000)
    value = b.select(b.cmp("uge", magnitude, kind.special), _as_float(b, special), value)
    return _as_float(b, b.or_(_as_int(b, value), b.shl(b.and_(code, sign), 32 - kind.width)))


def from_f32(b: Builder, x: Val, dtype: DType) -> Val:
    """f32 values as stored bf16 (i16), f16 or fp8 (i8), rounded to nearest even."""
    if dtype.name == "f16" and b.module.has_f16:
        return b.cast("fptrunc", x, F16)
    bits = _as_int(b, x)
    if dtype.name == "bf16":
        rounded = b.lshr(b.add(bits, b.add(b.and_(b.lshr(bits, 16), 1), 0x7FFF)), 16)
        return b.cast("trunc", b.select(b.cmp("uno", x, x), 0x7FC0, rounded), I16)
    kind = _SMALL[dtype.name]
    shift = 23 - kind.mantissa
    magnitude = b.and_(bits, 0x7FFFFFFF)
    odd = b.and_(b.lshr(magnitude, shift), 1)
    rebias = ((kind.bias - 127) << 23) + (1 << (shift - 1)) - 1
    normal = b.lshr(b.add(b.add(magnitude, rebias), odd), shift)
    # 2**e has an ulp of the smallest denormal: adding it rounds, and leaves the code in the low bits.
    anchor = (127 - kind.bias + 24 - kind.mantissa) << 23
    small = b.sub(_as_int(b, b.add(_as_float(b, magnitude), _float_of(anchor), contract=False)), anchor)
    code = b.select(b.cmp("ult", magnitude, (128 - kind.bias) << 23), small, normal)
    nan = b.cmp("ugt", magnitude, 0x7F800000)
    code = b.select(b.cmp("uge", magnitude, kind.overflow), kind.huge, code)
    code = b.or_(b.select(nan, kind.nan, code), b.and_(b.lshr(bits, 32 - kind.width), 1 << (kind.width - 1)))
    return _as(b, b.cast("trunc", code, I16), F16) if dtype.name == "f16" else b.cast("trunc", code, I8)


def _as(b: Builder, x: Val, ty: str) -> Val:
    return b.bitcast(x, emit.vec(emit.lanes(x.ty), ty))


def _as_float(b: Builder, x: Val) -> Val:
    return _as(b, x, F32)


def _as_int(b: Builder, x: Val) -> Val:
    return _as(b, x, I32)


def _float_of(bits: int) -> float:
    """A power of two from its f32 bits."""
    return 2.0 ** ((bits >> 23) - 127)
