"""Computes elements of tiles on demand: one lane or a vector of lanes at a point.

In: a tile value and a `Point` (an index for each axis; along one axis, a run of lanes). Out: a register
value: a vector where the tile varies along that axis, a scalar where it does not. Elementwise producers
are inlined into whatever asks, so an intermediate touches memory only where the plan said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tessera.errors import UnsupportedError
from tessera.kernel.backends.cpu import emit, vmath
from tessera.kernel.backends.cpu.columns import ANY, find_rows, is_aligned, load_across, merge_index, split_index
from tessera.kernel.backends.cpu.context import Context, Memory, floor_div, floor_mod, register_type, storage_type
from tessera.kernel.backends.cpu.emit import I1, I32, I64, Val
from tessera.kernel.backends.cpu.float_division import float_floor_div, float_floor_mod
from tessera.kernel.backends.cpu.storage import count_lanes, from_storage, load_first, round_to, store_first, to_storage
from tessera.kernel.ir import Op, Value
from tessera.types import DType, int4

_FLOAT_UNARY: dict[str, Callable] = {
    name: getattr(vmath, name)
    for name in ("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "sigmoid", "tanh", "sin", "cos",
                 "erf", "softplus")}
_ROUNDING = {"floor": "llvm.floor", "ceil": "llvm.ceil", "round": "llvm.roundeven"}
COSTLY = frozenset({*_FLOAT_UNARY, "pow", "rand", "div"}) - {"sqrt"}  # worth keeping rather than computing twice


@dataclass(frozen=True)
class Point:
    """Where to evaluate: an index an axis; `axis` (None: a single element) runs over `lanes` lanes.

    `mask` (None: all) selects the first lanes, at least one; the others may be computed but not read or written.
    """

    indices: tuple[Val, ...]
    axis: int | None = None
    lanes: int = 0
    mask: Val | None = None

    @property
    def key(self) -> tuple:
        return (tuple(i.name for i in self.indices), self.axis, self.lanes, self.mask and self.mask.name)

    def pick(self, indices: Sequence[Val], axis: int | None) -> Point:
        """The same lanes at other indices; without a vector axis, a scalar point."""
        if axis is None:
            return Point(tuple(indices))
        return replace(self, indices=tuple(indices), axis=axis)


def element(ctx: Context, value: Value, point: Point) -> Val:
    """The element(s) of a tile at a point: a vector if it varies along the point's axis, else a scalar."""
    if not value.type.rank:
        return ctx.scalars[value.name]
    key = (value.name, *point.key)
    known = ctx.lookup(key)
    if known is None:
        known = produce(ctx, value, point)
        ctx.remember(key, known)
    return known


def produce(ctx: Context, value: Value, point: Point) -> Val:
    """Compute an element, without looking whether it is known."""
    memory = ctx.memory.get(value.name)
    if memory is not None:
        return load(ctx, memory, point)
    op = value.op
    assert op is not None, f"{value.name} has neither memory nor a producer"
    name = op.name
    if name == "load":
        return load(ctx, ctx.memory[op.operands[0].name], point)
    if name == "iota":
        return _iota(ctx, op, point)
    if name == "gather":
        return _gather(ctx, op, point)
    if name == "reshape" and point.axis is not None and point.axis in _renumbered(op) and not _stays_inside(op, point):
        return _lane_by_lane(ctx, value, point)
    operands = [element(ctx, operand, at) for operand, at in operand_points(ctx, op, point)]
    if name in ("broadcast", "transpose", "reshape", "slice", "full"):
        return operands[0]
    return compute(ctx, op, operands, point)


def _lane_by_lane(ctx: Context, value: Value, point: Point) -> Val:
    """A vector put together from scalars, where neighbouring lanes come from unrelated places."""
    b, axis = ctx.b, point.axis
    assert axis is not None
    last = b.sub(ctx.size(value.type.extent(axis)), 1)
    vector = Val("poison", emit.vec(point.lanes, register_type(value.type.dtype)))
    for lane in range(point.lanes):
        indices = list(point.indices)
        indices[axis] = b.min(b.add(indices[axis], lane), last)
        vector = b.insert(vector, element(ctx, value, Point(tuple(indices))), lane)
    return vector


