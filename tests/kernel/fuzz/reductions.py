"""Operations along an axis: reductions, scans, sorts, matrix products."""

from __future__ import annotations

from typing import Any

from tessera import types as ts
from tessera.kernel.dims import Dim

from . import approx
from .maker import Maker
from .node import Node


def reduction(m: Maker) -> Node | None:
    """sum, mean, max, argmax, ... along any axis."""
    a = m.number(lambda n: n.type.rank)
    if a is None:
        return None
    kinds = ["sum", "max", "min"] + (["mean"] if a.dtype.is_float else [])
    kinds += ["argmax", "argmin"] if a.exact else []
    node = m.reduced(m.random.choice(kinds), a, axis := m.random.randrange(a.type.rank))
    return m.expanded(m.small(node), axis) if m.random.random() < 0.4 else node


def scan(m: Maker) -> Node | None:
    """Running sums or maxima."""
    a = m.number(lambda n: n.type.rank)
    if a is None:
        return None
    kind, axis = m.random.choice(["cumsum", "cummax"]), m.random.randrange(a.type.rank)
    value = m.program.scan(kind, a.value, axis)
    dtype = value.type.dtype
    sums = kind == "cumsum" and dtype.is_float
    bound = a.bound * max(a.type.shape[axis].value(m.case.sizes), 1)
    return Node(value, lambda memo: approx.scan(kind, approx.cast(a.at(memo), dtype), axis, dtype),
                a.exact and not sums, a.same and not (sums and a.product), bound)


def sort(m: Maker) -> Node | None:
    """Sorted values, or their indices."""
    a = m.number(lambda n: n.type.rank)
    return a and sorted_along(m, a, m.random.randrange(a.type.rank), m.random.random() < 0.5)


def sorted_along(m: Maker, a: Node, axis: int, down: bool) -> Node:
    """Values or indices of a sort."""
    values, indices = m.program.sort(a.value, axis, down)
    if a.exact and m.random.random() < 0.5:
        return Node(indices, lambda memo: approx.sort(a.at(memo), axis, down)[1], True, True, 64.0)
    return Node(values, lambda memo: approx.sort(a.at(memo), axis, down)[0], a.exact, a.same, a.bound)


def top(m: Maker) -> Node | None:
    """The k largest along a row."""
    a = m.number(lambda n: n.type.rank and n.type.valid[-1] is None)
    if a is None:
        return None
    axis, k = a.type.rank - 1, min(m.random.choice([1, 2, 3]), a.type.shape[-1].value(m.case.sizes))
    ordered = sorted_along(m, a, axis, True)
    spec: list[tuple[Any, ...]] = [*[("all",)] * axis, ("range", 1, Dim.of(k), None)]
    return m.moved(m.program.slice(ordered.value, spec, [m.program.const(0)]), ordered, lambda x: x[..., :k])


def mma(m: Maker) -> Node | None:
    """A matrix product with an input, or of a tile with itself."""
    a = m.number(lambda n: n.type.rank >= 2)
    if a is None:
        return None
    a = m.small(a, 8.0)
    if m.random.random() < 0.2:
        b = m.turned(a, [*range(a.type.rank - 2), a.type.rank - 1, a.type.rank - 2])
    elif a.type.valid[-1] is not None:
        return None
    else:
        columns = Dim.of(m.random.choice(["M", "N", "K", 4, 16]))
        batch = a.type.shape[:-2] if m.random.random() < 0.3 and not any(a.type.valid[:-2]) else ()
        dtype = a.dtype if m.random.random() < 0.6 or a.dtype == ts.bool_ else ts.f32 if a.dtype.is_float else ts.int8
        b = m.load((*batch, a.type.shape[-1], columns), dtype, whole=True)
    plain = m.product(a, b)
    acc = m.number(lambda n: n.type == plain.type) if m.random.random() < 0.3 else None
    return m.product(a, b, acc) if acc is not None else plain


def int4_product(m: Maker) -> Node | None:
    """Ints against 4-bit weights, stored with either axis last."""
    a = m.number(lambda n: n.type.rank >= 2 and n.dtype.is_int and n.type.valid[-1] is None)
    if a is None:
        a = m.load((Dim.of("M"), Dim.of("K")), ts.int8)
    a = m.small(a, 32.0)
    columns, depth = Dim.of(m.random.choice(["N", 4, 16])), a.type.shape[-1]
    if m.random.random() < 0.5:
        return m.product(a, m.load((depth, columns), ts.int4, whole=True))
    return m.product(a, m.turned(m.load((columns, depth), ts.int4, whole=True), [1, 0]))
