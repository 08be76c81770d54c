"""Less memory for a second computation: `@ts.checkpoint`, `@ts.memory_efficient`.

In: a function. Out: the same function, whose activations are not kept for the backward pass but computed again in it,
with the same random numbers. `region` does it for a piece of a function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tessera.errors import InputError
from tessera.function.annotations import Signature, TensorSpec, tensor_specs
from tessera.function.decorator import decorate, decorate_class, signature_of
from tessera.kernel.dims import Dim


def checkpoint(function: Any) -> Any:
    """Decorator: keep the arguments only, and compute the activations again in the backward pass.

    Random numbers are those of the forward pass. Without gradients it costs nothing. On a class of modules it is
    `forward` that is checkpointed.

    Source: Chen et al. 2016, arXiv:1604.06174; torch.utils.checkpoint, not reentrant.
    """
    return _decorate(function, _recomputed, "checkpoint")


def memory_efficient(function: Any = None, /, *, rows: str | None = None, chunk: int = 1024) -> Any:
    """Decorator: as `checkpoint`, and in chunks of rows where a dim is named.

        @ts.memory_efficient(rows="S", chunk=512)
        def mlp(x: Tensor["B", "S", "D"], up: Tensor["D", "F"], down: Tensor["F", "D"]) -> Tensor["B", "S", "D"]: ...

    With `rows`, every argument that has this dim is cut along it, the function runs once a chunk, forward and in the
    backward pass, and the results are joined: only one chunk's activations exist at a time. The function must treat
    its rows apart from each other; gradients of what is not cut are added up. On a class, `forward` is meant, or every
    method that is a `ts.function`.

    Args:
        rows: a dim of the result and of at least one argument.
        chunk: rows at a time.

    Raises:
        InputError: at decoration: chunk is not positive, or the annotations have no such dim, or not once in each.
    """
    if function is None:
        return functools.partial(memory_efficient, rows=rows, chunk=chunk)
    if rows is None:
        return _decorate(function, _recomputed, "memory_efficient")
    if chunk < 1:
        raise InputError(f"memory_efficient: chunk={chunk} given; expected at least 1")
    if isinstance(function, type):
        raise InputError("memory_efficient: rows given for a class; expected on its methods")
    checked = decorate(function, None)
    signature = signature_of(getattr(checked, "__func__", checked))
    assert signature is not None
    cut = _row_axes(signature, rows)
    return decorate(checked, lambda body: _chunked(body, signature, cut, chunk))


def _decorate(function: Any, transform: Callable[..., Any], name: str) -> Any:
    if isinstance(function, type):
        return decorate_class(function, transform, name)
    return decorate(function, transform)


def _recomputed(body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return body(*args, **kwargs)
        return torch_checkpoint(body, *args, use_reentrant=False, **kwargs)

    return run


def _row_axes(signature: Signature, rows: str) -> dict[str, int]:
    """The axis that is cut, by argument, and of the result under "return".

    Raises:
        InputError: the annotations do not say it.
    """
    found: dict[str, int] = {}
    wanted = Dim.of(rows)
    for name, spec in [*((p.name, p.spec) for p in signature.parameters), ("return", signature.result)]:
        for tensor in tensor_specs(spec):
            axes = [i for i, dim in enumerate(tensor.dims or ()) if dim == wanted]
            if not any(wanted.atoms & dim.atoms for dim in tensor.dims or ()):
                continue
            if len(axes) != 1 or tensor.ellipsis is not None or sum(
                    bool(wanted.atoms & dim.atoms) for dim in tensor.dims or ()) != 1 or name in found:
                raise InputError(f"memory_efficient: {signature.name}: {rows} stands in {tensor} of {name!r}; expected "
                                 "it once, as a dim of its own")
            found[name] = axes[0]
    if "return" not in found or len(found) < 2 or not isinstance(signature.result, TensorSpec):
        raise InputError(f"memory_efficient: rows={rows!r} given; expected a dim of the result of {signature.name} and "
                         "of at least one argument")
    if rows in signature.sizes:
        raise InputError(f"memory_efficient: {signature.name}: {rows} is an argument; expected a dim of tensors only")
    return found


def _chunked(body: Callable[..., Any], signature: Signature, cut: dict[str, int], chunk: int) -> Callable[..., Any]:
    names = [p.name for p in signature.parameters]
    recomputed = _recomputed(body)

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        tensors = {name: given[name] for name in cut if given.get(name) is not None}
        n_rows = next(t.shape[cut[name]] for name, t in tensors.items())
        if n_rows <= chunk:
            return recomputed(*args, **kwargs)
        results = []
        for start in range(0, n_rows, chunk):
            part = {name: t.narrow(cut[name], start, min(chunk, n_rows - start)) for name, t in tensors.items()}
            results.append(recomputed(*(part.get(n, a) for n, a in zip(names, args)),
                                      **{n: part.get(n, a) for n, a in kwargs.items()}))
        return torch.cat(results, cut["return"])

    return run
