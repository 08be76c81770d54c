"""Random tile programs of 3 to 15 operations, each with its own float64 reference.

In: a `random.Random` (hypothesis's for shrinking, a seeded one for the kept seeds). Out: a `Case`: the IR, the
inputs, and for every output the expected values with the error that each element may have.

Every tile that is made is a `Node`: its IR value and how to compute it with `approx`. `exact` says that all
backends must agree with the reference to the bit; only such tiles are compared, truncated or sorted by index,
so that a rounding cannot tip a decision. `same` says that two backends must agree with each other to the bit,
because the order of every sum is fixed. `bound` is the largest magnitude, kept small by clamping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from tessera import types as ts
from tessera.kernel.build import TypeRuleError
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, TileTy, Value
from tessera.types import DType

from . import approx
from .approx import Approx
from .programs import Program

SIZES = (1, 2, 3, 5, 7, 8, 16, 17, 33, 40, 65)
FLOATS = (ts.f32, ts.f32, ts.f32, ts.bf16, ts.f16, ts.fp8_e4m3, ts.fp8_e5m2, ts.f64)
INTS = (ts.int32, ts.int32, ts.int8, ts.uint8)
BLOCK = 8
LIMIT = 64.0  # larger magnitudes are clamped before they grow further
Memo = dict[Any, Any]


@dataclass(eq=False)
class Node:
    """A tile of the program and its meaning."""

    value: Value
    compute: Callable[[Memo], Approx]
    exact: bool
    same: bool
    bound: float
    product: bool = False  # a multiplication that an add may contract

    @property
    def dtype(self) -> DType:
        return self.value.type.dtype

    @property
    def type(self) -> TileTy:
        return self.value.type

    def at(self, memo: Memo) -> Approx:
        """Its value, computed once for each iteration of the loops and grids around it."""
        if self not in memo:
            memo[self] = self.compute(memo)
        return memo[self]


@dataclass
class Case:
    """A program with its arguments and what it must compute."""

    program: Program
    sizes: dict[str, int]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)  # as they are before the launch
    expected: list[Approx] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def run(self, backend: Any) -> list[Tensor]:
        """The outputs that a backend computes."""
        outputs = [x.clone() for x in self.outputs]
        self.program.run(*self.inputs, *outputs, backend=backend, **self.sizes)
        return outputs


def make(random: Random) -> Case:
    """A random program."""
    return Maker(random).make()


class Maker:
    """Grows one program."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.program = Program("fuzz")
        self.case = Case(self.program, {name: random.choice(SIZES) for name in "MNK"})
        self.program.function.sizes += ["M", "N", "K"]
        self.pool: list[Node] = []
        self.values = torch.Generator().manual_seed(random.randrange(2**31))
        self.blocked: tuple[Value, str] | None = None  # the first row of this program's block, when in a grid
        self.grid_value: Value | None = None

    def make(self) -> Case:
        parallel = self.random.random() < 0.4
        count = self.random.randint(3, 15)
        if not parallel:
            self.grow(count)
            self.finish({})
            return self.reorder()
        program, rows = self.program, Dim.of("M")
        block = program.grid(program.size(rows.ceildiv(BLOCK)))
        with program.inside(block):
            self.grid_value, = block.args
            self.blocked = program.binary("mul", block.args[0], program.const(BLOCK)), "M"
            self.grow(count)
            self.finish(None)
        return self.reorder()

    def grow(self, count: int) -> None:
        """Add operations to the pool."""
        self.pool.append(self.load())
        kinds = [self.elementwise, self.elementwise, self.function, self.compare_and_choose, self.reduction,
                 self.scan, self.sort, self.mma, self.cast, self.transpose, self.reshape, self.slice, self.concat,
                 self.expand, self.element, self.loop, self.branch, self.iota, self.fma, self.integer]
        made = 0
        for _ in range(8 * count):
            if made >= count:
                break
            try:
                node = self.random.choice(kinds)()
            except TypeRuleError:  # a ragged dim where it may not be: what was emitted so far is dead code
                continue
            if node is not None:
                self.pool.append(node)
                made += 1

    # -- leaves -------------------------------------------------------------------------------------

    def load(self, shape: tuple[Dim, ...] | None = None, dtype: DType | None = None, whole: bool = False) -> Node:
        """A new input; in a grid its first dim may be cut into the program's block."""
        pick = self.random
        if dtype is None:
            dtype = pick.choice(FLOATS) if pick.random() < 0.75 else pick.choice(INTS)
        if shape is None:
            names = [Dim.of(pick.choice(["M", "N", "K", 4, 16])) for _ in range(pick.choice([1, 2, 2, 2, 3]))]
            if self.blocked and not whole:
                names[0] = Dim.of("M")
            shape = tuple(names)
        sizes = [dim.value(self.case.sizes) for dim in shape]
        bound = 4.0
        data = torch.randint(-32, 33, sizes, generator=self.values)
        data = (data / 8 if dtype.is_float else data if dtype.kind == "int" else data.abs()).to(dtype.torch)
        if not dtype.is_float:
            bound = 32.0
        name = f"x{len(self.case.inputs)}"
        view = self.program.tensor(name, shape, dtype)
        if len(shape) > 1 and pick.random() < 0.1:
            data = data.transpose(-1, -2).contiguous().transpose(-1, -2)
            self.program.function.params[-1].unit_stride = False
        self.case.inputs.append(data)
        known = approx.exact(data.float() if dtype.is_float and dtype.bits < 32 else data)
        if not self.blocked or whole or shape[0] != Dim.of("M"):
            return Node(self.program.load(view), lambda memo: known, True, True, bound)
        start, dim = self.blocked
        view = self.program.view(view, self.block_spec(view.type, 0), [start])
        rows = self.case.sizes[dim]
        return Node(self.program.load(view), lambda memo: known.move(
            lambda x: x[memo["block"]:min(memo["block"] + BLOCK, rows)]), True, True, bound)

    def block_spec(self, type_: TileTy, axis: int) -> list[tuple[Any, ...]]:
        assert self.blocked
        start, dim = self.blocked
        ends = (Dim.of(dim) - start.expr).minimum(BLOCK)
        return [("range", 1, Dim.of(BLOCK), ends) if i == axis else ("all",) for i in range(type_.rank)]

    def constant(self, like: Node, low: int = -16, high: int = 16) -> Node:
        number = self.random.randint(low, high)
        if like.dtype.is_float:
            return self.fixed(number / 8)
        return self.fixed(number)

    def fixed(self, number: float) -> Node:
        value = self.program.const(number)
        known = approx.exact(torch.tensor(number))
        return Node(value, lambda memo: known, True, True, abs(number))

    def iota(self) -> Node:
        like = self.pick(lambda n: n.type.rank and all(v is None for v in n.type.valid))
        if like is None:
            return self.load()
        axis = self.random.randrange(like.type.rank)
        sizes = [dim.value(self.case.sizes) for dim in like.type.shape]
        steps = torch.arange(sizes[axis]).reshape(-1, *[1] * (len(sizes) - 1 - axis)).expand(sizes)
        value = self.program.iota(like.type.shape, axis)
        return Node(value, lambda memo: approx.exact(steps), True, True, float(sizes[axis]))

    # -- choosing -----------------------------------------------------------------------------------

    def pick(self, fits: Callable[[Node], Any] = lambda node: True) -> Node | None:
        """A node of the pool that fits, the newer the likelier."""
        fitting = [node for node in self.pool if fits(node)]
        if not fitting:
            return None
        return fitting[-1] if self.random.random() < 0.4 else self.random.choice(fitting)

    def number(self, fits: Callable[[Node], Any] = lambda node: True) -> Node | None:
        """A node that is not bool, clamped when it is large."""
        node = self.pick(lambda n: n.dtype != ts.bool_ and fits(n))
        return node and self.small(node)

    def small(self, node: Node, limit: float = LIMIT) -> Node:
        """The node, clamped to +-limit where it may be larger."""
        if node.bound <= limit:
            return node
        low, high = (self.fixed(sign * (limit if node.dtype.is_float else int(limit))) for sign in (-1, 1))
        return self.binary("max", self.binary("min", node, high, node.bound), low, limit)

    def partner(self, node: Node) -> Node:
        """Something that broadcasts against a node: a constant, an equal, a new input, a reduction of it."""
        kind = self.random.random()
        if kind < 0.25:
            return self.constant(node)
        if kind < 0.5:
            equal = self.number(lambda n: n.type.shape == node.type.shape and n.dtype.is_float == node.dtype.is_float)
            if equal is not None:
                return equal
        if kind < 0.7 and node.type.rank and node.dtype.is_float:
            smaller = self.reduced(self.random.choice(["max", "sum"]), node, node.type.rank - 1)
            return self.small(self.expanded(smaller, node.type.rank - 1))
        keep = self.random.randint(0, node.type.rank)
        shape = tuple(dim if self.random.random() < 0.8 else Dim.of(1) for dim in node.type.shape[keep:])
        if any(v is not None for v in node.type.valid[keep:]):
            return self.constant(node)
        dtypes = (ts.f32, ts.bf16) if node.dtype.is_float else (ts.int32, ts.int8)
        return self.load(shape, self.random.choice(dtypes), whole=True) if shape else self.constant(node)

    # -- building blocks ----------------------------------------------------------------------------

    def binary(self, name: str, a: Node, b: Node, bound: float) -> Node:
        value = self.program.binary(name, a.value, b.value)
        assert value.op
        dtype = value.op.operands[0].type.dtype
        contracted = dtype.is_float and name in ("add", "sub") and (a.product or b.product)

        def compute(memo: Memo) -> Approx:
            return approx.binary(name, *(approx.cast(n.at(memo), dtype) for n in (a, b)), dtype, contracted)

        exact, same = a.exact and b.exact and not contracted, a.same and b.same and not contracted
        return Node(value, compute, exact, same, bound, product=name == "mul" and dtype.is_float)

    def unary(self, name: str, a: Node, bound: float) -> Node:
        value = self.program.unary(name, a.value)
        dtype = value.type.dtype
        plain = name in ("neg", "abs", "not", "sqrt", "floor", "ceil", "round")
        return Node(value, lambda memo: approx.unary(name, approx.cast(a.at(memo), dtype), dtype),
                    a.exact and plain, a.same and (plain or name == "rsqrt"), bound, a.product and name == "neg")

    def moved(self, value: Value, a: Node, move: Callable[[Tensor], Tensor]) -> Node:
        return Node(value, lambda memo: a.at(memo).move(move), a.exact, a.same, a.bound, a.product)

    def reduced(self, kind: str, a: Node, axis: int) -> Node:
        value = self.program.reduce(kind, a.value, axis)
        dtype = value.type.dtype if not kind.startswith("arg") else a.dtype
        count = max(a.type.shape[axis].value(self.case.sizes), 1)
        sums = kind in ("sum", "mean") and dtype.is_float
        bound = a.bound * count if kind == "sum" else float(count) if kind.startswith("arg") else a.bound
        return Node(value, lambda memo: approx.reduce(kind, approx.cast(a.at(memo), dtype), axis, dtype),
                    a.exact and not sums, a.same and not (sums and a.product), bound)

    def expanded(self, a: Node, axis: int) -> Node:
        return self.moved(self.program.expand_dims(a.value, axis), a, lambda x: x.unsqueeze(axis))

    # -- operations ---------------------------------------------------------------------------------

    def elementwise(self) -> Node | None:
        a = self.number()
        if a is None:
            return None
        b = self.partner(a)
        if self.random.random() < 0.5:
            a, b = b, a
        names = ["add", "sub", "mul", "max", "min"] + (["div"] if a.dtype.is_float else [])
        name = self.random.choice(names)
        if name == "div":
            b = self.binary("add", self.unary("abs", b, b.bound), self.fixed(0.5), b.bound + 0.5)
            return self.binary("div", a, b, a.bound * 2)
        bound = a.bound * b.bound if name == "mul" else a.bound + b.bound
        return self.binary(name, a, b, bound)

    def integer(self) -> Node | None:
        a = self.number(lambda n: n.dtype.is_int)
        if a is None:
            return None
        name = self.random.choice(["floordiv", "mod", "and", "or", "xor", "shl", "shr"])
        low, high = {"floordiv": (1, 9), "mod": (1, 9), "shl": (0, 8), "shr": (0, 8)}.get(name, (-99, 99))
        return self.binary(name, a, self.fixed(self.random.randint(low, high)), 2.0**31)

    def function(self) -> Node | None:
        a = self.number(lambda n: n.dtype.is_float)
        if a is None:
            return None
        name = self.random.choice([*approx.MONOTONE, *approx.STEPS, "sin", "cos", "sqrt", "neg", "abs", "pow"])
        if name in approx.STEPS and not a.exact:
            return None
        if name in ("log", "log2", "log1p", "sqrt", "rsqrt"):
            a = self.binary("add", self.unary("abs", a, a.bound), self.fixed(0.25), a.bound + 0.25)
            return self.unary(name, a, max(a.bound, 3.0))
        if name == "pow":
            a = self.binary("add", self.unary("abs", a, a.bound), self.fixed(0.5), a.bound + 0.5)
            return self.power(self.small(a, 8.0), self.random.choice([-1.0, 0.5, 2.0, 3.0]))
        if name in ("exp", "exp2", "expm1", "softplus"):
            a = self.small(a, 6.0)
            return self.unary(name, a, 404.0)
        return self.unary(name, a, max(a.bound, 1.0) + 1)

    def power(self, a: Node, exponent: float) -> Node:
        value = self.program.binary("pow", a.value, self.program.const(exponent))
        dtype = value.type.dtype
        return Node(value, lambda memo: approx.power(approx.cast(a.at(memo), dtype), exponent, dtype),
                    False, False, max(a.bound**3, 2.0))

    def fma(self) -> Node | None:
        a = self.number(lambda n: n.dtype.is_float)
        if a is None:
            return None
        b, c = self.partner(a), self.partner(a)
        value = self.program.fma(a.value, b.value, c.value)
        dtype = value.type.dtype
        return Node(value, lambda memo: approx.fma(*(approx.cast(n.at(memo), dtype) for n in (a, b, c)), dtype),
                    a.exact and b.exact and c.exact, a.same and b.same and c.same, a.bound * b.bound + c.bound)

    def compare_and_choose(self) -> Node | None:
        a = self.number(lambda n: n.exact)
        if a is None:
            return None
        b = self.partner(a)
        if not b.exact:
            b = self.constant(a)
        condition = self.binary(self.random.choice([*approx.COMPARE]), a, b, 1.0)
        if self.random.random() < 0.3:
            condition = self.unary("not", condition, 1.0)
        if self.random.random() < 0.2:
            kind = self.random.choice(["any", "all"])
            return self.reduced(kind, condition, condition.type.rank - 1) if condition.type.rank else condition
        x = self.number(lambda n: n.type.shape == condition.type.shape) or self.constant(a)
        y = self.partner(x)
        value = self.program.where(condition.value, x.value, y.value)
        dtype = value.type.dtype
        return Node(value, lambda memo: approx.where(
            condition.at(memo), approx.cast(x.at(memo), dtype), approx.cast(y.at(memo), dtype)),
            x.exact and y.exact, x.same and y.same, max(x.bound, y.bound), x.product or y.product)

    def reduction(self) -> Node | None:
        a = self.number(lambda n: n.type.rank)
        if a is None:
            return None
        kinds = ["sum", "max", "min"] + (["mean"] if a.dtype.is_float else [])
        kinds += ["argmax", "argmin"] if a.exact else []
        node = self.reduced(self.random.choice(kinds), a, axis := self.random.randrange(a.type.rank))
        return self.expanded(self.small(node), axis) if self.random.random() < 0.4 else node

    def scan(self) -> Node | None:
        a = self.number(lambda n: n.type.rank)
        if a is None:
            return None
        kind, axis = self.random.choice(["cumsum", "cummax"]), self.random.randrange(a.type.rank)
        value = self.program.scan(kind, a.value, axis)
        dtype = value.type.dtype
        sums = kind == "cumsum" and dtype.is_float
        bound = a.bound * max(a.type.shape[axis].value(self.case.sizes), 1)
        return Node(value, lambda memo: approx.scan(kind, approx.cast(a.at(memo), dtype), axis, dtype),
                    a.exact and not sums, a.same and not (sums and a.product), bound)

    def sort(self) -> Node | None:
        a = self.number(lambda n: n.type.rank)
        if a is None:
            return None
        axis, down = self.random.randrange(a.type.rank), self.random.random() < 0.5
        values, indices = self.program.sort(a.value, axis, down)
        if a.exact and self.random.random() < 0.5:
            return Node(indices, lambda memo: approx.sort(a.at(memo), axis, down)[1], True, True, 64.0)
        return Node(values, lambda memo: approx.sort(a.at(memo), axis, down)[0], a.exact, a.same, a.bound)

    def mma(self) -> Node | None:
        a = self.number(lambda n: n.type.rank >= 2)
        if a is None:
            return None
        a = self.small(a, 8.0)
        kind = self.random.random()
        if kind < 0.2:
            b = self.turned(a, [*range(a.type.rank - 2), a.type.rank - 1, a.type.rank - 2])
        elif a.type.valid[-1] is not None:
            return None
        else:
            columns = Dim.of(self.random.choice(["M", "N", "K", 4, 16]))
            batch = a.type.shape[:-2] if self.random.random() < 0.3 and not any(a.type.valid[:-2]) else ()
            dtype = a.dtype if self.random.random() < 0.6 or a.dtype == ts.bool_ else \
                ts.f32 if a.dtype.is_float else ts.int8
            b = self.load((*batch, a.type.shape[-1], columns), dtype, whole=True)
        acc = None
        value = self.program.mma(a.value, b.value)
        if self.random.random() < 0.3:
            acc = self.number(lambda n: n.type == value.type)
            if acc is not None:
                value = self.program.mma(a.value, b.value, acc.value)
        return self.mma_node(value, a, b, acc)

    def mma_node(self, value: Value, a: Node, b: Node, acc: Node | None) -> Node:
        dtype = value.type.dtype
        depth = a.type.shape[-1].value(self.case.sizes)
        bound = a.bound * b.bound * depth + (acc.bound if acc else 0)
        # AVX512-BF16 adds products in pairs; the f64 product of interp is torch's, which fuses nothing.
        free = a.dtype == b.dtype == ts.bf16 or dtype == ts.f64

        def compute(memo: Memo) -> Approx:
            wide = dtype if dtype.is_float else ts.int64
            left, right = (approx.cast(n.at(memo), wide) for n in (a, b))
            return approx.mma(left, right, acc.at(memo) if acc else None, dtype)

        nodes = [n for n in (a, b, acc) if n]
        return Node(value, compute, not dtype.is_float, all(n.same for n in nodes) and not free, bound)

    def cast(self) -> Node | None:
        a = self.number(lambda n: n.type.rank)
        if a is None:
            return None
        target = self.random.choice([*FLOATS, *INTS])
        if not target.is_float and not a.exact:
            return None
        if target.bits == 8:
            a = self.small(a, 32.0)
        value = self.program.cast(a.value, target)
        bound = a.bound if target.kind != "uint" else 256.0
        return Node(value, lambda memo: approx.cast(a.at(memo), target), a.exact, a.same, bound, a.product)

    def turned(self, a: Node, perm: list[int]) -> Node:
        return self.moved(self.program.transpose(a.value, perm), a, lambda x: x.permute(perm))

    def transpose(self) -> Node | None:
        a = self.pick(lambda n: n.type.rank >= 2)
        return a and self.turned(a, self.random.sample(range(a.type.rank), a.type.rank))

    def reshape(self) -> Node | None:
        a = self.pick(lambda n: n.type.rank >= 1)
        if a is None:
            return None
        shape = list(a.type.shape)
        axis = self.random.randrange(len(shape))
        if shape[axis].const == 16 and self.random.random() < 0.7:
            shape[axis:axis + 1] = [Dim.of(2), Dim.of(8)]
        elif axis + 1 < len(shape):
            shape[axis:axis + 2] = [shape[axis] * shape[axis + 1]]
        else:
            shape.insert(axis, Dim.of(1))
        value = self.program.reshape(a.value, shape)

        def split_or_merge(x: Tensor) -> Tensor:
            if len(shape) < x.dim():
                return x.flatten(axis, axis + 1)
            return x.unflatten(axis, (-1, 8) if shape[axis].const == 2 else (1, -1))

        return self.moved(value, a, split_or_merge)

    def slice(self) -> Node | None:
        a = self.pick(lambda n: any(v is None for v in n.type.valid))
        if a is None:
            return None
        axis = self.random.choice([i for i, v in enumerate(a.type.valid) if v is None])
        dim = a.type.shape[axis]
        size = dim.value(self.case.sizes)
        start = self.random.randrange(size)
        spec: list[tuple[Any, ...]] = [("all",)] * a.type.rank
        drop = self.random.random() < 0.3
        spec[axis] = ("at", 1) if drop else ("range", 1, dim - start, None)
        value = self.program.slice(a.value, spec, [self.program.const(start)])
        return self.moved(value, a, lambda x: x.select(axis, start) if drop else x.narrow(axis, start, size - start))

    def concat(self) -> Node | None:
        a = self.pick(lambda n: n.type.rank)
        if a is None:
            return None
        axis = self.random.randrange(a.type.rank)
        b = self.pick(lambda n: n.dtype == a.dtype and n.type.rank == a.type.rank and all(
            i == axis or p == q for i, (p, q) in enumerate(zip(n.type.shape, a.type.shape))))
        assert b
        value = self.program.concat([a.value, b.value], axis)

        def compute(memo: Memo) -> Approx:
            p, q = a.at(memo), b.at(memo)
            return Approx(torch.cat([p.x, q.x], axis), torch.cat([p.e, q.e], axis))

        return Node(value, compute, a.exact and b.exact, a.same and b.same, max(a.bound, b.bound),
                    a.product or b.product)

    def expand(self) -> Node | None:
        a = self.pick(lambda n: n.type.rank <= 2)
        return a and self.expanded(a, self.random.randint(0, a.type.rank))

    def element(self) -> Node | None:
        a = self.pick(lambda n: n.type.rank and all(v is None for v in n.type.valid))
        if a is None:
            return None
        place = tuple(self.random.randrange(dim.value(self.case.sizes)) for dim in a.type.shape)
        indices = [self.program.const(i) for i in place]
        if self.random.random() < 0.5 or a.dtype == ts.bool_:
            return self.moved(self.program.extract(a.value, indices), a, lambda x: x[place])
        scalar = self.constant(a, 0)
        value = self.program.insert(a.value, scalar.value, indices)

        def compute(memo: Memo) -> Approx:
            whole, new = a.at(memo), approx.cast(scalar.at(memo), a.dtype)
            x, e = whole.x.clone(), whole.e.clone()
            x[place], e[place] = new.x, new.e
            return Approx(x, e)

        return Node(value, compute, a.exact, a.same, max(a.bound, scalar.bound))

    # -- control flow -------------------------------------------------------------------------------

    def loop(self) -> Node | None:
        """A carried tile, joined in every iteration with a row of an input or with something from outside."""
        start = self.number(lambda n: n.type.rank and n.dtype in (ts.f32, ts.int32))
        if start is None:
            return None
        start = self.small(start, 4.0)
        steps = self.random.randint(0, 4)
        rows = self.load((Dim.of(max(steps, 1)), Dim.of(4)), start.dtype, whole=True)
        region = Block([self.program.argument(TileTy((), ts.int64)), self.program.argument(start.type)])
        carried = Node(region.args[1], lambda memo: memo["carried"], not start.dtype.is_float, start.same, 4.0)
        with self.program.inside(region):
            picked = self.program.extract(rows.value, [region.args[0], self.program.const(1)])
            scalar = self.moved(picked, rows, lambda x: x)
            scalar.compute = lambda memo: rows.at(memo).move(lambda x: x[memo["step"], 1])
            name = self.random.choice(["add", "mul", "sub", "max"])
            body = self.binary(name, carried, scalar, 16.0)
            if self.random.random() < 0.5:
                body = self.binary(self.random.choice(["add", "max"]), body, start, 20.0)
            body = self.small(body, 4.0)
            self.program.emit("yield", [body.value])
        low, high, step = (self.program.const(v) for v in (0, steps, 1))
        value = self.program.emit("for", [low, high, step, start.value], [start.type], [region]).result

        def compute(memo: Memo) -> Approx:
            current = start.at(memo)
            for i in range(steps):
                current = body.at({**memo, "carried": current, "step": i})
            return current

        return Node(value, compute, start.exact and not start.dtype.is_float, body.same and start.same, 4.0)

    def branch(self) -> Node | None:
        a = self.number(lambda n: n.dtype in (ts.f32, ts.int32))
        if a is None:
            return None
        taken = self.random.random() < 0.5
        flag = self.random.randint(0, 5)
        condition = self.program.binary("lt", self.program.const(flag), self.program.size(Dim.of("M")))
        taken = flag < self.case.sizes["M"]
        nodes: list[Node] = []

        def side(name: str) -> list[Value]:
            nodes.append(self.binary(name, a, self.constant(a), a.bound * 2 + 2))
            return [nodes[-1].value]

        value, = self.program.branch(condition, lambda: side("add"), lambda: side("mul"))
        chosen = nodes[0 if taken else 1]
        return Node(value, chosen.at, all(n.exact for n in nodes), all(n.same for n in nodes), chosen.bound, True)

    # -- outputs ------------------------------------------------------------------------------------

    def finish(self, memo: Memo | None) -> None:
        """Store the last tile and perhaps others; work out what must be in the outputs."""
        chosen = {self.pool[-1]: None}
        for _ in range(self.random.randint(0, 2)):
            chosen[self.random.choice(self.pool)] = None
        for node in chosen:
            self.output(node, memo)

    def output(self, node: Node, memo: Memo | None) -> None:
        program, sizes, type_ = self.program, self.case.sizes, node.type
        ragged = [axis for axis, valid in enumerate(type_.valid) if valid is not None]
        blocked = memo is None and len(ragged) == 1 and type_.shape[ragged[0]] == Dim.of(BLOCK)
        shape = list(type_.shape)
        if blocked:
            shape[ragged[0]] = Dim.of("M")
        elif memo is None:
            shape.insert(0, Dim.of("M").ceildiv(BLOCK))
        elif not shape:
            shape = [Dim.of(1)]
        view = program.tensor(f"out{len(self.case.outputs)}", shape, node.dtype, output=True)
        if blocked:
            assert self.blocked
            view = program.view(view, self.block_spec(view.type, ragged[0]), [self.blocked[0]])
        elif memo is None or not type_.rank:
            index = self.grid_value or program.const(0)
            view = program.view(view, [("at", 1)] + [("all",)] * type_.rank, [index])
        program.store(view, node.value)
        before = torch.full([dim.value(sizes) for dim in shape], 3).to(node.dtype.torch)
        self.case.outputs.append(before)
        self.case.same.append(node.same)
        self.case.expected.append(self.expect(node, memo, before, ragged[0] if blocked else None))

    def expect(self, node: Node, memo: Memo | None, before: Tensor, blocked: int | None) -> Approx:
        result = approx.exact(before.float() if node.dtype.is_float and node.dtype.bits < 32 else before)
        result = Approx(result.x.clone(), result.e.clone())
        if memo is not None:
            now = approx.cast(node.at(memo), node.dtype)
            return now.move(lambda t: t.reshape(before.shape))
        for block in range(0, self.case.sizes["M"], BLOCK):
            now = node.at({"block": block})
            for target, source in ((result.x, now.x), (result.e, now.e)):
                place = target.narrow(blocked, block, source.shape[blocked]) if blocked is not None else \
                    target[block // BLOCK][tuple(slice(0, size) for size in source.shape)]
                place.copy_(source)
        return result

    def reorder(self) -> Case:
        """Inputs first: parameters were declared as they were needed."""
        params = self.program.function.params
        params.sort(key=lambda p: p.is_output)
        return self.case
