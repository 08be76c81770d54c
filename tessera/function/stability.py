"""`@ts.numerically_stable`: wide types inside, and no infinity or NaN out of finite numbers.

In: a function of tensors. Out: the same function, which computes on f32 where its arguments are narrower, and raises a
NumericalError that names the result when it overflows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from tessera.errors import NumericalError
from tessera.function.decorator import decorate

_NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def numerically_stable(function: Any) -> Any:
    """Decorator: compute in f32 at least, and refuse results that are not finite.

    Arguments of f16, bf16 and fp8 are widened to f32 before the body. When all were narrow, its f32 results are rounded
    to their type after it, or to bf16 where they had several. A result with an infinity or a NaN, of arguments that
    have none, raises; arguments that have some may give what they give. The check reads every argument and result
    once; under torch.compile it becomes an assertion of the graph.

    Raises:
        NumericalError: at a call, a result is not finite; it names the function and the result.
    """
    return decorate(function, _guarded)


def _guarded(body: Callable[..., Any]) -> Callable[..., Any]:
    name = body.__qualname__

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [x for _, x in _floats((args, kwargs))]
        narrow = _result_type(given)
        wide_args, wide_kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
        result = body(*wide_args, **wide_kwargs)
        if narrow is not None:
            result = tree_map_only(Tensor, functools.partial(_round, dtype=narrow), result)
        _check(name, given, result)
        return result

    return run


def _floats(values: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor of floats in nested containers."""
    for path, x in tree_flatten_with_path(values)[0]:
        if isinstance(x, Tensor) and x.is_floating_point():
            yield keystr(path), x


def _result_type(given: list[Tensor]) -> torch.dtype | None:
    """The type that f32 results are rounded to; None: they stay."""
    kinds = {x.dtype for x in given}
    if not kinds or not kinds <= set(_NARROW):
        return None
    # torch promotes no 8-bit floats; different narrow types meet in bf16, which has the range of them all.
    return kinds.pop() if len(kinds) == 1 else torch.bfloat16


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _NARROW else x


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype is torch.float32 else x


def _check(name: str, given: list[Tensor], result: Any) -> None:
    found = list(_floats(result))
    if any(x.is_meta or isinstance(x, FakeTensor) for _, x in found):
        return
    if torch.compiler.is_compiling():
        for path, x in found:
            fine = torch.stack([_is_finite(x), *(~_is_finite(g) for g in given)]).any()
            torch._assert_async(fine, f"{name}: result{path} is not finite, and every argument is")
        return
    wrong = [(path, x) for path, x in found if not _is_finite(x)]
    if wrong and all(_is_finite(g) for g in given):
        path, x = wrong[0]
        bad = ~torch.isfinite(x.float())
        raise NumericalError(
            f"{name}: result{path} has {int(bad.sum())} of {x.numel()} numbers that are not finite, the first at "
            f"{bad.nonzero()[0].tolist()}, from finite arguments")


def _is_finite(x: Tensor) -> Tensor:
    return torch.isfinite(x.detach().float() if x.dtype in _NARROW else x.detach()).all()
