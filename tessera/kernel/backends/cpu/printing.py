"""`print` in a kernel: a line a call, the values in the text, through C's printf.

In: a print operation. Out: calls that write what the interpreter would (`interp.shown`): the place in the source, the
program of the grid, the text. A line is written by one call of printf, or under a lock where it has tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from string import Formatter

from tessera.kernel import ir
from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.context import Context
from tessera.kernel.backends.cpu.elements import Point, element, index64
from tessera.kernel.backends.cpu.emit import F64, I1, I32, I64, PTR, Val
from tessera.kernel.backends.cpu.loops import each
from tessera.kernel.ir import MAX_PRINTED, PRINTED_EDGE, Op


def lower_print(ctx: Context, op: Op) -> None:
    """Print the text and the values of an operation; a breakpoint prints nothing."""
    if op.attrs.get("breakpoint"):
        return
    out = _Line(ctx)
    with _locked(ctx, any(value.type.rank for value in op.operands)):
        out.text(f"{op.loc or 'kernel'}: ")
        programs = _enclosing(ctx.function.body, op) or []
        if programs:
            out.text("program (")
            for number, index in enumerate(programs):
                out.text(", " if number else "")
                out.scalar(ctx.scalars[index.name], index.type)
            out.text(",): " if len(programs) == 1 else "): ")
        values = iter(op.operands)
        for text, field, _, _ in Formatter().parse(str(op.attrs.get("text", ""))):
            out.text(text)
            if field is not None:
                out.value(next(values))
        out.text("\n")
        out.flush()
        ctx.b.call(ctx.module.declare("fflush", I32, [PTR]), 0)


def _enclosing(block: ir.Block, op: Op) -> list[ir.Value] | None:
    """The indices of the grids around an operation, outer first; None where it is not in the block."""
    for other in block.ops:
        if other is op:
            return []
        for region in other.regions:
            found = _enclosing(region, op)
            if found is not None:
                return [*(region.args if other.name == "grid" else ()), *found]
    return None


class _Line:
    """What is to be printed, gathered until printf is called."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.format = ""
        self.arguments: list[Val] = []

    def text(self, text: str) -> None:
        self.format += text.replace("%", "%%")

    def scalar(self, x: Val, type_: ir.TileTy) -> None:
        b = self.ctx.b
        if x.ty == I1:
            kind, x = "%s", b.select(x, self._string("True"), self._string("False"))
        elif emit.is_float(x.ty):
            kind, x = ("%.15g" if type_.dtype.bits == 64 else "%.6g"), b.cast("fpext", x, F64)
        else:
            kind, x = "%ld", index64(self.ctx, x)
        self.format += kind
        self.arguments.append(x)

    def value(self, value: ir.Value) -> None:
        """A scalar, or a tile in brackets; of a long one the edges of every axis."""
        ctx, b = self.ctx, self.ctx.b
        extents = [ctx.size(value.type.extent(axis)) for axis in range(value.type.rank)]
        count: Val = emit.const(1, I64)
        for extent in extents:
            count = b.mul(count, extent)
        is_long = b.cmp("gt", count, MAX_PRINTED)

        def nest(indices: tuple[Val, ...]) -> None:
            if len(indices) == value.type.rank:
                self.scalar(element(ctx, value, Point(indices)), value.type)
                return
            extent = extents[len(indices)]
            is_cut = b.and_(is_long, b.cmp("gt", extent, 2 * PRINTED_EDGE))
            self.text("[")
            self.flush()
            with each(ctx, b.select(is_cut, 2 * PRINTED_EDGE, extent)) as step:
                with b.if_(b.cmp("gt", step, 0)):
                    self.text(", ")
                    self.flush()
                is_behind = b.and_(is_cut, b.cmp("ge", step, PRINTED_EDGE))
                with b.if_(b.and_(is_cut, b.cmp("eq", step, PRINTED_EDGE))):
                    self.text("..., ")
                    self.flush()
                nest((*indices, b.select(is_behind, b.add(step, b.sub(extent, 2 * PRINTED_EDGE)), step)))
                self.flush()
            self.text("]")

        nest(())

    def flush(self) -> None:
        """Call printf with what has been gathered."""
        if not self.format:
            return
        printf = self.ctx.module.declare("printf", I32, ["ptr, ..."])
        arguments = ", ".join(map(str, [self._string(self.format), *self.arguments]))
        self.ctx.b.emit(f"call i32 (ptr, ...) @{printf.name}({arguments})", I32)
        self.format, self.arguments = "", []

    def _string(self, text: str) -> Val:
        ctx = self.ctx
        return ctx.module.table(f"{ctx.llvm.name}_text{ctx.llvm.unique()}", [*text.encode(), 0], emit.I8, align=1)


@contextmanager
def _locked(ctx: Context, is_needed: bool) -> Iterator[None]:
    """Nothing else of the kernel prints meanwhile: a lock that spins."""
    if not is_needed:
        yield
        return
    b, number = ctx.b, ctx.llvm.unique()
    lock = ctx.module.global_bytes("print_lock", 8)
    b.line(f"br label %lock{number}")
    b.start_block(f"lock{number}")
    pair = b.emit(f"cmpxchg ptr {lock.name}, i64 0, i64 1 acquire monotonic", "{ i64, i1 }")
    taken = b.emit(f"extractvalue {pair}, 1", I1)
    b.line(f"br {taken}, label %locked{number}, label %lock{number}")
    b.start_block(f"locked{number}")
    yield
    b.line(f"store atomic i64 0, ptr {lock.name} release, align 8")
