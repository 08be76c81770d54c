"""The reference backend: runs tile IR on the CPU, operation by operation, on plain torch tensors.

In: an `ir.Function` and the tensors of a launch. Out: the outputs, rounded exactly where the IR says, or a
LaunchError with the place in the source on whatever a compiled kernel would do wrong silently: an access
out of bounds, a read of memory that the kernel has not written, a race between programs of a grid, an
integer division by zero, a failed assert. It is the definition that the other backends are tested against
(orders of summation: `interp_math`; races: `interp_memory`), and the place to debug a kernel.

A ragged tile is held without its unspecified elements: an operation cannot use one by mistake, and a type
that promises more elements than there are is an error. Elements that were allocated but never written
(`full` with `undefined`) travel with a mask; moving them is fine, computing with them or storing them is not.
A parameter whose first access is a store counts as unwritten until then; one that is loaded or added to
first is taken to hold the caller's values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from tessera.errors import LaunchError, UnsupportedError
from tessera.kernel import ir
from tessera.kernel.backends import interp_math as math
from tessera.kernel.backends.interp_memory import AccessError, Memory, Programs, View, check_range
from tessera.kernel.dims import Dim
from tessera.types import int4

# Operations that only move elements: an undefined element stays undefined.
_MOVES = frozenset("where broadcast reshape transpose concat slice extract insert".split())
_READS = frozenset("load gather atomic_add".split())
_WRITES = frozenset("store scatter".split())

Slot = tuple[Tensor, Tensor | None]  # a tile's valid elements; which of them are undefined (None: none)


def compile(function: ir.Function) -> Compiled:
    """Prepare a kernel to be run by the interpreter."""
    return Compiled(function)


def source(function: ir.Function) -> str:
    """The IR's text."""
    return str(function)


