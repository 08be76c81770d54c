"""The generated checks and the matcher, which is their meaning, agree with each other and with a search over sizes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import tessera as ts
from tessera import Tensor
from tessera.errors import ShapeError
from tessera.function.annotations import read_signature
from tessera.function.match import match

DIMS = ("A", "B", "C", 2, "A+1", "2*B", "A*B", "B/2", "A+B", "C-1", "n", "A+n", "#A", "#2*B")
DTYPES = (None, None, torch.float32, torch.int64)
LARGEST = 7  # of a size that the search tries


def holds(dims: list[tuple], shapes: list[tuple], n: int) -> bool:
    """Whether some sizes of at least 0 make every dim its number; fractions are exact."""
    if any(len(d) != len(s) for d, s in zip(dims, shapes)):
        return False
    for a, b, c in itertools.product(range(LARGEST), repeat=3):
        sizes = {"A": a, "B": b, "C": c, "n": n}
        if all(eval(str(dim).lstrip("#"), {}, dict(sizes)) == size or (size == 1 and str(dim).startswith("#"))
               for d, s in zip(dims, shapes) for dim, size in zip(d, s)):
            return True
    return False


def draw(rng: random.Random) -> tuple[list[tuple], list[tuple], list, int]:
    """Dims of some tensors, shapes that fit more often than not, dtypes, and a value of n."""
    sizes = {"A": rng.randint(0, 2), "B": 2 * rng.randint(0, 1), "C": rng.randint(1, 3), "n": rng.randint(0, 2)}
    dims = [tuple(rng.choice(DIMS) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 3))]
    dims.insert(0, ("A", "B", "C"))  # known, so that the search and the solver mean the same
    rng.shuffle(dims)
    shapes = [tuple(1 if rng.random() < 0.3 and str(dim).startswith("#") else int(eval(str(dim).lstrip("#"), {}, sizes))
                    for dim in d) for d in dims]
    for i in range(len(shapes)):
        if rng.random() < 0.25 and shapes[i]:
            axis = rng.randrange(len(shapes[i]))
            changed = list(shapes[i])
            changed[axis] = rng.randint(0, 4)
            shapes[i] = tuple(changed)
    return dims, shapes, [rng.choice(DTYPES) for _ in dims], sizes["n"]


@pytest.mark.parametrize("seed", range(20))
def test_arguments_and_results(seed) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        dims, shapes, dtypes, n = draw(rng)
        values = [torch.empty(s, dtype=dtype or torch.float32) for s, dtype in zip(shapes, dtypes)]
        wrong_dtype = rng.random() < 0.1 and dtypes[-1] is torch.float32
        if wrong_dtype:
            values[-1] = values[-1].double()

        def f(a, b, c=None, d=None, *, n):
            return result  # noqa: B023

        result = values[-1]
        names = "abcd"[:len(values) - 1]
        annotations = [Tensor[(*d, dtype)] if dtype else Tensor[d] for d, dtype in zip(dims, dtypes)]
        if not names:
            continue
        f.__annotations__ = {**dict(zip(names, annotations)), "n": int, "return": annotations[-1]}
        arguments = {**dict.fromkeys("abcd"), **dict(zip(names, values)), "n": n}
        expected = holds(dims, shapes, n) and not wrong_dtype
        verdicts = []
        for check in (lambda: ts.function(f)(**arguments),  # noqa: B023
                      lambda: match(read_signature(f), arguments, result)):  # noqa: B023
            try:
                check()
                verdicts.append(True)
            except ShapeError:
                verdicts.append(False)
        assert verdicts == [expected, expected], (dims, shapes, dtypes, n)


@pytest.mark.parametrize("seed", range(10))
def test_unions_and_containers(seed) -> None:
    rng = random.Random(100 + seed)
    for _ in range(25):
        base = ("A", "B", "C")
        first = tuple(rng.choice(("A", "B", 2, "A+1")) for _ in range(rng.randint(1, 2)))
        second = tuple(rng.choice(("B", "C", "A+B")) for _ in range(rng.randint(1, 3)))
        each = tuple(rng.choice(("A", "B", "C", 2)) for _ in range(rng.randint(0, 2)))
        optional = rng.random() < 0.5

        def f(x, choice, items):
            return choice

        union = Tensor[first] | Tensor[second]
        f.__annotations__ = {"x": Tensor[base], "choice": union | None if optional else union,
                             "items": list[Tensor[each]] if rng.random() < 0.7 else object}
        sizes = {"A": rng.randint(0, 2), "B": rng.randint(0, 2), "C": rng.randint(1, 3), "n": 0}

        def shape(dims, sizes=sizes):
            made = [int(eval(str(dim), {}, dict(sizes))) for dim in dims]
            if made and rng.random() < 0.2:
                made[rng.randrange(len(made))] = rng.randint(0, 4)
            return tuple(made)

        x = torch.empty(shape(base))
        choice = None if rng.random() < 0.2 else torch.empty(shape(rng.choice((first, second))))
        items = [torch.empty(shape(each)) for _ in range(rng.randint(0, 3))]
        listed = [] if f.__annotations__["items"] is object else items
        readings = [[]] if choice is None and optional else [] if choice is None else [[first], [second]]
        expected = any(holds([base, *r, *[each] * len(listed)],
                             [tuple(x.shape), *[tuple(choice.shape) for _ in r], *[tuple(i.shape) for i in listed]], 0)
                       for r in readings)
        arguments = {"x": x, "choice": choice, "items": items}
        for check in (lambda: ts.function(f)(**arguments), lambda: match(read_signature(f), arguments)):  # noqa: B023
            try:
                check()
                verdict = True
            except ShapeError:
                verdict = False
            assert verdict == expected, (base, first, second, each, arguments)
