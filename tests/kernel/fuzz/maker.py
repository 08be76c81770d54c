"""Grows one random program: its inputs, its pool of tiles, and the operations that everything else is built of."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from tessera import types as ts
from tessera.kernel.build import TypeRuleError
from tessera.kernel.dims import Dim
from tessera.kernel.ir import TileTy, Value
from tessera.types import DType

from ..programs import Program
from . import approx
from .approx import Approx
from .node import Case, Memo, Node, Vocabulary

LIMIT = 64.0  # larger magnitudes are clamped before they grow further
EXACT_UNARY = ("neg", "abs", "not", "sqrt", "floor", "ceil", "round")


class Maker:
    """A program under construction. `pool` holds the tiles so far; operations take some and add one."""

    def __init__(self, random: Random, words: Vocabulary) -> None:
        self.random = random
        self.words = words
        self.program = Program("fuzz")
        self.case = Case(self.program, {name: random.choice(words.sizes) for name in "MNK"})
        self.program.function.sizes += ["M", "N", "K"]
        self.pool: list[Node] = []
        self.values = torch.Generator().manual_seed(random.randrange(2**31))
        self.block = words.blocks[0] if len(words.blocks) == 1 else random.choice(words.blocks)
        self.first_row: Value | None = None  # of this program's block of M, when in a grid
        self.indices: list[Node] = []  # this program's place in the grid
        self.columns = 0  # the grid's second extent, 0: it has one axis
        self.depth = 0  # of loops and branches

    def grow(self, count: int, tries: int = 8) -> None:
        """Add operations to the pool."""
        made = 0
        for _ in range(tries * count):
            if made >= count:
                break
            try:
                node = self.random.choice(self.words.kinds)(self)
            except TypeRuleError:  # a ragged dim where it may not be: what was emitted so far is dead code
                continue
            if node is not None:
                self.pool.append(node)
                made += 1

    # -- leaves -------------------------------------------------------------------------------------

    def load(self, shape: tuple[Dim, ...] | None = None, dtype: DType | None = None, whole: bool = False) -> Node:
        """A new input; in a grid its first dim may be cut into the program's block."""
        view, known, bound = self.tensor(shape, dtype, whole)
        if self.first_row is None or whole or view.type.shape[0] != Dim.of("M"):
            return Node(self.program.load(view), lambda memo: known, True, True, bound)
        view = self.program.view(view, self.block_spec(view.type, 0), [self.first_row])
        rows = self.case.sizes["M"]
        return Node(self.program.load(view), lambda memo: known.move(
            lambda x: x[memo["block"]:min(memo["block"] + self.block, rows)]), True, True, bound)

    def tensor(self, shape: tuple[Dim, ...] | None = None, dtype: DType | None = None,
               whole: bool = False) -> tuple[Value, Approx, float]:
        """A new parameter: its view, its values and the largest of them."""
        pick = self.random
        if dtype is None:
            dtype = pick.choice(self.words.floats) if pick.random() < 0.75 else pick.choice(self.words.ints)
        if shape is None:
            names = [Dim.of(pick.choice(["M", "N", "K", 4, 16])) for _ in range(pick.choice([1, 2, 2, 2, 3]))]
            if self.first_row is not None and not whole:
                names[0] = Dim.of("M")
            shape = tuple(names)
        sizes = [dim.value(self.case.sizes) for dim in shape]
        view = self.program.tensor(f"x{len(self.case.inputs)}", shape, dtype)
        data, known = self.numbers(sizes, dtype)
        if len(shape) > 1 and pick.random() < 0.1 and dtype != ts.int4:
            data = data.transpose(-1, -2).contiguous().transpose(-1, -2)
            self.program.function.params[-1].unit_stride = False
        self.case.inputs.append(data)
        return view, known, 4.0 if dtype.is_float else 32.0

    def numbers(self, sizes: list[int], dtype: DType) -> tuple[Tensor, Approx]:
        """Random values as a tensor holds them, and what they are."""
        data = torch.randint(-32, 33, sizes, generator=self.values)
        if dtype == ts.int4:
            data = data.clamp(-8, 7)
            pairs = torch.nn.functional.pad(data, (0, sizes[-1] % 2)).unflatten(-1, (-1, 2)) & 15
            return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), approx.exact(data)
        if dtype == ts.bool_:
            return data > 0, approx.exact(data > 0)
        data = (data / 8 if dtype.is_float else data if dtype.kind == "int" else data.abs()).to(dtype.torch)
        return data, approx.exact(data.float() if dtype.is_float and dtype.bits < 32 else data)

    def block_spec(self, type_: TileTy, axis: int) -> list[tuple[Any, ...]]:
        """The rows of this program's block along an axis."""
        assert self.first_row is not None and self.first_row.expr is not None
        ends = (Dim.of("M") - self.first_row.expr).minimum(self.block)
        return [("range", 1, Dim.of(self.block), ends) if i == axis else ("all",) for i in range(type_.rank)]

    def constant(self, like: Node, low: int = -16, high: int = 16) -> Node:
        number = self.random.randint(low, high)
        if like.dtype.is_float:
            return self.fixed(number / 8)
        return self.fixed(number)

    def fixed(self, number: float) -> Node:
        value = self.program.const(number)
        known = approx.exact(torch.tensor(number))
        return Node(value, lambda memo: known, True, True, abs(number))

    def size(self, name: str) -> Node:
        """A named size as an int scalar."""
        known = approx.exact(torch.tensor(self.case.sizes[name]))
        return Node(self.program.size(Dim.of(name)), lambda memo: known, True, True, float(self.case.sizes[name]))

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

    # -- what operations are built of ---------------------------------------------------------------

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
        plain = name in EXACT_UNARY
        return Node(value, lambda memo: approx.unary(name, approx.cast(a.at(memo), dtype), dtype),
                    a.exact and plain, a.same and (plain or name == "rsqrt"), bound, a.product and name == "neg")

    def chosen(self, condition: Node, x: Node, y: Node) -> Node:
        """x where the condition holds, else y."""
        value = self.program.where(condition.value, x.value, y.value)
        dtype = value.type.dtype
        return Node(value, lambda memo: approx.where(
            condition.at(memo), approx.cast(x.at(memo), dtype), approx.cast(y.at(memo), dtype)),
            x.exact and y.exact, x.same and y.same, max(x.bound, y.bound), x.product or y.product)

    def cast(self, a: Node, dtype: DType) -> Node:
        value = self.program.cast(a.value, dtype)
        bound = a.bound if dtype.kind != "uint" else 256.0
        return Node(value, lambda memo: approx.cast(a.at(memo), dtype), a.exact, a.same, bound, a.product)

    def moved(self, value: Value, a: Node, move: Callable[[Tensor], Tensor]) -> Node:
        return Node(value, lambda memo: a.at(memo).move(move), a.exact, a.same, a.bound, a.product)

    def moved_at(self, value: Value, a: Node, place: Node, move: Callable[[Tensor, int], Tensor]) -> Node:
        """`moved`, by an int that is known only when the program runs."""
        return Node(value, lambda memo: a.at(memo).move(lambda x: move(x, place.number(memo))),
                    a.exact, a.same, a.bound, a.product)

    def expanded(self, a: Node, axis: int) -> Node:
        return self.moved(self.program.expand_dims(a.value, axis), a, lambda x: x.unsqueeze(axis))

    def turned(self, a: Node, perm: list[int]) -> Node:
        return self.moved(self.program.transpose(a.value, perm), a, lambda x: x.permute(perm))

    def reduced(self, kind: str, a: Node, axis: int) -> Node:
        value = self.program.reduce(kind, a.value, axis)
        dtype = value.type.dtype if not kind.startswith("arg") else a.dtype
        count = max(a.type.shape[axis].value(self.case.sizes), 1)
        sums = kind in ("sum", "mean") and dtype.is_float
        bound = a.bound * count if kind == "sum" else float(count) if kind.startswith("arg") else a.bound
        return Node(value, lambda memo: approx.reduce(kind, approx.cast(a.at(memo), dtype), axis, dtype),
                    a.exact and not sums, a.same and not (sums and a.product), bound)

    def product(self, a: Node, b: Node, acc: Node | None = None) -> Node:
        """a @ b (+ acc)."""
        value = self.program.mma(a.value, b.value, *([acc.value] if acc else []))
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
