"""`@ts.module`: a torch module of a class that says what it holds and how it runs.

In: a class with `__init__` and `forward`. Out: a `torch.nn.Module` of the same name, whose methods with annotations of
tensors are checked.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from tessera.errors import InputError
from tessera.function.decorator import decorate


def module(cls: Any) -> Any:
    """Class decorator: make the class a torch.nn.Module.

        @ts.module
        class LearnedPositionalEmbedding:
            def __init__(self, max_seq_len: int, dim: int):
                self.embeddings = ts.nn.Embedding(max_seq_len, dim)

            def forward(self, position_ids: Tensor["B", "S"]) -> Tensor["B", "S", "D"]:
                return self.embeddings(position_ids)

    `super().__init__()` need not be called: parameters, buffers and modules are registered from the first assignment.
    `forward`, and every method whose annotations are dims of tensors, is a `ts.function`.

    Raises:
        InputError: it is no class or has no `forward`.
    """
    if not isinstance(cls, type) or not callable(getattr(cls, "forward", None)):
        raise InputError(f"module: {getattr(cls, '__name__', cls)!r} given; expected a class with a method `forward`")
    for name, method in list(vars(cls).items()):
        if isinstance(getattr(method, "__func__", method), types.FunctionType) and not name.startswith("__"):
            setattr(cls, name, decorate(method, None))
    if issubclass(cls, nn.Module):
        return cls
    return _joined(cls)


def _joined(cls: type) -> type:
    """A subclass of the class and nn.Module, in the class's place."""
    given = vars(cls).get("__init__")

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        if given is not None:
            given(self, *args, **kwargs)

    if given is not None:
        functools.update_wrapper(initialize, given)
    return type(cls.__name__, (cls, nn.Module), {
        "__init__": initialize, "__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": cls.__qualname__})
