"""Tile IR to LLVM: walks the operations and puts the pieces of this folder together.

In: a function after the passes. Out: an LLVM module with, for each segment k (one parallel loop, or
serial code that has effects), `items_k(args) -> i64` and `body_k(args, begin, end)`: any thread may run any
range of items. `args` points at 8-byte slots: for a view its address and strides, for a scalar an i64 or
a double, then the sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from tessera.errors import UnsupportedError
from tessera.kernel import ir
from tessera.kernel.backends.cpu import emit, grouped, plan
from tessera.kernel.backends.cpu.context import Context, Memory, register_type, storage_type
from tessera.kernel.backends.cpu.control import lower_for, lower_if, lower_while
from tessera.kernel.backends.cpu.elements import Point, compute, element, index64, load, produce, store
from tessera.kernel.backends.cpu.emit import I64, PTR, Val
from tessera.kernel.backends.cpu.fusion import Fused, fused_products
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.backends.cpu.loops import each, sweep, write
from tessera.kernel.backends.cpu.matmul import lower_mma, store_products
from tessera.kernel.backends.cpu.printing import lower_print
from tessera.kernel.backends.cpu.reductions import reduce, scan
from tessera.kernel.backends.cpu.sorting import sort
from tessera.kernel.backends.cpu.storage import from_storage, to_storage
from tessera.kernel.backends.cpu.stores import store_groups
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Op
from tessera.types import DType

_SCALAR = ir.ELEMENTWISE | {"rand"}
_LAZY = frozenset("broadcast transpose reshape slice full iota load gather".split())
Segments = list[tuple[list[Op], list[Op]]]  # of each: operations to repeat, its own operations


def lower(function: Function, target: Target) -> tuple[emit.Module, int]:
    """The module and its number of segments."""
    module = emit.Module(has_f16=target.has_f16)
    kept, joined = plan.plan(function), plan.joined(function)
    fused = fused_products(function, kept, target) | grouped.grouped_sums(function, kept)
    segments = _segments(function.body)
    _emit_work(function, module, target)
    for number, (shared, ops) in enumerate(segments):
        _lower_segment(function, module, target, kept, joined, fused, number, shared, ops)
    return module, len(segments)


def _emit_work(function: Function, module: emit.Module, target: Target) -> None:
    """work(args): elements of all views, several times where a matmul or a loop uses them again."""
    estimate = module.function("work", I64, [("args", PTR)])
    ctx = Context(function, module, target, estimate)
    repeats = 8 if any(op.name in ("mma", "for", "while") for op in ir.walk(function.body)) else 1
    total: Val = emit.const(0, I64)
    for param in function.params:
        if param.is_view:
            count = emit.const(repeats, I64)
            for dim in param.value.type.shape:
                count = ctx.b.mul(count, ctx.size(dim))
            total = ctx.b.add(total, count)
    ctx.b.ret(total)


def _segments(body: Block) -> Segments:
    """Split the top level at its grids: (operations to repeat, operations of the segment).

    Where a loop outside the grids both has effects and carries values out, or memory is written after it was read for
    a later segment, nothing can be repeated: the whole kernel is one serial segment.
    """
    if any(_has_effects(op) and op.results for op in body.ops):
        return [([], body.ops)]
    pure: list[Op] = []
    segments: Segments = []
    for op in body.ops:
        if op.name == "grid":
            segments.append((list(pure), [op]))
        elif _has_effects(op):
            if segments and segments[-1][1][0].name != "grid" and len(segments[-1][0]) == len(pure):
                segments[-1][1].append(op)
            else:
                segments.append((list(pure), [op]))
        else:
            pure.append(op)
    return [([], body.ops)] if _reads_too_late(segments) else segments


def _reads_too_late(segments: Segments) -> bool:
    """Whether a segment would repeat a read from before an earlier segment, which wrote to what it reads."""
    rests: dict[str, set[ir.Value]] = {}  # of a value that is repeated: the parameters that it is read from
    stale: set[str] = set()
    known = 0
    for shared, ops in segments:
        for op in shared[known:]:
            inner = list(ir.walk(Block(ops=[op])))
            operands = ir.users(inner).keys()
            params = {ir.param_of(each.operands[0]) for each in inner if each.name in ir.READS}
            params |= set().union(*(rests.get(name, ()) for name in operands))
            rests |= {result.name: params for result in op.results}
            if not stale.isdisjoint(operands):
                stale |= {result.name for result in op.results}
        known, inner = len(shared), list(ir.walk(Block(ops=ops)))
        if not stale.isdisjoint(ir.users(inner)):
            return True
        written = {ir.param_of(op.operands[0]) for op in inner if op.name in ir.WRITES}
        stale |= {name for name, params in rests.items() if params & written}
    return False


def uneven_segments(function: Function) -> list[int]:
    """The segments whose items differ in cost: those with loops that an item's index, or what it reads, bounds."""
    return [number for number, (_, ops) in enumerate(_segments(function.body)) if any(map(_is_uneven, ops))]


