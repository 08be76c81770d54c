"""How a product steps along k: what one 32-bit unit of a packed operand holds, and how two units are multiplied.

In: the dtypes of the operands and the processor. Out: a `Dot`, which the packing, the register-blocked kernels and
the kernels for few rows share, so that an element of a product is the same chain whichever computes it.

A unit holds `pack` neighbours along k. Where the processor has no instruction for a pair or a quad, operands are
widened while they are packed: bf16 to f32 (one k a unit), 8-bit integers to 16 bits (two). Units start at even k
(at multiples of four for quads) and a missing last k is zero in both operands.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.kernel.backends.cpu.emit import BF16, F32, I8, I16, I32, Builder, Val, const, lanes, vec
from tessera.kernel.backends.cpu.host import Target
from tessera.types import DType


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One way of multiplying packed units.

    Attributes:
        name: f32, bf16x2, i16x2, u8x4 or i8x4; part of the names of generated helpers.
        pack: how many k a unit holds.
        element: the LLVM type of one k in a packed operand; bf16 as its 16 bits.
        unit: the LLVM type of a unit, one lane of a vector.
        total: the LLVM type of a sum.
        shift: what is added to every element of the left operand when it is packed: `vpdpbusd` takes unsigned bytes
            on the left. `shift` times the column sums of the right operand has to be taken off again.
    """

    name: str
    pack: int
    element: str
    unit: str
    total: str
    shift: int = 0


F32_CHAIN = Dot(name="f32", pack=1, element=F32, unit=F32, total=F32)
_BF16_PAIR = Dot(name="bf16x2", pack=2, element=I16, unit=I32, total=F32)
_INT16_PAIR = Dot(name="i16x2", pack=2, element=I16, unit=I32, total=I32)
_UINT8_QUAD = Dot(name="u8x4", pack=4, element=I8, unit=I32, total=I32)
_INT8_QUAD = Dot(name="i8x4", pack=4, element=I8, unit=I32, total=I32, shift=128)


def dot_unit(left: DType, right: DType, target: Target) -> Dot | None:
    """The dot of a product of these dtypes; None for those that have no packed kernel (f64, int32, int64).

    f32 sums are chains acc = fma(a_k, w_k, acc), k ascending; on a processor with `vdpbf16ps` products of two bf16
    operands add pairs as that instruction does. Integer sums are exact modulo 2**32.
    """
    if left.is_float and right.is_float and max(left.bits, right.bits) <= 32:
        return _BF16_PAIR if left.name == right.name == "bf16" and target.has_avx512bf16 else F32_CHAIN
    if left.is_int and right.is_int and max(left.bits, right.bits) <= 8:
        if target.has_vnni and right.kind == "int":
            return _INT8_QUAD if left.kind == "int" else _UINT8_QUAD
        return _INT16_PAIR
    return None


def multiply_add(b: Builder, target: Target, dot: Dot, x: Val, y: Val, total: Val) -> Val:
    """total + x * y, lane by lane, for vectors of units; x comes from the left operand, y from the right one."""
    if dot.pack == 1:
        return b.fma(x, y, total)
    if dot.total == F32:
        return _bf16_pair(b, target, x, y, total)
    if dot.pack == 2:
        return b.add(total, _int16_pair(b, target, x, y))
    return _int8_quad(b, target, x, y, total)


def _bf16_pair(b: Builder, target: Target, x: Val, y: Val, total: Val) -> Val:
    n = lanes(total.ty)
    if target.emulates_dots:
        for half in (lambda u: b.and_(u, -65536), lambda u: b.shl(u, 16)):
            total = b.fma(b.bitcast(half(x), total.ty), b.bitcast(half(y), total.ty), total)
        return total
    pairs = vec(2 * n, BF16)
    callee = b.module.declare(f"llvm.x86.avx512bf16.dpbf16ps.{32 * n}", total.ty, [total.ty, pairs, pairs])
    return b.call(callee, total, b.bitcast(x, pairs), b.bitcast(y, pairs))


def _int8_quad(b: Builder, target: Target, x: Val, y: Val, total: Val) -> Val:
    n = lanes(total.ty)
    if target.emulates_dots:
        for offset in (0, 8, 16, 24):
            unsigned, signed = b.and_(b.lshr(x, offset), 255), b.ashr(b.shl(y, 24 - offset), 24)
            total = b.add(total, b.mul(unsigned, signed))
        return total
    quads = vec(4 * n, I8)
    callee = b.module.declare(f"llvm.x86.avx512.vpdpbusd.{32 * n}", total.ty, [total.ty, quads, quads])
    return b.call(callee, total, b.bitcast(x, quads), b.bitcast(y, quads))


def _int16_pair(b: Builder, target: Target, x: Val, y: Val) -> Val:
    n = lanes(x.ty)
    names = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
    if n in names and 32 * n == target.vector_bits:
        pairs = vec(2 * n, I16)
        callee = b.module.declare(names[n], x.ty, [pairs, pairs])
        return b.call(callee, b.bitcast(x, pairs), b.bitcast(y, pairs))
    low = b.mul(b.ashr(b.shl(x, 16), 16), b.ashr(b.shl(y, 16), 16))
    return b.add(low, b.mul(b.ashr(x, 16), b.ashr(y, 16)))


def shifted_sums(b: Builder, target: Target, dot: Dot, y: Val, total: Val) -> Val:
    """total + shift * (the elements of a vector of right units): what `shift` adds to a product."""
    return multiply_add(b, target, dot, const(dot.shift * 0x01010101 - (1 << 32), vec(lanes(y.ty), I32)), y, total)
