"""Mesh: the devices of a job, arranged along named axes.

In: axis names, devices and a shape. Out: coordinates, sizes, and a process group for every axis. Placement
plans, collectives, loaders and trainers take a mesh as an argument.

A mesh is live when this process is a rank of a torch.distributed job (`ts.init()`) that has its devices, and
abstract otherwise: an abstract mesh answers every question about shapes and coordinates (192 devices fit on
a laptop), and refuses to communicate. A mesh of one device needs no job.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tessera.dist import world
from tessera.dist.shared import SharedLine
from tessera.dist.sockets import SocketLine
from tessera.errors import InputError, UnsupportedError

_MOST_DEVICES = 1 << 20


class Mesh:
    """Devices in a grid with named axes, row-major: the last axis varies fastest.

    Args:
        axes: names, e.g. ("tp", "pp", "dp").
        devices: a count, ranks, or devices by name ("cuda:0"; the i-th stands for rank i); default all ranks.
        shape: size of each axis; default for one axis the number of devices, for several the most even
            factors in falling order (192 devices on three axes: 8, 6, 4; what MPI_Dims_create does).
        abstract: plan only; None makes the mesh live whenever the job has its devices.
        rank: whose coordinates an abstract mesh answers with.

    Raises:
        InputError: sizes, names or devices that do not fit together, or more devices than the job has.
    """

    def __init__(
        self, axes: Sequence[str] = ("tp",), devices: int | Iterable[Any] | None = None,
        shape: Sequence[int] | None = None, *, abstract: bool | None = None, rank: int = 0,
    ) -> None:
        self.axes = _axis_names(axes)
        ranks = _ranks(devices)
        self.shape = _shape(self.axes, len(ranks), shape)
        self._grid = np.array(ranks).reshape(self.shape)
        self.is_abstract = len(ranks) > 1 and (not world.is_initialized() if abstract is None else abstract)
        self._sockets: dict[str, SocketLine] = {}
        self._shared: dict[str, SharedLine | None] = {}
        if self.is_abstract or not world.is_initialized():
            self._locate(rank if self.is_abstract else ranks[0])
            if self._here is None:
                raise InputError(f"rank: {rank} given; expected one of the mesh's {len(ranks)} devices")
            return
        self._locate(world.get_rank())
        if max(ranks) >= world.get_world_size():
            raise InputError(f"devices: rank {max(ranks)} given; the job has {world.get_world_size()} ranks "
                             "(pass abstract=True to plan for more)")
        self._make_groups()

    def _locate(self, rank: int) -> None:
        """Note this process's coordinates and, for each axis, the ranks of its line."""
        self._rank = rank
        found = np.argwhere(self._grid == rank)
        self._here: tuple[int, ...] | None = tuple(found[0].tolist()) if len(found) else None
        self._lines: dict[str, tuple[int, ...]] = {}
        for place, axis in enumerate(self.axes if self._here is not None else ()):
            assert self._here is not None
            line = self._grid[(*self._here[:place], slice(None), *self._here[place + 1:])]
            self._lines[axis] = tuple(line.tolist())

    def _make_groups(self) -> None:
        """A process group for each line of the grid; every rank of the job takes part in making them all."""
        for place, axis in enumerate(self.axes):
            lines = np.moveaxis(self._grid, place, -1).reshape(-1, self.shape[place])
            for line in lines.tolist():
                if len(line) > 1:
                    group = world.new_group(line)
                    if self._rank in line:
                        self._sockets[axis] = SocketLine(group, line, line.index(self._rank))
                        self._shared[axis] = world.shared_line(line)

    def size(self, axis: str | None = None) -> int:
        """Devices along an axis, or of the whole mesh."""
        return math.prod(self.shape) if axis is None else self.shape[self._place(axis)]

    @property
    def rank(self) -> int:
        """This process's place among the mesh's devices, 0..size() - 1."""
        return int(np.ravel_multi_index(self._coordinates(), self.shape))

    @property
    def contains_this_rank(self) -> bool:
        return self._here is not None

    def get_coordinate(self, axis: str | None = None) -> Any:
        """This process's place along an axis; without an axis all places, in the order of `axes`.

        Raises:
            InputError: this process is not in the mesh, or there is no such axis.
        """
        coordinates = self._coordinates()
        return coordinates if axis is None else coordinates[self._place(axis)]

    def ranks(self, axis: str | None = None) -> tuple[int, ...]:
        """The job's ranks along this process's line of an axis, or of the whole mesh, in order."""
        if axis is None:
            return tuple(self._grid.ravel().tolist())
        self._place(axis)
        self._coordinates()
        return self._lines[axis]

    def has_axis(self, axis: str) -> bool:
        return axis in self.axes

    def group(self, axis: str) -> Any:
        """torch's process group of this process's line of an axis; None for a line of one.

        Raises:
            UnsupportedError: the mesh is abstract.
        """
        if self.size(axis) == 1:
            return None
        self._coordinates()
        if self.is_abstract:
            raise UnsupportedError(f"mesh: {self} is abstract and cannot communicate; start {self.size()} processes "
                                   f"(tessera launch --nproc {self.size()} script.py) and call ts.init() first")
        return self._sockets[axis].group

    def line(self, axis: str, x: torch.Tensor | None = None, *, sums: bool = False) -> SharedLine | SocketLine:
        """What moves x, and sums it, along this process's line of an axis; all of its ranks ask alike."""
        shared = self._shared[axis]
        return shared if shared is not None and (x is None or shared.takes(x, sums=sums)) else self._sockets[axis]

    def submesh(self, *axes: str) -> Mesh:
        """The part of the mesh that shares this process's coordinates on all other axes; groups are shared."""
        places = [self._place(axis) for axis in axes]
        if not places or places != sorted(set(places)):
            raise InputError(f"axes: {axes} given; expected some of {', '.join(self.axes)}, in this order")
        index = [slice(None) if i in places else c for i, c in enumerate(self._coordinates())]
        part = object.__new__(Mesh)
        part.axes, part.shape = axes, tuple(self.shape[i] for i in places)
        part._grid = self._grid[tuple(index)]
        part._locate(self._rank)
        part.is_abstract = self.is_abstract
        part._sockets = {axis: line for axis, line in self._sockets.items() if axis in axes}
        part._shared = {axis: line for axis, line in self._shared.items() if axis in axes}
        return part

    def __getitem__(self, axes: str | tuple[str, ...]) -> Mesh:
        return self.submesh(*([axes] if isinstance(axes, str) else axes))

    def at(self, rank: int) -> Mesh:
        """The abstract mesh as another rank sees it."""
        return Mesh(self.axes, self.ranks(), self.shape, abstract=True, rank=rank)

    @contextlib.contextmanager
    def axis(self, name: str) -> Iterator[Mesh]:
        """Collectives inside that name no mesh or axis use this one: `with mesh.axis("tp"): ...`."""
        with current(self, name):
            yield self

    def device_mesh(self, device_type: str = "cpu") -> Any:
        """torch's DeviceMesh over the same groups, for DTensor, FSDP and torch's pipelines.

        Raises:
            UnsupportedError: the mesh is abstract, or has an axis of one device.
        """
        from torch.distributed.device_mesh import DeviceMesh

        groups = [self.group(axis) for axis in self.axes]
        if None in groups:
            raise UnsupportedError(f"mesh: {self} has an axis of one device; torch's DeviceMesh needs two")
        grid = torch.tensor(self._grid)
        given = groups[0] if len(groups) == 1 else groups
        return DeviceMesh.from_group(
            given, device_type, mesh=None if len(groups) == 1 else grid, mesh_dim_names=self.axes)

    def _coordinates(self) -> tuple[int, ...]:
        if self._here is None:
            raise InputError(f"mesh: rank {self._rank} is not one of its {self.size()} devices")
        return self._here

    def _place(self, axis: str) -> int:
        if axis not in self.axes:
            raise InputError(f"axis: {axis!r} given; the mesh has {', '.join(self.axes)}")
        return self.axes.index(axis)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(self.axes, self.shape))
        return f"Mesh({sizes}{', abstract' if self.is_abstract else ''})"


