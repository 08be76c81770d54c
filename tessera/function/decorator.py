"""`@ts.function`, and what the other decorators of functions share with it.

In: a function with annotations. Out: one that checks them at each call. `decorate` puts another decorator's work
between the checks and the body, so that nothing is checked twice, whatever the order of the decorators.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tessera.errors import InputError
from tessera.function.annotations import Signature, read_signature
from tessera.function.generate import make_checked
from tessera.function.match import caller_frame

F = TypeVar("F", bound=Callable[..., Any])
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


def function(function: F) -> F:
    """Decorator: check rank, dims, dtype and device of tensors at each call, from the annotations.

        @ts.function
        def rms_norm(x: Tensor["B", "S", "D"], weight: Tensor["D"], eps: float = 1e-6) -> Tensor["B", "S", "D"]: ...

    A name is one size wherever it stands: in every argument, in the result, and as an int argument of that name. A dim
    is a name, an int, an expression ("S+max_new", "2*D", "D/2": 2 divides D), or "..." for any axes, the same wherever
    it stands. Optional, unions, tuples, lists and dict values of tensors are checked as well; annotations without
    tensors are not. Three tensors and a result take about one microsecond; torch.compile checks when it compiles.

    Returns:
        A function with the same parameters.

    Raises:
        InputError: at decoration, an annotation cannot be read; at a call,
        ShapeError: an argument or the result does not fit; it names both values, both dims, both sizes and the call.
    """
    return decorate(function, None)


def decorate(function: Any, transform: Transform | None) -> Any:
    """A checked function whose body is `transform(body)`; without annotations of tensors, that alone.

    Raises:
        InputError: it is not a function, or an annotation cannot be read.
    """
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(decorate(function.__func__, transform))
    signature = signature_of(function)
    if signature is not None:
        if transform is None:
            return function
        body = function.__tessera_body__
    else:
        if not isinstance(function, types.FunctionType):
            raise InputError(f"function: {function!r} given; expected a Python function")
        body, signature = function, read_signature(function, _names_in_scope())
    call = body if transform is None else transform(body)
    checked: Any = call if signature.is_trivial else make_checked(signature, call)
    if checked is not body:
        functools.update_wrapper(checked, body)
    checked.__tessera_signature__, checked.__tessera_body__ = signature, call
    return checked


def decorate_class(cls: type, transform: Transform, name: str) -> type:
    """A class with `transform` applied, in place, to `forward`, or else to each of its methods that is checked.

    Args:
        name: of the decorator, for the error.

    Raises:
        InputError: it has neither.
    """
    methods = vars(cls)
    chosen = [n for n, m in methods.items() if signature_of(getattr(m, "__func__", m)) is not None]
    if "forward" in methods:
        chosen = ["forward"]
    if not chosen:
        raise InputError(f"{name}: class {cls.__name__} has no method `forward` and none that is a ts.function")
    for method in chosen:
        setattr(cls, method, decorate(methods[method], transform))
    return cls


def signature_of(function: Any) -> Signature | None:
    """The signature of what `function` made; None of anything else."""
    return getattr(function, "__tessera_signature__", None)


def _names_in_scope() -> Mapping[str, Any]:
    """The locals of the scope that defines the function, and around a class body those of the function that it is in:
    what text annotations may name beside globals and closure."""
    frame = caller_frame()
    scopes: list[Mapping[str, Any]] = []
    while frame is not None:
        scopes.append(frame.f_locals)
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED or frame.f_code.co_name == "<module>":
            break
        frame = frame.f_back
    return ChainMap(*scopes)  # type: ignore[arg-type]
