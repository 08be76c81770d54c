"""State of one lowering: values, sizes, scratch memory and what has been computed already.

In: a tile function whose top level is scalars and grids. Out: LLVM text in `module`, written through
`b`. The other modules of this folder take a `Context` as their first argument.

Every tile value is one of: computed on demand from its operands at a point (lazy), a window on memory
(`Memory`: a parameter, a slice of one, or a scratch buffer), or a scalar in a register.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tessera.errors import UnsupportedError
from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.emit import F32, F64, I1, I8, I32, I64, PTR, Builder, Val
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.dims import Dim, Term, split_fraction
from tessera.kernel.ir import Function, Op, Param, Value
from tessera.types import DType, f32, int32

ZERO = emit.const(0, I64)
MAX_STACK_SCRATCH = 16384  # bytes; larger scratch comes from the heap once per call

_STORAGE = {"f64": F64, "f32": F32, "f16": emit.F16, "bf16": emit.I16, "fp8_e4m3": I8, "fp8_e5m2": I8,
            "int64": I64, "int32": I32, "int8": I8, "uint8": I8, "int4": I8, "bool": I8}


def storage_type(dtype: DType) -> str:
    """The LLVM type of an element in memory."""
    return _STORAGE[dtype.name]


def register_type(dtype: DType) -> str:
    """The LLVM type of an element in a register: low-precision floats are held as exact f32, small ints as i32."""
    if dtype.is_float:
        return F64 if dtype.bits == 64 else F32
    return I1 if dtype.kind == "bool" else I64 if dtype.bits == 64 else I32


@dataclass(frozen=True)
class Memory:
    """A window on memory: address, element strides and the dtype of what lies there.

    `offset` counts elements from the address; only packed int4 needs it, whose elements have no addresses. With
    `starts_byte` it is known to be even, and so are the distances of rows.
    """

    pointer: Val
    strides: tuple[Val, ...]
    dtype: DType
    offset: Val = ZERO
    starts_byte: bool = True

    def address(self, b: Builder, indices: Sequence[Val]) -> Val:
        """The address of one element."""
        offset = self.offset
        for index, stride in zip(indices, self.strides):
            offset = b.add(offset, b.mul(index, stride))
        return b.gep(self.pointer, offset, storage_type(self.dtype))


class Context:
    """Everything that the lowering of one segment (one parallel loop) knows."""

    def __init__(self, function: Function, module: emit.Module, target: Target, llvm: emit.Function) -> None:
        self.function, self.module, self.target = function, module, target
        self.llvm = llvm
        self.b: Builder = llvm.builder
        self.args = llvm.args[0]
        self.memory: dict[str, Memory] = {}
        self.scalars: dict[str, Val] = {}
        self.sizes: dict[str, Val] = {}
        self.materialize: set[str] = set()
        self.rows_ahead = 0  # how far ahead loads across rows ask for memory
        self.run_along = emit.const(0, I64)  # of how many elements of a row, before the loads go on to other rows
        self.joined: set[str] = set()  # concatenations that their store computes
        self.fused: dict[Op, list[Op]] = {}  # stores that compute products themselves, and these products
        self.together: dict[Op, list[Op]] = {}  # stores that run in one loop, by the last of them
        self.destinations: dict[str, Memory] = {}  # where a matmul is told to put its result
        self._known: list[dict[tuple, Val]] = [{}]
        self._scratch: list[tuple[Val, Dim]] = []
        self._load_arguments()

    # -- arguments ----------------------------------------------------------------------------------

    def _load_arguments(self) -> None:
        slot = 0
        with self.prologue():
            for param in self.function.params:
                slot = self._load_param(param, slot)
            for name in self.function.sizes:
                self.sizes[name] = self._slot(slot, I64)
                slot += 1
            self.sizes["$threads"] = self._slot(slot, I64)
            slot += 1
            self.status = self.b.gep(self.args, slot, I64)  # 0, or the number of an assertion that failed

    def _load_param(self, param: Param, slot: int) -> int:
        value = param.value
        if not param.is_view:
            ty = F64 if value.type.dtype.is_float else I64
            self.scalars[value.name] = self._to_register(self._slot(slot, ty), value.type.dtype)
            return slot + 1
        rank = value.type.rank
        strides = [self._slot(slot + 1 + axis, I64) for axis in range(rank)]
        if value.type.dtype.name == "int4":  # torch counts bytes; only the last axis is packed
            strides[:-1] = [self.b.mul(stride, 2) for stride in strides[:-1]]
        if rank and param.unit_stride:
            strides[-1] = emit.const(1, I64)
        self.memory[value.name] = Memory(self._slot(slot, PTR), tuple(strides), value.type.dtype)
        return slot + 1 + rank

    def _slot(self, index: int, ty: str) -> Val:
        return self.b.load(self.b.gep(self.args, index, I64), ty, invariant=True)

    def _to_register(self, v: Val, dtype: DType) -> Val:
        ty = register_type(dtype)
        if v.ty == ty:
            return v
        if ty == I1:
            return self.b.cmp("ne", v, 0)
        return self.b.cast("fptrunc" if dtype.is_float else "trunc", v, ty)

    # -- sizes --------------------------------------------------------------------------------------

    def size(self, dim: Dim) -> Val:
        """The i64 of a symbolic size; sizes of named dims alone are computed once, at the start."""
        if dim.const is not None:
            return emit.const(dim.const, I64)
        key = ("dim", dim)
        known = self.lookup(key)
        if known is not None:
            return known
        if any(atom.startswith("%") for atom in dim.atoms):
            value = self._polynomial(dim)
            self.remember(key, value)
        else:
            with self.prologue():
                value = self._polynomial(dim)
            self._known[0][key] = value
        return value

    def _polynomial(self, dim: Dim) -> Val:
        total = emit.const(0, I64)
        for monomial, factor in dim.terms:
            product = emit.const(factor, I64)
            for atom in monomial:
                product = self.b.mul(product, self._atom(atom))
            total = self.b.add(total, product)
        return total

    def _atom(self, atom: str | Term) -> Val:
        b = self.b
        if isinstance(atom, Term):
            left, right = self.size(atom.left), self.size(atom.right)
            if atom.op in ("min", "max"):
                return (b.min if atom.op == "min" else b.max)(left, right)
            return floor_div(b, left, right) if atom.op == "//" else floor_mod(b, left, right)
        if atom.startswith("%"):
            value = self.scalars[atom]
            return value if value.ty == I64 else b.cast("sext", value, I64)
        name, divisor = split_fraction(atom)
        return self.sizes[name] if divisor == 1 else b.udiv(self.sizes[name], divisor)

    # -- scratch ------------------------------------------------------------------------------------

    def buffer(self, value: Value, dtype: DType | None = None) -> Memory:
        """Scratch memory of a tile's nominal shape, row-major, 64-byte aligned, one copy a thread."""
        return self.buffer_of(value.type.shape, dtype or _buffer_dtype(value.type.dtype))

    def buffer_of(self, shape: Sequence[Dim], dtype: DType) -> Memory:
        """Scratch memory of a shape."""
        strides: list[Val] = []
        count = Dim.of(1)
        for dim in reversed(shape):
            strides.insert(0, self.size(count))
            count = count * dim
        return Memory(self.scratch(count * max(1, dtype.bits // 8)), tuple(strides), dtype)

    def scratch(self, nbytes: Dim) -> Val:
        """Scratch bytes that live as long as the segment.

        Raises:
            UnsupportedError: the size depends on values that only the running kernel knows.
        """
        if any(atom.startswith("%") for atom in nbytes.atoms):
            raise UnsupportedError(
                f"kernel {self.function.name}: a tile of {nbytes} bytes has a size that only the running kernel "
                "knows; bound it by a block size (x[i:i+BLOCK])")
        pointer = self.llvm.named(f"%scratch{len(self._scratch)}", PTR)
        self._scratch.append((pointer, nbytes))
        return pointer

    def finish(self) -> None:
        """Emit the allocation of all scratch at the start, its release and the return at the end."""
        b = self.b
        # Each buffer is rounded up to a cache line: 64 bytes more than it asks for always suffice.
        total = sum((nbytes + 64 for _, nbytes in self._scratch), Dim.of(0))
        heap = total.const is None or total.const > MAX_STACK_SCRATCH
        with self.prologue():
            if heap:
                allocate = self.module.declare("aligned_alloc", PTR, [I64, I64])
                rounded = b.and_(b.add(self.size(total), 63), -64)
                base = b.call(allocate, 64, rounded)
            elif self._scratch:
                base = b.alloca(I8, total.const or 1)
            offset = emit.const(0, I64)
            for pointer, nbytes in self._scratch:
                self.llvm.lines.append(f"  {pointer.name} = getelementptr i8, {base}, {offset}")
                offset = b.and_(b.add(offset, b.add(self.size(nbytes), 63)), -64)
        if heap:
            b.call(self.module.declare("free", emit.VOID, [PTR]), base)
        b.ret()

    # -- what has been computed ---------------------------------------------------------------------

    def lookup(self, key: tuple) -> Val | None:
        """A value computed earlier in this or an enclosing scope."""
        for scope in reversed(self._known):
            if key in scope:
                return scope[key]
        return None

    def remember(self, key: tuple, value: Val) -> None:
        """Make a value known in this scope."""
        self._known[-1][key] = value

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Code that need not dominate what follows: a loop body or an arm of an if."""
        self._known.append({})
        try:
            yield
        finally:
            self._known.pop()

    @contextmanager
    def reading_ahead(self, rows: int, along: Val) -> Iterator[None]:
        """Loads across rows, of which they take so many elements, also ask for what comes so many rows later."""
        self.rows_ahead, self.run_along = rows, along
        try:
            yield
        finally:
            self.rows_ahead = 0

    @contextmanager
    def prologue(self) -> Iterator[None]:
        """Emit at the start of the function instead, where it dominates everything."""
        lines, block = self.llvm.lines, self.b.block
        start = len(lines)
        yield
        self.llvm.allocas += lines[start:]
        del lines[start:]
        assert self.b.block == block, "prologue code must not branch"


def _buffer_dtype(dtype: DType) -> DType:
    if dtype.is_float and dtype.bits < 32:
        return f32
    return int32 if dtype.name == "int4" else dtype


def floor_div(b: Builder, x: Val, y: Val) -> Val:
    """Floor division of signed integers, as Python divides; 0 for a divisor of 0, which would stop the process."""
    if y.const is not None and y.const > 0 and y.const & (y.const - 1) == 0:
        return b.ashr(x, y.const.bit_length() - 1)
    is_open = y.const in (None, 0, -1)  # by -1 the least integer would stop the process, too
    is_zero, is_minus = b.cmp("eq", y, 0), b.cmp("eq", y, -1)
    quotient = b.div(x, b.select(b.or_(is_zero, is_minus), 1, y)) if is_open else b.div(x, y)
    if is_open:
        quotient = b.select(is_minus, b.sub(0, x), quotient)
    remainder = b.sub(x, b.mul(quotient, y))
    wrong = b.and_(b.cmp("ne", remainder, 0), b.cmp("lt", b.xor(remainder, y), 0))
    floor = b.select(wrong, b.sub(quotient, 1), quotient)
    return b.select(is_zero, 0, floor) if is_open else floor


def floor_mod(b: Builder, x: Val, y: Val) -> Val:
    """The remainder that goes with `floor_div`: it has the sign of the divisor."""
    return b.sub(x, b.mul(floor_div(b, x, y), y))