_CURRENT: contextvars.ContextVar[tuple[Mesh, str | None] | None] = contextvars.ContextVar(
    "tessera_mesh_axis", default=None)


@contextlib.contextmanager
def current(mesh: Mesh, axis: str | None) -> Iterator[None]:
    """Collectives inside that name no mesh use this one and, unless it is None, this axis.

    Raises:
        InputError: the mesh has no such axis, or this process is not in it.
    """
    mesh._coordinates()
    if axis is not None:
        mesh._place(axis)
    token = _CURRENT.set((mesh, axis))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def mesh(
    devices: int | Iterable[Any] | None = None, axes: Sequence[str] = ("tp",), shape: Sequence[int] | None = None,
    **options: Any,
) -> Mesh:
    """`Mesh` with the devices first: dist.mesh(4), dist.mesh(devices=[...], axes=("tp",), shape=(8,))."""
    return Mesh(axes, devices, shape, **options)


def resolve(mesh: Mesh | None, axis: str | None) -> tuple[Mesh, str]:
    """The mesh and axis of a collective: as given, else those of `with mesh.axis(...)`, else a mesh's only axis.

    Raises:
        InputError: nothing says which.
    """
    found = _CURRENT.get()
    if mesh is None:
        if found is None:
            raise InputError("mesh: none given; pass one, or call inside `with mesh.axis(name)`")
        mesh = found[0]
    if axis is None:
        if found is not None and found[0] is mesh and found[1] is not None:
            axis = found[1]
        elif len(mesh.axes) == 1:
            axis = mesh.axes[0]
        else:
            raise InputError(f"axis: none given; the mesh has {', '.join(mesh.axes)}")
    mesh.size(axis)
    return mesh, axis


