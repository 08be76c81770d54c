"""ShardSpec: how a tensor is cut over a mesh, and the local part of a tensor that is.

In: a whole tensor's shape and a spec. Out: this rank's part, as a shape, as slices, or as a tensor. Called
by placement plans, loaders and users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.dist.mesh import Mesh
from tessera.errors import InputError, ShapeError
from tessera.types import dtype_of

_NAMED_DIMS = {"row": 0, "col": 1}


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Which dims are cut over which axes.

    Attributes:
        partition: one entry for each cut: "row" (dim 0), "col" (dim 1) or a dim's number. Empty: replicated.
        mesh_axes: the axis that each cut goes along.
        sizes: for each cut the parts' sizes, one for each place on the axis; None for as even as can be (the
            first parts one larger).

    Raises:
        InputError: entries that do not fit together.
    """

    partition: tuple[str | int, ...] = ()
    mesh_axes: tuple[str, ...] = ()
    sizes: tuple[tuple[int, ...] | None, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.partition) != len(self.mesh_axes):
            raise InputError(f"mesh_axes: {self.mesh_axes} given; expected one for each of partition {self.partition}")
        for entry in self.partition:
            if entry not in _NAMED_DIMS and (not isinstance(entry, int) or entry < 0):
                raise InputError(f"partition: {entry!r} given; expected 'row', 'col' or a dim's number")
        if len(set(self.mesh_axes)) < len(self.mesh_axes) or len(set(self.dims)) < len(self.dims):
            raise InputError(f"partition: {self.partition} over {self.mesh_axes} given; expected each dim and "
                             "each axis once")
        if self.sizes is not None and len(self.sizes) != len(self.partition):
            raise InputError(f"sizes: {len(self.sizes)} entries given; expected one for each of {self.partition}")

    @property
    def dims(self) -> tuple[int, ...]:
        """The cut dims as numbers."""
        return tuple(_NAMED_DIMS[entry] if isinstance(entry, str) else entry for entry in self.partition)

    def slices(self, shape: Sequence[int], mesh: Mesh) -> tuple[slice, ...]:
        """This rank's part of a tensor of this shape.

        Raises:
            ShapeError: the shape has no such dim, or sizes do not sum to it.
        """
        out = [slice(0, size) for size in shape]
        for i, (dim, axis) in enumerate(zip(self.dims, self.mesh_axes)):
            if dim >= len(shape):
                raise ShapeError(f"shape: {tuple(shape)} given; the spec cuts dim {dim}")
            sizes = self.sizes[i] if self.sizes is not None else None
            sizes = even_sizes(shape[dim], mesh.size(axis)) if sizes is None else sizes
            if len(sizes) != mesh.size(axis) or sum(sizes) != shape[dim]:
                raise ShapeError(f"sizes: {sizes} given; expected {mesh.size(axis)} that sum to {shape[dim]}")
            start = sum(sizes[: mesh.get_coordinate(axis)])
            out[dim] = slice(start, start + sizes[mesh.get_coordinate(axis)])
        return tuple(out)

    def local_shape(self, shape: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return tuple(part.stop - part.start for part in self.slices(shape, mesh))

    def local(self, whole: Tensor, mesh: Mesh) -> Tensor:
        """This rank's part of a tensor, a view."""
        return whole[self.slices(whole.shape, mesh)]


def even_sizes(whole: int, n_parts: int) -> tuple[int, ...]:
    """`whole` cut into parts that differ by at most one, the larger first; parts may be empty."""
    small, n_larger = divmod(whole, n_parts)
    return tuple(small + (i < n_larger) for i in range(n_parts))


def tensor(
    shape: Sequence[int], layout: ShardSpec | None = None, mesh: Mesh | None = None, dtype: Any = "f32",
    device: torch.device | str | None = None,
) -> Tensor:
    """This rank's part of a tensor of zeros; on an abstract mesh a meta tensor, which takes no memory.

    Args:
        shape: of the whole tensor.
        layout: how it is cut; None for replicated.
        mesh: what it is cut over; needed with a layout that cuts.
        dtype: name, DType or torch dtype.
        device: default the mesh's: "meta" when it is abstract, else the CPU.

    Raises:
        InputError: a layout that cuts, and no mesh.
        ShapeError: the layout does not fit the shape.
    """
    if mesh is None:
        if layout is not None and layout.partition:
            raise InputError("mesh: none given; the layout cuts the tensor over a mesh's axes")
        local = tuple(shape)
    else:
        local = (layout or ShardSpec()).local_shape(shape, mesh)
    if device is None:
        device = "meta" if mesh is not None and mesh.is_abstract else "cpu"
    return torch.zeros(local, dtype=dtype_of(dtype).torch, device=device)
