"""Turns a kernel without `tile.grid` into a grid over blocks of its parallel dims.

In: a function whose tiles span whole dims. Out: the same function with one `grid` around its body: each
program computes one block of every dim that no operation reduces, scans or indexes across and that
every store covers. Values keep their names; their types become block types, ragged at the end of a dim.
Called by `passes.prepare` for the cpu and cuda backends, which choose the block sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.kernel import ir
from tessera.kernel.build import Builder
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Op, TileTy, Value
from tessera.kernel.passes.axes import AxisClasses, Node


@dataclass(frozen=True, kw_only=True)
class ParallelDim:
    """A dim that may be cut: its size, and what a backend needs to choose a block size."""

    size: Dim
    innermost: bool  # the last axis of what is stored: cut it only into pieces of many vectors
    mma_rows: bool  # the M of a matmul
    mma_columns: bool  # the N of a matmul
    crossed: bool = False  # the last axis of a tile that is loaded whose earlier axis is stored innermost


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a dim is cut: blocks of at most `most` elements, `step` of them at run time (default: `most`).

    `step` may depend on the launch: sizes, and `THREADS`. Scratch memory is laid out for `most`.
    """

    most: int
    step: Dim | None = None


THREADS = Dim.atom("$threads")  # how many threads run the launch
BlockSizes = Callable[[Function, Sequence[ParallelDim]], Sequence[Cut | None]]


def parallelize(function: Function, choose: BlockSizes) -> None:
    """Rewrite in place; nothing happens where there is a grid already, or nothing to cut.

    Args:
        choose: says how to cut each parallel dim; None leaves it whole.
    """
    if any(op.name == "grid" for op in function.body.ops):
        return
    classes = AxisClasses(function)
    roots = _parallel_roots(function, classes)
    dims = [_describe(function, classes, root) for root in roots]
    cuts = {root: (dim.size, cut) for root, dim, cut in zip(roots, dims, choose(function, dims)) if cut}
    if cuts:
        _Cutter(function, classes, cuts).run()


def _parallel_roots(function: Function, classes: AxisClasses) -> list[Node]:
    writes = [op for op in ir.walk(function.body) if op.name in ir.WRITES]
    if not writes:
        return []
    common: list[Node] | None = None
    for op in writes:
        mine = [classes.find(op.operands[-1], axis) for axis in range(op.operands[-1].type.rank)]
        common = mine if common is None else [root for root in common if root in mine]
    return [root for root in common or [] if classes.is_free(root) and _reads_stay_in_block(function, classes, root)]


def _reads_stay_in_block(function: Function, classes: AxisClasses, root: Node) -> bool:
    """A parameter that is read and written must be cut along the same axis at each access."""
    written: dict[str, set[int | None]] = {}
    for op in ir.walk(function.body):
        if op.name in ir.WRITES:
            param, axis = _param_axis(op, op.operands[-1], classes, root)
            written.setdefault(param, set()).add(axis)
    for op in ir.walk(function.body):
        if op.name in ir.READS:
            param, axis = _param_axis(op, op.result, classes, root)
            if param in written and ({axis} != written[param] or axis is None or op.name == "gather"):
                return False
    return all(len(axes) == 1 for axes in written.values())


def _param_axis(op: Op, tile: Value, classes: AxisClasses, root: Node) -> tuple[str, int | None]:
    """The parameter behind an access, and the parameter's axis that the class runs along."""
    axis = classes.axis_of(tile, root)
    view = op.operands[0]
    if op.name in ("gather", "scatter") and axis is not None:
        axis = None if axis < op.operands[1].type.rank else axis - op.operands[1].type.rank + 1
    while view.op is not None and view.op.name == "view":
        kept = [i for i, entry in enumerate(view.op.attrs["spec"]) if entry[0] != "at"]
        axis = None if axis is None else kept[axis]
        view = view.op.operands[0]
    return view.name, axis


def _describe(function: Function, classes: AxisClasses, root: Node) -> ParallelDim:
    writes = [op.operands[-1] for op in ir.walk(function.body) if op.name in ir.WRITES]
    mmas = [op.result for op in ir.walk(function.body) if op.name == "mma"]

    def at(values: Sequence[Value], axis: int) -> bool:
        return any(v.type.rank >= -axis and classes.find(v, v.type.rank + axis) == root for v in values)

    return ParallelDim(size=classes.sizes[root], innermost=at(writes, -1), mma_rows=at(mmas, -2),
                       mma_columns=at(mmas, -1), crossed=not at(writes, -1) and _is_crossed(function, classes, root))


def _is_crossed(function: Function, classes: AxisClasses, root: Node) -> bool:
    stored = {classes.find(op.operands[-1], op.operands[-1].type.rank - 1) for op in ir.walk(function.body)
              if op.name in ir.WRITES and op.operands[-1].type.rank}
    for op in ir.walk(function.body):
        if op.name == "load":
            *outer, last = [None, *(classes.find(op.result, axis) for axis in range(op.result.type.rank))]
            if last == root and not stored.isdisjoint(outer):
                return True
    return False


