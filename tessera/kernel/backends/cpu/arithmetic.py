"""Instructions on registers: arithmetic, comparisons, calls, conversions.

Comes in: values (`Val`) and Python numbers. Goes out: one line of text each, appended to the function, and the
`Val` it computes. `instructions.py` adds vectors and memory, `emit.Builder` control flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tessera.kernel.backends.cpu.values import (
    I1,
    VOID,
    Callee,
    Operand,
    Val,
    const,
    elem,
    is_float,
    lanes,
    mangle,
    vec,
)

if TYPE_CHECKING:
    from tessera.kernel.backends.cpu.emit import Function

_INT_CMP = {"eq": "eq", "ne": "ne", "lt": "slt", "le": "sle", "gt": "sgt", "ge": "sge",
            "ult": "ult", "ule": "ule", "ugt": "ugt", "uge": "uge"}
_FLOAT_CMP = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge",
              "uno": "uno", "ord": "ord"}


class Arithmetic:
    """Instructions on registers; every method returns the `Val` it computes."""

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
        function.types[name] = ty
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

    def splat(self, v: Val, n: int) -> Val:
        """A vector of n lanes that all hold the scalar v."""
        ty = vec(n, v.ty)
        if v.const is not None:
            return const(v.const, ty)
        one = self.emit(f"insertelement {ty} poison, {v}, i64 0", ty)
        return self.emit(f"shufflevector {ty} {one.name}, {ty} poison, <{n} x i32> zeroinitializer", ty)

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

    def min(self, a: Operand, b: Operand, *, signed_zeros: bool = True) -> Val:
        """The smaller; signed for integers, NaN if either is NaN for floats."""
        x, y = self._same(a, b)
        return self._extreme("min", x, y, signed_zeros)

    def max(self, a: Operand, b: Operand, *, signed_zeros: bool = True) -> Val:
        """The larger; signed for integers, NaN if either is NaN for floats.

        Args:
            signed_zeros: -0.0 is smaller than 0.0, which takes two instructions more.
        """
        x, y = self._same(a, b)
        return self._extreme("max", x, y, signed_zeros)

    def _extreme(self, kind: str, x: Val, y: Val, signed_zeros: bool) -> Val:
        if not is_float(x.ty):
            return self.intrinsic(f"llvm.s{kind}", [x, y], x.ty)
        callee = self.module.declare(f"llvm.{kind}imum.{mangle(x.ty)}", x.ty, [x.ty, x.ty])
        return self.emit(f"call {'' if signed_zeros else 'nsz '}{x.ty} @{callee.name}({x}, {y})", x.ty)

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
