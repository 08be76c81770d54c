"""`@ts.distributed`: a function that every rank of a mesh calls with its own parts.

In: a function and, among its arguments or the decorator's, a mesh. Out: one whose collectives need not name the mesh,
and whose annotated arguments are checked. Called by users; the package `tessera.dist` itself is this decorator.

    @ts.distributed
    def distributed_rms_norm(x: MeshTensor["B", "S", "D"], weight: MeshTensor["D"], mesh: Mesh, eps: float = 1e-6):
        with mesh.axis("model"):
            mean_square = ts.mesh_reduce((x * x).mean(-1, keepdim=True), axis="model", op="mean")
        return x / torch.sqrt(mean_square + eps) * weight
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from tessera.dist.mesh import Mesh, current
from tessera.errors import InputError
from tessera.function.decorator import decorate
from tessera.types import Tensor


class MeshTensor(Tensor):
    """Annotation of a tensor of which each rank passes its own part: MeshTensor["B", "S", "D"]; the dims are the
    part's, and a name is one size on this rank."""


def distributed(
    function: Callable[..., Any] | None = None, *, mesh: Mesh | None = None, axis: str | None = None,
) -> Any:
    """Decorator: collectives inside that name no mesh use the function's; annotations are checked as by ts.function.

    Args:
        function: what all ranks of the mesh call together.
        mesh: the one for calls without a Mesh among their arguments.
        axis: the one for collectives that name none; default the mesh's only axis.

    Raises:
        InputError: at a call, there is no mesh or there are two, this rank is not in it, or it has no such axis.
    """
    def transform(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = {id(x): x for x in itertools.chain(args, kwargs.values()) if isinstance(x, Mesh)}
            if len(given) > 1 or not (given or mesh is not None):
                raise InputError(f"{body.__name__}: {len(given)} meshes given; expected one, as an argument or as "
                                 "@distributed(mesh=...)")
            here = next(iter(given.values()), mesh)
            assert here is not None
            with current(here, axis):
                return body(*args, **kwargs)

        return call

    return decorate(function, transform) if function is not None else lambda f: decorate(f, transform)