class Compiled:
    """A kernel that the interpreter runs. `source` is the IR's text."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.source = str(function)
        self._first_access = _first_access(function)

    def __call__(self, args: Sequence[Tensor | int | float | bool], sizes: Sequence[int]) -> None:
        """Run the kernel: args in the order of its parameters, sizes in the order of `function.sizes`.

        Raises:
            LaunchError: an argument does not fit, or the kernel does something that has no meaning.
        """
        run = _Run(dict(zip(self.function.sizes, sizes, strict=True)))
        with torch.no_grad():
            bound = list(zip(self.function.params, args, strict=True))
            for param, arg in bound:
                if type(arg) is FakeTensor:
                    raise LaunchError(f"kernel {self.function.name}: {param.name} is a FakeTensor without memory of "
                                      "its own; expected a tensor with values")
                if not param.is_view:
                    run.assign(param.value, torch.as_tensor(arg, dtype=param.value.type.dtype.torch))
            run.bind_tensors([(p, arg) for p, arg in bound if isinstance(arg, Tensor)], self._first_access)
            run.block(self.function.body)


def _first_access(function: ir.Function) -> dict[str, str]:
    """For every parameter that the kernel writes, the operation that touches it first in program order."""
    roots = {param.value.name: param.name for param in function.params if param.is_view}
    first: dict[str, str] = {}
    written: set[str] = set()
    for op in ir.walk(function.body):
        if op.name == "view":
            roots[op.result.name] = roots[op.operands[0].name]
        elif op.name in _READS | _WRITES:
            name = roots[op.operands[0].name]
            first.setdefault(name, op.name)
            if op.name not in ("load", "gather"):
                written.add(name)
    return {name: first[name] for name in written}


class _Run:
    """One launch: the values of all SSA names so far."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.numbers = sizes  # named sizes and every int scalar: what dims are made of
        self.tiles: dict[str, Slot] = {}
        self.named: dict[str, str] = {}  # the user's variables: the SSA names that they stand for now
        self.views: dict[str, View] = {}
        self.memories: list[Memory] = []
        self.programs = Programs()
        self.coordinates: list[int] = []

    # -- values -------------------------------------------------------------------------------------

    def number(self, dim: Dim) -> int:
        """The value of a dim now."""
        const = dim.const
        return dim.value(self.numbers) if const is None else const

    def nominal(self, type_: ir.TileTy) -> list[int]:
        """A tile's shape, ragged ends included."""
        return [self.number(dim) for dim in type_.shape]

    def extents(self, type_: ir.TileTy) -> list[int]:
        """How many elements count along every axis."""
        return [max(self.number(type_.extent(axis)), 0) for axis in range(type_.rank)]

    def assign(self, value: ir.Value, x: Tensor, undefined: Tensor | None = None) -> None:
        """Give an SSA name its tile, cut to the valid elements of its type."""
        dtype = torch.int8 if value.type.dtype == int4 else value.type.dtype.torch
        extents = self.extents(value.type)
        if list(x.shape) != extents:
            if any(have < want for have, want in zip(x.shape, extents)) or x.dim() != len(extents):
                raise AccessError(f"the tile is {list(x.shape)} where its type {value.type} promises {extents}")
            x = _cut(x, extents)
            undefined = None if undefined is None else _cut(undefined, extents)
        if x.dtype != dtype:
            raise AccessError(f"the tile holds {x.dtype} where its type is {value.type}")
        self.tiles[value.name] = (x, undefined if undefined is not None and undefined.any() else None)
        if value.hint:
            self.named[value.hint] = value.name
        if not extents and value.type.dtype.is_int:
            self.numbers[value.name] = int(x)

    def tile(self, value: ir.Value) -> Tensor:
        """The elements of a tile that is used.

        Raises:
            AccessError: one of them is undefined.
        """
        x, undefined = self.tiles[value.name]
        if undefined is not None:
            raise AccessError(f"{value.hint or 'the tile'} is read before all of it has been written")
        return x

    def bind_tensors(self, bound: Sequence[tuple[ir.Param, Tensor]], first: dict[str, str]) -> None:
        """Make each tensor the memory of its parameter. Parameters on the same memory share its history."""
        groups: dict[tuple[Any, ...], list[tuple[ir.Param, Tensor]]] = {}
        for param, tensor in bound:
            data = self._checked(param, tensor)
            key = (data.data_ptr(), data.shape, data.stride(), data.dtype) if data.numel() else (param.name,)
            groups.setdefault(key, []).append((param, data))
        for group in groups.values():
            accesses = {first.get(param.name, "load") for param, _ in group}
            tracked = any(param.name in first for param, _ in group)
            memory = Memory(group[0][0].name, group[0][1], self.programs, tracked=tracked, fresh=accesses <= _WRITES)
            self.memories.append(memory)
            for param, data in group:
                self.views[param.value.name] = View(memory, tuple(slice(0, size) for size in data.shape))

    def _checked(self, param: ir.Param, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            raise UnsupportedError(f"interp: {param.name} is on {tensor.device}; the interpreter runs on the CPU")
        shape = self.nominal(param.value.type)
        data = tensor.detach()
        if param.value.type.dtype == int4:
            data = math.unpack_int4(data)
            data = _cut(data, shape)  # the last byte of an odd row holds one value
        if list(data.shape) != shape:
            raise LaunchError(f"{param.name}: a tensor of {list(data.shape)} given; expected {shape}")
        return data

    # -- execution ----------------------------------------------------------------------------------

    def block(self, block: ir.Block) -> list[Slot]:
        """Run a region; what its yield holds."""
        for op in block.ops:
            if op.name == "yield":
                return [self.tiles[value.name] for value in op.operands]
            try:
                self.operation(op)
            except LaunchError:
                raise
            except (AccessError, ValueError, RuntimeError, ZeroDivisionError) as error:
                where = f"{op.loc}: " if op.loc else ""
                line = f"\n    {op.loc.text.strip()}" if op.loc else ""
                raise LaunchError(f"{where}{op.name}: {error}{line}") from error
        return []

    def operation(self, op: ir.Op) -> None:
        """Run one operation and assign its results."""
        if op.name in _MOVES:
            self._move(op)
        elif op.name in math.UNARY:
            self.assign(op.result, math.UNARY[op.name](self.tile(op.operands[0])))
        elif op.name in math.BINARY or op.name == "fma":
            function: Callable[..., Tensor] = math.BINARY.get(op.name, math.fma)
            self.assign(op.result, function(*self._together(op)))
        else:
            getattr(self, f"_{op.name}")(op)

    def _together(self, op: ir.Op) -> list[Tensor]:
        """Operands cut to the elements that count of the result."""
        extents = self.extents(op.result.type)
        return [_cut(self.tile(value), extents) for value in op.operands]

    def _move(self, op: ir.Op) -> None:
        slots = [self.tiles[value.name] for value in op.operands]
        move = getattr(self, f"_{op.name}")
        masks = None
        if any(undefined is not None for _, undefined in slots):
            masks = move(op, [torch.zeros(x.shape, dtype=torch.bool) if u is None else u for x, u in slots])
        self.assign(op.result, move(op, [x for x, _ in slots]), masks)

    # -- moves: from the operands' tensors to the result's ------------------------------------------

    def _where(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        extents = self.extents(op.result.type)
        condition, x, y = (_cut(t, extents) for t in (self.tile(op.operands[0]), *tensors[1:]))
        return torch.where(condition, x, y)

    def _broadcast(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        x, = tensors
        source, target = op.operands[0].type, op.result.type
        extents = self.extents(target)
        axes = op.attrs["axes"]
        x = x.permute([a for a in axes if a is not None])
        for axis, origin in enumerate(axes):
            if origin is None:
                x = x.unsqueeze(axis)
            elif source.shape[origin] == target.shape[axis]:
                x = x.narrow(axis, 0, min(extents[axis], x.shape[axis]))
        return x.expand(extents)

    def _reshape(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        return tensors[0].reshape(self.extents(op.result.type))

    def _transpose(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        return tensors[0].permute(op.attrs["perm"])

    def _concat(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        axis, extents = op.attrs["axis"], self.extents(op.result.type)
        return torch.cat([_cut(t, [*extents[:axis], t.shape[axis], *extents[axis + 1:]]) for t in tensors], axis)

    def _slice(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        x = tensors[0]
        axis = 0
        for entry in self._entries(op):
            if isinstance(entry, int):
                check_range("slice", entry, 1, x.shape[axis])
                x = x.select(axis, entry)
                continue
            if entry is not None:
                check_range("slice", *entry, x.shape[axis])
                x = x.narrow(axis, entry[0] if entry[1] else 0, entry[1])
            axis += 1
        return x

    def _extract(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        return tensors[0][self._place(op, tensors[0], op.operands[1:])]

    def _insert(self, op: ir.Op, tensors: list[Tensor]) -> Tensor:
        x = tensors[0].clone()
        x[self._place(op, x, op.operands[2:])] = tensors[1]
        return x

    def _place(self, op: ir.Op, x: Tensor, indices: Sequence[ir.Value]) -> tuple[int, ...]:
        place = tuple(int(self.tile(value)) for value in indices)
        for index, size in zip(place, x.shape):
            check_range(op.name, index, 1, size)
        return place

    def _entries(self, op: ir.Op) -> list[int | tuple[int, int] | None]:
        """A spec with its numbers: for each axis an index, (start, valid extent) or None for all of it."""
        entries: list[int | tuple[int, int] | None] = []
        for kind, *rest in op.attrs["spec"]:
            start = int(self.tile(op.operands[rest[0]])) if rest else 0
            if kind == "range":
                extent = self.number(rest[1] if rest[2] is None else rest[2])
                entries.append((start, max(extent, 0)))
            else:
                entries.append(start if kind == "at" else None)
        return entries

    # -- tiles from scratch, casts, reductions ------------------------------------------------------

    def _const(self, op: ir.Op) -> None:
        self.assign(op.result, torch.tensor(op.attrs["value"], dtype=op.result.type.dtype.torch))

    def _dim(self, op: ir.Op) -> None:
        self.assign(op.result, torch.tensor(self.number(op.attrs["expr"])))

    def _full(self, op: ir.Op) -> None:
        x = self.tile(op.operands[0]).expand(self.nominal(op.result.type))
        self.assign(op.result, x, torch.ones(x.shape, dtype=torch.bool) if op.attrs.get("undefined") else None)

    def _iota(self, op: ir.Op) -> None:
        shape, axis = self.nominal(op.result.type), op.attrs["axis"]
        steps = torch.arange(shape[axis], dtype=torch.int32)
        self.assign(op.result, steps.reshape(-1, *[1] * (len(shape) - 1 - axis)).expand(shape))

    def _cast(self, op: ir.Op) -> None:
        self.assign(op.result, math.cast(self.tile(op.operands[0]), op.result.type.dtype))

    def _reduce(self, op: ir.Op) -> None:
        self.assign(op.result, math.reduce(op.attrs["kind"], self.tile(op.operands[0]), op.attrs["axis"]))

    def _scan(self, op: ir.Op) -> None:
        self.assign(op.result, math.scan(op.attrs["kind"], self.tile(op.operands[0]), op.attrs["axis"]))

    def _sort(self, op: ir.Op) -> None:
        both = math.sort(self.tile(op.operands[0]), op.attrs["axis"], op.attrs["descending"])
        for value, x in zip(op.results, both):
            self.assign(value, x)

    def _mma(self, op: ir.Op) -> None:
        a, b, *acc = (self.tile(value) for value in op.operands)
        inner = min(a.shape[-1], b.shape[-2])
        *batch, m, n = self.extents(op.result.type)
        a = _cut(a, [*batch, m, inner])
        b = _cut(b, [*(batch if b.dim() > 2 else []), inner, n])
        self.assign(op.result, math.mma(a, b, _cut(acc[0], [*batch, m, n]) if acc else None))

    def _rand(self, op: ir.Op) -> None:
        self.assign(op.result, math.rand(*(self.tile(value) for value in op.operands)))

    # -- memory -------------------------------------------------------------------------------------

    def _view(self, op: ir.Op) -> None:
        self.views[op.result.name] = self.views[op.operands[0].name].narrow(self._entries(op))

    def _load(self, op: ir.Op) -> None:
        self.assign(op.result, self.views[op.operands[0].name].load())

    def _target(self, op: ir.Op) -> tuple[View, Tensor]:
        """The view and the tile of a store, both cut to the elements that count of both."""
        view, x = self.views[op.operands[0].name], self.tile(op.operands[1])
        extents = [min(pair) for pair in zip(view.shape, x.shape)]
        return view.narrow([(0, extent) for extent in extents]), _cut(x, extents)

    def _store(self, op: ir.Op) -> None:
        view, x = self._target(op)
        view.store(x)

    def _atomic_add(self, op: ir.Op) -> None:
        view, x = self._target(op)
        view.atomic_add(x)

    def _gather(self, op: ir.Op) -> None:
        self.assign(op.result, self.views[op.operands[0].name].gather(self.tile(op.operands[1])))

    def _scatter(self, op: ir.Op) -> None:
        view, index, x = self.views[op.operands[0].name], self.tile(op.operands[1]), self.tile(op.operands[2])
        extents = [min(pair) for pair in zip([*index.shape, *view.shape[1:]], x.shape)]
        rows = view.narrow([None, *((0, extent) for extent in extents[index.dim():])])
        rows.scatter(_cut(index, extents[:index.dim()]), _cut(x, extents))

    # -- control flow -------------------------------------------------------------------------------

    def _grid(self, op: ir.Op) -> None:
        region, = op.regions
        with self._grid_open():
            for place in itertools.product(*(range(int(self.tile(value))) for value in op.operands)):
                self.programs.ancestors.append(next(self.programs.numbers))
                self.coordinates += place
                self._pass(region.args, [(torch.tensor(i, dtype=a.type.dtype.torch), None)
                                         for i, a in zip(place, region.args)])
                self.block(region)
                self.programs.ancestors.pop()
                del self.coordinates[len(self.coordinates) - len(place):]

    @contextmanager
    def _grid_open(self) -> Iterator[None]:
        self.programs.bases.append(next(self.programs.numbers))
        yield
        for memory in self.memories:
            memory.close_grid()
        self.programs.bases.pop()

    def _pass(self, values: Sequence[ir.Value], slots: Sequence[Slot]) -> None:
        for value, (x, undefined) in zip(values, slots, strict=True):
            self.assign(value, x, undefined)

    def _for(self, op: ir.Op) -> None:
        low, high, step = (int(self.tile(value)) for value in op.operands[:3])
        carried = [self.tiles[value.name] for value in op.operands[3:]]
        region, = op.regions
        for i in range(low, high, step):
            counter = torch.tensor(i, dtype=region.args[0].type.dtype.torch)
            self._pass(region.args, [(counter, None), *carried])
            carried = self.block(region)
            if op.attrs.get("early_exit"):
                (stop, _), *carried = carried
                if stop:
                    break
        self._pass(op.results, carried)

    def _while(self, op: ir.Op) -> None:
        condition, body = op.regions
        carried = [self.tiles[value.name] for value in op.operands]
        while True:
            self._pass(condition.args, carried)
            if not self.block(condition)[0][0]:
                break
            self._pass(body.args, carried)
            carried = self.block(body)
        self._pass(op.results, carried)

    def _if(self, op: ir.Op) -> None:
        taken = op.regions[0] if self.tile(op.operands[0]) else op.regions[1]
        self._pass(op.results, self.block(taken))

    def _print(self, op: ir.Op) -> None:
        place = f"{op.loc or 'kernel'}:" + (f" program {tuple(self.coordinates)}:" if self.coordinates else "")
        if op.attrs.get("breakpoint"):
            stop({name: self.tiles[value][0] for name, value in self.named.items()}, place)
            return
        print(place, str(op.attrs.get("text", "")).format(*(shown(self.tiles[v.name][0]) for v in op.operands)))

    def _assert(self, op: ir.Op) -> None:
        if not self.tile(op.operands[0]).all():
            raise AccessError(op.attrs.get("text") or "the condition does not hold")


def shown(x: Tensor) -> str:
    """A scalar, or a tile in brackets, as `print` writes them; of a long tile the edges of every axis."""
    def text(x: Tensor, is_long: bool) -> str:
        if x.dim():
            rows = [text(row, is_long) for row in x] if not is_long or len(x) <= 2 * ir.PRINTED_EDGE else [
                *(text(row, is_long) for row in x[:ir.PRINTED_EDGE]), "...",
                *(text(row, is_long) for row in x[-ir.PRINTED_EDGE:])]
            return f"[{', '.join(rows)}]"
        return f"{float(x):.{15 if x.dtype == torch.float64 else 6}g}" if x.is_floating_point() else str(x.item())

    return text(x, x.numel() > ir.MAX_PRINTED)


def stop(tiles: dict[str, Tensor], place: str) -> None:
    """Enter the debugger at a kernel's `breakpoint()`: `tiles` holds the kernel's variables by name."""
    breakpoint()


def _cut(x: Tensor, extents: Sequence[int]) -> Tensor:
    """The first elements of every axis."""
    return x[tuple(slice(0, extent) for extent in extents)] if list(x.shape) != list(extents) else x