def _is_uneven(op: Op) -> bool:
    if op.name != "grid":
        return False
    varying = {arg.name for arg in op.regions[0].args}
    for inner in ir.walk(op.regions[0]):
        if inner.name == "while" or (inner.name == "for" and (
                inner.attrs.get("early_exit") or any(bound.name in varying for bound in inner.operands[:3]))):
            return True
        if inner.name == "load" or any(operand.name in varying for operand in inner.operands):
            varying |= {result.name for result in inner.results}
    return False


def _has_effects(op: Op) -> bool:
    return op.name in ir.EFFECTS or any(_has_effects(inner) for region in op.regions for inner in region.ops)


def _lower_segment(function: Function, module: emit.Module, target: Target, kept: set[str], joined: set[str],
                   fused: Fused, number: int, shared: list[Op], ops: list[Op]) -> None:
    items = module.function(f"items_{number}", I64, [("args", "ptr")])
    ctx = Context(function, module, target, items)
    total: Val = emit.const(1, I64)
    parallel = ops[0].name == "grid" and len(ops) == 1
    if parallel:
        _lower_block(ctx, Block(ops=[op for op in shared if not op.result.type.rank or op.name == "view"]))
        for count in ops[0].operands:
            total = ctx.b.mul(total, ctx.b.max(index64(ctx, ctx.scalars[count.name]), 0))
    ctx.b.ret(total)
    # Two callers, one for a team and one for a lone thread: a copy in each would double the time to compile.
    body = module.function(
        f"body_{number}", emit.VOID, [("args", PTR), ("begin", I64), ("end", I64)], inline=False)
    ctx = Context(function, module, target, body)
    ctx.materialize, ctx.joined, ctx.fused, ctx.together = kept, joined, fused, store_groups(function)
    _lower_block(ctx, Block(ops=shared))
    if parallel:
        with ctx.b.for_(body.args[1], body.args[2]) as loop, ctx.scope():
            _grid_item(ctx, ops[0], loop.i)
    else:
        _lower_block(ctx, Block(ops=ops))
    ctx.finish()


def _grid_item(ctx: Context, op: Op, item: Val) -> None:
    """One program of the grid: the last index runs fastest."""
    b, region = ctx.b, op.regions[0]
    for arg, count in reversed(list(zip(region.args, op.operands))):
        if arg is region.args[0]:
            index = item
        else:
            size = index64(ctx, ctx.scalars[count.name])
            index, item = b.urem(item, size), b.udiv(item, size)
        ctx.scalars[arg.name] = index
    _lower_block(ctx, region)


def _lower_block(ctx: Context, block: Block) -> None:
    for op in block.ops:
        rule = _RULES.get(op.name)
        if rule is not None:
            rule(ctx, op)
        elif op.results and not op.result.type.rank:
            ctx.scalars[op.result.name] = _scalar(ctx, op)
        elif op.name in _LAZY or op.name in _SCALAR:
            if op.result.name in ctx.materialize:
                _materialize(ctx, op)
        elif op.name != "yield":
            raise UnsupportedError(f"cpu: operation {op.name!r} at {op.loc}")


def _scalar(ctx: Context, op: Op) -> Val:
    if op.name in _SCALAR:
        return compute(ctx, op, [ctx.scalars[v.name] for v in op.operands])
    if op.name == "load":
        return load(ctx, ctx.memory[op.operands[0].name], Point(()))
    return produce(ctx, op.result, Point(()))


def _materialize(ctx: Context, op: Op) -> None:
    memory = ctx.buffer(op.result)
    write(ctx, memory, op.result)
    ctx.memory[op.result.name] = memory


def _const(ctx: Context, op: Op) -> None:
    ctx.scalars[op.result.name] = emit.const(op.attrs["value"], register_type(op.result.type.dtype))


def _dim(ctx: Context, op: Op) -> None:
    ctx.scalars[op.result.name] = ctx.size(op.attrs["expr"])


def _view(ctx: Context, op: Op) -> None:
    b, base = ctx.b, ctx.memory[op.operands[0].name]
    indices, strides = [], []
    for entry, stride in zip(op.attrs["spec"], base.strides):
        start = emit.const(0, I64) if entry[0] == "all" else index64(ctx, ctx.scalars[op.operands[entry[1]].name])
        indices.append(start)
        if entry[0] != "at":
            strides.append(stride)
    if base.dtype.name == "int4":
        offset = base.offset
        for index, stride in zip(indices, base.strides):
            offset = b.add(offset, b.mul(index, stride))
        even = base.starts_byte and indices[-1].const is not None and indices[-1].const % 2 == 0
        ctx.memory[op.result.name] = Memory(base.pointer, tuple(strides), base.dtype, offset, even)
        return
    ctx.memory[op.result.name] = Memory(base.address(b, indices), tuple(strides), base.dtype)


