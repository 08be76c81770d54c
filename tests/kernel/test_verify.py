"""The verifier accepts what the builder makes and finds each kind of damage."""

import copy

import pytest

import tessera as ts
from tessera import Tile, f32, tile
from tessera.kernel import ir
from tessera.kernel.diagnostics import InternalCompilerError
from tessera.kernel.verify import verify
from tessera.types import bf16, int32


@ts.kernel
def sample(x: Tile["S", "D", f32], o: Tile["S", "D", f32], n: int):
    for i in tile.grid(x.shape[0]):
        acc = tile.zeros((x.shape[1],))
        for j in tile.range(n):
            if j > 2:
                acc = acc + x[i]
        o[i] = acc * 2.0


def function():
    return copy.deepcopy(sample.trace())


def find(f, name):
    return next(op for op in ir.walk(f.body) if op.name == name)


def test_sound_function():
    verify(function())


def drop_yield(f):
    find(f, "for").regions[0].ops.pop()


def use_out_of_scope(f):
    inner = find(f, "for").regions[0].args[0]
    f.body.ops.append(ir.Op("print", [inner], attrs={"text": ""}))


def use_before_definition(f):
    grid = find(f, "grid").regions[0]
    grid.ops.reverse()


def define_twice(f):
    find(f, "grid").regions[0].args.append(f.params[0].value)


def other_dtype(f):
    op = find(f, "add")
    op.results[0].type = ir.TileTy(op.result.type.shape, bf16)


def other_shape(f):
    op = find(f, "mul")
    op.results[0].type = ir.TileTy((), f32)


def wrong_arity(f):
    find(f, "mul").operands.pop()


def unknown_operation(f):
    find(f, "mul").name = "multiply"


def wrong_carried_type(f):
    find(f, "for").regions[0].args[1].type = ir.TileTy((), int32)


def condition_not_bool(f):
    find(f, "if").operands[0] = find(f, "for").regions[0].args[0]


def load_of_a_tile(f):
    find(f, "load").operands[0] = find(f, "full").result


@pytest.mark.parametrize("damage", [
    drop_yield, use_out_of_scope, use_before_definition, define_twice, other_dtype, other_shape, wrong_arity,
    unknown_operation, wrong_carried_type, condition_not_bool, load_of_a_tile,
])
def test_damage_is_found(damage):
    damaged = function()
    damage(damaged)
    with pytest.raises(InternalCompilerError, match="kernel sample: internal error"):
        verify(damaged)
