"""How elements lie in memory and in registers, by dtype.

Registers hold f64 as double, every other float as f32 (bf16, f16 and fp8 exactly), int64 as i64, other
ints as i32, bool as i1. These functions convert between the two, round a register to a dtype, and load and
store the first elements of a vector, as the ragged end of a dim needs it.
"""

from __future__ import annotations

from tessera.kernel.backends.cpu import convert, emit
from tessera.kernel.backends.cpu.emit import I8, I32, I64, Builder, Val
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


def load_first(b: Builder, address: Val, ty: str, mask: Val, *, by_words: bool) -> Val:
    """The elements of a vector that a mask of its first lanes (at least one) selects; touches no others.

    Args:
        by_words: the processor has masks for 32-bit elements only; narrower ones are loaded four bytes at a time
            and the last few one by one. (LLVM would branch on each lane.)
    """
    lanes, pack = emit.lanes(ty), _per_word(ty)
    if not by_words or pack == 1 or lanes <= pack:
        return b.masked_load(address, ty, mask)
    count, words = count_lanes(b, mask), emit.vec(lanes // pack, I32)
    selected = b.lane_mask(b.lshr(count, pack.bit_length() - 1), lanes // pack)
    vector = b.bitcast(b.masked_load(address, words, selected, align=1), ty)
    for index in _last(b, count, pack):
        one = b.load(b.gep(address, b.cast("zext", index, I64), emit.elem(ty)), emit.elem(ty))
        narrow = emit.vec(0, f"i{emit.bits(emit.elem(ty))}")
        here = b.cmp("eq", b.iota(lanes, narrow), b.splat(b.cast("trunc", index, narrow), lanes))
        vector = b.select(here, b.splat(one, lanes), vector)
    return vector


def store_first(b: Builder, raw: Val, address: Val, mask: Val, *, by_words: bool) -> None:
    """Store the elements that a mask of the first lanes (at least one) selects; arguments as `load_first`."""
    lanes, pack = emit.lanes(raw.ty), _per_word(raw.ty)
    if not by_words or pack == 1 or lanes <= pack:
        b.masked_store(raw, address, mask)
        return
    count, words = count_lanes(b, mask), emit.vec(lanes // pack, I32)
    selected = b.lane_mask(b.lshr(count, pack.bit_length() - 1), lanes // pack)
    b.masked_store(b.bitcast(raw, words), address, selected, align=1)
    for index in _last(b, count, pack):
        index = b.cast("zext", index, I64)
        b.store(b.extract(raw, index), b.gep(address, index, emit.elem(raw.ty)))


def _per_word(ty: str) -> int:
    return max(1, 32 // emit.bits(emit.elem(ty)))


def count_lanes(b: Builder, mask: Val) -> Val:
    """How many lanes a mask selects, as i32."""
    ty = f"i{emit.lanes(mask.ty)}"
    count = b.intrinsic("llvm.ctpop", [b.bitcast(mask, ty)], ty)
    return b.cast("trunc" if emit.bits(ty) > 32 else "zext", count, I32)


def _last(b: Builder, count: Val, pack: int) -> list[Val]:
    """Positions of the elements that may lie behind the last whole word; the first stands in for missing ones."""
    return [b.max(b.sub(count, back), 0) for back in range(1, pack)]
