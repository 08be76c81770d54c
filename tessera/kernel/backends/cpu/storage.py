"""How elements lie in memory and in registers, by dtype.

Registers hold f64 as double, every other float as f32 (bf16, f16 and fp8 exactly), int64 as i64, other
ints as i32, bool as i1. These functions convert between the two and round a register to a dtype.
"""

from __future__ import annotations

from tessera.kernel.backends.cpu import convert
from tessera.kernel.backends.cpu.emit import I8, I32, Builder, Val
from tessera.types import DType


def from_storage(b: Builder, raw: Val, dtype: DType) -> Val:
    """The register value of what was loaded."""
    if dtype.is_float:
        return raw if dtype.bits >= 32 else convert.to_f32(b, raw, dtype)
    if dtype.kind == "bool":
        return b.cmp("ne", raw, 0)
    if dtype.bits == 8:
        return b.cast("zext" if dtype.kind == "uint" else "sext", raw, I32)
    return raw


def to_storage(b: Builder, x: Val, dtype: DType) -> Val:
    """What to store for a register value, rounded to nearest even."""
    if dtype.is_float:
        return x if dtype.bits >= 32 else convert.from_f32(b, x, dtype)
    if dtype.kind == "bool":
        return b.cast("zext", x, I8)
    return b.cast("trunc", x, I8) if dtype.bits == 8 else x


def round_to(b: Builder, x: Val, dtype: DType) -> Val:
    """An f32 register rounded to a low-precision float, held as f32 again."""
    return convert.to_f32(b, convert.from_f32(b, x, dtype), dtype)


