"""The tile IR: typed SSA over tiles, with structured control flow.

In: operations from `build.Builder` (which infers and checks every type). Out: a `Function` that the
passes rewrite and the backends lower. `str(function)` is stable text: the compile cache hashes it.

Two kinds of values:
  * tiles (`TileTy`), immutable arrays with symbolic dims; rank 0 is a scalar;
  * views (`ViewTy`), windows on a parameter's memory that `load` and `store` go through.

A tile's dim may be ragged: its nominal size is a block size, and `valid` says how many elements count
(`min(Br, S-i)` for `Q[i:i+Br]`). Elements past it are unspecified: reductions, scans and mma skip
them, stores and gathers leave them out; a dim whose `valid` is None is valid as a whole.

Low-precision types (bf16, f16, fp8, int8, uint8, int4) are storage types: arithmetic on them gives f32
or int32, so that rounding happens only where a program casts or stores.

Operations (operands -> results; attributes in braces):
  const {value} · dim {expr} -> int64 scalar                                  full(scalar) {shape}
  iota {shape, axis} -> int32 0..n-1 along axis                               cast(x)
  UNARY(x) · BINARY(x, y) · where(c, x, y) · fma(x, y, z): equal shapes       broadcast(x) {axes}
  reshape(x) · transpose(x) {perm} · concat(x...) {axis}                      rand(seed, offset) -> f32 in [0, 1)
  slice(x, start...) {spec} · extract(x, i...) -> scalar · insert(x, s, i...) -> tile with one element set
  reduce(x) {kind, axis} · scan(x) {kind, axis} · sort(x) {axis, descending} -> values, int32 indices
  mma(a, b[, acc]): [*, M, K] x [*, K, N] -> f32, int32 for 8- and 4-bit ints, f64 for f64
  view(base, scalar...) {spec} -> view · load(view) · store(view, x)
  gather(view, index): rows of axis 0 -> index.shape + view.shape[1:] · scatter(view, index, x)
  atomic_add(view, x) · print(x...) {text: "{}" for each value, braces doubled} · assert(c) {text}
  grid(n...) {region(iv...)}: parallel, no results
  for(lo, hi, step, init...) {region(iv, iter...) yields ([stop,] next...)} {early_exit} -> final iters
  while(init...) {region(iter...) yields cond} {region(iter...) yields next...} -> final iters
  if(c) {then yields ...} {else yields ...} -> values · yield(x...)

`spec` of view and slice has one entry an axis: ("all",), ("at", operand) which drops the axis, or
("range", operand, extent, valid): extent elements from the start that the operand holds; operand counts
from 1, operand 0 being the base.
`axes` of broadcast has one entry a result axis: the source axis, or None for a new one; a source dim
of size 1 expands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tessera.kernel.dims import Dim
from tessera.types import DType

UNARY_FLOAT = frozenset(
    "exp exp2 expm1 log log2 log1p sqrt rsqrt sigmoid tanh sin cos erf floor ceil round softplus".split())
UNARY_ANY = frozenset("neg abs".split())
UNARY = UNARY_FLOAT | UNARY_ANY | {"not"}
ARITHMETIC = frozenset("add sub mul div floordiv mod pow max min".split())
BITWISE = frozenset("and or xor shl shr".split())
COMPARE = frozenset("lt le gt ge eq ne".split())
BINARY = ARITHMETIC | BITWISE | COMPARE
ELEMENTWISE = UNARY | BINARY | {"where", "fma", "cast"}
REDUCTIONS = frozenset("sum mean max min argmax argmin any all".split())
SCANS = frozenset(["cumsum", "cummax"])
READS = frozenset(["load", "gather"])  # of the view that is their first operand
WRITES = frozenset("store scatter atomic_add".split())  # to the view that is their first operand
EFFECTS = WRITES | frozenset("print assert grid yield".split())
CONTROL = frozenset("grid for while if".split())
MAX_PRINTED, PRINTED_EDGE = 1000, 3  # a tile of more elements is printed by its edges


@dataclass(frozen=True)
class Location:
    """A place in a user's source: what an error message points at."""

    file: str
    line: int
    column: int
    end_column: int
    text: str  # the source line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class TileTy:
    """Type of a tile; rank 0 is a scalar."""

    shape: tuple[Dim, ...]
    dtype: DType
    valid: tuple[Dim | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.valid) != len(self.shape):
            object.__setattr__(self, "valid", (None,) * len(self.shape))

    @property
    def rank(self) -> int:
        return len(self.shape)

    def extent(self, axis: int) -> Dim:
        """How many elements of an axis count."""
        valid = self.valid[axis]
        return self.shape[axis] if valid is None else valid

    def __str__(self) -> str:
        dims = ", ".join(str(d) if v is None else f"{d}<{v}" for d, v in zip(self.shape, self.valid))
        return f"{self.dtype}[{dims}]" if self.shape else str(self.dtype)


