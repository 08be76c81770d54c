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

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tessera.kernel.backends.cpu.instructions import Instructions
from tessera.kernel.backends.cpu.values import (
    BF16,
    F16,
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    PTR,
    VOID,
    Callee,
    Operand,
    Val,
    bits,
    const,
    const_vector,
    elem,
    is_float,
    lanes,
    literal,
    mangle,
    vec,
)

__all__ = [
    "BF16", "F16", "F32", "F64", "I1", "I8", "I16", "I32", "I64", "PTR",
    "VOID", "Branch", "Builder", "Callee", "Function", "Loop", "Module", "Operand", "Val", "bits",
    "const", "const_vector", "elem", "is_float", "lanes", "mangle", "vec",
]


_NAME = re.compile(r"%[a-z]\w*(?:\.\d+)?")
_CALLED = re.compile(r" call [^@]*@(\w+)")
_MADE = re.compile(r"^  (%[a-z]\w*(?:\.\d+)?) =", re.MULTILINE)


class Function(Callee):
    """A function definition under construction: `args` are its parameters, `builder` appends to its body."""

    def __init__(self, module: Module, name: str, ret: str, params: Sequence[tuple[str, str]],
                 head: str, *, inline: bool = False) -> None:
        super().__init__(name, ret, [ty.split(" ", 1)[0] if ty.startswith(PTR) else ty for _, ty in params])
        self.module = module
        self.args = [Val(f"%{arg}", ty) for (arg, _), ty in zip(params, self.params)]
        self.allocas: list[str] = []
        self.lines: list[str] = []
        self.types = {arg.name: arg.ty for arg in self.args}  # of all values
        self.label = "start"  # of the first block
        self.inline = inline
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

    def named(self, name: str, ty: str) -> Val:
        """The value that will have this name."""
        self.types[name] = ty
        return Val(name, ty)

    def text(self) -> str:
        """The function as LLVM assembly."""
        return "\n".join([self._head + " {", "entry:", *self.allocas, f"  br label %{self.label}", f"{self.label}:",
                          *self.lines, "}"])


class Module:
    """One LLVM module: functions, declarations and constant tables, collected as text.

    Args:
        has_f16: the processor converts between f16 and f32.
    """

    def __init__(self, *, has_f16: bool = True) -> None:
        self.has_f16 = has_f16
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
        function = Function(self, name, ret, params, f"{head} {attrs}".rstrip(), inline=bool(inline))
        self.functions[name] = function
        return function

    def helper(self, name: str, ret: str, params: Sequence[tuple[str, str]],
               body: Callable[[Function], None], *, inline: bool | None = True) -> Function:
        """The internal function `name`, built by `body(function)` the first time it is asked for."""
        if name not in self.functions:
            body(self.function(name, ret, params, internal=True, inline=inline))
        return self.functions[name]

    def inlined(self, name: str) -> int:
        """Instructions that a call of a function becomes, besides itself."""
        function = self.functions.get(name)
        if function is None or not function.inline:
            return 0
        return len(function.lines) + sum(map(self.inlined, _CALLED.findall("\n".join(function.lines))))

    def declare(self, name: str, ret: str, params: Sequence[str], *, attrs: str = "") -> Callee:
        """An intrinsic or an outside symbol with this signature."""
        if name not in self._declarations:
            text = f"declare {ret} @{name}({', '.join(params)}) {attrs}".rstrip()
            self._declarations[name] = (text, Callee(name, ret, params))
        return self._declarations[name][1]

    def table(self, name: str, xs: Sequence[int | float], scalar: str, *, align: int = 64) -> Val:
        """A pointer to a constant array; the same name gives the same table."""
        if name not in self._globals:
            body = ", ".join(f"{scalar} {literal(x, scalar)}" for x in xs)
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


class Builder(Instructions):
    """Appends instructions to a function; every method returns the `Val` it computes."""

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
        named = self.function.named
        loop = Loop(named(f"%i{number}", I64), [named(f"%c{number}.{k}", v.ty) for k, v in enumerate(carry)])
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

    @contextmanager
    def apart(self, name: str, *, least: int = 0) -> Iterator[None]:
        """The with block becomes a function of its own, called here with what it reads of the code around it.

        It hands nothing on but what it stores. Functions are what the threads that make machine code share
        (`halves.py`), and what takes long in a large one is done sooner in two of half its size.

        Args:
            least: instructions that it has to have; with fewer it stays where it is.
        """
        outer, start = self.function, len(self.function.lines)
        label = self.block
        yield
        lines = outer.lines[start:]
        text = "\n".join(lines)
        if len(lines) + sum(self.module.inlined(called) for called in _CALLED.findall(text)) < least:
            return
        made = set(_MADE.findall(text))
        read = [read for read in dict.fromkeys(_NAME.findall(text)) if read not in made and read in outer.types]
        del outer.lines[start:]
        inner = self.module.function(f"{outer.name}_{name}{outer.unique()}", VOID,
                                     [(read[1:], outer.types[read]) for read in read], internal=True, inline=False)
        inner.label, inner.lines = label, lines
        inner.builder.ret()
        self.block = label
        self.call(inner, *(Val(name, outer.types[name]) for name in read))

    def ret(self, v: Val | None = None) -> None:
        """Return from the function; ends its last block."""
        self.line(f"ret {v}" if v else "ret void")