def operand_points(ctx: Context, op: Op, point: Point) -> list[tuple[Value, Point]]:
    """For each operand that an element of the result needs: where it is needed."""
    name = op.name
    if name == "full":
        return [(op.operands[0], Point(()))]
    if name == "broadcast":
        return [(op.operands[0], _through_broadcast(op, point))]
    if name == "transpose":
        source = [0] * len(point.indices)
        for axis, origin in enumerate(op.attrs["perm"]):
            source[origin] = axis
        axis_of = None if point.axis is None else op.attrs["perm"][point.axis]
        return [(op.operands[0], point.pick([point.indices[a] for a in source], axis_of))]
    if name == "slice":
        return [(op.operands[0], _through_slice(ctx, op, point))]
    if name == "reshape":
        return [(op.operands[0], _through_reshape(ctx, op, point))]
    return [(operand, point if operand.type.rank else Point(())) for operand in op.operands]


def _through_broadcast(op: Op, point: Point) -> Point:
    source, result = op.operands[0].type, op.result.type
    indices, axis = [emit.const(0, I64)] * source.rank, None
    for i, origin in enumerate(op.attrs["axes"]):
        if origin is None or (source.shape[origin].const == 1 and result.shape[i].const != 1):
            continue
        indices[origin] = point.indices[i]
        axis = origin if i == point.axis else axis
    return point.pick(indices, axis)


def _through_slice(ctx: Context, op: Op, point: Point) -> Point:
    indices, axis, position = [], None, 0
    for source_axis, entry in enumerate(op.attrs["spec"]):
        start = emit.const(0, I64) if entry[0] == "all" else index64(ctx, ctx.scalars[op.operands[entry[1]].name])
        if entry[0] == "at":
            indices.append(start)
            continue
        if position == point.axis:
            axis = source_axis
        index = point.indices[position]
        indices.append(index if index is ANY else ctx.b.add(index, start))
        position += 1
    return point.pick(indices, axis)


def lazy_reshape_suffix(op: Op) -> int:
    """How many trailing dims a reshape keeps; 0 means that its source has to lie in memory."""
    a, b = op.operands[0].type.shape, op.result.type.shape
    suffix = 0
    while suffix < min(len(a), len(b)) and a[-1 - suffix] == b[-1 - suffix]:
        suffix += 1
    return suffix


def _renumbered(op: Op) -> range:
    """The axes of a reshape's result that are neither among the leading nor among the trailing dims it keeps."""
    a, b = op.operands[0].type.shape, op.result.type.shape
    end = len(b) - lazy_reshape_suffix(op)
    prefix = 0
    while prefix < min(end, len(a) - len(b) + end) and a[prefix] == b[prefix]:
        prefix += 1
    return range(prefix, end)


def _stays_inside(op: Op, point: Point) -> bool:
    """Whether lanes along the innermost dim that a reshape splits or merges are neighbours on the other side too."""
    axis = point.axis
    source, result, middle = op.operands[0].type, op.result.type, _renumbered(op)
    if axis is None or axis != middle.stop - 1 or middle.stop + source.rank - result.rank <= middle.start:
        return False
    extents = [source.shape[axis + source.rank - result.rank].const, result.shape[axis].const]
    known = [extent for extent in extents if extent is not None]
    return bool(known) and all(extent % point.lanes == 0 for extent in known) and \
        is_aligned(point.indices[axis], point.lanes)