def _reduce(ctx: Context, op: Op) -> None:
    if op in ctx.fused:
        grouped.lower(ctx, op, *ctx.fused[op])
        return
    scalar = reduce(ctx, op)
    if scalar is not None:
        ctx.scalars[op.result.name] = scalar


def _store(ctx: Context, op: Op) -> None:
    view, value = op.operands
    memory = ctx.memory[view.name]
    if not value.type.rank:
        store(ctx, memory, Point(()), ctx.scalars[value.name])
        return
    source, type_ = plan.stored_value(op), _store_type(view, value)
    if source.name in ctx.joined:
        _store_parts(ctx, memory, source, type_)
        return
    if op in ctx.fused:
        store_products(ctx, op, ctx.fused[op], type_)
        return
    if op in ctx.together:  # else a later store's loop does it
        _store_together(ctx, ctx.together[op], type_)


def _store_together(ctx: Context, stores: list[Op], type_: ir.TileTy) -> None:
    """The stores of one loop; at every point all values are computed before one is stored."""
    places, values = [ctx.memory[op.operands[0].name] for op in stores], [plan.stored_value(op) for op in stores]

    def body(point: Point) -> None:
        for place, x in zip(places, [element(ctx, value, point) for value in values]):
            store(ctx, place, point, x)

    sweep(ctx, type_, values, body)


def _store_parts(ctx: Context, memory: Memory, joined: ir.Value, type_: ir.TileTy) -> None:
    """A concatenation, each part to its place; at every point all parts are computed before one is stored."""
    assert joined.op is not None
    parts, axis = list(joined.op.operands), joined.op.attrs["axis"]
    if parts[-1].type != parts[0].type:
        last = parts.pop()
        place = _part(ctx, memory, axis, len(parts) * parts[0].type.shape[axis])
        sweep(ctx, ir.TileTy(last.type.shape, type_.dtype, type_.valid), [last],
              lambda point: store(ctx, place, point, element(ctx, last, point)))
    places = [_part(ctx, memory, axis, number * parts[0].type.shape[axis]) for number in range(len(parts))]

    def body(point: Point) -> None:
        for place, x in zip(places, [element(ctx, part, point) for part in parts]):
            store(ctx, place, point, x)

    sweep(ctx, ir.TileTy(parts[0].type.shape, type_.dtype, type_.valid), parts, body)


def _part(ctx: Context, memory: Memory, axis: int, offset: Dim) -> Memory:
    """Memory from an offset along an axis on."""
    start = [emit.const(0, I64)] * len(memory.strides)
    start[axis] = ctx.size(offset)
    return Memory(memory.address(ctx.b, start), memory.strides, memory.dtype)


def _store_type(view: ir.Value, value: ir.Value) -> ir.TileTy:
    """What both the target and the tile count as valid."""
    valid = tuple(a if v is None else v if a is None or a == v else a.minimum(v)
                  for a, v in zip(view.type.valid, value.type.valid))
    return ir.TileTy(value.type.shape, value.type.dtype, valid)


def _concat(ctx: Context, op: Op) -> None:
    if op.result.name in ctx.joined:
        return
    memory, axis = ctx.buffer(op.result), op.attrs["axis"]
    offset = emit.const(0, I64)
    for operand in op.operands:
        start = [emit.const(0, I64)] * operand.type.rank
        start[axis] = offset
        write(ctx, Memory(memory.address(ctx.b, start), memory.strides, memory.dtype), operand)
        offset = ctx.b.add(offset, ctx.size(operand.type.extent(axis)))
    ctx.memory[op.result.name] = memory


def _insert(ctx: Context, op: Op) -> None:
    x, scalar, *indices = op.operands
    memory = ctx.buffer(op.result)
    write(ctx, memory, x)
    store(ctx, memory, Point(tuple(index64(ctx, ctx.scalars[i.name]) for i in indices)), ctx.scalars[scalar.name])
    ctx.memory[op.result.name] = memory


def _extract(ctx: Context, op: Op) -> None:
    x, *indices = op.operands
    point = Point(tuple(index64(ctx, ctx.scalars[i.name]) for i in indices))
    ctx.scalars[op.result.name] = element(ctx, x, point)


