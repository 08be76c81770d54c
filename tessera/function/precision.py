"""`ts.precision(compute=, accumulate=)`: in which types products and sums are taken.

In: two dtypes. Out: while the context is open, torch's products (matmul, linear, einsum, attention) round their
operands to `compute` and add in `accumulate`; its sums (sum, mean, var, norm, cumsum, ...) add in `accumulate`; both
give results in `compute`, unless a call names its own dtype. What is elementwise keeps torch's types. `ops` with
kernels of their own and `stable` read `active_precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tessera.errors import InputError, UnsupportedError
from tessera.function.decorator import decorate
from tessera.types import DType, dtype_of, parse_precision

_COMPUTE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class ActivePrecision:
    """The types of the innermost open `precision`."""

    compute: torch.dtype
    accumulate: torch.dtype

    @property
    def is_native(self) -> bool:
        """Whether a product of the compute type adds in the accumulate type of itself."""
        return self.accumulate is (torch.float64 if self.compute is torch.float64 else torch.float32)


def active_precision() -> ActivePrecision | None:
    """What products and sums are taken in here; None outside every `precision`.

    The open contexts are torch's own stack of function modes, which torch.compile traces as it is.
    """
    if not torch._C._len_torch_function_stack():  # nearly always: operations ask at every call
        return None
    mode = _innermost()
    return None if mode is None else mode.types


def _innermost() -> _Mode | None:
    for i in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(i)
        if isinstance(mode, _Mode):
            return mode
    return None


class precision:
    """Context and decorator: take products and sums in stated types.

        with ts.precision(compute=ts.bf16, accumulate=ts.f32):
            y = x @ w               # operands rounded to bf16, added in f32, a bf16 result

    The innermost context holds. Gradients are taken in the same types.

    Args:
        compute: of operands and results: f16, bf16, f32 or f64; or a text such as "bf16 @accum(fp32)".
        accumulate: of sums, at least as wide as compute; default f32, or f64 where compute is f64.

    Raises:
        InputError: another type, or sums narrower than operands.
    """

    def __init__(self, *, compute: DType | torch.dtype | str, accumulate: DType | torch.dtype | str | None = None,
                 ) -> None:
        stated = parse_precision(compute) if isinstance(compute, str) else None
        wanted = stated.storage if stated else dtype_of(compute)
        if wanted.torch not in _COMPUTE:
            raise InputError(f"compute: {wanted} given; expected f16, bf16, f32 or f64")
        widest = "f64" if wanted.bits == 64 else "f32"
        if accumulate is None and stated and "@" in str(compute):
            accumulate = stated.accumulate
        sums = dtype_of(widest if accumulate is None else accumulate)
        if not sums.is_float or sums.bits < max(32, wanted.bits):
            raise InputError(f"accumulate: {sums} given with compute={wanted}; expected "
                             f"{'f64' if wanted.bits == 64 else 'f32 or f64'}")
        self.types = ActivePrecision(compute=wanted.torch, accumulate=sums.torch)
        self._open: list[_Mode] = []

    def __enter__(self) -> ActivePrecision:
        mode = _Mode(self.types, outer=_innermost())
        self._open.append(mode)
        mode.__enter__()
        return self.types

    def __exit__(self, *error: Any) -> None:
        mode = self._open.pop()
        mode.__exit__(*error)
        mode.uncover()

    def __call__(self, function: Callable[..., Any]) -> Any:
        """Decorate a function: its body runs inside."""
        compute, accumulate = self.types.compute, self.types.accumulate

        def transform(body: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(body)
            def run(*args: Any, **kwargs: Any) -> Any:
                with precision(compute=compute, accumulate=accumulate):  # its own, for recursion and threads
                    return body(*args, **kwargs)

            return run

        return decorate(function, transform)


# torch's products and its sums, by the names of its functions and methods.
_PRODUCTS = frozenset((
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "linear", "bilinear", "einsum", "addmm",
    "baddbmm", "addbmm", "addmv", "tensordot", "scaled_dot_product_attention"))
_SUMS = frozenset(("sum", "mean", "nansum", "nanmean", "cumsum", "logsumexp", "norm", "vector_norm", "var", "std"))


class _Mode(TorchFunctionMode):
    """Brings operands to the compute type and results back from the accumulate type."""

    def __init__(self, types: ActivePrecision, outer: _Mode | None) -> None:
        super().__init__()
        self.types, self.outer, self.is_covered = types, outer, False
        if outer is not None:
            outer.is_covered = True  # what this one calls would come to the outer one next

    def uncover(self) -> None:
        """Hand back to the context around it."""
        if self.outer is not None:
            self.outer.is_covered = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        is_product = name in _PRODUCTS
        is_sum = name in _SUMS and kwargs.get("dtype") is None
        if self.is_covered or not (is_product or is_sum):
            return func(*args, **kwargs)
        if kwargs.get("out") is not None:
            raise UnsupportedError(f"{name}: out= cannot be given inside ts.precision")
        inner = self.types.compute if is_product and self.types.is_native else self.types.accumulate

        def cast(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            return (x.to(self.types.compute) if is_product else x).to(inner)

        def back(x: Tensor) -> Tensor:
            return x.to(self.types.compute) if x.dtype is inner else x

        args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return tree_map_only(Tensor, back, func(*args, **kwargs))
