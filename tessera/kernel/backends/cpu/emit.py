"""A small textual LLVM-IR builder: the one place that knows LLVM's syntax.

Comes in: Python calls that say what to compute. Goes out: the text of one LLVM module, for `jit.py`.
Called by the CPU backend's lowering, `vmath.py`, `convert.py` and `mma*.py`.

    m = Module()
    f = m.function("axpy", VOID, [("x", "ptr noalias"), ("y", "ptr noalias"), ("n", I64), ("a", F32)])
    b, (x, y, n, a) = f.builder, f.args
    with b.for_(0, n, 8) as loop:
        p = b.gep(y, loop.i, F32)
        b.store(b.fma(a, b.load(b.gep(x, loop.i, F32), vec(8, F32)), b.load(p, vec(8, F32))), p)
    b.ret()
    text = m.text()

Conventions:
- A value is a `Val`: its name (or literal) and its LLVM type as text, so types print as they are written.
- Operands may be Python numbers: they become constants of the other operand's type; a scalar next to a
  vector is splatted.
- `add`, `mul`, `cmp`, ... choose the integer or the float instruction by the operand type; integers are
  signed where it matters, the unsigned forms have their own names.
- Floating point carries the `contract` flag and no other: an fmul feeding an fadd may become an fma; sums
  keep their order, NaN and infinity mean what they mean. `contract=False` keeps the two roundings apart.
- Memory accesses are aligned to the element's size unless `align=` says more.
- Loops come out rotated (a guard, then do-while), so the optimiser needs no loop-rotation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache

VOID, PTR, I1, I8, I16, I32, I64 = "void", "ptr", "i1", "i8", "i16", "i32", "i64"
F16, BF16, F32, F64 = "half", "bfloat", "float", "double"

_FLOATS = {F16: 16, BF16: 16, F32: 32, F64: 64}
_FLOAT_MANGLE = {F16: "f16", BF16: "bf16", F32: "f32", F64: "f64", PTR: "p0"}
_INT_CMP = {"eq": "eq", "ne": "ne", "lt": "slt", "le": "sle", "gt": "sgt", "ge": "sge",
            "ult": "ult", "ule": "ule", "ugt": "ugt", "uge": "uge"}
_FLOAT_CMP = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge",
              "uno": "uno", "ord": "ord"}


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


def _literal(x: int | float, ty: str) -> str:
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
    text = _literal(x, scalar)
    folded = int(x) if scalar not in _FLOATS and not n else None
    return Val(f"splat ({scalar} {text})" if n else text, ty, folded)


def const(x: int | float, ty: str) -> Val:
    """The number `x` as a constant of type `ty` (in every lane of a vector type), rounded to nearest even."""
    return _const(x, ty, str(x))  # the text keeps -0.0 and 0.0 (equal, hash alike) apart in the cache


def const_vector(xs: Sequence[int | float], scalar: str) -> Val:
    """The vector constant with the elements `xs` of type `scalar`."""
    return Val("<" + ", ".join(f"{scalar} {_literal(x, scalar)}" for x in xs) + ">", vec(len(xs), scalar))


class Callee:
    """Something that can be called: an intrinsic, an outside symbol, or a function of the module."""

    def __init__(self, name: str, ret: str, params: Sequence[str]) -> None:
        self.name, self.ret, self.params = name, ret, tuple(params)


class Function(Callee):
    """A function definition under construction: `args` are its parameters, `builder` appends to its body."""

    def __init__(self, module: Module, name: str, ret: str, params: Sequence[tuple[str, str]],
                 head: str) -> None:
        super().__init__(name, ret, [ty.split(" ", 1)[0] if ty.startswith(PTR) else ty for _, ty in params])
        self.module = module
        self.args = [Val(f"%{arg}", ty) for (arg, _), ty in zip(params, self.params)]
        self.allocas: list[str] = []
        self.lines: list[str] = []
        self._head = head
        self._count = 0
        self.builder = Builder(self)

    @property
    def pointer(self) -> Val:
        """The function's address."""
        return Val(f"@{self.name}", PTR)

    def unique(self) -> int:
        """A number not yet used in this function."""
        self._count += 1
        return self._count

    def text(self) -> str:
        return "\n".join([self._head + " {", "entry:", *self.allocas, "  br label %start", "start:",
                          *self.lines, "}"])