def _axis_names(axes: Sequence[str]) -> tuple[str, ...]:
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise InputError(f"axes: {axes!r} given; expected different names")
    return names


def _ranks(devices: int | Iterable[Any] | None) -> list[int]:
    if devices is None:
        devices = world.get_world_size()
    if isinstance(devices, int) and not isinstance(devices, bool):
        devices = range(devices)
    given = list(devices)
    if not 1 <= len(given) <= _MOST_DEVICES:
        raise InputError(f"devices: {len(given)} given; expected 1..{_MOST_DEVICES}")
    if all(isinstance(device, (str, torch.device)) for device in given):
        ranks = list(range(len(given)))
        names = [str(torch.device(device)) for device in given]
        # "cpu" may stand for several ranks, a GPU for one.
        if len(set(names)) < len(names) and any(not name.startswith("cpu") for name in names):
            raise InputError(f"devices: {given} given; expected different devices")
        return ranks
    if not all(isinstance(device, int) and device >= 0 for device in given) or len(set(given)) < len(given):
        raise InputError(f"devices: {given[:8]} given; expected different ranks, or names of devices")
    return given


def _shape(axes: tuple[str, ...], n_devices: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        return _even_factors(n_devices, len(axes))
    sizes = tuple(shape)
    if len(sizes) != len(axes) or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise InputError(f"shape: {shape} given; expected a size for each of {', '.join(axes)}")
    if math.prod(sizes) != n_devices:
        raise InputError(f"shape: {sizes} given, which is {math.prod(sizes)} devices; the mesh has {n_devices}")
    return sizes


def _even_factors(n: int, count: int) -> tuple[int, ...]:
    """n as a product of `count` factors, largest first, the largest as small as possible."""
    if count == 1:
        return (n,)
    best: tuple[int, ...] | None = None
    for first in (d for d in range(1, n + 1) if n % d == 0 and d**count >= n):
        rest = _even_factors(n // first, count - 1)
        factors = tuple(sorted((first, *rest), reverse=True))
        if best is None or (factors[0], sum(factors)) < (best[0], sum(best)):
            best = factors
        if best[0] <= first:
            break
    assert best is not None
    return best
