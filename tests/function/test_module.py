"""ts.module: a plain class becomes a torch module."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import tessera as ts
from tessera import Tensor
from tessera.errors import InputError, ShapeError


@ts.module
class LearnedPositionalEmbedding:
    """The documents' own."""

    def __init__(self, max_seq_len: int, dim: int):
        self.embeddings = ts.nn.Embedding(max_seq_len, dim)

    def forward(self, position_ids: Tensor["B", "S"]) -> Tensor["B", "S", "D"]:
        return self.embeddings(position_ids)


@ts.module
class Scaled:
    """Parameters, buffers, a checked method, and a call of super().__init__()."""

    def __init__(self, dim: int, *, factor: float = 2.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))
        self.register_buffer("offset", torch.zeros(dim))
        self.factor = factor

    @ts.function
    def forward(self, x: Tensor["B", "D"]) -> Tensor["B", "D"]:
        return self.scale(x, self.weight) + self.offset

    @staticmethod
    def scale(x: Tensor["B", "D"], weight: Tensor["D"]) -> Tensor["B", "D"]:
        return x * weight


def test_it_is_a_module() -> None:
    layer = LearnedPositionalEmbedding(6, 4)
    assert isinstance(layer, torch.nn.Module) and LearnedPositionalEmbedding.__name__ == "LearnedPositionalEmbedding"
    assert LearnedPositionalEmbedding.__doc__ == "The documents' own."
    assert list(inspect.signature(LearnedPositionalEmbedding).parameters) == ["max_seq_len", "dim"]
    assert [name for name, _ in layer.named_parameters()] == ["embeddings.weight"]
    ids = torch.tensor([[0, 5, 2]])
    assert torch.equal(layer(ids), layer.embeddings.weight[ids])
    with pytest.raises(ShapeError, match="position_ids has 1 axis"):
        layer(ids[0])


def test_parameters_buffers_and_state() -> None:
    layer = Scaled(3, factor=4.0)
    assert layer.factor == 4.0 and set(layer.state_dict()) == {"weight", "offset"}
    assert layer.to(torch.float64).weight.dtype is torch.float64
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is Scaled and torch.equal(other.weight, layer.weight)
    with pytest.raises(ShapeError, match=r"weight has D=3 .* but x has D=2"):
        layer(torch.ones(1, 2))
    with pytest.raises(ShapeError, match="scale: weight"):
        Scaled.scale(torch.ones(1, 2), torch.ones(3))


def test_subclass_and_module_that_is_one_already() -> None:
    class Wider(Scaled):
        def __init__(self) -> None:
            super().__init__(5)
            self.more = torch.nn.Linear(5, 5)

    assert {name for name, _ in Wider().named_parameters()} == {"weight", "more.weight", "more.bias"}

    @ts.module
    class Already(torch.nn.Module):
        def forward(self, x: Tensor["N"]) -> Tensor["N"]:
            return x

    assert Already.__mro__[1] is torch.nn.Module
    with pytest.raises(ShapeError):
        Already()(torch.ones(1, 1))


@pytest.mark.parametrize("given", [3, type("Empty", (), {}), lambda x: x])
def test_what_is_no_module(given) -> None:
    with pytest.raises(InputError, match="expected a class with a method `forward`"):
        ts.module(given)
