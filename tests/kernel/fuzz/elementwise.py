"""Operations element by element: each takes the maker, and gives the tile that it made or None."""

from __future__ import annotations

import torch

from tessera import types as ts

from . import approx
from .maker import Maker
from .node import Node


def elementwise(m: Maker) -> Node | None:
    """a + b and the like."""
    a = m.number()
    if a is None:
        return None
    b = m.partner(a)
    if m.random.random() < 0.5:
        a, b = b, a
    names = ["add", "sub", "mul", "max", "min"] + (["div"] if a.dtype.is_float else [])
    name = m.random.choice(names)
    if name == "div":
        b = m.binary("add", m.unary("abs", b, b.bound), m.fixed(0.5), b.bound + 0.5)
        return m.binary("div", a, b, a.bound * 2)
    bound = a.bound * b.bound if name == "mul" else a.bound + b.bound
    return m.binary(name, a, b, bound)


def integer(m: Maker) -> Node | None:
    """Division, bits and shifts of ints."""
    a = m.number(lambda n: n.dtype.is_int)
    if a is None:
        return None
    name = m.random.choice(["floordiv", "mod", "and", "or", "xor", "shl", "shr"])
    low, high = {"floordiv": (1, 9), "mod": (1, 9), "shl": (0, 8), "shr": (0, 8)}.get(name, (-99, 99))
    return m.binary(name, a, m.fixed(m.random.randint(low, high)), 2.0**31)


def function(m: Maker) -> Node | None:
    """A float function, its argument kept where the function is defined and moderate."""
    a = m.number(lambda n: n.dtype.is_float)
    if a is None:
        return None
    name = m.random.choice([*approx.MONOTONE, *approx.STEPS, "sin", "cos", "sqrt", "neg", "abs", "pow"])
    if name in approx.STEPS and not a.exact:
        return None
    if name in ("log", "log2", "log1p", "sqrt", "rsqrt"):
        a = m.binary("add", m.unary("abs", a, a.bound), m.fixed(0.25), a.bound + 0.25)
        return m.unary(name, a, max(a.bound, 3.0))
    if name == "pow":
        a = m.binary("add", m.unary("abs", a, a.bound), m.fixed(0.5), a.bound + 0.5)
        return power(m, m.small(a, 8.0), m.random.choice([-1.0, 0.5, 2.0, 3.0]))
    if name in ("exp", "exp2", "expm1", "softplus"):
        a = m.small(a, 6.0)
        return m.unary(name, a, 404.0)
    return m.unary(name, a, max(a.bound, 1.0) + 1)


def power(m: Maker, a: Node, exponent: float) -> Node:
    """a ** exponent."""
    value = m.program.binary("pow", a.value, m.program.const(exponent))
    dtype = value.type.dtype
    return Node(value, lambda memo: approx.power(approx.cast(a.at(memo), dtype), exponent, dtype),
                False, False, max(a.bound**3, 2.0))


def fma(m: Maker) -> Node | None:
    """a * b + c, rounded once."""
    a = m.number(lambda n: n.dtype.is_float)
    if a is None:
        return None
    b, c = m.partner(a), m.partner(a)
    value = m.program.fma(a.value, b.value, c.value)
    dtype = value.type.dtype
    return Node(value, lambda memo: approx.fma(*(approx.cast(n.at(memo), dtype) for n in (a, b, c)), dtype),
                a.exact and b.exact and c.exact, a.same and b.same and c.same, a.bound * b.bound + c.bound)


def compared(m: Maker) -> tuple[Node, Node] | None:
    """A number and a bool tile from a comparison of it."""
    a = m.number(lambda n: n.exact)
    if a is None:
        return None
    b = m.partner(a)
    if not b.exact:
        b = m.constant(a)
    return a, m.binary(m.random.choice([*approx.COMPARE]), a, b, 1.0)