def _through_reshape(ctx: Context, op: Op, point: Point) -> Point:
    """The dims that change are renumbered through their row-major position; the kept ones pass."""
    source, result = op.operands[0].type, op.result.type
    middle = _renumbered(op)
    shift = source.rank - result.rank
    position = emit.const(0, I64)
    for axis in middle:
        if point.indices[axis] is ANY:
            position = ANY
            break
        position = merge_index(ctx, position, ctx.size(result.shape[axis]), point.indices[axis])
    indices: list[Val] = []
    for dim in reversed(source.shape[middle.start + 1:middle.stop + shift]):
        if position is ANY:
            indices.insert(0, ANY)
            continue
        position, rest = split_index(ctx, position, ctx.size(dim))
        indices.insert(0, rest)
    if middle.stop + shift > middle.start:
        indices.insert(0, position)
    lane_axis = point.axis if point.axis is None or point.axis < middle.start else point.axis + shift
    # Lanes on a dim that changes stay inside the innermost one (`_stays_inside`).
    return point.pick([*point.indices[:middle.start], *indices, *point.indices[middle.stop:]], lane_axis)


def hoist(ctx: Context, value: Value, point: Point, seen: set[tuple] | None = None) -> None:
    """Compute now every part of a tile's expression that does not depend on the indices that are ANY.

    `seen` holds the parts that have been looked at: many ways may lead to one.
    """
    seen = set() if seen is None else seen
    key = value.name, *point.key
    if not value.type.rank or key in seen:
        return
    seen.add(key)
    if all(index is not ANY for index in point.indices):
        element(ctx, value, point)
        return
    if value.name in ctx.memory or value.op is None or value.op.name in ("load", "iota", "gather"):
        memory = ctx.memory.get(value.op.operands[0].name if value.op is not None and value.op.name == "load"
                                else value.name)
        if memory is not None and point.axis is not None and memory.strides[point.axis].const not in (0, 1):
            find_rows(ctx, memory, point.indices, point.axis, point.lanes, point.mask)
        return
    for operand, at in operand_points(ctx, value.op, point):
        hoist(ctx, operand, at, seen)


# -- memory -----------------------------------------------------------------------------------------


def load(ctx: Context, memory: Memory, point: Point) -> Val:
    """Elements of memory as registers (low-precision floats become f32, small ints i32)."""
    b, dtype, axis = ctx.b, memory.dtype, point.axis
    if axis is not None and memory.strides[axis].const not in (0, 1):
        across = load_across(ctx, memory, point.indices, axis, point.lanes, point.mask)
        if across is not None:
            return across
    if dtype == int4:
        return _load_int4(ctx, memory, point)
    ty = storage_type(dtype)
    if axis is None or memory.strides[axis].const == 0:
        raw = b.load(memory.address(b, point.indices), ty)
    elif memory.strides[axis].const == 1:
        address = memory.address(b, point.indices)
        wide = emit.vec(point.lanes, ty)
        raw = b.load(address, wide) if point.mask is None else \
            load_first(b, address, wide, point.mask, by_words=not ctx.target.has_avx512)
    else:
        raw = _load_apart(ctx, memory, point, ty)
    return from_storage(b, raw, dtype)


def _load_apart(ctx: Context, memory: Memory, point: Point, ty: str) -> Val:
    """Elements that lie apart; the first one for lanes that the mask leaves out. (With masks, processors without
    instructions for gathers would branch on each lane.)"""
    b, axis, lanes = ctx.b, point.axis, ctx.b.iota(point.lanes)
    assert axis is not None
    offsets = b.mul(lanes if point.mask is None else b.select(point.mask, lanes, 0), memory.strides[axis])
    pointers = b.gep(memory.address(b, point.indices), offsets, ty)
    return b.gather(pointers, emit.vec(point.lanes, ty), _all(point.lanes))


