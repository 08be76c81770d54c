"""RMSNorm of activations whose width is shared out over the ranks of an axis.

In: this rank's part of each row. Out: this rank's part of the result. Plans that cut the residual stream call it.
"""

from __future__ import annotations

from torch import Tensor

from tessera import ops
from tessera.dist.collectives import all_reduce
from tessera.dist.mesh import Mesh, resolve


def distributed_rms_norm(
    x: Tensor, weight: Tensor, mesh: Mesh | None = None, eps: float = 1e-6, *, axis: str | None = None,
) -> Tensor:
    """`ops.rms_norm` of whole rows; one number a row is all-reduced.

    Args:
        x: [..., D / n], the same part of each row's width on every rank.
        weight: [D / n], this rank's part; a whole weight must be cut as x is.
        mesh, axis: default those of `with mesh.axis(...)`, or the mesh's only axis.
        eps: added to the mean square.

    Returns:
        [..., D / n] in x's dtype.
    """
    mesh, axis = resolve(mesh, axis)
    width = x.shape[-1] * mesh.size(axis)
    return ops.sharded_rms_norm(x, weight, width, lambda total: all_reduce(total, mesh, axis=axis), eps)
