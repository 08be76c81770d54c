"""Random tile programs of 3 to 15 operations, each with its own float64 reference.

In: a `random.Random` (hypothesis's for shrinking, a seeded one for the kept seeds). Out: a `Case`: the IR, the
inputs, and for every output the expected values with the error that each element may have.

  node         a tile and its meaning; a program and what it must compute
  approx       float64 values with error bounds: the meaning of the operations
  maker        grows one program: inputs, the pool of tiles, what operations are built of
  elementwise, moves, reductions, control     the operations
  outputs      what is stored and how: plain, on a condition, row by row, scattered, added
"""

from __future__ import annotations

from random import Random

from tessera import types as ts
from tessera.kernel.dims import Dim

from . import approx, control, elementwise, moves, reductions
from .maker import Maker
from .node import Case, Node, Vocabulary
from .outputs import finish

__all__ = ["ALL", "FIRST", "Case", "make"]

_FIRST_KINDS = [
    elementwise.elementwise, elementwise.elementwise, elementwise.function, elementwise.compare_and_choose,
    reductions.reduction, reductions.scan, reductions.sort, reductions.mma, elementwise.cast, moves.transpose,
    moves.reshape, moves.slice, moves.concat, moves.expand, moves.element, control.loop, control.branch, moves.iota,
    elementwise.fma, elementwise.integer]

# Seeds were kept before the vocabulary grew: it stays as it was for them.
FIRST = Vocabulary(
    sizes=(1, 2, 3, 5, 7, 8, 16, 17, 33, 40, 65),
    floats=(ts.f32, ts.f32, ts.f32, ts.bf16, ts.f16, ts.fp8_e4m3, ts.fp8_e5m2, ts.f64),
    ints=(ts.int32, ts.int32, ts.int8, ts.uint8), kinds=_FIRST_KINDS, blocks=(8,))

ALL = Vocabulary(
    sizes=(1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 40, 65),
    floats=FIRST.floats,
    ints=(ts.int32, ts.int32, ts.int8, ts.uint8, ts.int64, ts.int4),
    kinds=[*_FIRST_KINDS, *[elementwise.function] * 4, elementwise.integer, elementwise.integer, elementwise.logic,
           elementwise.random_numbers, elementwise.dropout, elementwise.scalar, elementwise.softmax,
           moves.part_at, moves.part_at, moves.window, moves.halves, moves.element_at, moves.gather,
           reductions.top, reductions.int4_product, control.growing_loop, control.growing_loop, control.growing_while,
           control.growing_branch, control.product_loop, control.product_loop, control.online_softmax],
    blocks=(8, 8, 5, 16), wide=True)


def make(random: Random, words: Vocabulary = ALL) -> Case:
    """A random program."""
    m = Maker(random, words)
    parallel = random.random() < 0.4
    count = random.randint(3, 15)
    if not parallel:
        m.pool.append(m.load())
        m.grow(count)
        finish(m)
        return _inputs_first(m.case)
    program = m.program
    extents = [program.size(Dim.of("M").ceildiv(m.block))]
    if words.wide and random.random() < 0.3:
        m.columns = 3
        extents.append(program.const(m.columns))
    block = program.grid(*extents)
    with program.inside(block):
        for axis, value in enumerate(block.args):
            m.indices.append(Node(value, lambda memo, axis=axis: approx.exact(approx.torch.tensor(memo["place"][axis])),
                                  True, True, 64.0))
        m.first_row = program.binary("mul", block.args[0], program.const(m.block))
        m.pool.append(m.load())
        m.grow(count)
        finish(m)
    return _inputs_first(m.case)


def _inputs_first(case: Case) -> Case:
    """Parameters were declared as they were needed."""
    case.program.function.params.sort(key=lambda p: p.is_output)
    return case
