"""Runs a random program on backends: each against the reference's bounds, and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch

from tessera.kernel.verify import verify

from .approx import Approx
from .node import Case


def check(case: Case, backends: Sequence[str]) -> None:
    """Run a program everywhere and compare."""
    verify(case.program.function)
    text = f"sizes {case.sizes}:\n{case.program.function}"
    results = {name: case.run(import_module(f"tessera.kernel.backends.{name}")) for name in backends}
    for name, outputs in results.items():
        for number, (output, expected) in enumerate(zip(outputs, case.expected)):
            close(output, expected, f"{name}, out{number}, {text}")
    for number, same in enumerate(case.same):
        first, *others = (outputs[number].double() for outputs in results.values())
        if same:
            assert all(torch.equal(first, other) for other in others), f"out{number} differs, {text}"


def close(output: torch.Tensor, expected: Approx, what: str) -> None:
    value = output.double() if output.is_floating_point() else output.to(expected.x.dtype)
    assert value.shape == expected.x.shape, what
    off = value != expected.x
    if output.is_floating_point():
        off &= ~((value - expected.x).abs() <= expected.e)
    assert not off.any(), f"{what}\ngot {value[off][:4]}, expected {expected.x[off][:4]} +- {expected.e[off][:4]}"
