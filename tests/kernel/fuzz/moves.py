"""Operations that move elements: shapes, parts, joins, rows of tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera import types as ts
from tessera.kernel.dims import Dim

from . import approx
from .approx import Approx
from .maker import Maker
from .node import Memo, Node

Spec = list[tuple[Any, ...]]


def iota(m: Maker) -> Node | None:
    """0, 1, ... along an axis."""
    like = m.pick(lambda n: n.type.rank and n.whole)
    if like is None:
        return m.load()
    axis = m.random.randrange(like.type.rank)
    sizes = [dim.value(m.case.sizes) for dim in like.type.shape]
    steps = torch.arange(sizes[axis]).reshape(-1, *[1] * (len(sizes) - 1 - axis)).expand(sizes)
    value = m.program.iota(like.type.shape, axis)
    return Node(value, lambda memo: approx.exact(steps), True, True, float(sizes[axis]))


def transpose(m: Maker) -> Node | None:
    """Axes in another order."""
    a = m.pick(lambda n: n.type.rank >= 2)
    return a and m.turned(a, m.random.sample(range(a.type.rank), a.type.rank))


def reshape(m: Maker) -> Node | None:
    """Two dims merged, or one split."""
    a = m.pick(lambda n: n.type.rank >= 1)
    if a is None:
        return None
    shape = list(a.type.shape)
    axis = m.random.randrange(len(shape))
    if shape[axis].const == 16 and m.random.random() < 0.7:
        shape[axis:axis + 1] = [Dim.of(2), Dim.of(8)]
    elif axis + 1 < len(shape):
        shape[axis:axis + 2] = [shape[axis] * shape[axis + 1]]
    else:
        shape.insert(axis, Dim.of(1))
    value = m.program.reshape(a.value, shape)

    def split_or_merge(x: Tensor) -> Tensor:
        if len(shape) < x.dim():
            return x.flatten(axis, axis + 1)
        return x.unflatten(axis, (-1, 8) if shape[axis].const == 2 else (1, -1))

    return m.moved(value, a, split_or_merge)


def slice(m: Maker) -> Node | None:
    """The end of an axis, or one place of it, known at compile time."""
    a = m.pick(lambda n: any(v is None for v in n.type.valid))
    if a is None:
        return None
    axis = m.random.choice([i for i, v in enumerate(a.type.valid) if v is None])
    dim = a.type.shape[axis]
    size = dim.value(m.case.sizes)
    start = m.random.randrange(size)
    spec: Spec = [("all",)] * a.type.rank
    drop = m.random.random() < 0.3
    spec[axis] = ("at", 1) if drop else ("range", 1, dim - start, None)
    value = m.program.slice(a.value, spec, [m.program.const(start)])
    return m.moved(value, a, lambda x: x.select(axis, start) if drop else x.narrow(axis, start, size - start))


def concat(m: Maker) -> Node | None:
    """Two tiles joined."""
    a = m.pick(lambda n: n.type.rank)
    if a is None:
        return None
    axis = m.random.randrange(a.type.rank)
    b = m.pick(lambda n: n.dtype == a.dtype and n.type.rank == a.type.rank and all(
        i == axis or p == q for i, (p, q) in enumerate(zip(n.type.shape, a.type.shape))))
    assert b
    return joined(m, a, b, axis)


def joined(m: Maker, a: Node, b: Node, axis: int) -> Node:
    """a, then b, along an axis."""
    value = m.program.concat([a.value, b.value], axis)

    def compute(memo: Memo) -> Approx:
        p, q = a.at(memo), b.at(memo)
        return Approx(torch.cat([p.x, q.x], axis), torch.cat([p.e, q.e], axis))

    return Node(value, compute, a.exact and b.exact, a.same and b.same, max(a.bound, b.bound), a.product or b.product)


def expand(m: Maker) -> Node | None:
    """A new axis of size 1."""
    a = m.pick(lambda n: n.type.rank <= 2)
    return a and m.expanded(a, m.random.randint(0, a.type.rank))


def element(m: Maker) -> Node | None:
    """One element read or replaced, at a place known at compile time."""
    a = m.pick(lambda n: n.type.rank and n.whole)
    if a is None:
        return None
    place = tuple(m.random.randrange(dim.value(m.case.sizes)) for dim in a.type.shape)
    indices = [m.program.const(i) for i in place]
    if m.random.random() < 0.5 or a.dtype == ts.bool_:
        return m.moved(m.program.extract(a.value, indices), a, lambda x: x[place])
    scalar = m.constant(a, 0)
    value = m.program.insert(a.value, scalar.value, indices)

    def compute(memo: Memo) -> Approx:
        whole, new = a.at(memo), approx.cast(scalar.at(memo), a.dtype)
        x, e = whole.x.clone(), whole.e.clone()
        x[place], e[place] = new.x, new.e
        return Approx(x, e)

    return Node(value, compute, a.exact, a.same, max(a.bound, scalar.bound))


# -- parts at places that are known only when the program runs ----------------------------------------


def run_time_int(m: Maker, high: int) -> Node:
    """An int scalar in 0..high that the compiler does not know."""
    sources = [lambda: m.size(m.random.choice("MNK")), lambda: first_of(m), *([lambda: m.indices[0]] * len(m.indices))]
    return m.binary("mod", m.random.choice(sources)(), m.fixed(high + 1), float(high))


def first_of(m: Maker) -> Node:
    """An int read from a tile."""
    a = m.pick(lambda n: n.dtype in (ts.int32, ts.int64) and n.type.rank and n.whole)
    if a is None:
        a = m.load((Dim.of("N"),), ts.int32, whole=True)
    place = (0,) * a.type.rank
    return m.moved(m.program.extract(a.value, [m.program.const(0)] * a.type.rank), a, lambda x: x[place])


def part_at(m: Maker) -> Node | None:
    """Eight of sixteen, or a row, from a place known at run time."""
    a = m.pick(lambda n: any(v is None for v in n.type.valid))
    if a is None:
        return None
    axis = m.random.choice([i for i, v in enumerate(a.type.valid) if v is None])
    size = a.type.shape[axis].value(m.case.sizes)
    spec: Spec = [("all",)] * a.type.rank
    if a.type.shape[axis].const == 16:
        start = run_time_int(m, 8)
        spec[axis] = ("range", 1, Dim.of(8), None)
        return m.moved_at(m.program.slice(a.value, spec, [start.value]), a, start, lambda x, i: x.narrow(axis, i, 8))
    start = run_time_int(m, size - 1)
    if m.random.random() < 0.5:
        spec[axis] = ("at", 1)
        return m.moved_at(m.program.slice(a.value, spec, [start.value]), a, start, lambda x, i: x.select(axis, i))
    assert start.value.expr is not None
    extent = m.random.choice([3, 8])
    spec[axis] = ("range", 1, Dim.of(extent), (a.type.shape[axis] - start.value.expr).minimum(extent))
    return m.moved_at(m.program.slice(a.value, spec, [start.value]), a, start,
                      lambda x, i: x.narrow(axis, i, min(extent, size - i)))


def window(m: Maker) -> Node:
    """Rows of an input from a place known at run time, with a ragged end."""
    name = m.random.choice("MNK")
    view, known, bound = m.tensor((Dim.of(name), Dim.of(m.random.choice(["N", 4, 16]))), whole=True)
    size, extent = m.case.sizes[name], m.random.choice([4, 8])
    start = run_time_int(m, size - 1)
    assert start.value.expr is not None
    ends = (Dim.of(name) - start.value.expr).minimum(extent)
    view = m.program.view(view, [("range", 1, Dim.of(extent), ends), ("all",)], [start.value])
    return Node(m.program.load(view), lambda memo: known.move(
        lambda x: x[start.number(memo):start.number(memo) + extent]), True, True, bound)


def halves(m: Maker) -> Node | None:
    """An even dim split, and its parts swapped or combined."""
    a = m.number(lambda n: any(d.const in (4, 16) and v is None for d, v in zip(n.type.shape, n.type.valid)))
    if a is None:
        return None
    axis = m.random.choice([i for i, d in enumerate(a.type.shape) if d.const in (4, 16) and a.type.valid[i] is None])
    half = a.type.shape[axis].value({}) // 2
    parts = []
    for start in (0, half):
        spec: Spec = [("all",)] * a.type.rank
        spec[axis] = ("range", 1, Dim.of(half), None)
        value = m.program.slice(a.value, spec, [m.program.const(start)])
        parts.append(m.moved(value, a, lambda x, start=start: x.narrow(axis, start, half)))
    first, second = parts
    if m.random.random() < 0.3:
        return m.binary("mul", first, second, a.bound**2)
    factor = m.constant(a, 1)
    turned = m.binary("sub", m.binary("mul", first, factor, a.bound * 2), second, a.bound * 3)
    return joined(m, turned, m.binary("add", second, first, a.bound * 2), axis)


def element_at(m: Maker) -> Node | None:
    """One element replaced at a place known at run time."""
    a = m.number(lambda n: n.type.rank and n.whole)
    if a is None:
        return None
    place = [run_time_int(m, dim.value(m.case.sizes) - 1) for dim in a.type.shape]
    new = m.constant(a, 0)
    value = m.program.insert(a.value, new.value, [p.value for p in place])

    def compute(memo: Memo) -> Approx:
        whole, scalar = a.at(memo), approx.cast(new.at(memo), a.dtype)
        x, e = whole.x.clone(), whole.e.clone()
        where = tuple(p.number(memo) for p in place)
        x[where], e[where] = scalar.x, scalar.e
        return Approx(x, e)

    return Node(value, compute, a.exact, a.same, max(a.bound, new.bound))


def gather(m: Maker) -> Node | None:
    """Rows of a table by the ints of a tile."""
    index = m.number(lambda n: n.dtype in (ts.int32, ts.int64) and n.type.rank in (1, 2))
    if index is None or m.random.random() < 0.4:
        index = m.load((Dim.of("M"),), m.random.choice([ts.int32, ts.int64]))
    shape = (Dim.of(m.random.choice("MNK")), *[Dim.of(m.random.choice(["N", "K", 4]))] * m.random.randint(0, 1))
    # The CPU backend gathers single rows of int4 only, and says so.
    dtype = m.random.choice([t for t in (*m.words.floats, *m.words.ints) if t != ts.int4])
    view, known, bound = m.tensor(shape, dtype, whole=True)
    last = shape[0].value(m.case.sizes) - 1
    index = m.binary("max", m.binary("min", index, m.fixed(last), index.bound), m.fixed(0), float(last))
    value = m.program.gather(view, index.value)
    return Node(value, lambda memo: known.move(lambda x: x[index.at(memo).x]), True, True, bound)
