"""Temporary: bf16 and f16 only (the full module replaces this file)."""
from tessera.kernel.backends.cpu import emit


def to_f32(b, raw, dtype):
    if dtype.name == "bf16":
        w = b.shl(b.cast("zext", raw, "i32"), 16)
        return b.bitcast(w, emit.vec(emit.lanes(w.ty), "float"))
    return b.cast("fpext", raw, "float")


def from_f32(b, x, dtype):
    if dtype.name == "bf16":
        w = b.bitcast(x, emit.vec(emit.lanes(x.ty), "i32"))
        w = b.add(w, b.add(b.and_(b.lshr(w, 16), 1), 0x7FFF))
        return b.cast("trunc", b.lshr(w, 16), "i16")
    return b.cast("fptrunc", x, "half")
