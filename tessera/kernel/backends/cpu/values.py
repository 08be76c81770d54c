"""LLVM's types and values as text: what `emit.py` and its instructions are written with.

Comes in: Python numbers and type names. Goes out: a `Val` (name and type) and helpers that read types. Imported
through `emit.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache, lru_cache

VOID, PTR, I1, I8, I16, I32, I64 = "void", "ptr", "i1", "i8", "i16", "i32", "i64"
F16, BF16, F32, F64 = "half", "bfloat", "float", "double"

_FLOATS = {F16: 16, BF16: 16, F32: 32, F64: 64}
_FLOAT_MANGLE = {F16: "f16", BF16: "bf16", F32: "f32", F64: "f64", PTR: "p0"}


class Val:
    """An SSA value or a constant: `name` as it stands in the text, `ty` its LLVM type.

    `const` is the Python integer behind an integer constant (None for everything else); index arithmetic on
    constants is folded while it is built.
    """

    __slots__ = ("const", "name", "ty")

    def __init__(self, name: str, ty: str, const: int | None = None) -> None:
        self.name, self.ty, self.const = name, ty, const

    def __str__(self) -> str:
        return f"{self.ty} {self.name}"

    __repr__ = __str__


Operand = Val | int | float


@cache
def vec(n: int, ty: str) -> str:
    """The type of a vector of `n` elements of scalar type `ty`; the scalar type itself when n is 0."""
    return f"<{n} x {ty}>" if n else ty


@cache
def lanes(ty: str) -> int:
    """The number of lanes of a vector type; 0 for a scalar."""
    return int(ty[1:].split(" x ", 1)[0]) if ty.startswith("<") else 0


@cache
def elem(ty: str) -> str:
    """The element type of a vector type; a scalar type itself."""
    return ty[1:-1].split(" x ", 1)[1] if ty.startswith("<") else ty


@cache
def bits(ty: str) -> int:
    """The width of a scalar type (of one lane of a vector type) in bits; pointers have 64."""
    scalar = elem(ty)
    if scalar in _FLOATS:
        return _FLOATS[scalar]
    return 64 if scalar == PTR else int(scalar[1:])


def is_float(ty: str) -> bool:
    """Whether the (element) type is a floating-point type."""
    return elem(ty) in _FLOATS


@cache
def mangle(ty: str) -> str:
    """The suffix of an overloaded intrinsic for a type: `<8 x float>` -> `v8f32`, `i32` -> `i32`."""
    scalar = elem(ty)
    base = _FLOAT_MANGLE.get(scalar, scalar)
    return f"v{lanes(ty)}{base}" if lanes(ty) else base


def _round_bf16(x: float) -> int:
    """The 16 bits of `x` as bfloat16, rounded from f32 to nearest even; NaN becomes the quiet NaN."""
    if x != x:
        return 0x7FC0
    word = struct.unpack("<I", _pack_f32(x))[0]
    return (word + 0x7FFF + ((word >> 16) & 1)) >> 16


def _pack_f32(x: float) -> bytes:
    try:
        return struct.pack("<f", x)
    except OverflowError:
        return struct.pack("<f", float("inf") if x > 0 else float("-inf"))


def literal(x: int | float, ty: str) -> str:
    """A number as LLVM writes it in a constant of a scalar type, rounded to nearest even."""
    if ty == F32:
        x = struct.unpack("<f", _pack_f32(x))[0]
    if ty in (F32, F64):
        return f"0x{struct.unpack('<Q', struct.pack('<d', x))[0]:016X}"
    if ty == F16:
        return f"0xH{struct.unpack('<H', struct.pack('<e', x))[0]:04X}"
    if ty == BF16:
        return f"0xR{_round_bf16(x):04X}"
    if ty == PTR:
        return "null" if x == 0 else f"inttoptr (i64 {int(x)} to ptr)"
    if ty == I1:
        return "true" if x else "false"
    return str(int(x))


@lru_cache(maxsize=4096)
def _const(x: int | float, ty: str, _sign: str) -> Val:
    scalar, n = elem(ty), lanes(ty)
    text = literal(x, scalar)
    folded = int(x) if scalar not in _FLOATS and not n else None
    return Val(f"splat ({scalar} {text})" if n else text, ty, folded)


def const(x: int | float, ty: str) -> Val:
    """The number `x` as a constant of type `ty` (in every lane of a vector type), rounded to nearest even."""
    return _const(x, ty, str(x))  # the text keeps -0.0 and 0.0 (equal, hash alike) apart in the cache


def const_vector(xs: Sequence[int | float], scalar: str) -> Val:
    """The vector constant with the elements `xs` of type `scalar`."""
    return Val("<" + ", ".join(f"{scalar} {literal(x, scalar)}" for x in xs) + ">", vec(len(xs), scalar))


@cache
def natural_alignment(ty: str) -> int:
    """The alignment in bytes of one element of the type."""
    return max(1, bits(ty) // 8)


class Callee:
    """Something that can be called: an intrinsic, an outside symbol, or a function of the module."""

    def __init__(self, name: str, ret: str, params: Sequence[str]) -> None:
        self.name, self.ret, self.params = name, ret, tuple(params)
