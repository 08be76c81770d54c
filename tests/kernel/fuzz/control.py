"""Loops and branches, on conditions known at compile time and on conditions that are data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from tessera import types as ts
from tessera.kernel.build import TypeRuleError
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, TileTy, Value

from . import approx
from .approx import Approx
from .maker import Maker
from .moves import run_time_int
from .node import Memo, Node

Body = Callable[[Node, list[Node]], list[Node]]
STEPS = 4  # a loop's largest number of iterations, where its bound is data


# -- what loops and branches are built of --------------------------------------------------------------


def carried_nodes(m: Maker, key: object, initial: Sequence[Node]) -> list[Node]:
    """A region's arguments. A float is never exact in a loop; `same` is settled by the caller."""
    return [Node(m.program.argument(n.type), lambda memo, i=i: memo[key, i], not n.dtype.is_float, n.same, n.bound)
            for i, n in enumerate(initial)]


def results(values: Sequence[Value], initial: Sequence[Node], after: Sequence[Node],
            run: Callable[[Memo], list[Approx]]) -> list[Node]:
    """What a loop leaves; it is run once for each memo."""
    key = object()

    def at(memo: Memo, i: int) -> Approx:
        if key not in memo:
            memo[key] = run(memo)
        return memo[key][i]

    same = all(n.same for n in (*initial, *after))
    return [Node(v, lambda memo, i=i: at(memo, i), not n.dtype.is_float, same, n.bound)
            for i, (v, n) in enumerate(zip(values, initial))]


def for_loop(m: Maker, bounds: tuple[Node, Node, int], initial: list[Node], body: Body,
             early: bool = False) -> list[Node]:
    """`for i in range(low, high, step)`; the body's first result is the stop flag when `early`."""
    key, (low, high, step) = object(), bounds
    index = Node(m.program.argument(TileTy((), ts.int64)),
                 lambda memo: approx.exact(torch.tensor(memo[key, "i"])), True, True, 64.0)
    carried = carried_nodes(m, key, initial)
    region = Block([n.value for n in (index, *carried)])
    with inner(m, region):
        after = body(index, carried)
        m.program.emit("yield", [n.value for n in after])
    operands = [low.value, high.value, m.program.const(step), *(n.value for n in initial)]
    types = [n.type for n in initial]
    op = m.program.emit("for", operands, types, [region], early_exit=early or None)

    def run(memo: Memo) -> list[Approx]:
        now = [n.at(memo) for n in initial]
        for i in range(low.number(memo), high.number(memo), step):
            inside = {**memo, (key, "i"): i, **{(key, j): x for j, x in enumerate(now)}}
            stop, now = False, [n.at(inside) for n in after]
            if early:
                flag, *now = now
                stop = bool(flag.x)
            if stop:
                break
        return now

    return results(op.results, initial, after[1:] if early else after, run)


def while_loop(m: Maker, initial: list[Node], condition: Callable[[list[Node]], Node],
               body: Callable[[list[Node]], list[Node]]) -> list[Node]:
    """`while condition(carried): carried = body(carried)`."""
    key, regions, made = object(), [], []
    for part in (lambda carried: [condition(carried)], body):
        carried = carried_nodes(m, key, initial)
        region = Block([n.value for n in carried])
        with inner(m, region):
            made.append(part(carried))
            m.program.emit("yield", [n.value for n in made[-1]])
        regions.append(region)
    op = m.program.emit("while", [n.value for n in initial], [n.type for n in initial], regions)

    def run(memo: Memo) -> list[Approx]:
        now = [n.at(memo) for n in initial]
        while True:
            inside = {**memo, **{(key, j): x for j, x in enumerate(now)}}
            if not made[0][0].at(inside).x:
                return now
            now = [n.at(inside) for n in made[1]]

    return results(op.results, initial, made[1], run)


def either(m: Maker, condition: Node, then: Callable[[], list[Node]], other: Callable[[], list[Node]]) -> list[Node]:
    """`if condition: ... else: ...`; both give tiles of the same types."""
    regions, made = [], []
    for part in (then, other):
        region = Block()
        with inner(m, region):
            made.append(part())
            m.program.emit("yield", [n.value for n in made[-1]])
        regions.append(region)
    if [n.type for n in made[0]] != [n.type for n in made[1]]:
        raise TypeRuleError("the sides of a branch differ")
    op = m.program.emit("if", [condition.value], [n.type for n in made[0]], regions)
    return [Node(v, lambda memo, a=a, b=b: (a if condition.at(memo).x else b).at(memo), a.exact and b.exact,
                 a.same and b.same, max(a.bound, b.bound), True) for v, a, b in zip(op.results, *made)]


@contextmanager
def inner(m: Maker, region: Block) -> Iterator[None]:
    """Operations go into a region; the tiles made there are out of the pool at its end."""
    pool = list(m.pool)
    m.depth += 1
    try:
        with m.program.inside(region):
            yield
    finally:
        m.pool[:], m.depth = pool, m.depth - 1