def compare_and_choose(m: Maker) -> Node | None:
    """`where` on a comparison, or whether any or all of a row compare so."""
    both = compared(m)
    if both is None:
        return None
    a, condition = both
    if m.random.random() < 0.3:
        condition = m.unary("not", condition, 1.0)
    if m.random.random() < 0.2:
        kind = m.random.choice(["any", "all"])
        return m.reduced(kind, condition, condition.type.rank - 1) if condition.type.rank else condition
    x = m.number(lambda n: n.type.shape == condition.type.shape) or m.constant(a)
    return m.chosen(condition, x, m.partner(x))


def logic(m: Maker) -> Node | None:
    """and, or, xor of bools from inputs and comparisons."""
    a = m.pick(lambda n: n.dtype == ts.bool_)
    if a is None or m.random.random() < 0.4:
        both = compared(m)
        a = both[1] if both else m.load(dtype=ts.bool_)
    equals = [n for n in m.pool if n.dtype == ts.bool_ and n.type == a.type]
    b = m.random.choice(equals) if equals and m.random.random() < 0.5 else None
    if b is None:
        if not a.whole or not a.type.rank:
            return m.unary("not", a, 1.0)
        b = m.load(a.type.shape[m.random.randint(0, a.type.rank - 1):], ts.bool_, whole=True)
    return m.binary(m.random.choice(["and", "or", "xor"]), a, b, 1.0)


def cast(m: Maker) -> Node | None:
    """To another dtype."""
    a = m.number(lambda n: n.type.rank)
    if a is None:
        return None
    target = m.random.choice([t for t in (*m.words.floats, *m.words.ints) if t != ts.int4])
    if not target.is_float and not a.exact:
        return None
    if target.bits == 8:
        a = m.small(a, 32.0)
    return m.cast(a, target)


def random_numbers(m: Maker) -> Node | None:
    """Uniform numbers of a seed and of ints of the program."""
    offset = m.number(lambda n: n.dtype in (ts.int32, ts.int64) and n.type.rank)
    if offset is None:
        return None
    seed = m.random.randint(0, 2**31 - 1)
    value, bits = m.program.rand(m.program.const(seed), offset.value), offset.dtype.bits
    return Node(value, lambda memo: approx.exact(approx.rand(seed, offset.at(memo).x, bits)), True, True, 1.0)


def dropout(m: Maker) -> Node | None:
    """x / (1 - p) where a random number is at least p."""
    x = m.number(lambda n: n.type.rank and n.dtype.is_float and n.whole)
    if x is None:
        return None
    seed, p = m.random.randint(0, 99), m.random.choice([0.125, 0.5])
    index = m.program.iota(x.type.shape, x.type.rank - 1)
    sizes = [dim.value(m.case.sizes) for dim in x.type.shape]
    numbers = approx.rand(seed, torch.arange(sizes[-1])).expand(sizes)
    drawn = Node(m.program.rand(m.program.const(seed), index), lambda memo: approx.exact(numbers), True, True, 1.0)
    scaled = m.binary("div", x, m.fixed(1 - p), x.bound * 2)
    return m.chosen(m.binary("ge", drawn, m.fixed(p), 1.0), scaled, m.fixed(0.0))


def scalar(m: Maker) -> Node:
    """A run-time scalar argument."""
    dtype = m.random.choice([ts.f32, ts.int32, ts.int64])
    number = m.random.randint(-16, 16) / 8 if dtype.is_float else m.random.randint(-9, 9)
    known = approx.exact(torch.tensor(number))
    value = m.program.scalar(f"x{len(m.case.inputs)}", dtype)
    m.case.inputs.append(number)
    return Node(value, lambda memo: known, True, True, abs(number))


def softmax(m: Maker) -> Node | None:
    """exp(x - max) / sum along the last axis: a reduction that feeds the row it came from, twice."""
    x = m.number(lambda n: n.type.rank and n.dtype.is_float and n.bound <= 64)
    if x is None:
        return None
    last = x.type.rank - 1
    shifted = m.binary("sub", x, m.expanded(m.reduced("max", x, last), last), x.bound * 2)
    weights = m.unary("exp", m.small(shifted, 12.0), 1.0)
    if m.random.random() < 0.3:
        return weights
    return m.binary("div", weights, m.expanded(m.reduced("sum", weights, last), last), 1.0)
