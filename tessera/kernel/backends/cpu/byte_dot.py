"""Dot products of signed bytes with weights of 8 or 4 bits, in 32-bit integers.

In: the processor and the weights' dtype. Out: a `ByteDot`, which says how a 32-bit unit of a row of weights comes
apart into planes of bytes, which bytes of the other operand each plane meets, and how their products are added.
`byte_rows.py` has the loops.

Nibbles become unsigned bytes by an `and` and a shift, as the instructions want them on one side: the weights are
stored with an offset (8, or 128 for bytes), whose share in a product, offset * sum(x), is taken off at the end. Where
a processor adds products of bytes in 16 bits only, a byte is taken as two nibbles: 8 pairs of products of a nibble
with a byte cannot overflow them (8 * 2 * 15 * 128 < 2**15), and pairs are widened once for 32 elements.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.emit import I8, I16, I32, Builder, Val
from tessera.kernel.backends.cpu.host import Target
from tessera.types import DType, int4

CHUNK = 32  # elements along k that are added before the sums are widened
_LOW = 0x0F0F0F0F


class ByteDot:
    """How `lanes` columns are multiplied at once.

    Attributes:
        offset: what is added to each weight; the products hold offset * (sum of x) too much.
        order: where the bytes of 8 neighbouring x go, so that a plane meets 4 neighbours.
        quads: for each plane of a unit, which of the unit's groups of four x it meets.
        sums: accumulators a row.
    """

    def __init__(self, target: Target, dtype: DType, lanes: int) -> None:
        self.target, self.lanes = target, lanes
        self.nibbles = dtype == int4
        wide = 32 * lanes == target.vector_bits
        self._quad = wide and target.has_vnni
        self._pair = wide and not self._quad and target.has_avx2 and not target.emulates_dots
        self._split = self.nibbles or self._pair
        self.offset = 8 if self.nibbles else 128
        self.order = (0, 2, 4, 6, 1, 3, 5, 7) if self.nibbles else tuple(range(8))
        self.quads = (0, 1) if self.nibbles else (0, 0) if self._split else (0,)
        self.sums = 2 if self._pair and not self.nibbles else 1
        self._ty = emit.vec(lanes, I32)

    def start(self) -> list[Val]:
        """The accumulators of one row, empty."""
        return [emit.const(0, self._ty)] * self.sums

    def planes(self, b: Builder, unit: Val) -> list[Val]:
        """Four unsigned bytes a lane, for each plane."""
        unit = b.xor(unit, -0x77777778 if self.nibbles else -0x7F7F7F80)
        return [b.and_(unit, _LOW), b.and_(b.lshr(unit, 4), _LOW)] if self._split else [unit]

    def add(self, b: Builder, sums: Sequence[Val], number: int, plane: Val, x: Val) -> list[Val]:
        """The accumulators after the products of a plane with four bytes of x."""
        sums, at = list(sums), number % self.sums
        if self._pair:
            bytes_, words = emit.vec(4 * self.lanes, I8), emit.vec(2 * self.lanes, I16)
            name = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}[self.lanes]
            products = b.call(b.module.declare(name, words, [bytes_, bytes_]), b.bitcast(plane, bytes_),
                              b.bitcast(x, bytes_))
            sums[at] = b.bitcast(b.add(b.bitcast(sums[at], words), products), self._ty)
        elif self._quad and not self.target.emulates_dots:
            quads = emit.vec(4 * self.lanes, I8)
            callee = b.module.declare(
                f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self._ty, [self._ty, quads, quads])
            sums[at] = b.call(callee, sums[at], b.bitcast(plane, quads), b.bitcast(x, quads))
        else:
            for place in (0, 8, 16, 24):
                unsigned, signed = b.and_(b.lshr(plane, place), 255), b.ashr(b.shl(x, 24 - place), 24)
                sums[at] = b.add(sums[at], b.mul(unsigned, signed))
        return sums

    def total(self, b: Builder, sums: Sequence[Val]) -> Val:
        """The accumulators of at most CHUNK elements as 32-bit sums."""
        if not self._pair:
            return sums[0]
        name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}[self.lanes]
        pairs = emit.vec(2 * self.lanes, I16)
        widen = b.module.declare(name, self._ty, [pairs, pairs])
        total, *high = [b.call(widen, b.bitcast(part, pairs), emit.const(weight, pairs))
                        for part, weight in zip(sums, (1, 16))]
        return b.add(total, high[0]) if high else total