# -- operations ----------------------------------------------------------------------------------------


def loop(m: Maker) -> Node | None:
    """A carried tile, joined in every iteration with a row of an input or with something from outside."""
    start = m.number(lambda n: n.type.rank and n.dtype in (ts.f32, ts.int32))
    if start is None:
        return None
    start = m.small(start, 4.0)
    steps = m.random.randint(0, 4)
    rows = m.load((Dim.of(max(steps, 1)), Dim.of(4)), start.dtype, whole=True)

    def body(index: Node, carried: list[Node]) -> list[Node]:
        picked = m.program.extract(rows.value, [index.value, m.program.const(1)])
        scalar = m.moved_at(picked, rows, index, lambda x, i: x[i, 1])
        body = m.binary(m.random.choice(["add", "mul", "sub", "max"]), carried[0], scalar, 16.0)
        if m.random.random() < 0.5:
            body = m.binary(m.random.choice(["add", "max"]), body, start, 20.0)
        return [m.small(body, 4.0)]

    return for_loop(m, (m.fixed(0), m.fixed(steps), 1), [start], body)[0]


def branch(m: Maker) -> Node | None:
    """One of two, by a size."""
    a = m.number(lambda n: n.dtype in (ts.f32, ts.int32))
    if a is None:
        return None
    m.random.random()
    condition = m.binary("lt", m.fixed(m.random.randint(0, 5)), m.size("M"), 1.0)
    return either(m, condition, lambda: [m.binary("add", a, m.constant(a), a.bound * 2 + 2)],
                  lambda: [m.binary("mul", a, m.constant(a), a.bound * 2 + 2)])[0]


def grown(m: Maker, like: Node) -> Node:
    """A few operations inside a region, brought to a tile's type and size."""
    m.pool.append(like)
    m.grow(m.random.randint(1, 2), tries=3)
    last = m.pool[-1]
    if last.dtype == ts.bool_:
        last = m.cast(last, ts.int32)
    last = m.small(last, 4.0)
    if last.dtype.is_float != like.dtype.is_float:
        if like.dtype.is_int:  # an inexact tile cannot become ints
            return m.cast(m.small(m.binary("add", like, m.fixed(1), 5.0), 4.0), like.dtype)
        last = m.cast(last, ts.f32)
    try:
        joined = m.binary("add", like, last, 8.0)
    except TypeRuleError:
        joined = m.binary("mul", like, m.fixed(-1 if like.dtype.is_int else -0.5), 8.0)
    if joined.type.shape != like.type.shape or joined.type.valid != like.type.valid:
        joined = m.binary("sub", like, m.fixed(1), 8.0)
    return m.cast(m.small(joined, 4.0), like.dtype)


def starting(m: Maker) -> Node | None:
    """A tile that a loop can carry, unless loops are deep already."""
    if m.depth >= 2:
        return None
    start = m.number(lambda n: n.dtype in (ts.f32, ts.int32))
    return start and m.small(start, 4.0)


def growing_loop(m: Maker) -> Node | None:
    """Any operations in a loop whose bound may be data, perhaps left early."""
    start = starting(m)
    if start is None:
        return None
    high = run_time_int(m, STEPS) if m.random.random() < 0.6 else m.fixed(m.random.randint(0, 3))
    limit = run_time_int(m, STEPS) if m.random.random() < 0.4 else None

    def body(index: Node, carried: list[Node]) -> list[Node]:
        after = grown(m, carried[0])
        return [after] if limit is None else [m.binary("ge", index, limit, 1.0), after]

    return for_loop(m, (m.fixed(0), high, 1), [start], body, early=limit is not None)[0]


def growing_while(m: Maker) -> Node | None:
    """`while n < limit: n = n * 2 + 1; x = ...` from an n that is data."""
    start = starting(m)
    if start is None:
        return None
    limit = m.random.choice([0, 3, 9])
    count = run_time_int(m, 5)

    def body(carried: list[Node]) -> list[Node]:
        doubled = m.binary("add", m.binary("mul", carried[0], m.fixed(2), 20.0), m.fixed(1), 20.0)
        return [doubled, grown(m, carried[1])]

    number, x = while_loop(m, [count, start], lambda carried: m.binary("lt", carried[0], m.fixed(limit), 1.0), body)
    return x if m.random.random() < 0.8 else number


def growing_branch(m: Maker) -> Node | None:
    """Any operations on either side of a condition that is data."""
    start = starting(m)
    if start is None:
        return None
    condition = m.binary(m.random.choice(["lt", "eq", "ge"]), run_time_int(m, 3), m.fixed(m.random.randint(0, 3)), 1.0)
    return m.random.choice(either(m, condition, lambda: [grown(m, start), start],
                                  lambda: [start, grown(m, start)]))


