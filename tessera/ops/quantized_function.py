"""`@ts.quantized(weights=, activations=)`: a function whose tensors are stored in 8 bits.

In: a function with annotations of tensors. Out: the same function, which refuses tensors of other types where the
annotation states one, and rounds floats to the stated types where it does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tessera.errors import InputError
from tessera.function.annotations import Signature, TensorSpec, tensor_specs
from tessera.function.decorator import decorate, signature_of
from tessera.kernel.dims import Dim
from tessera.ops.quantize import fake_quantize_rows, is_quantized
from tessera.types import DType, dtype_of


def quantized(*, weights: DType | torch.dtype | str, activations: DType | torch.dtype | str | None = None,
              ) -> Callable[[Any], Any]:
    """Decorator: keep weights, and activations where a type is given, in 8 bits.

        @ts.quantized(weights=ts.int8, activations=ts.fp8)
        def mlp(x: Tensor["B", "S", "D"], up: Tensor["D", "F"], down: Tensor["F", "D"]) -> Tensor["B", "S", "D"]:
            return torch.relu(x @ up) @ down

    Activations are the tensors that have the batch dim, the first dim of the first tensor; weights are the matrices
    that have not. Where the annotation states an 8-bit type (`Tensor["D", "F", ts.int8]`), the argument comes in it,
    and the body multiplies it, as `ts.nn.quantized_matmul` does. Where it states none, floats are rounded as they
    would be stored and computed with as floats: a weight with a scale for each of its columns, an activation with one
    for each of its rows. Gradients pass straight through the rounding (arXiv:1308.3432).

    Args:
        weights, activations: int8, fp8_e4m3 or fp8_e5m2; activations None: as they are.

    Raises:
        InputError: another type; at decoration: no argument is a weight, or an annotation states an 8-bit type that
            is not the decorator's.
    """
    wanted = {"weights": _stored("weights", weights)}
    if activations is not None:
        wanted["activations"] = _stored("activations", activations)

    def make(function: Any) -> Any:
        checked = decorate(function, None)
        signature = signature_of(getattr(checked, "__func__", checked))
        rounded = _rounded(signature, wanted) if signature is not None else {}
        return decorate(checked, lambda body: _with_rounding(body, signature, rounded))

    return make


def _stored(name: str, given: DType | torch.dtype | str) -> DType:
    dtype = dtype_of(given)
    if not is_quantized(dtype.torch):
        raise InputError(f"{name}: {dtype} given; expected int8, fp8_e4m3 or fp8_e5m2")
    return dtype


def _rounded(signature: Signature, wanted: Mapping[str, DType]) -> dict[str, tuple[str, torch.dtype]]:
    """What is rounded: argument -> (its role, the type); checks the types that the annotations state."""
    roles: dict[str, tuple[str, TensorSpec]] = {}
    batch: Dim | None = None
    for p in signature.parameters:
        for spec in tensor_specs(p.spec):
            dims = spec.dims or ()
            batch = dims[0] if batch is None and dims else batch
            if batch in dims or spec.ellipsis is not None:
                roles[p.name] = "activations", spec
            elif len(dims) >= 2:
                roles[p.name] = "weights", spec
    if not any(role == "weights" for role, _ in roles.values()):
        raise InputError(f"quantized: {signature.name} has no weight: no argument is a matrix without the batch dim")
    found: dict[str, tuple[str, torch.dtype]] = {}
    for name, (role, spec) in roles.items():
        stated = spec.annotation.dtype if spec.annotation is not None else None
        if stated is not None and is_quantized(stated.torch):
            if stated is not wanted.get(role, stated):
                raise InputError(f"quantized: {signature.name}: {name} is annotated {stated}; {role}={wanted[role]}")
        elif role in wanted and (stated is None or stated.is_float):
            found[name] = role, wanted[role].torch
    return found


def _with_rounding(body: Callable[..., Any], signature: Signature | None,
                   rounded: Mapping[str, tuple[str, torch.dtype]]) -> Callable[..., Any]:
    names = [p.name for p in signature.parameters] if signature is not None else []

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [_round(value, *rounded[n]) if n in rounded else value for n, value in zip(names, args)]
        named = {n: _round(value, *rounded[n]) if n in rounded else value for n, value in kwargs.items()}
        return body(*given, *args[len(given):], **named)

    return run


def _round(x: Any, role: str, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or is_quantized(x.dtype):
        return x
    return fake_quantize_rows(x.mT, dtype).mT if role == "weights" else fake_quantize_rows(x, dtype)
