"""Sending a tensor to one rank, as pipeline stages written by hand do.

In: a tensor and a place on an axis. Out: the tensor on the other rank, whose shape and dtype travel with it.
No gradients: training pipelines go through torch.distributed.pipelining.
"""

from __future__ import annotations

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tessera.dist.collectives import _check_peer, _watching
from tessera.dist.mesh import Mesh, resolve
from tessera.errors import InputError, ShapeError
from tessera.types import DTYPES, dtype_of

_MAX_DIMS = 8
_NAMES = list(DTYPES)


def send(x: Tensor, dst: int, mesh_axis: str | None = None, mesh: Mesh | None = None) -> None:
    """Send x to the rank with coordinate `dst` on an axis; it must call `recv`.

    Args:
        x: at most 8 dims.
        dst: coordinate on the axis.
        mesh_axis, mesh: default those of `with mesh.axis(...)`.

    Raises:
        InputError: dst is this rank or not on the axis.
        CollectiveError: the other rank died or does not come.
    """
    mesh, axis = _line("dst", dst, mesh, mesh_axis)
    if x.dim() > _MAX_DIMS:
        raise ShapeError(f"x: {x.dim()} dims given; expected at most {_MAX_DIMS}")
    header = torch.tensor([_NAMES.index(dtype_of(x.dtype).name), x.dim(), *x.shape, *[0] * (_MAX_DIMS - x.dim())])
    with _watching("send", mesh, axis, x.shape):
        torch_dist.send(header, mesh.ranks(axis)[dst], group=mesh.group(axis))
        torch_dist.send(x.detach().contiguous(), mesh.ranks(axis)[dst], group=mesh.group(axis))


def recv(
    src: int, mesh_axis: str | None = None, mesh: Mesh | None = None, device: torch.device | str = "cpu",
) -> Tensor:
    """The tensor that the rank with coordinate `src` on an axis sends.

    Raises:
        InputError: src is this rank or not on the axis.
        CollectiveError: the other rank died or does not come.
    """
    mesh, axis = _line("src", src, mesh, mesh_axis)
    header = torch.empty(2 + _MAX_DIMS, dtype=torch.int64)
    with _watching("recv", mesh, axis, ()):
        torch_dist.recv(header, mesh.ranks(axis)[src], group=mesh.group(axis))
        kind, n_dims, *sizes = header.tolist()
        out = torch.empty(sizes[:n_dims], dtype=DTYPES[_NAMES[kind]].torch, device=device)
        torch_dist.recv(out, mesh.ranks(axis)[src], group=mesh.group(axis))
    return out


def _line(name: str, place: int, mesh: Mesh | None, axis: str | None) -> tuple[Mesh, str]:
    mesh, axis = resolve(mesh, axis)
    _check_peer(name, place, mesh, axis)
    if place == mesh.get_coordinate(axis):
        raise InputError(f"{name}: {place} given, which is this rank itself on axis {axis!r}; expected another")
    mesh.group(axis)
    return mesh, axis
