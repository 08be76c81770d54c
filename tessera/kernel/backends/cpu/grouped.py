"""Sums over groups of k, each a product of bytes that is scaled as it is added: `sum(axis=0)` over [G, M, N].

In: a sum over the leading axis of what is computed element by element from a product of int8 [G, M, k] with int8 or
int4 [G, k, N], whose weights lie as rows [N, G * k]: a linear layer with activations in 8 bits and a scale for each
group. Out: its result in scratch. No [G, M, N] tile is made: the products of a group stay in registers, the weights
are read once (`byte_rows.py`), and what surrounds the product is computed where it is added, groups ascending, so that
the bits are those of the operations one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.kernel import ir
from tessera.kernel.backends.cpu import byte_rows, emit
from tessera.kernel.backends.cpu.byte_dot import CHUNK
from tessera.kernel.backends.cpu.columns import find_rows, run_elements, step
from tessera.kernel.backends.cpu.context import ZERO, Context, Memory, register_type
from tessera.kernel.backends.cpu.elements import ANY, Point, element, operand_points, store
from tessera.kernel.backends.cpu.emit import F32, I64, Val
from tessera.kernel.backends.cpu.fusion import Fused
from tessera.kernel.ir import Function, Op, Value

_LARGEST_GROUP = 128


def grouped_sums(function: Function, kept: set[str]) -> Fused:
    """For each sum that computes the product below it: that product.

    Args:
        kept: values that are materialised where they are defined.
    """
    users, looped = ir.users(ir.walk(function.body)), ir.in_loops(function.body)
    unit = {param.value.name for param in function.params if param.is_view and param.unit_stride}
    found: Fused = {}
    for op in ir.walk(function.body):
        if op.name == "reduce" and op not in looped and op.attrs["kind"] == "sum" and op.attrs["axis"] == 0 and \
                op.operands[0].type.rank == 3 and op.operands[0].type.dtype.name == "f32":
            chain = _chain(op, kept)
            products = [mma for mma in chain if mma.name == "mma" and _only_for(op, mma, chain, users)]
            if len(products) == 1 and _weights(products[0], unit) is not None:
                found[op] = products
    return found


def _chain(sum_: Op, kept: set[str]) -> set[Op]:
    """The sum, the operations that are computed at the same point as what it adds, and the products they read."""
    chain, pending = {sum_}, list(sum_.operands)
    while pending:
        value = pending.pop()
        if value.op is not None and value.type.shape == sum_.operands[0].type.shape:
            if value.op.name in ir.ELEMENTWISE and value.name not in kept:
                chain.add(value.op)
                pending += value.op.operands
            elif value.op.name == "mma":
                chain.add(value.op)
    return chain


def _only_for(sum_: Op, op: Op, chain: set[Op], users: dict[str, list[Op]]) -> bool:
    """Whether nothing but the sum needs what is computed from an operation's result."""
    return all(user is sum_ or (user in chain and _only_for(sum_, user, chain, users))
               for user in users[op.result.name])


def _weights(mma: Op, unit: set[str] | None) -> Value | None:
    """The view [N, K] behind a product's right operand, transpose(reshape(load)); None for anything else.

    Args:
        unit: the parameters whose last axis lies side by side.
    """
    left, right = mma.operands[:2]
    group = right.type.shape[-2].const
    if len(mma.operands) > 2 or left.type.dtype.name != "int8" or right.type.dtype.name not in ("int8", "int4") or \
            group is None or group % CHUNK or not group or group > _LARGEST_GROUP:
        return None
    turned = right.op
    if turned is None or turned.name != "transpose" or turned.attrs["perm"] != (1, 2, 0):
        return None
    split = turned.operands[0].op
    loaded = split.operands[0].op if split is not None and split.name == "reshape" else None
    if loaded is None or loaded.name != "load" or loaded.result.type.rank != 2:
        return None
    view = loaded.operands[0]
    whole = view
    while whole.op is not None and whole.op.name == "view":
        if whole.op.attrs["spec"][-1] != ("all",):
            return None
        whole = whole.op.operands[0]
    return view if unit is None or whole.name in unit else None


def lower(ctx: Context, op: Op, product: Op) -> None:
    """Fill the sum's buffer; `ctx.memory` is set."""
    _Grouped(ctx, op, product).lower()


@dataclass(frozen=True)
class _Column:
    """A tile that is read across rows of memory: for a panel of columns it lies in scratch, a vector a group."""

    value: Value
    point: Point
    memory: Memory
    scratch: Val


