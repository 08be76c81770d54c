"""Annotations: what they mean and what is refused."""

import pytest

import tessera as ts
from tessera import Tile, f32, tile
from tessera.errors import CompileError, InputError
from tessera.kernel.dims import Dim
from tessera.kernel.signature import Parameter, make_signature


def signature(**dims):
    return make_signature("k", [Parameter(name, "tile", shape) for name, shape in dims.items()])


@pytest.mark.parametrize("dims, shapes, expected", [
    ({"x": ("S", "D")}, {"x": (3, 4)}, {"S": 3, "D": 4}),
    ({"x": ("B*S", "D"), "y": ("S",)}, {"x": (6, 4), "y": (3,)}, {"B": 2, "S": 3, "D": 4}),
    ({"x": ("V+1",)}, {"x": (11,)}, {"V": 10}),
    ({"x": ("D/2",)}, {"x": (4,)}, {"D": 8}),
    ({"x": ("2*D-1",)}, {"x": (9,)}, {"D": 5}),
    ({"x": ("B*S",)}, {"x": (6,)}, {"B*S": 6}),
    ({"x": ("A*B", "B*C", "C")}, {"x": (6, 12, 4)}, {"A": 2, "B": 3, "C": 4}),
])
def test_sizes_are_solved(dims, shapes, expected):
    found = signature(**dims)
    assert found.solve(shapes) == expected
    assert set(found.sizes) == set(expected)


def test_fractions_are_exact():
    found = signature(x=("D",), half=("D/2",), quarter=("D/4",))
    (x,), (half,), (quarter,) = (found.shapes[n] for n in ("x", "half", "quarter"))
    assert x == 4 * quarter and half == 2 * quarter and x // 2 == half
    assert found.divisors == {"D": 4}


def test_names_of_the_context():
    found = signature(x=("B*S", "D"), y=("S", "V+1", 3))
    assert set(found.named) == {"B*S", "D", "S", "V+1", "B", "V"}
    assert found.named["B*S"] == Dim.atom("B") * Dim.atom("S")


def make(annotations, defaults=""):
    source = f"def f({annotations}):\n    pass\n"
    space = {"ts": ts, "Tile": Tile, "f32": f32, "tile": tile}
    exec(source, space)
    return space["f"]


@pytest.mark.parametrize("annotations, message", [
    ("x", "parameter 'x' has no annotation"),
    ("x: list", "expected Tile"),
    ('x: Tile["S@", f32]', "'S@' is not a size"),
    ('x: "Tile[Unknown]"', "cannot be evaluated"),
])
def test_annotations_that_are_refused(annotations, message):
    from tessera.kernel.signature import read_parameters

    function = make(annotations)
    with pytest.raises(CompileError, match=message):
        make_signature("f", read_parameters(function, ["x"], {}, {}))


def test_a_kernel_has_a_tensor():
    @ts.kernel
    def none(n: int):
        pass

    with pytest.raises(InputError, match="no parameter is a tensor"):
        none.check()


def test_a_missing_compile_time_argument():
    @ts.kernel
    def block(x: Tile["N", f32], size: ts.constexpr):
        x[0:size] = 0.0

    with pytest.raises(InputError, match="compile-time argument 'size' is missing"):
        block.check()
    block.check(size=4)