PAIRS = [(ts.f32, ts.f32)] * 3 + [(ts.bf16, ts.bf16)] * 2 + [
    (ts.f32, ts.bf16), (ts.bf16, ts.f32), (ts.f16, ts.f16), (ts.int8, ts.int8), (ts.int8, ts.int4), (ts.f64, ts.f64)]


def blocks_of(m: Maker, rows: Dim, depth: str, block: int, dtype: ts.DType, last: bool) -> Callable[[Node], Node]:
    """A new input [rows, depth], or its transpose; what it gives at a step of a loop over blocks of depth."""
    shape = (rows, Dim.of(depth)) if last else (Dim.of(depth), rows)
    view, known, bound = m.tensor(shape, dtype, whole=True)

    def at(start: Node) -> Node:
        assert start.value.expr is not None
        part = ("range", 1, Dim.of(block), (Dim.of(depth) - start.value.expr).minimum(block))
        seen = m.program.view(view, [("all",), part] if last else [part, ("all",)], [start.value])
        end = m.case.sizes[depth]
        return Node(m.program.load(seen), lambda memo: known.move(lambda x: x.narrow(
            int(last), s := start.number(memo), min(block, end - s))), True, True, bound / 4)

    return at


def product_loop(m: Maker) -> Node:
    """acc += x[:, k:k+b] @ w[k:k+b], few rows or many, weights stored either way; perhaps rescaled at each step."""
    rows = Dim.of(m.random.choice([1, 2, 3, 4, 7, 8, 16, "M"]))
    columns, depth = Dim.of(m.random.choice(["N", 4, 16, 33])), m.random.choice("MNK")
    block, (left, right) = m.random.choice([4, 8, 16, 32]), m.random.choice(PAIRS)
    last = m.random.random() < 0.5
    x, w = blocks_of(m, rows, depth, block, left, True), blocks_of(m, columns, depth, block, right, last)
    kind = ts.int32 if left.is_int else ts.f64 if left == ts.f64 else ts.f32
    zero = m.fixed(0 if left.is_int else 0.0)
    shape = [dim.value(m.case.sizes) for dim in (rows, columns)]
    start = Node(m.program.full((rows, columns), m.program.cast(zero.value, kind)),
                 lambda memo: approx.exact(torch.zeros(shape, dtype=torch.long if left.is_int else torch.double)),
                 True, True, 3e4)
    scale = m.random.choice([None, None, 1 if left.is_int else 0.5])

    def body(k: Node, carried: list[Node]) -> list[Node]:
        a, b = x(k), w(k)
        b = m.turned(b, [1, 0]) if last else b
        if scale is None:
            return [m.product(a, b, carried[0])]
        return [m.binary("add", m.binary("mul", carried[0], m.fixed(scale), 3e4), m.product(a, b), 3e4)]

    return for_loop(m, (m.fixed(0), m.size(depth), block), [start], body)[0]


def online_softmax(m: Maker) -> Node:
    """softmax(q k^T) v over blocks of keys with a running maximum, for a few queries or many."""
    rows, width = Dim.of(m.random.choice([1, 3, 8, "M"])), Dim.of(m.random.choice([4, 16, "K"]))
    depth, block = "N", m.random.choice([4, 8, 16])
    dtype = m.random.choice([ts.f32, ts.f32, ts.bf16])
    q = m.binary("mul", m.load((rows, width), dtype, whole=True), m.fixed(0.0625), 0.25)
    q = q if dtype == ts.f32 else m.cast(q, dtype)
    k, v = (blocks_of(m, width, depth, block, dtype, False) for _ in range(2))
    shape = [dim.value(m.case.sizes) for dim in (rows, width)]

    def full(number: float, dims: Sequence[Dim]) -> Node:
        known = approx.exact(torch.full(shape[:len(dims)], number, dtype=torch.double))
        return Node(m.program.full(dims, m.program.const(number)), lambda memo: known, False, True, 64.0)

    initial = [full(-64.0, [rows]), full(0.0, [rows]), full(0.0, [rows, width])]

    def body(step: Node, carried: list[Node]) -> list[Node]:
        top, total, result = carried
        scores = m.product(q, m.turned(k(step), [1, 0]))
        new_top = m.binary("max", top, m.reduced("max", scores, 1), 64.0)
        weights = m.unary("exp", m.binary("sub", scores, m.expanded(new_top, 1), 64.0), 1.0)
        rescale = m.unary("exp", m.binary("sub", top, new_top, 64.0), 1.0)
        total = m.binary("add", m.binary("mul", total, rescale, 64.0), m.reduced("sum", weights, 1), 64.0)
        values = m.product(weights if dtype == ts.f32 else m.cast(weights, dtype), v(step))
        result = m.binary("add", m.binary("mul", result, m.expanded(rescale, 1), 64.0), values, 64.0)
        return [new_top, total, result]

    _, total, result = for_loop(m, (m.fixed(0), m.size(depth), block), initial, body)
    return m.binary("div", result, m.expanded(total, 1), 64.0)
