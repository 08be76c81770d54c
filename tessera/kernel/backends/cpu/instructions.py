"""Instructions on vectors and on memory.

Comes in: values (`Val`) and Python numbers. Goes out: as in `arithmetic.py`. `emit.Builder` adds control flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tessera.kernel.backends.cpu.arithmetic import Arithmetic
from tessera.kernel.backends.cpu.values import (
    I1,
    I8,
    I32,
    I64,
    PTR,
    VOID,
    Operand,
    Val,
    const_vector,
    elem,
    lanes,
    mangle,
    natural_alignment,
    vec,
)


class Instructions(Arithmetic):
    """All instructions without control flow."""

    # -- vectors ------------------------------------------------------------------------------------------

    def extract(self, v: Val, i: int | Val) -> Val:
        """Lane i as a scalar."""
        return self.emit(f"extractelement {v}, {self.value(i, I64)}", elem(v.ty))

    def insert(self, v: Val, x: Operand, i: int | Val) -> Val:
        """v with lane i replaced by the scalar x."""
        return self.emit(f"insertelement {v}, {self.value(x, elem(v.ty))}, {self.value(i, I64)}", v.ty)

    def shuffle(self, a: Val, b: Val | None, picks: Sequence[int]) -> Val:
        """Lanes picked from a and b laid end to end; -1 leaves a lane undefined."""
        mask = ", ".join("i32 poison" if p < 0 else f"i32 {p}" for p in picks)
        other = f"{a.ty} {b.name if b else 'poison'}"
        return self.emit(f"shufflevector {a}, {other}, <{len(picks)} x i32> <{mask}>",
                         vec(len(picks), elem(a.ty)))

    def slice(self, v: Val, start: int, n: int) -> Val:
        """Lanes start .. start + n - 1."""
        return v if n == lanes(v.ty) else self.shuffle(v, None, range(start, start + n))

    def concat(self, parts: Sequence[Val]) -> Val:
        """Vectors of one type laid end to end (their number is a power of two)."""
        while len(parts) > 1:
            n = 2 * lanes(parts[0].ty)
            parts = [self.shuffle(parts[i], parts[i + 1], range(n)) for i in range(0, len(parts), 2)]
        return parts[0]

    def iota(self, n: int, ty: str = I64) -> Val:
        """The vector 0, 1, ..., n - 1."""
        return const_vector(range(n), ty)

    def lane_mask(self, count: Val, n: int) -> Val:
        """Lanes i < count of n; the mask of a ragged edge."""
        return self.cmp("lt", self.iota(n, count.ty), count)

    def reduce(self, v: Val, op: Callable[[Val, Val], Val]) -> Val:
        """Combine the lanes (a power of two) with `op` in a fixed tree: halves are folded onto each other."""
        n = lanes(v.ty)
        while n > 1:
            n //= 2
            v = op(self.slice(v, 0, n), self.slice(v, n, n))
        return self.extract(v, 0)

    def opaque(self, index: Val) -> Val:
        """The same number, but nothing that LLVM knows how to count: its search for the best addresses of some dozens
        of rows would take longer than all the rest of its work, and finds nothing."""
        return self.emit(f'call i64 asm "", "=r,0"({index})', I64)

    # -- memory -------------------------------------------------------------------------------------------

    def alloca(self, ty: str, count: int = 1, *, align: int = 64) -> Val:
        """`count` elements of type `ty` on the stack for the whole call (placed in the entry block)."""
        name = f"%a{self.function.unique()}"
        self.function.allocas.append(f"  {name} = alloca {ty}, i64 {count}, align {align}")
        return self.function.named(name, PTR)

    def gep(self, base: Val, index: Operand, ty: str) -> Val:
        """The address of element `index` (of type `ty`) behind `base`; a vector of indices gives a vector."""
        i = self.value(index, I64) if not isinstance(index, Val) else index
        if i.const == 0:
            return base
        return self.emit(f"getelementptr {ty}, {base}, {i}", vec(lanes(i.ty), PTR))

    def load(self, p: Val, ty: str, *, align: int | None = None, invariant: bool = False) -> Val:
        """Load a scalar or a vector; `invariant` promises that nobody writes there during the kernel."""
        tail = ", !invariant.load !{}" if invariant else ""
        return self.emit(f"load {ty}, ptr {p.name}, align {align or natural_alignment(ty)}{tail}", ty)

    def store(self, v: Val, p: Val, *, align: int | None = None) -> None:
        """Store a scalar or a vector."""
        self.line(f"store {v}, ptr {p.name}, align {align or natural_alignment(v.ty)}")

    def masked_load(self, p: Val, ty: str, mask: Val, other: Val | None = None, *,
                    align: int | None = None) -> Val:
        """Load the lanes that the mask selects, touching no other; the rest come from `other` (default 0)."""
        callee = self.module.declare(f"llvm.masked.load.{mangle(ty)}.p0", ty, [PTR, I32, mask.ty, ty])
        return self.call(callee, p, align or natural_alignment(ty), mask, other or Val("zeroinitializer", ty))

    def masked_store(self, v: Val, p: Val, mask: Val, *, align: int | None = None) -> None:
        """Store the lanes that the mask selects."""
        callee = self.module.declare(f"llvm.masked.store.{mangle(v.ty)}.p0", VOID, [v.ty, PTR, I32, mask.ty])
        self.call(callee, v, p, align or natural_alignment(v.ty), mask)

    def gather(self, ptrs: Val, ty: str, mask: Val, other: Val | None = None) -> Val:
        """Load a vector from a vector of addresses, the lanes that the mask selects."""
        name = f"llvm.masked.gather.{mangle(ty)}.{mangle(ptrs.ty)}"
        callee = self.module.declare(name, ty, [ptrs.ty, I32, mask.ty, ty])
        return self.call(callee, ptrs, natural_alignment(ty), mask, other or Val("zeroinitializer", ty))

    def scatter(self, v: Val, ptrs: Val, mask: Val) -> None:
        """Store a vector to a vector of addresses; where addresses coincide the highest lane wins."""
        name = f"llvm.masked.scatter.{mangle(v.ty)}.{mangle(ptrs.ty)}"
        callee = self.module.declare(name, VOID, [v.ty, ptrs.ty, I32, mask.ty])
        self.call(callee, v, ptrs, natural_alignment(v.ty), mask)

    def prefetch(self, p: Val, *, locality: int = 3, write: bool = False) -> None:
        """Ask for the cache line at p; locality 3 keeps it close, 0 streams."""
        callee = self.module.declare("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])
        self.call(callee, p, int(write), locality, 1)

    def copy(self, dst: Val, src: Val, nbytes: Operand) -> None:
        """memcpy of `nbytes` bytes between areas that do not overlap."""
        callee = self.module.declare("llvm.memcpy.p0.p0.i64", VOID, [PTR, PTR, I64, I1])
        self.call(callee, dst, src, nbytes, 0)

    def fill(self, dst: Val, byte: int, nbytes: Operand) -> None:
        """memset of `nbytes` bytes."""
        callee = self.module.declare("llvm.memset.p0.i64", VOID, [PTR, I8, I64, I1])
        self.call(callee, dst, byte, nbytes, 0)

    def atomic_load(self, p: Val, ty: str = I64, *, order: str = "acquire") -> Val:
        """Load an integer that another thread or process may be writing."""
        return self.emit(f"load atomic {ty}, ptr {p.name} {order}, align {natural_alignment(ty)}", ty)

    def atomic_store(self, v: Val, p: Val, *, order: str = "release") -> None:
        """Store an integer that another thread or process may be reading."""
        self.line(f"store atomic {v}, ptr {p.name} {order}, align {natural_alignment(v.ty)}")

    def atomic_add(self, p: Val, v: Operand, ty: str = I64, *, order: str = "monotonic") -> Val:
        """Add to the integer at p; returns what stood there before."""
        return self.emit(f"atomicrmw add ptr {p.name}, {self.value(v, ty)} {order}", ty)