def _step(cut: Cut) -> Dim:
    return Dim.of(cut.most) if cut.step is None else cut.step


class _Cutter:
    """Rewrites types and accesses so that the body works on one block of each cut class."""

    def __init__(self, function: Function, classes: AxisClasses, cuts: dict[Node, tuple[Dim, Cut]]) -> None:
        self.function, self.classes, self.cuts = function, classes, cuts
        self.builder = Builder(function)
        self.starts: dict[Node, Value] = {}
        self.blocks: dict[Node, tuple[Dim, Dim | None]] = {}
        self.params = {p.value.name for p in function.params}

    def run(self) -> None:
        """Wrap the body into a grid and rewrite it."""
        builder, body = self.builder, self.function.body
        region = Block()
        self.function.body = builder.block = Block()
        counts = [builder.size(size.ceildiv(_step(cut))) for size, cut in self.cuts.values()]
        region.args = [builder.argument(TileTy((), counts[0].type.dtype)) for _ in counts]
        builder.emit("grid", counts, regions=[region])
        with builder.inside(region):
            for (root, (_, cut)), index in zip(self.cuts.items(), region.args):
                self.starts[root] = index if cut.most == 1 else builder.binary("mul", index, builder.size(_step(cut)))
        self._rewrite(body)
        region.ops += body.ops

    def _rewrite(self, block: Block) -> None:
        rewritten = Block()
        for arg in block.args:
            arg.type = self._cut_type(arg)
        with self.builder.inside(rewritten):
            for op in block.ops:
                self.builder.loc = op.loc
                for region in op.regions:
                    self._rewrite(region)
                self._rewrite_op(op)
        block.ops = rewritten.ops

    def _rewrite_op(self, op: Op) -> None:
        if op.name in ir.WRITES | ir.READS and op.operands[0].name in self.params:
            tile = op.operands[-1] if op.name in ir.WRITES else op.result
            op.operands[0] = self._window(op, tile)
        elif op.name == "view" and op.operands[0].name in self.params:
            self._narrow_view(op)
        roots = {axis: self.classes.find(op.result, axis) for axis in range(op.result.type.rank)} if op.results else {}
        for result in op.results:
            result.type = self._cut_type(result)
        self.builder.block.ops.append(op)
        if op.name == "iota" and roots[op.attrs["axis"]] in self.cuts:
            self._shift_iota(op, self.starts[roots[op.attrs["axis"]]])

    def _cut(self, root: Node) -> tuple[Dim, Dim | None]:
        """How long a block is: (nominally, at the end of the dim)."""
        if root not in self.blocks:
            size, cut = self.cuts[root]
            start, valid = self.starts[root].expr, None
            if cut.most > 1:
                assert start is not None
                valid = _step(cut).minimum(size - start)
            self.blocks[root] = Dim.of(cut.most), None if valid is None or valid.const == cut.most else valid
        return self.blocks[root]

    def _cut_type(self, value: Value) -> TileTy:
        if value.name in self.params or not value.type.rank:
            return value.type
        shape, valid = list(value.type.shape), list(value.type.valid)
        for axis in range(value.type.rank):
            root = self.classes.find(value, axis)
            if root in self.cuts:
                shape[axis], valid[axis] = self._cut(root)
        return type(value.type)(tuple(shape), value.type.dtype, tuple(valid))

    def _window(self, op: Op, tile: Value) -> Value:
        """The block's window on a parameter that an access reads or writes whole."""
        view = op.operands[0]
        offset = 0 if op.name not in ("gather", "scatter") else op.operands[1].type.rank - 1
        spec: list[tuple[Any, ...]] = []
        starts: list[Value] = []
        for axis in range(view.type.rank):
            root = self.classes.find(tile, axis + offset) if axis + offset >= 0 else None
            looked_up = op.name in ("gather", "scatter") and axis == 0
            if root is None or root not in self.cuts or looked_up:
                spec.append(("all",))
            else:
                starts.append(self.starts[root])
                spec.append(("range", len(starts), *self._cut(root)))
        return self.builder.view(view, spec, starts)

    def _narrow_view(self, op: Op) -> None:
        """A view taken straight from a parameter: its whole axes become block ranges."""
        spec, position = list(op.attrs["spec"]), 0
        for axis, entry in enumerate(spec):
            root = self.classes.find(op.result, position) if entry[0] != "at" else None
            if entry[0] == "all" and root in self.cuts:
                op.operands.append(self.starts[root])
                spec[axis] = ("range", len(op.operands) - 1, *self._cut(root))
            position += entry[0] != "at"
        op.attrs["spec"] = tuple(spec)

    def _shift_iota(self, op: Op, start: Value) -> None:
        """Positions count from the start of the dim, not of the block."""
        old = op.result
        local = Value(self.function.fresh(), old.type, op)
        op.results = [local]
        shift = self.builder.cast(start, old.type.dtype)
        shift = self.builder.broadcast(shift, old.type.shape, (None,) * old.type.rank, old.type.valid)
        add = self.builder.emit("add", [local, shift])
        old.op = add
        add.results = [old]