class Module:
    """One LLVM module: functions, declarations and constant tables, collected as text."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self._declarations: dict[str, tuple[str, Callee]] = {}
        self._globals: dict[str, str] = {}

    def function(self, name: str, ret: str, params: Sequence[tuple[str, str]], *, internal: bool = False,
                 inline: bool | None = None, attrs: str = "") -> Function:
        """Start a function.

        Args:
            params: (name, type) pairs; a pointer type may carry attributes, as in `"ptr noalias readonly"`.
            internal: not visible outside the module (helpers); an entry point is external.
            inline: True for alwaysinline, False for noinline, None leaves it to the optimiser.
            attrs: further function attributes, as LLVM writes them.
        """
        if name in self.functions:
            raise ValueError(f"function {name!r} is already defined in this module")
        inlining = {True: " alwaysinline", False: " noinline", None: ""}[inline]
        args = ", ".join(f"{ty} %{arg}" for arg, ty in params)
        head = f"define {'internal ' if internal else ''}{ret} @{name}({args}) nounwind{inlining}"
        function = Function(self, name, ret, params, f"{head} {attrs}".rstrip())
        self.functions[name] = function
        return function

    def helper(self, name: str, ret: str, params: Sequence[tuple[str, str]],
               body: Callable[[Function], None], *, inline: bool | None = True) -> Function:
        """The internal function `name`, built by `body(function)` the first time it is asked for."""
        if name not in self.functions:
            body(self.function(name, ret, params, internal=True, inline=inline))
        return self.functions[name]

    def declare(self, name: str, ret: str, params: Sequence[str], *, attrs: str = "") -> Callee:
        """An intrinsic or an outside symbol with this signature."""
        if name not in self._declarations:
            text = f"declare {ret} @{name}({', '.join(params)}) {attrs}".rstrip()
            self._declarations[name] = (text, Callee(name, ret, params))
        return self._declarations[name][1]

    def table(self, name: str, xs: Sequence[int | float], scalar: str, *, align: int = 64) -> Val:
        """A pointer to a constant array; the same name gives the same table."""
        if name not in self._globals:
            body = ", ".join(f"{scalar} {_literal(x, scalar)}" for x in xs)
            self._globals[name] = (f"@{name} = internal unnamed_addr constant [{len(xs)} x {scalar}] "
                                   f"[{body}], align {align}")
        return Val(f"@{name}", PTR)

    def global_bytes(self, name: str, size: int, *, align: int = 64) -> Val:
        """A pointer to `size` zero-initialised, writable bytes of the module (a shared counter, say)."""
        self._globals.setdefault(
            name, f"@{name} = internal global [{size} x i8] zeroinitializer, align {align}")
        return Val(f"@{name}", PTR)

    def text(self) -> str:
        """The whole module as LLVM assembly."""
        parts = [*self._globals.values(), *(text for text, _ in self._declarations.values()),
                 *(function.text() for function in self.functions.values())]
        return "\n".join(parts) + "\n"


class Loop:
    """A loop under construction: `i` the counter, `carry` the values carried into this iteration.

    The body calls `next(values)` once with the values for the next iteration; `results` holds the final ones
    after the `with` block (the initial ones where the loop ran no time). A body that sets `next_i` chooses the
    next value of the counter itself.
    """

    def __init__(self, i: Val, carry: list[Val]) -> None:
        self.i, self.carry = i, carry
        self.latch_values: list[Val] = carry
        self.next_i: Val | None = None
        self.results: list[Val] = []

    def next(self, values: Sequence[Val]) -> None:
        if [v.ty for v in values] != [v.ty for v in self.carry]:
            raise ValueError(f"loop carries {[v.ty for v in self.carry]}, next() was given {list(values)}")
        self.latch_values = list(values)


class Branch:
    """An `if` under construction; `give(values)` in both arms makes `results` after the else."""

    def __init__(self, builder: Builder, number: int) -> None:
        self._builder, self._number = builder, number
        self._given: list[list[Val]] = []
        self._ends: list[str] = []
        self._jump = 0
        self.results: list[Val] = []

    def give(self, values: Sequence[Val]) -> None:
        """The values of this arm."""
        self._given.append(list(values))

    @contextmanager
    def else_(self) -> Iterator[None]:
        """The other arm; stands directly after the `with b.if_(...)` block."""
        b, end = self._builder, f"end{self._number}"
        if b.block != f"else{self._number}":
            raise ValueError("else_() must directly follow its if_()")
        b.function.lines[self._jump] = f"  br label %{end}"
        yield
        self._ends.append(b.block)
        b.line(f"br label %{end}")
        b.start_block(end)
        if self._given:
            then, other = self._given
            self.results = [b.phi((x, self._ends[0]), (y, self._ends[1]))
                            for x, y in zip(then, other, strict=True)]


class Builder:
    """Appends instructions to a function; every method returns the `Val` it computes."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.module = function.module
        self.block = "start"

    # -- text ---------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Append one instruction without a result."""
        self.function.lines.append("  " + text)

    def emit(self, text: str, ty: str) -> Val:
        """Append one instruction with a result of type `ty`."""
        function = self.function
        function._count += 1
        name = f"%v{function._count}"
        function.lines.append(f"  {name} = {text}")
        return Val(name, ty)

    def start_block(self, label: str) -> None:
        """Open a basic block; the previous one must have ended with a branch."""
        self.function.lines.append(f"{label}:")
        self.block = label

    def phi(self, *sources: tuple[Val, str]) -> Val:
        """Merge (value, label of the block it comes from) pairs at the start of the current block."""
        text = ", ".join(f"[ {v.name}, %{label} ]" for v, label in sources)
        return self.emit(f"phi {sources[0][0].ty} {text}", sources[0][0].ty)

    def comment(self, text: str) -> None:
        """A comment line in the LLVM text (for people who read the dump)."""
        self.function.lines.append(f"  ; {text}")

    # -- operands -----------------------------------------------------------------------------------------

    def value(self, x: Operand, ty: str) -> Val:
        """`x` as a value of type `ty`: numbers become constants, scalars are splatted to vector types."""
        if not isinstance(x, Val):
            return const(x, ty)
        if x.ty == ty:
            return x
        if lanes(ty) and x.ty == elem(ty):
            return self.splat(x, lanes(ty))
        raise TypeError(f"expected a value of type {ty}, got {x}")

    def _same(self, *xs: Operand) -> list[Val]:
        ty = ""
        for x in xs:
            if isinstance(x, Val) and (not ty or lanes(x.ty)):
                ty = x.ty
        if not ty:
            raise TypeError(f"at least one operand of {xs} must be a Val")
        return [x if isinstance(x, Val) and x.ty == ty else self.value(x, ty) for x in xs]

    def _binary(self, op: str, a: Operand, b: Operand) -> Val:
        x, y = self._same(a, b)
        return self.emit(f"{op} {x.ty} {x.name}, {y.name}", x.ty)

    # -- arithmetic ---------------------------------------------------------------------------------------

    def add(self, a: Operand, b: Operand, *, contract: bool = True) -> Val:
        """a + b."""
        x, y = self._same(a, b)
        if is_float(x.ty):
            return self._float("fadd", x, y, contract)
        if y.const == 0:
            return x
        if x.const == 0:
            return y
        if x.const is not None and y.const is not None:
            return const(x.const + y.const, x.ty)
        return self.emit(f"add {x.ty} {x.name}, {y.name}", x.ty)

    def sub(self, a: Operand, b: Operand, *, contract: bool = True) -> Val:
        """a - b."""
        x, y = self._same(a, b)
        if is_float(x.ty):
            return self._float("fsub", x, y, contract)
        if y.const == 0:
            return x
        if x.const is not None and y.const is not None:
            return const(x.const - y.const, x.ty)
        return self.emit(f"sub {x.ty} {x.name}, {y.name}", x.ty)

    def mul(self, a: Operand, b: Operand, *, contract: bool = True) -> Val:
        """a * b."""
        x, y = self._same(a, b)
        if is_float(x.ty):
            return self._float("fmul", x, y, contract)
        if y.const == 1:
            return x
        if x.const == 1:
            return y
        if x.const is not None and y.const is not None:
            return const(x.const * y.const, x.ty)
        return self.emit(f"mul {x.ty} {x.name}, {y.name}", x.ty)

    def _float(self, op: str, x: Val, y: Val, contract: bool) -> Val:
        return self.emit(f"{op} {'contract ' if contract else ''}{x.ty} {x.name}, {y.name}", x.ty)

    def div(self, a: Operand, b: Operand) -> Val:
        """a / b; integers are signed and round towards zero."""
        x, y = self._same(a, b)
        if y.const == 1:
            return x
        return self.emit(f"{'fdiv' if is_float(x.ty) else 'sdiv'} {x.ty} {x.name}, {y.name}", x.ty)

    def rem(self, a: Operand, b: Operand) -> Val:
        """The remainder of `div`, with the sign of a."""
        x, y = self._same(a, b)
        return self.emit(f"{'frem' if is_float(x.ty) else 'srem'} {x.ty} {x.name}, {y.name}", x.ty)

    def udiv(self, a: Operand, b: Operand) -> Val:
        """a / b of unsigned integers."""
        return self._binary("udiv", a, b)

    def urem(self, a: Operand, b: Operand) -> Val:
        """a mod b of unsigned integers."""
        return self._binary("urem", a, b)

    def ceil_div(self, a: Operand, b: int) -> Val:
        """ceil(a / b) for a >= 0 and a positive number b."""
        return self.udiv(self.add(a, b - 1), b) if b > 1 else self.add(a, 0)

    def neg(self, a: Val) -> Val:
        """-a."""
        return self.emit(f"fneg {a}", a.ty) if is_float(a.ty) else self.sub(0, a)

    def fma(self, a: Operand, b: Operand, c: Operand) -> Val:
        """a * b + c with one rounding."""
        x, y, z = self._same(a, b, c)
        return self.intrinsic("llvm.fma", [x, y, z], z.ty)

    def min(self, a: Operand, b: Operand) -> Val:
        """The smaller; signed for integers, NaN if either is NaN for floats."""
        x, y = self._same(a, b)
        return self.intrinsic("llvm.minimum" if is_float(x.ty) else "llvm.smin", [x, y], x.ty)

    def max(self, a: Operand, b: Operand) -> Val:
        """The larger; signed for integers, NaN if either is NaN for floats."""
        x, y = self._same(a, b)
        return self.intrinsic("llvm.maximum" if is_float(x.ty) else "llvm.smax", [x, y], x.ty)

    def abs(self, a: Val) -> Val:
        """|a|."""
        if is_float(a.ty):
            return self.intrinsic("llvm.fabs", [a], a.ty)
        callee = self.module.declare(f"llvm.abs.{mangle(a.ty)}", a.ty, [a.ty, I1])
        return self.call(callee, a, const(0, I1))

    def and_(self, a: Operand, b: Operand) -> Val:
        """Bitwise and."""
        return self._binary("and", a, b)

    def or_(self, a: Operand, b: Operand) -> Val:
        """Bitwise or."""
        return self._binary("or", a, b)

    def xor(self, a: Operand, b: Operand) -> Val:
        """Bitwise exclusive or."""
        return self._binary("xor", a, b)

    def not_(self, a: Val) -> Val:
        """Bitwise complement."""
        return self._binary("xor", a, -1 if elem(a.ty) != I1 else 1)

    def shl(self, a: Operand, b: Operand) -> Val:
        """a << b."""
        return self._binary("shl", a, b)

    def lshr(self, a: Operand, b: Operand) -> Val:
        """a >> b, zeros come in."""
        return self._binary("lshr", a, b)

    def ashr(self, a: Operand, b: Operand) -> Val:
        """a >> b, the sign comes in."""
        return self._binary("ashr", a, b)

    def cmp(self, pred: str, a: Operand, b: Operand) -> Val:
        """Compare: eq ne lt le gt ge; ult ule ugt uge (unsigned); uno ord (floats).

        Float comparisons are false where an operand is NaN, except `ne` and `uno`.
        """
        x, y = self._same(a, b)
        op = f"fcmp {_FLOAT_CMP[pred]}" if is_float(x.ty) else f"icmp {_INT_CMP[pred]}"
        return self.emit(f"{op} {x.ty} {x.name}, {y.name}", vec(lanes(x.ty), I1))

    def select(self, cond: Val, a: Operand, b: Operand) -> Val:
        """a where cond, else b."""
        x, y = self._same(a, b)
        if lanes(cond.ty) and not lanes(x.ty):
            x, y = self.splat(x, lanes(cond.ty)), self.splat(y, lanes(cond.ty))
        return self.emit(f"select {cond}, {x}, {y}", x.ty)

    def intrinsic(self, name: str, args: Sequence[Val], ret: str,
                  overload: Sequence[str] | None = None) -> Val:
        """Call an LLVM intrinsic; `overload` are the types in its name (by default the result type)."""
        suffix = "".join("." + mangle(ty) for ty in ([ret] if overload is None else overload))
        return self.call(self.module.declare(name + suffix, ret, [a.ty for a in args]), *args)

    def call(self, callee: Callee, *args: Operand) -> Val:
        """Call a function of the module or a declared one; numbers become constants of its types."""
        if len(args) != len(callee.params):
            raise TypeError(f"{callee.name} takes {len(callee.params)} arguments, got {len(args)}")
        values = ", ".join(str(self.value(a, ty)) for a, ty in zip(args, callee.params))
        if callee.ret == VOID:
            self.line(f"call void @{callee.name}({values})")
            return Val("", VOID)
        return self.emit(f"call {callee.ret} @{callee.name}({values})", callee.ret)

    def call_pointer(self, pointer: Val, ret: str, *args: Val) -> Val:
        """Call through a function pointer."""
        text = f"call {ret} {pointer.name}({', '.join(map(str, args))})"
        if ret == VOID:
            self.line(text)
            return Val("", VOID)
        return self.emit(text, ret)

    # -- conversions --------------------------------------------------------------------------------------

    def cast(self, op: str, v: Val, ty: str) -> Val:
        """trunc zext sext sitofp uitofp fptosi fptoui fpext fptrunc ptrtoint inttoptr, lane by lane.

        `ty` is the scalar type of the result; a vector keeps its lanes.
        """
        to = vec(lanes(v.ty), elem(ty))
        if to == v.ty:
            return v
        if v.const is not None and op in ("zext", "sext") and v.const >= 0:
            return const(v.const, to)
        return self.emit(f"{op} {v} to {to}", to)

    def bitcast(self, v: Val, ty: str) -> Val:
        """The same bits as another type (the full result type, lanes and all)."""
        return v if v.ty == ty else self.emit(f"bitcast {v} to {ty}", ty)

    # -- vectors ------------------------------------------------------------------------------------------

    def splat(self, v: Val, n: int) -> Val:
        """A vector of n lanes that all hold the scalar v."""
        ty = vec(n, v.ty)
        if v.const is not None:
            return const(v.const, ty)
        one = self.emit(f"insertelement {ty} poison, {v}, i64 0", ty)
        return self.emit(f"shufflevector {ty} {one.name}, {ty} poison, <{n} x i32> zeroinitializer", ty)

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

    # -- memory -------------------------------------------------------------------------------------------

    def alloca(self, ty: str, count: int = 1, *, align: int = 64) -> Val:
        """`count` elements of type `ty` on the stack for the whole call (placed in the entry block)."""
        name = f"%a{self.function.unique()}"
        self.function.allocas.append(f"  {name} = alloca {ty}, i64 {count}, align {align}")
        return Val(name, PTR)

    def gep(self, base: Val, index: Operand, ty: str) -> Val:
        """The address of element `index` (of type `ty`) behind `base`; a vector of indices gives a vector."""
        i = self.value(index, I64) if not isinstance(index, Val) else index
        if i.const == 0:
            return base
        return self.emit(f"getelementptr {ty}, {base}, {i}", vec(lanes(i.ty), PTR))

    def load(self, p: Val, ty: str, *, align: int | None = None, invariant: bool = False) -> Val:
        """Load a scalar or a vector; `invariant` promises that nobody writes there during the kernel."""
        tail = ", !invariant.load !{}" if invariant else ""
        return self.emit(f"load {ty}, ptr {p.name}, align {align or _natural(ty)}{tail}", ty)

    def store(self, v: Val, p: Val, *, align: int | None = None) -> None:
        """Store a scalar or a vector."""
        self.line(f"store {v}, ptr {p.name}, align {align or _natural(v.ty)}")

    def masked_load(self, p: Val, ty: str, mask: Val, other: Val | None = None, *,
                    align: int | None = None) -> Val:
        """Load the lanes that the mask selects, touching no other; the rest come from `other` (default 0)."""
        callee = self.module.declare(f"llvm.masked.load.{mangle(ty)}.p0", ty, [PTR, I32, mask.ty, ty])
        return self.call(callee, p, align or _natural(ty), mask, other or Val("zeroinitializer", ty))

    def masked_store(self, v: Val, p: Val, mask: Val, *, align: int | None = None) -> None:
        """Store the lanes that the mask selects."""
        callee = self.module.declare(f"llvm.masked.store.{mangle(v.ty)}.p0", VOID, [v.ty, PTR, I32, mask.ty])
        self.call(callee, v, p, align or _natural(v.ty), mask)

    def gather(self, ptrs: Val, ty: str, mask: Val, other: Val | None = None) -> Val:
        """Load a vector from a vector of addresses, the lanes that the mask selects."""
        name = f"llvm.masked.gather.{mangle(ty)}.{mangle(ptrs.ty)}"
        callee = self.module.declare(name, ty, [ptrs.ty, I32, mask.ty, ty])
        return self.call(callee, ptrs, _natural(ty), mask, other or Val("zeroinitializer", ty))

    def scatter(self, v: Val, ptrs: Val, mask: Val) -> None:
        """Store a vector to a vector of addresses; where addresses coincide the highest lane wins."""
        name = f"llvm.masked.scatter.{mangle(v.ty)}.{mangle(ptrs.ty)}"
        callee = self.module.declare(name, VOID, [v.ty, ptrs.ty, I32, mask.ty])
        self.call(callee, v, ptrs, _natural(v.ty), mask)

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

    def atomic_add(self, p: Val, v: Operand, ty: str = I64, *, order: str = "monotonic") -> Val:
        """Add to the integer at p; returns what stood there before."""
        return self.emit(f"atomicrmw add ptr {p.name}, {self.value(v, ty)} {order}", ty)

    # -- control ------------------------------------------------------------------------------------------

    @contextmanager
    def for_(self, lo: Operand, hi: Operand, step: Operand = 1, *, carry: Sequence[Val] = (),
             unroll: bool = False) -> Iterator[Loop]:
        """for (i64 i = lo; i < hi; i += step), carrying the values `carry` from iteration to iteration.

        `unroll=False` tells the optimiser to leave the loop as it is: unrolling is the generator's choice.
        """
        first, last, inc = (self.value(x, I64) for x in (lo, hi, step))
        number, before, lines = self.function.unique(), self.block, self.function.lines
        body, after = f"loop{number}", f"done{number}"
        runs_once = first.const is not None and last.const is not None and first.const < last.const
        if runs_once:
            self.line(f"br label %{body}")
        else:
            guard = self.cmp("lt", first, last)
            self.line(f"br {guard}, label %{body}, label %{after}")
        self.start_block(body)
        loop = Loop(Val(f"%i{number}", I64), [Val(f"%c{number}.{k}", v.ty) for k, v in enumerate(carry)])
        phis = len(lines)
        lines.extend([""] * (1 + len(carry)))
        yield loop
        nxt, latch = loop.next_i or self.add(loop.i, inc), self.block
        more = self.cmp("lt", nxt, last)
        tail = "" if unroll else ", !llvm.loop !{!\"loop\", !{!\"llvm.loop.unroll.disable\"}}"
        self.line(f"br {more}, label %{body}, label %{after}{tail}")
        ends = [nxt, *loop.latch_values]
        for k, (phi, start, end) in enumerate(zip([loop.i, *loop.carry], [first, *carry], ends)):
            lines[phis + k] = (f"  {phi.name} = phi {phi.ty} "
                               f"[ {start.name}, %{before} ], [ {end.name}, %{latch} ]")
        self.start_block(after)
        if runs_once:
            loop.results = loop.latch_values
        else:
            loop.results = [self.phi((v, before), (end, latch))
                            for v, end in zip(carry, loop.latch_values)]

    @contextmanager
    def if_(self, cond: Val, *, likely: bool | None = None) -> Iterator[Branch]:
        """if (cond) { the with block }; `else_` of the yielded branch may follow."""
        number = self.function.unique()
        branch = Branch(self, number)
        weights = {True: ", !prof !{!\"branch_weights\", i32 1000, i32 1}",
                   False: ", !prof !{!\"branch_weights\", i32 1, i32 1000}", None: ""}[likely]
        self.line(f"br {cond}, label %then{number}, label %else{number}{weights}")
        self.start_block(f"then{number}")
        yield branch
        branch._ends.append(self.block)
        branch._jump = len(self.function.lines)
        self.line(f"br label %else{number}")
        self.start_block(f"else{number}")

    def ret(self, v: Val | None = None) -> None:
        """Return from the function; ends its last block."""
        self.line(f"ret {v}" if v else "ret void")


@cache
def _natural(ty: str) -> int:
    """The alignment in bytes of one element of the type."""
    return max(1, bits(ty) // 8)
