"""Rules of the operations that run along an axis: reduce, scan and sort; which axes can be taken by blocks.

An axis that fits registers is taken whole. A longer one is walked in blocks, the operand being computed block
by block inside the loop; what a consumer needs again it computes again. The order of a sum depends on
the axis's own size and on the schedule only, never on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel import ir
from tessera.kernel.backends.cuda.emit import MAX_SINGLE, MAX_TILE, TRITON_TYPE, Emitter, Rule, axis_name
from tessera.kernel.backends.cuda.values import Axis, Index, Val, depth_of, order
from tessera.kernel.dims import Dim

LOW = {"max": 'float("-inf")', "min": 'float("inf")', "argmax": 'float("-inf")', "argmin": 'float("inf")'}
INT_RANGE = {8: 0x7F, 32: 0x7FFFFFFF, 64: 0x7FFFFFFFFFFFFFFF}


def reduce(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    source, axis = op.operands[0], op.attrs["axis"]
    depth = max(emitter.home_depth(value), depth_of(indices))
    with emitter.scopes.at(depth):
        return _reduce(emitter, op, value, source, axis, indices, depth)


def _reduce(emitter: Emitter, op: ir.Op, value: ir.Value, source: ir.Value, axis: int,
            indices: Sequence[Index], depth: int) -> Val:
    outer = order(indices)
    limit = source.type.extent(axis)
    others = 1
    for taken in outer:
        others *= taken.size
    whole = _whole_size(emitter, source, axis, MAX_TILE // others)
    if whole:
        over = emitter.full_index(source.type, axis, outer)
        if not over.axes:
            return _of_one(emitter, op, value, emitter.emit(source, _with(indices, axis, over)))
        x = _operand(emitter, op, source, _with(indices, axis, over), over.axes[0], limit)
        return _finish(emitter, op, value, x, None, over.axes[0], limit)
    block = max(16, min(4096, MAX_TILE // others) // 2)
    return _by_blocks(emitter, op, value, source, axis, indices, block, depth)


def _by_blocks(emitter: Emitter, op: ir.Op, value: ir.Value, source: ir.Value, axis: int,
               indices: Sequence[Index], block: int, depth: int) -> Val:
    """One pass over blocks: an accumulator for every position of the block, reduced once at the end."""
    kind, limit, outer = op.attrs["kind"], source.type.extent(axis), order(indices)
    dtype = _working_type(source)
    neutral = _neutral(kind, dtype)
    text = emitter.constant(f"BLOCK_{axis_name(source.type.shape[axis])}", block)
    start, end = emitter.scopes.name(f"{axis_name(source.type.shape[axis])}_start"), emitter.size(limit)
    shape_axis = Axis("block", "", block, text, depth)
    shape = emitter.shape((*outer, shape_axis))
    accumulator = emitter.assign(value.hint or kind, f"tl.full({shape}, {neutral}, {TRITON_TYPE[dtype]})",
                                 (*outer, shape_axis), depth, op.loc)
    position = None
    if kind.startswith("arg"):
        position = emitter.assign("position", f"tl.full({shape}, {INT_RANGE[32]}, tl.int32)",
                                  (*outer, shape_axis), depth)
    with emitter.scopes.inside(f"for {start} in range(0, {end.text}, {text}):", op.loc):
        inner = emitter.new_axis(axis_name(source.type.shape[axis]), start, block, text, emitter.scopes.depth)
        x = _operand(emitter, op, source, _with(indices, axis, emitter.over(inner, limit)), inner, limit,
                     (*outer, inner))
        if position is not None:
            emitter.helpers.add(f"first_{kind}")
            positions = emitter.filled(Val(inner.offsets, (inner,)), (*outer, inner))
            better = f"first_{kind}({x.text}, {positions}, {accumulator.text}, {position.text})"
            emitter.scopes.line(f"{accumulator.text}, {position.text} = {better}")
        else:
            step = _step(kind, dtype, accumulator.text, x.text)
            emitter.scopes.line(f"{accumulator.text} = {step}")
    final = Val(accumulator.text, (*outer, shape_axis), depth)
    return _finish(emitter, op, value, final, position, shape_axis, limit)


def _whole_size(emitter: Emitter, source: ir.Value, axis: int, room: int) -> bool:
    """Whether an axis is taken whole: it fits, or it cannot be computed by blocks."""
    size = emitter.bound(source.type.shape[axis])
    if size is not None and size <= max(room, 16):
        return True
    if not by_blocks(emitter, source, axis):
        return size is not None and size <= MAX_SINGLE
    return False


def by_blocks(emitter: Emitter, value: ir.Value, axis: int) -> bool:
    """Whether any stretch of an axis can be computed without the rest of it."""
    key = value, axis
    if key not in emitter.block_free:  # asked again along every way to a value
        emitter.block_free[key] = _find_by_blocks(emitter, value, axis)
    return emitter.block_free[key]


def _find_by_blocks(emitter: Emitter, value: ir.Value, axis: int) -> bool:
    op = value.op
    if value in emitter.pinned or op is None or op.name in ir.CONTROL:
        return value.type.rank == 0
    if op.name in ("load", "gather", "iota", "full", "const", "dim", "rand"):
        return True
    if op.name in ("scan", "sort"):
        return axis != op.attrs["axis"] and by_blocks(emitter, op.operands[0], axis)
    if op.name == "broadcast":
        source = op.attrs["axes"][axis]
        return source is None or by_blocks(emitter, op.operands[0], source)
    if op.name == "transpose":
        return by_blocks(emitter, op.operands[0], op.attrs["perm"][axis])
    if op.name == "reduce":
        return by_blocks(emitter, op.operands[0], axis + (axis >= op.attrs["axis"]))
    if op.name == "mma":
        last = value.type.rank - 1
        a, b = op.operands[:2]
        side = b if axis == last else a
        return by_blocks(emitter, side, side.type.rank - value.type.rank + axis) and all(
            by_blocks(emitter, acc, axis) for acc in op.operands[2:])
    if op.name == "slice":
        kept = [i for i, entry in enumerate(op.attrs["spec"]) if entry[0] != "at"]
        return by_blocks(emitter, op.operands[0], kept[axis])
    if op.name == "reshape":
        source = op.operands[0]
        return all(by_blocks(emitter, source, i) for i in range(source.type.rank))
    if op.name == "insert":
        return by_blocks(emitter, op.operands[0], axis)
    return all(by_blocks(emitter, x, axis) for x in op.operands if x.type.rank)


def _with(indices: Sequence[Index], axis: int, index: Index) -> list[Index]:
    return [*indices[:axis], index, *indices[axis:]]


def _working_type(source: ir.Value) -> str:
    """Low-precision values are compared in f32 or int32, exactly."""
    dtype = source.type.dtype
    if dtype.name == "bool":
        return "int32"
    return dtype.name if dtype.bits >= 32 else "f32" if dtype.is_float else "int32"


def _neutral(kind: str, dtype: str) -> str:
    if kind in ("sum", "mean", "any"):
        return "0.0" if dtype.startswith("f") else "0"
    if kind == "all":
        return "1"
    if dtype.startswith("f"):
        return LOW[kind]
    top = INT_RANGE[64 if dtype == "int64" else 32]
    return str(-top - 1 if kind.endswith("max") else top)


def _step(kind: str, dtype: str, acc: str, x: str) -> str:
    if kind in ("sum", "mean"):
        return f"{acc} + {x}"
    nan = ", tl.PropagateNan.ALL" if dtype.startswith("f") else ""
    return f"tl.{'minimum' if kind in ('min', 'all') else 'maximum'}({acc}, {x}{nan})"


def _operand(emitter: Emitter, op: ir.Op, source: ir.Value, indices: list[Index], axis: Axis, limit: Dim,
             axes: tuple[Axis, ...] = ()) -> Val:
    """What is reduced, as a full tensor with the neutral element past the limit."""
    x = emitter.emit(source, indices)
    axes = axes or tuple(a for a in order(indices) if a is axis or a in x.axes)
    kind, dtype = op.attrs["kind"], _working_type(source)
    text, depth = emitter.filled(x, axes), max(x.depth, depth_of(indices))
    if dtype != source.type.dtype.name:
        text = f"{text}.to({TRITON_TYPE[dtype]})"
    mask = emitter.mask(axis, limit)
    if mask is not None and not (kind in ("sum", "mean", "any") and (axis, limit) in x.zero):
        text = f"tl.where({emitter.spread(mask, axes)}, {text}, {_neutral(kind, dtype)})"
        depth = max(depth, mask.depth)
    if text != x.text:
        return emitter.assign(source.hint or "x", text, axes, depth, op.loc)
    return Val(text, axes, depth)


def _finish(emitter: Emitter, op: ir.Op, value: ir.Value, x: Val, position: Val | None, axis: Axis, limit: Dim) -> Val:
    """The reduction proper, over one axis of a tensor."""
    kind, dtype = op.attrs["kind"], _working_type(op.operands[0])
    place = x.axes.index(axis)
    axes = tuple(a for a in x.axes if a is not axis)
    if kind in ("sum", "mean"):
        text = f"tl.sum({x.text}, axis={place})"
    elif kind.startswith("arg"):
        emitter.helpers.add(f"first_{kind}")
        where = position.text if position else emitter.filled(Val(axis.offsets, (axis,)), x.axes) + ".to(tl.int32)"
        text = f"tl.reduce(({x.text}, {where}), {place}, first_{kind})[1]"
    elif dtype.startswith("f"):
        emitter.helpers.add(f"nan_{kind}")
        text = f"tl.reduce({x.text}, {place}, nan_{kind})"
    else:
        text = f"tl.{'min' if kind in ('min', 'all') else 'max'}({x.text}, axis={place})"
    depth = x.depth
    if kind == "mean":
        size = emitter.size(limit)
        text, depth = f"{text} / {size.text}", max(depth, size.depth)
    if kind in ("any", "all"):
        text = f"{text} != 0"
    elif not kind.startswith("arg") and dtype != value.type.dtype.name:
        text = f"({text}).to({TRITON_TYPE[value.type.dtype.name]})"
    return emitter.assign(value.hint or kind, text, axes, depth, op.loc)


def _of_one(emitter: Emitter, op: ir.Op, value: ir.Value, x: Val) -> Val:
    """A reduction over an axis of size 1."""
    return Val("0") if op.attrs["kind"].startswith("arg") else x


# -- scan and sort -----------------------------------------------------------------------------------


def scan(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """tl.cumsum or cummax over a whole axis; elements past the limit come last and harm nobody."""
    def build(own: list[Index], axes: tuple[Axis, ...]) -> list[Val]:
        x = emitter.emit(op.operands[0], own)
        place = axes.index(own[op.attrs["axis"]].axes[0])
        text = emitter.filled(x, axes)
        if op.attrs["kind"] == "cumsum":
            text = f"tl.cumsum({text}, axis={place})"
        else:
            helper = "nan_max" if value.type.dtype.is_float else "int_max"
            emitter.helpers.add(helper)
            text = f"tl.associative_scan({text}, {place}, {helper})"
        return [emitter.assign(value.hint or op.attrs["kind"], text, axes, max(x.depth, depth_of(own)), op.loc)]

    return _over_whole_axis(emitter, op, value, indices, build)


def sort(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """Stable sort through 64-bit keys: the value's order-preserving bits above its position.

    Of values of 64 bits the keys are sorted by their low halves, then by their high ones.
    """
    source = op.operands[0]
    kind = "float" if source.type.dtype.is_float else "int"

    def build(own: list[Index], axes: tuple[Axis, ...]) -> list[Val]:
        axis = own[op.attrs["axis"]].axes[0]
        rows = (*(a for a in axes if a is not axis), axis)  # tl.sort sorts the last dim
        x = emitter.emit(source, own)
        depth = max(x.depth, depth_of(own))
        is_wide = source.type.dtype.bits > 32
        prefix = "wide_" if is_wide else ""
        emitter.helpers |= {f"{prefix}{kind}_key", f"{prefix}{kind}_of_key"}
        descending = bool(op.attrs["descending"])
        positions = emitter.spread(Val(axis.offsets, (axis,)), rows)
        text = f"{prefix}{kind}_key({emitter.filled(x, rows)}, {descending})"
        text += "" if is_wide else f" << 32 | {positions}"
        keys = emitter.assign("key", text, rows, depth, op.loc)
        mask = emitter.mask(axis, source.type.extent(op.attrs["axis"]))
        if mask is not None:
            text = f"tl.where({emitter.spread(mask, rows)}, {keys.text}, {INT_RANGE[64]})"
            keys = emitter.assign("key", text, rows, max(depth, mask.depth))
        if is_wide:
            emitter.helpers.add("wide_order")
            text = f"wide_order({keys.text}, {positions}, {len(rows) - 1})"
            places = emitter.assign(op.results[1].hint or "order", text, rows, keys.depth)
            text = f"wide_{kind}_of_key(tl.gather({keys.text}, {places.text}, axis={len(rows) - 1}), {descending})"
            return [emitter.assign(op.results[0].hint or "values", text, rows, keys.depth), places]
        ordered = emitter.assign("sorted", f"tl.sort({keys.text})", rows, keys.depth)
        type_ = TRITON_TYPE[source.type.dtype.name]
        values = f"{kind}_of_key({ordered.text}, {descending}).to({type_})"
        return [emitter.assign(op.results[0].hint or "values", values, rows, keys.depth),
                emitter.assign(op.results[1].hint or "order", f"({ordered.text} & 0xFFFFFFFF).to(tl.int32)",
                               rows, keys.depth)]

    return _over_whole_axis(emitter, op, value, indices, build)


def _over_whole_axis(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index], build) -> Val:  # type: ignore[no-untyped-def]
    """Compute results along a whole axis at the other indices asked for; then pick from that axis."""
    axis = op.attrs["axis"]
    wanted = indices[axis]
    rest = [index for i, index in enumerate(indices) if i != axis]
    outer = order(rest)
    with emitter.scopes.at(max(emitter.home_depth(value), depth_of(rest))):
        size = emitter.bound(value.type.shape[axis])
        if size is None or size > MAX_SINGLE:
            raise emitter.unsupported(op, f"an axis of {value.type.shape[axis]} elements is too long for one block")
        over = emitter.full_index(value.type, axis, outer)
        own = [*rest[:axis], over, *rest[axis:]]
        key = (op, tuple(index.key for index in own))
        if not over.axes:
            return emitter.emit(op.operands[0], own) if value is op.results[0] else Val("0")
        if emitter.scopes.find((key, 0)) is None:
            for number, result in enumerate(build(own, order(own))):
                emitter.scopes.keep((key, number), result)
        tensor = emitter.scopes.find((key, op.results.index(value)))
        assert tensor is not None
    return emitter.picked(value, tensor, own, [*rest[:axis], wanted, *rest[axis:]])


RULES: dict[str, Rule] = {"reduce": reduce, "scan": scan, "sort": sort}

__all__ = ["RULES", "by_blocks"]