def _reshape(ctx: Context, op: Op) -> None:
    """Over memory a reshape is another set of strides, as long as the source lies densely."""
    source = ctx.memory.get(op.operands[0].name)
    made = op.operands[0].op
    dense = op.operands[0].name in ctx.materialize or (made is not None and made.name in (*plan.BUFFERED, "reduce"))
    if dense and source is not None and op.result.type.rank:
        count = emit.const(1, I64)
        strides: list[Val] = []
        for dim in reversed(op.result.type.shape):
            strides.insert(0, count)
            count = ctx.b.mul(count, ctx.size(dim))
        ctx.memory[op.result.name] = Memory(source.pointer, tuple(strides), source.dtype)
    elif not op.result.type.rank:
        zero = Point((emit.const(0, I64),) * op.operands[0].type.rank)
        ctx.scalars[op.result.name] = element(ctx, op.operands[0], zero)


def _scatter(ctx: Context, op: Op) -> None:
    view, index, rows = op.operands
    memory, lead = ctx.memory[view.name], index.type.rank
    if rows.type.rank == lead:
        def one(point: Point) -> None:
            store(ctx, memory, Point((index64(ctx, element(ctx, index, point)),)), element(ctx, rows, point))
        _each_point(ctx, rows, one)
        return
    inner = ir.TileTy(rows.type.shape[lead:], rows.type.dtype, rows.type.valid[lead:])

    def row(point: Point) -> None:
        target = index64(ctx, element(ctx, index, point)) if lead else ctx.scalars[index.name]
        sweep(ctx, inner, [], lambda p: store(
            ctx, memory, p.pick((target, *p.indices), None if p.axis is None else p.axis + 1),
            element(ctx, rows, p.pick((*point.indices, *p.indices), None if p.axis is None else p.axis + lead))))

    _each_point(ctx, index, row)


def _atomic_add(ctx: Context, op: Op) -> None:
    view, value = op.operands
    memory, b = ctx.memory[view.name], ctx.b

    def one(point: Point) -> None:
        x, address = element(ctx, value, point), memory.address(b, point.indices)
        if memory.dtype.bits < 32:
            _add_small(b, address, x, memory.dtype)
        else:
            kind = "fadd" if emit.is_float(x.ty) else "add"
            b.emit(f"atomicrmw {kind} ptr {address.name}, {x} monotonic", x.ty)

    _each_point(ctx, value, one)


def _add_small(b: emit.Builder, address: Val, x: Val, dtype: DType) -> None:
    """Add to 16 or 8 bits of memory: again and again, until nobody else has changed them meanwhile."""
    number, bits = b.function.unique(), f"i{dtype.bits}"
    b.line(f"br label %add{number}")
    b.start_block(f"add{number}")
    old = b.emit(f"load atomic {bits}, ptr {address.name} monotonic, align {dtype.bits // 8}", bits)
    held = from_storage(b, b.bitcast(old, storage_type(dtype)), dtype)
    new = b.bitcast(to_storage(b, b.add(held, x), dtype), bits)
    pair = b.emit(f"cmpxchg ptr {address.name}, {old}, {new} monotonic monotonic", f"{{ {bits}, i1 }}")
    b.line(f"br {b.emit(f'extractvalue {pair}, 1', emit.I1)}, label %added{number}, label %add{number}")
    b.start_block(f"added{number}")


def _assert(ctx: Context, op: Op) -> None:
    """A failed assertion leaves its number in the status slot; the launch raises."""
    b = ctx.b
    number = next(i for i, other in enumerate(ir.asserts(ctx.function), 1) if other is op)

    def check(point: Point) -> None:
        with b.if_(b.not_(element(ctx, op.operands[0], point)), likely=False):
            b.store(emit.const(number, I64), ctx.status)

    _each_point(ctx, op.operands[0], check)


def _each_point(ctx: Context, value: ir.Value, body: Callable[[Point], None]) -> None:
    def nest(indices: tuple[Val, ...]) -> None:
        if len(indices) == value.type.rank:
            body(Point(indices))
        else:
            with each(ctx, ctx.size(value.type.extent(len(indices)))) as index:
                nest((*indices, index))

    nest(())


def _grid_inside(ctx: Context, op: Op) -> None:
    """A grid inside a loop or another grid runs in order."""
    total: Val = emit.const(1, I64)
    for count in op.operands:
        total = ctx.b.mul(total, index64(ctx, ctx.scalars[count.name]))
    with ctx.b.for_(0, total) as loop, ctx.scope():
        _grid_item(ctx, op, loop.i)


_RULES = {
    "const": _const, "dim": _dim, "view": _view, "reduce": _reduce, "scan": scan, "sort": sort, "mma": lower_mma,
    "store": _store, "concat": _concat, "insert": _insert, "extract": _extract, "reshape": _reshape,
    "scatter": _scatter, "atomic_add": _atomic_add, "grid": _grid_inside,
    "print": lower_print, "assert": _assert,
    "for": lambda ctx, op: lower_for(ctx, op, _lower_block),
    "while": lambda ctx, op: lower_while(ctx, op, _lower_block),
    "if": lambda ctx, op: lower_if(ctx, op, _lower_block),
}