def store(ctx: Context, memory: Memory, point: Point, x: Val) -> None:
    """Write registers to memory, rounding to its dtype."""
    b, axis = ctx.b, point.axis
    if axis is None:
        b.store(to_storage(b, x, memory.dtype), memory.address(b, point.indices))
        return
    x = x if emit.lanes(x.ty) else b.splat(x, point.lanes)
    raw = to_storage(b, x, memory.dtype)
    if memory.strides[axis].const != 1:
        _store_apart(ctx, memory, point, raw)
    elif point.mask is None:
        b.store(raw, memory.address(b, point.indices))
    else:
        store_first(b, raw, memory.address(b, point.indices), point.mask, by_words=not ctx.target.has_avx512)


def _store_apart(ctx: Context, memory: Memory, point: Point, raw: Val) -> None:
    """Lane by lane, in a loop: processors store one at a time anyway, and their addresses laid out one after the other
    would be a large part of the code of a kernel with such an output."""
    b, ty = ctx.b, emit.elem(raw.ty)
    assert point.axis is not None
    lanes, to = b.alloca(ty, point.lanes), memory.address(b, point.indices)
    b.store(raw, lanes)
    count: Val = emit.const(point.lanes, I64) if point.mask is None else b.cast("zext", count_lanes(b, point.mask), I64)
    with b.for_(0, count) as lane:
        x = b.load(b.gep(lanes, lane.i, ty), ty)
        b.store(x, b.gep(to, b.mul(lane.i, memory.strides[point.axis]), ty))


