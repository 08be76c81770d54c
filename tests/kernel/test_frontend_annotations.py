"""Kernels of a module whose annotations are text, and the decorator's spellings."""

from __future__ import annotations

import pytest
import torch

import tessera
import tessera as ts
from tessera import Tile, f32, tile


def add(x: Tile["S", "D", f32], o: Tile["S", "D", f32], bias: Tile["D", f32] | None = None, gain: float = 1.0):
    y = x * gain
    o[:] = y if bias is None else y + bias


DECORATORS = [ts.kernel, tessera.kernel, ts.kernel.fused, ts.kernel(name="named"), ts.kernel()]


@pytest.mark.parametrize("decorator", DECORATORS)
def test_spellings_of_the_decorator(decorator, monkeypatch):
    monkeypatch.setenv("TESSERA_BACKEND", "interp")
    kernel = decorator(add)
    x, bias, o = torch.ones(2, 3), torch.full((3,), 0.5), torch.zeros(2, 3)
    kernel(x, o, gain=3)
    assert (o == 3).all()
    kernel(x, o, bias)
    assert (o == 1.5).all()
    assert kernel.__doc__ == add.__doc__ and kernel.name in ("add", "named")


def test_annotations_see_the_closure(monkeypatch):
    monkeypatch.setenv("TESSERA_BACKEND", "interp")
    element = ts.bf16

    @ts.kernel
    def copy(x: Tile["N", element], o: Tile["N", element]):
        o[:] = tile.cast(tile.load(x), element)

    x, o = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    copy(x, o)
    assert torch.equal(x, o)
