"""Memory as the interp backend sees it: who wrote what, and who may read it.

In: a launch's tensors, and windows on them. Out: tensors read, or an `AccessError` on an access out of
bounds, a read of memory that the kernel has not written, or a race between two programs of a grid.

Every program of every grid gets a number; 0 is the code outside of all grids. An element of a tensor
that the kernel writes keeps the number of its last writer, reader and adder. When a grid ends its programs
are ordered before what follows, so their numbers are handed to the program that opened the grid. Hence
another program's number on an element means that nothing orders the two accesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

Index = tuple[int | slice | Tensor, ...]


class AccessError(Exception):
    """A bad access; the interpreter adds the place in the source."""


@dataclass
class Programs:
    """The running program and the ones that opened the grids around it.

    `ancestors` goes from 0 (outside of all grids) to the running program; `bases[i]` is the first number
    that a program of the i-th open grid can have.
    """

    ancestors: list[int] = field(default_factory=lambda: [0])
    bases: list[int] = field(default_factory=list)
    numbers: count[int] = field(default_factory=lambda: count(1))

    @property
    def current(self) -> int:
        """The number of the running program."""
        return self.ancestors[-1]


class Memory:
    """A parameter's tensor. `tracked`: the kernel writes it; `fresh`: and never reads it before its first write."""

    def __init__(self, name: str, data: Tensor, programs: Programs, *, tracked: bool, fresh: bool) -> None:
        self.name = name
        self.data = data
        self.programs = programs
        self.written = torch.zeros(data.shape, dtype=torch.bool) if fresh else None
        # Last storing, loading and adding program; a negative number -b: several programs of the grid of base b.
        self.users = {kind: torch.zeros(data.shape, dtype=torch.int64) for kind in ("store", "load", "atomic_add")} \
            if tracked else {}

    def access(self, kind: str, where: Index) -> None:
        """Check and note that the running program loads, stores or atomically adds elements.

        Raises:
            AccessError: another program's access to one of them is not ordered with this one, or a load or
                atomic add meets an element that nothing has written.
        """
        if self.programs.bases:
            for other, users in self.users.items():
                if kind != other or kind == "store":
                    self._check_order(kind, other, users[where])
            if self.users:
                self._note(self.users[kind], where)
        if self.written is not None:
            if kind == "store":
                self.written[where] = True
            elif not self.written[where].all():
                raise AccessError(f"{kind} of {self.name}: an element is read before the kernel has written it")

    def _check_order(self, kind: str, other: str, users: Tensor) -> None:
        strange = torch.ones_like(users, dtype=torch.bool)
        for mine in self.programs.ancestors:
            strange &= users != mine
        if strange.any():
            raise AccessError(
                f"race on {self.name}: this {kind} and the {other} of another grid program touch the same element")

    def _note(self, users: Tensor, where: Index) -> None:
        before, current = users[where], self.programs.current
        after = torch.full_like(before, current)
        for base in self.programs.bases:  # the innermost grid that the other program is part of decides
            after = torch.where(before >= base, -base, after)
        for mine in self.programs.ancestors:
            after = torch.where(before == mine, current, after)
        users[where] = torch.where(before < 0, before, after)

    def close_grid(self) -> None:
        """The innermost grid is done: what its programs touched counts as touched by the program around it."""
        base, around = self.programs.bases[-1], self.programs.ancestors[-1]
        for users in self.users.values():
            users[(users >= base) | (users <= -base)] = around


@dataclass(frozen=True)
class View:
    """A window on a memory: one int or slice for each of the memory's axes."""

    memory: Memory
    index: Index

    @property
    def shape(self) -> torch.Size:
        """Extent of every axis that the window keeps."""
        return torch.Size(i.stop - i.start for i in self.index if isinstance(i, slice))

    def narrow(self, entries: Sequence[int | tuple[int, int] | None]) -> View:
        """A window on the window: for each axis an index, (start, extent), or None for the whole axis.

        Raises:
            AccessError: an entry reaches outside of this window.
        """
        kept = iter(entries)
        index: list[int | slice | Tensor] = []
        for own in self.index:
            if not isinstance(own, slice) or (entry := next(kept)) is None:
                index.append(own)
                continue
            start, extent = (entry, 1) if isinstance(entry, int) else entry
            check_range(f"view of {self.memory.name}", start, extent, own.stop - own.start)
            first = own.start + (start if extent else 0)
            index.append(first if isinstance(entry, int) else slice(first, first + extent))
        return View(self.memory, tuple(index))

    def load(self) -> Tensor:
        """A copy of the elements."""
        self.memory.access("load", self.index)
        return self.memory.data[self.index].clone()

    def store(self, x: Tensor) -> None:
        """Write the elements; x has the window's shape."""
        self.memory.access("store", self.index)
        self.memory.data[self.index] = x

    def atomic_add(self, x: Tensor) -> None:
        """Add to the elements, rounded to the memory's dtype."""
        self.memory.access("atomic_add", self.index)
        data = self.memory.data
        if data.is_floating_point() and data.element_size() < 4:  # torch has no sums of 8-bit floats
            data[self.index] = (data[self.index].float() + x.float()).to(data.dtype)
        else:
            data[self.index] += x

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of the first axis: rows.shape + shape[1:]."""
        where = self._rows(rows)
        self.memory.access("load", where)
        return self.memory.data[where]

    def scatter(self, rows: Tensor, x: Tensor) -> None:
        """Write rows of the first axis; of equal indices one stays."""
        where = self._rows(rows)
        self.memory.access("store", where)
        self.memory.data[where] = x

    def _rows(self, rows: Tensor) -> Index:
        """An index of the memory that picks rows of this window."""
        size = self.shape[0]
        if rows.numel():
            low, high = int(rows.min()), int(rows.max())
            check_range(f"row of {self.memory.name}", low if low < 0 else high, 1, size)
        first = next(i for i, own in enumerate(self.index) if isinstance(own, slice))
        own = self.index[first]
        assert isinstance(own, slice)
        return (*self.index[:first], rows.long() + own.start, *self.index[first + 1:])


def check_range(what: str, start: int, extent: int, size: int) -> None:
    """Raise an AccessError unless start .. start + extent - 1 lies in an axis of `size` elements."""
    if extent and not 0 <= start <= size - extent:
        asked = f"index {start}" if extent == 1 else f"elements {start} to {start + extent - 1}"
        raise AccessError(f"{what}: {asked} of an axis of {size} elements")