class _Grouped:
    """One sum over groups."""

    def __init__(self, ctx: Context, op: Op, product: Op) -> None:
        view = _weights(product, None)
        assert view is not None
        self.ctx, self.op, self.product = ctx, op, product
        self.source, self.result = op.operands[0], ctx.buffer(op.result)
        self.weights = ctx.memory[view.name]
        self.groups = self.source.type.shape[0]
        self.group = product.operands[0].type.shape[-1]
        self.columns = [
            _Column(value, at, memory, ctx.scratch(self.groups * (4 * byte_rows.lanes(ctx))))
            for value, at, memory in self._read_across(self.source, self._point(ANY, ZERO, ZERO, None))]

    def lower(self) -> None:
        """Loops over rows, columns and groups."""
        ctx = self.ctx
        byte_rows.multiply(ctx, byte_rows.Rows(
            weights=self.weights, bytes=self._bytes, chunks=(self.group.const or 0) // CHUNK,
            m=ctx.size(self.source.type.extent(1)), n=ctx.size(self.source.type.extent(2)),
            k=ctx.size(self.groups * self.group), start=emit.const(0.0, emit.vec(byte_rows.lanes(ctx), F32)),
            prepare=self._prepare, step=self._add, finish=self._finish,
            scratch=ctx.scratch(byte_rows.scratch_bytes(self.groups * self.group))))
        ctx.memory[self.op.result.name] = self.result

    def _point(self, group: Val, row: Val, column: Val, mask: Val | None) -> Point:
        return Point((group, row, column), 2, byte_rows.lanes(self.ctx), mask)

    def _bytes(self, row: Val, group: Val, chunk: int, mask: Val | None) -> Val:
        at = Point((group, row, emit.const(chunk * CHUNK, I64)), 2, CHUNK, mask)
        return element(self.ctx, self.product.operands[0], at)

    def _read_across(self, value: Value, point: Point) -> list[tuple[Value, Point, Memory]]:
        """The loads below a value that find the lanes of a point in different rows of memory."""
        ctx, op = self.ctx, value.op
        memory = ctx.memory.get(value.name)
        if memory is None and op is not None and op.name == "load":
            memory = ctx.memory[op.operands[0].name]
        if memory is not None:
            across = point.axis is not None and memory.strides[point.axis].const not in (0, 1)
            return [(value, point, memory)] if across and run_elements(memory) and len(point.indices) == 2 else []
        if op is None or op is self.product or op.name == "gather":
            return []
        return [found for operand, at in operand_points(ctx, op, point) if operand.type.rank
                for found in self._read_across(operand, at)]

    def _prepare(self, column: Val, mask: Val) -> None:
        """Transpose what is read across rows."""
        with self.ctx.reading_ahead(byte_rows.lanes(self.ctx), self.ctx.size(self.groups)):
            for found in self.columns:
                at = self._at(found, ANY, column, mask)
                find_rows(self.ctx, found.memory, at.indices, at.axis or 0, at.lanes, mask)
                self._transpose(found, column, mask)

    def _transpose(self, found: _Column, column: Val, mask: Val) -> None:
        ctx, b, run = self.ctx, self.ctx.b, run_elements(found.memory)
        groups = ctx.size(self.groups)

        def put(group: Val) -> None:
            x = element(ctx, found.value, self._at(found, group, column, mask))
            b.store(x, self._place(found, group, x.ty))

        whole = b.udiv(groups, run)
        with b.for_(0, whole) as loop, ctx.scope():
            root = b.opaque(loop.i)
            for offset in range(run):
                put(step(ctx, root, run, offset))
        with b.for_(b.mul(whole, run), groups) as loop, ctx.scope():
            put(loop.i)

    def _at(self, found: _Column, group: Val, column: Val, mask: Val) -> Point:
        indices = [column if axis == found.point.axis else group for axis in range(2)]
        return Point(tuple(indices), found.point.axis, byte_rows.lanes(self.ctx), mask)

    def _place(self, found: _Column, group: Val, ty: str) -> Val:
        return self.ctx.b.gep(found.scratch, group, ty)

    def _add(self, group: Val, row: Val, column: Val, mask: Val, total: Val, sums: Val) -> Val:
        """The total after a group."""
        ctx, b, point = self.ctx, self.ctx.b, self._point(group, row, column, mask)
        for found in self.columns:
            at = self._at(found, group, column, mask)
            if ctx.lookup((found.value.name, *at.key)) is None:
                ty = emit.vec(byte_rows.lanes(ctx), register_type(found.memory.dtype))
                ctx.remember((found.value.name, *at.key), b.load(self._place(found, group, ty), ty))
        ctx.remember((self.product.result.name, *point.key), sums)
        return b.add(total, element(ctx, self.source, point), contract=False)

    def _finish(self, row: Val, column: Val, mask: Val, total: Val) -> None:
        store(self.ctx, self.result, Point((row, column), 1, byte_rows.lanes(self.ctx), mask), total)