@dataclass(frozen=True)
class ViewTy(TileTy):
    """Type of a view of a parameter's memory."""

    def __str__(self) -> str:
        return "&" + super().__str__()


@dataclass(eq=False)
class Value:
    """An SSA value. `expr` is set on int scalars: what is known of its number symbolically."""

    name: str
    type: TileTy
    op: Op | None = None  # None: a region argument or a parameter
    expr: Dim | None = None
    hint: str = ""  # the user's name for it, for messages
    loc: Location | None = None  # where a parameter is declared; other values have their operation's

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Op:
    """One operation; `regions` holds the bodies of control flow."""

    name: str
    operands: list[Value]
    results: list[Value] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    regions: list[Block] = field(default_factory=list)
    loc: Location | None = None

    @property
    def result(self) -> Value:
        return self.results[0]


@dataclass(eq=False)
class Block:
    """A region's only block. The last operation is `yield`, except in grids and the function body."""

    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @property
    def terminator(self) -> Op:
        return self.ops[-1]


@dataclass(eq=False)
class Param:
    """A run-time parameter: a view of a tensor or a scalar. Compile-time arguments do not appear."""

    name: str
    value: Value
    is_output: bool = False
    unit_stride: bool = True  # the last axis is contiguous

    @property
    def is_view(self) -> bool:
        return isinstance(self.value.type, ViewTy)


@dataclass(eq=False)
class Function:
    """A kernel specialised to dtypes, ranks and compile-time values.

    `sizes` lists the named dims that a launch binds, in order. `schedule` holds block sizes and
    options chosen by the user or the tuner ("BM", "BN", "BK", "warps", ...).
    """

    name: str
    params: list[Param]
    sizes: list[str]
    body: Block
    schedule: dict[str, Any] = field(default_factory=dict)
    counter: int = 0

    def fresh(self) -> str:
        """A name for a new value."""
        self.counter += 1
        return f"%{self.counter}"

    def __str__(self) -> str:
        header = ", ".join(
            f"{p.value.name} {p.name}: {p.value.type}{'' if p.unit_stride or not p.is_view else ' strided'}"
            for p in self.params)
        lines = [f"kernel {self.name}({header}) sizes({', '.join(self.sizes)}) {{"]
        lines += _print_block(self.body, 1)
        return "\n".join([*lines, "}"])


def param_of(view: Value) -> Value:
    """The parameter whose memory a view shows."""
    while view.op is not None and view.op.name == "view":
        view = view.op.operands[0]
    return view


def walk(block: Block) -> Iterator[Op]:
    """Every operation of a block and of its regions, outer before inner, in program order."""
    for op in block.ops:
        yield op
        for region in op.regions:
            yield from walk(region)


def users(ops: Iterable[Op]) -> defaultdict[str, list[Op]]:
    """For each value, by name, the operations that read it, once for each operand."""
    found: defaultdict[str, list[Op]] = defaultdict(list)
    for op in ops:
        for operand in op.operands:
            found[operand.name].append(op)
    return found


def in_loops(block: Block) -> set[Op]:
    """The operations inside a `for` or `while`."""
    return {inner for op in walk(block) if op.name in ("for", "while") for region in op.regions
            for inner in walk(region)}


def asserts(function: Function) -> list[Op]:
    """The run-time assertions of a kernel, in program order."""
    return [op for op in walk(function.body) if op.name == "assert"]


def _print_block(block: Block, depth: int) -> list[str]:
    pad = "  " * depth
    lines = []
    for op in block.ops:
        results = ", ".join(r.name for r in op.results)
        attrs = "".join(f" {k}={_print_attr(v)}" for k, v in sorted(op.attrs.items()) if v is not None)
        types = ", ".join(str(r.type) for r in op.results)
        lines.append(
            f"{pad}{results + ' = ' if results else ''}{op.name}({', '.join(v.name for v in op.operands)}){attrs}"
            + (f" : {types}" if types else "") + (" {" if op.regions else ""))
        for index, region in enumerate(op.regions):
            if index:
                lines.append(pad + "} {")
            if region.args:
                lines.append(f"{pad} ({', '.join(f'{a.name}: {a.type}' for a in region.args)}):")
            lines += _print_block(region, depth + 1)
        if op.regions:
            lines.append(pad + "}")
    return lines


def _print_attr(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_print_attr(v) for v in value) + ")"
    return repr(value) if isinstance(value, (str, float)) else str(value)