def _load_int4(ctx: Context, memory: Memory, point: Point) -> Val:
    """Two values a byte, the even index in the low nibble, both signed."""
    b, axis = ctx.b, point.axis
    offset = memory.offset
    for index, stride in zip(point.indices, memory.strides):
        offset = b.add(offset, b.mul(index, stride))
    if axis is not None and memory.strides[axis].const == 1 and memory.starts_byte and point.mask is None and \
            is_aligned(point.indices[axis], 2):
        pairs = b.load(b.gep(memory.pointer, b.lshr(offset, 1), emit.I8), emit.vec(point.lanes // 2, emit.I8))
        halves = b.ashr(b.shl(pairs, 4), 4), b.ashr(pairs, 4)
        order = [i + half for i in range(point.lanes // 2) for half in (0, point.lanes // 2)]
        return b.cast("sext", b.shuffle(*halves, order), I32)
    if point.axis is not None:
        offset = b.add(b.mul(b.iota(point.lanes), memory.strides[point.axis]), offset)
        pointers = b.gep(memory.pointer, b.lshr(offset, 1), emit.I8)
        byte = b.gather(pointers, emit.vec(point.lanes, emit.I8), _mask(ctx, point))
    else:
        byte = b.load(b.gep(memory.pointer, b.lshr(offset, 1), emit.I8), emit.I8)
    shift = b.cast("trunc", b.mul(b.and_(b.xor(offset, 1), 1), 4), emit.I8)
    return b.cast("sext", b.ashr(b.shl(byte, shift), 4), I32)


def _mask(ctx: Context, point: Point) -> Val:
    return point.mask if point.mask is not None else _all(point.lanes)


def _all(lanes: int) -> Val:
    return emit.const(1, emit.vec(lanes, I1))


def _gather(ctx: Context, op: Op, point: Point) -> Val:
    view, index = op.operands
    memory, rank = ctx.memory[view.name], index.type.rank
    lead = point.axis if point.axis is not None and point.axis < rank else None
    row = element(ctx, index, point.pick(point.indices[:rank], lead) if rank else Point(()))
    row = index64(ctx, row)
    trailing = point.indices[rank:]
    if not emit.lanes(row.ty):
        inner = None if point.axis is None or lead is not None else point.axis - rank + 1
        return load(ctx, memory, point.pick([row, *trailing], inner))
    nearby = _load_nearby(ctx, memory, index, point) if view.type.rank == rank == 1 else None
    if nearby is not None:
        return nearby
    b = ctx.b
    if memory.dtype == int4:
        raise UnsupportedError(f"kernel {ctx.function.name}: gather of int4 rows by a vector of indices")
    row = b.select(point.mask, row, 0) if point.mask is not None else row
    offsets = b.mul(row, memory.strides[0])
    for position, stride in zip(trailing, memory.strides[1:]):
        offsets = b.add(offsets, b.mul(position, stride))
    ty = storage_type(memory.dtype)
    raw = b.gather(b.gep(memory.pointer, offsets, ty), emit.vec(point.lanes, ty), _mask(ctx, point))
    return from_storage(b, raw, memory.dtype)


def _load_nearby(ctx: Context, memory: Memory, index: Value, point: Point) -> Val | None:
    """x[i ^ n] and x[i >> n] for lanes i that fill whole groups: one load and a shuffle; None for other indices."""
    op, b, lanes = index.op, ctx.b, point.lanes
    if op is None or op.name not in ("xor", "shr") or memory.strides[0].const != 1:
        return None
    iota, count = op.operands[0].op, _constant(op.operands[1])
    if iota is None or iota.name != "iota" or count is None or not 0 < count < 6:
        return None
    group = 1 << (count.bit_length() if op.name == "xor" else count)
    if lanes % group or lanes == group or not is_aligned(point.indices[0], group):
        return None
    if op.name == "xor":
        if point.mask is not None and count != 1:
            return None  # of a group that is cut, memory may hold what some lanes need and no more
        whole = None if point.mask is None else b.shuffle(point.mask, None, [lane & ~1 for lane in range(lanes)])
        near = load(ctx, memory, replace(point, mask=whole))
        return b.shuffle(near, None, [lane ^ count for lane in range(lanes)])
    first = list(range(0, lanes, group))
    mask = None if point.mask is None else b.shuffle(point.mask, None, first)
    few = load(ctx, memory, Point((b.lshr(point.indices[0], count),), 0, len(first), mask))
    return b.shuffle(few, None, [lane >> count for lane in range(lanes)])


def _constant(value: Value) -> int | None:
    """The int that every element of a tile is, where it is known."""
    op = value.op
    while op is not None and op.name == "broadcast":
        op = op.operands[0].op
    return op.attrs["value"] if op is not None and op.name == "const" else None


def _iota(ctx: Context, op: Op, point: Point) -> Val:
    b, axis = ctx.b, op.attrs["axis"]
    start = b.cast("trunc", point.indices[axis], I32)
    return b.add(start, b.iota(point.lanes, I32)) if axis == point.axis else start


def index64(ctx: Context, v: Val) -> Val:
    """An int register as i64, for addresses."""
    return v if emit.elem(v.ty) == I64 else ctx.b.cast("sext", v, I64)


# -- arithmetic -------------------------------------------------------------------------------------


def compute(ctx: Context, op: Op, operands: Sequence[Val], point: Point | None = None) -> Val:
    """An elementwise operation on registers; scalars next to vectors are splatted."""
    b, name = ctx.b, op.name
    if name == "cast":
        return cast(ctx, operands[0], op)
    if name in _FLOAT_UNARY:
        return _FLOAT_UNARY[name](b, operands[0])
    if name in _ROUNDING:
        return b.intrinsic(_ROUNDING[name], [operands[0]], operands[0].ty)
    if name in ("neg", "abs", "not"):
        return {"neg": b.neg, "abs": b.abs, "not": b.not_}[name](operands[0])
    if name == "fma":
        return _fma(ctx, *operands)
    if name == "where":
        return b.select(_widen(ctx, operands[0], operands[1:]), operands[1], operands[2])
    if name == "rand":
        return vmath.rand(b, *_uniform_lanes(ctx, operands))
    return _binary(ctx, name, operands[0], operands[1], point)


def _fma(ctx: Context, x: Val, y: Val, z: Val) -> Val:
    if emit.is_float(x.ty):
        return ctx.b.fma(x, y, z)
    return ctx.b.add(ctx.b.mul(x, y), z)


def _widen(ctx: Context, condition: Val, others: Sequence[Val]) -> Val:
    lanes = max(emit.lanes(v.ty) for v in others)
    return condition if emit.lanes(condition.ty) or not lanes else ctx.b.splat(condition, lanes)


def _uniform_lanes(ctx: Context, operands: Sequence[Val]) -> list[Val]:
    lanes = max(emit.lanes(v.ty) for v in operands)
    return [v if emit.lanes(v.ty) == lanes else ctx.b.splat(v, lanes) for v in operands]


def _binary(ctx: Context, name: str, x: Val, y: Val, point: Point | None) -> Val:
    b, is_float = ctx.b, emit.is_float(x.ty)
    if name in ("add", "sub", "mul"):
        return getattr(b, name)(x, y, contract=False) if is_float else getattr(b, name)(x, y)
    if name in ("lt", "le", "gt", "ge", "eq", "ne"):
        return b.cmp(("u" + name if emit.elem(x.ty) == I1 and name not in ("eq", "ne") else name), x, y)
    if name in ("and", "or", "xor", "min", "max"):
        return {"and": b.and_, "or": b.or_, "xor": b.xor, "min": b.min, "max": b.max}[name](x, y)
    if name in ("shl", "shr"):
        return (b.shl if name == "shl" else b.ashr)(x, y)
    if name == "div":
        return b.div(x, y)
    if name == "pow":
        return vmath.pow(b, *_uniform_lanes(ctx, [x, y])) if is_float else _int_pow(ctx, x, y)
    if is_float:
        return (float_floor_div if name == "floordiv" else float_floor_mod)(b, *_uniform_lanes(ctx, [x, y]))
    if point is not None and point.mask is not None and emit.lanes(y.ty):
        y = b.select(point.mask, y, 1)  # a lane past the edge must not divide by zero
    x, y = _uniform_lanes(ctx, [x, y])
    return (floor_div if name == "floordiv" else floor_mod)(b, x, y)


def _int_pow(ctx: Context, x: Val, y: Val) -> Val:
    raise UnsupportedError(f"kernel {ctx.function.name}: pow of ints; cast to f32")


def cast(ctx: Context, x: Val, op: Op) -> Val:
    """Between register types, with the rounding that the target dtype asks for."""
    b, source, target = ctx.b, op.operands[0].type.dtype, op.result.type.dtype
    ty = register_type(target)
    if target.kind == "bool":
        return b.cmp("ne", x, 0 if not source.is_float else 0.0)
    if source.is_float and target.is_float:
        if emit.elem(x.ty) != ty:
            x = b.cast("fptrunc" if source.bits == 64 else "fpext", x, ty)
        return round_to(b, x, target) if target.bits < 32 else x
    if source.is_float:
        return _float_to_int(b, x, target)
    if target.is_float:
        x = b.cast("uitofp" if source.kind == "bool" else "sitofp", x, ty)
        return round_to(b, x, target) if target.bits < 32 else x
    if source.kind == "bool":
        return b.cast("zext", x, ty)
    if emit.elem(x.ty) != ty:
        x = b.cast("trunc" if ty == I32 else "sext", x, ty)
    return wrap_int(b, x, target)


def _float_to_int(b: emit.Builder, x: Val, target: DType) -> Val:
    """Truncates; what does not fit becomes the nearest int, NaN 0."""
    unsigned = target.kind == "uint"
    to = emit.vec(emit.lanes(x.ty), f"i{target.bits}")
    narrow = b.intrinsic("llvm.fptoui.sat" if unsigned else "llvm.fptosi.sat", [x], to, overload=[to, x.ty])
    return b.cast("zext" if unsigned else "sext", narrow, register_type(target))


def wrap_int(b: emit.Builder, x: Val, target: DType) -> Val:
    """int8 and uint8 are held in i32: keep the low byte, sign- or zero-extended."""
    if target.bits != 8:
        return x
    return b.and_(x, 255) if target.kind == "uint" else b.ashr(b.shl(x, 24), 24)


