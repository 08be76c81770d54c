"""Matrix products: tl.dot over the inner axis or blocks of it, in the cheapest type that holds both sides exactly.

An f32 side that was cast from bf16, f16, fp8 or a small int is multiplied in that type again: products of such
numbers are exact in the f32 accumulator. An f32 side against one that bf16 holds is split into bf16 parts
(schedule option "mixed_dot": "bf16x3", by default, keeps all of its 24 bits; "bf16x2" 16; "bf16" rounds it, as
flash attention does with its weights). Two f32 sides are multiplied as "f32_dot" says: "tf32x3", by default, three
products of tensor cores that keep 22 of their 24 bits, less than which is lost where a long sum is rounded; "ieee", all
24, by threads; "tf32", 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.kernel import ir
from tessera.kernel.backends.cuda.contract import by_blocks
from tessera.kernel.backends.cuda.emit import MAX_TILE, TRITON_TYPE, Emitter, Rule, axis_name
from tessera.kernel.backends.cuda.values import Axis, Index, Val, depth_of, next_power_of_2, order
from tessera.kernel.dims import Dim
from tessera.types import DType, bf16, f16, f32, fp8_e4m3, fp8_e5m2, int4, int8

PARTS = {"bf16": 1, "bf16x2": 2, "bf16x3": 3}
_HELD_BY = {"bf16": frozenset([bf16]), "f16": frozenset([f16]),
            **dict.fromkeys(("fp8_e4m3", "fp8_e5m2", "int8", "uint8", "int4"), frozenset([bf16, f16]))}
_REARRANGING = frozenset("broadcast transpose reshape slice neg abs".split())

def mma(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """tl.dot over the whole inner axis or over blocks of it; sums of products where a side is no matrix."""
    depth = max(emitter.home_depth(value), depth_of(indices))
    with emitter.scopes.at(depth):
        a, b = op.operands[:2]
        *batch, row, column = indices
        b_batch = batch if b.type.rank > 2 else []
        m, n = row.axes, column.axes
        matrix = len(m) == len(n) == 1 and m != n and not order(batch) and min(m[0].size, n[0].size) >= 16
        matrix = matrix and _has_dot(a.type.dtype, b.type.dtype)
        axes = order(indices)
        rows = 1
        for axis in axes:
            rows *= axis.size
        start = _accumulator(emitter, op, indices, axes)
        block = _inner_block(emitter, op, rows, matrix)
        if block == 0:
            inner = emitter.full_index(a.type, a.type.rank - 1, axes)
            return _product(emitter, op, value, (*batch, row, inner), (*b_batch, inner, column), start, axes,
                            matrix, value.hint or "dot")
        return _mma_by_blocks(emitter, op, value, (batch, b_batch, row, column), start, axes, matrix, block)


def _has_dot(a: DType, b: DType) -> bool:
    """Whether tl.dot takes the two types; int4 is held as int8."""
    return (a == b and a.is_float) or {a.name, b.name} <= {"int8", "int4"}


def _mma_by_blocks(emitter: Emitter, op: ir.Op, value: ir.Value, sides: tuple, start: Val | None,  # type: ignore[type-arg]
                   axes: tuple[Axis, ...], matrix: bool, block: int) -> Val:
    a = op.operands[0]
    batch, b_batch, row, column = sides
    dim, limit = a.type.shape[-1], _inner_limit(op)
    type_ = TRITON_TYPE[value.type.dtype.name]
    text = emitter.constant(f"BLOCK_K_{axis_name(dim)}" if matrix else f"CHUNK_{axis_name(dim)}", block)
    zero = f"tl.zeros({emitter.shape(axes)}, {type_})" if axes else f"tl.full((), 0, {type_})"
    first = start.text if start is not None else zero
    acc = emitter.assign(value.hint or "acc", first, axes, emitter.scopes.depth, op.loc)
    position, end = emitter.scopes.name(f"{axis_name(dim)}_start"), emitter.size(limit)
    with emitter.scopes.inside(f"for {position} in range(0, {end.text}, {text}):", op.loc):
        inner = emitter.over(emitter.new_axis(axis_name(dim), position, block, text, emitter.scopes.depth), limit)
        total = _product(emitter, op, value, (*batch, row, inner), (*b_batch, inner, column), acc, axes, matrix, "")
        emitter.scopes.line(f"{acc.text} = {total.text}")
    return acc


def _inner_limit(op: ir.Op) -> Dim:
    a, b = op.operands[:2]
    left, right = a.type.extent(a.type.rank - 1), b.type.extent(b.type.rank - 2)
    return left if left == right or right == b.type.shape[-2] else right if left == a.type.shape[-1] \
        else left.minimum(right)


def _inner_block(emitter: Emitter, op: ir.Op, rows: int, matrix: bool) -> int:
    """Elements of K a step; 0: all of it at once."""
    a, b = op.operands[:2]
    size = emitter.bound(a.type.shape[-1])
    blockable = by_blocks(emitter, a, a.type.rank - 1) and by_blocks(emitter, b, b.type.rank - 2)
    if not blockable:
        if size is None:
            raise emitter.unsupported(op, f"the inner size {a.type.shape[-1]} is not known and cannot be blocked")
        return 0
    in_loop = emitter.home_depth(op.result) > 0
    if matrix:
        chosen = int(emitter.function.schedule.get("BK", 0))
        if size is not None and size <= (256 if in_loop else chosen or 64):
            return 0
        plan = _plan(emitter, op)
        few = rows <= 16 * 32  # narrow tiles: long ones keep as many bytes on their way
        room = 1024 if not few else 4096 if plan.left == plan.right == 1 else 2048
        return max(16 if plan.dtype.bits > 8 else 32, chosen or room // plan.dtype.bits)
    room = max(1, MAX_TILE // rows)
    if size is not None and size <= min(room, 1024):
        return 0
    return min(next_power_of_2(room), 1024)


def _accumulator(emitter: Emitter, op: ir.Op, indices: Sequence[Index], axes: tuple[Axis, ...]) -> Val | None:
    if len(op.operands) < 3:
        return None
    acc = emitter.emit(op.operands[2], indices)
    if acc.text in ("0", "0.0"):
        return None
    if acc.axes == axes:
        return acc
    return emitter.assign(op.operands[2].hint or "acc", emitter.filled(acc, axes), axes, acc.depth)


def _product(emitter: Emitter, op: ir.Op, value: ir.Value, left: Sequence[Index], right: Sequence[Index],
             acc: Val | None, axes: tuple[Axis, ...], matrix: bool, hint: str) -> Val:
    """acc + the product over one stretch of K. Without a hint the result is only a text, for `acc = ...`."""
    if matrix and left[-1].axes:
        text, depth = _dot(emitter, op, value, left, right, axes, acc)
    else:
        x, y = emitter.emit(op.operands[0], left), emitter.emit(op.operands[1], right)
        make = _sum_of_products if left[-1].axes else _outer_product
        text, depth = make(emitter, op, value, left, x, y, axes)
        text = text if acc is None else f"{acc.text} + {text}"
    depth = max(depth, acc.depth if acc else 0, depth_of(left), depth_of(right))
    return emitter.assign(hint, text, axes, depth, op.loc) if hint else Val(text, axes, depth)


def _dot(emitter: Emitter, op: ir.Op, value: ir.Value, left: Sequence[Index], right: Sequence[Index],
         axes: tuple[Axis, ...], acc: Val | None) -> tuple[str, int]:
    """One tl.dot, or one for each part of a side that is split, the smallest parts first."""
    k = left[-1].axes[0]
    (m,), (n,) = left[-2].axes, right[-1].axes
    plan = _plan(emitter, op)
    inner = k, _inner_limit(op)
    lefts, x_depth = _side(emitter, op.operands[0], left, (m, k), inner, plan.dtype, plan.left)
    rights, y_depth = _side(emitter, op.operands[1], right, (k, n), inner, plan.dtype, plan.right)
    depth = max(x_depth, y_depth, acc.depth if acc else 0)
    options = f", out_dtype={TRITON_TYPE[value.type.dtype.name]}"
    emitter.dot_elements += emitter.count(axes) * (2 if plan.dtype == f32 else 1)
    if plan.dtype == f32:
        options = f', input_precision="{emitter.function.schedule.get("f32_dot", "tf32x3")}"' + options
    text, total = "", acc.text if acc is not None else ""
    for x, y in [(x, y) for x in lefts for y in rights]:
        if text:
            total = emitter.assign("partial", text, axes, depth).text
        pair = (x, y) if axes == (m, n) else (f"tl.trans({y})", f"tl.trans({x})")  # (a b)^T = b^T a^T
        text = f"tl.dot({', '.join([*pair, total] if total else pair)}{options})"
    return text, depth


# -- the type of a product ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The type that a product's sides are given to tl.dot in, and into how many parts each is split."""

    dtype: DType
    left: int = 1
    right: int = 1


def _plan(emitter: Emitter, op: ir.Op) -> _Plan:
    a, b = op.operands[:2]
    if a.type.dtype in (fp8_e4m3, fp8_e5m2):
        return _Plan(dtype=f16)  # the tensor cores' own sums of fp8 products have too few bits
    if a.type.dtype != f32:
        return _Plan(dtype=int8 if a.type.dtype.is_int else a.type.dtype)
    left, right = holders(a), holders(b)
    if common := left & right:
        return _Plan(dtype=f16 if f16 in common and _natural(a, b) <= {f16, fp8_e4m3, fp8_e5m2, None} else
                     min(common, key=lambda dtype: dtype != bf16))
    if bf16 in left | right:
        parts = PARTS[str(emitter.function.schedule.get("mixed_dot", "bf16x3"))]
        return _Plan(dtype=bf16, left=1 if bf16 in left else parts, right=1 if bf16 in right else parts)
    return _Plan(dtype=f32)


def holders(value: ir.Value) -> frozenset[DType]:
    """Of bf16 and f16, the types that hold every number of an f32 tile exactly, as far as its making shows."""
    op = value.op
    if op is None:
        return frozenset()
    if op.name == "cast":
        return _HELD_BY.get(op.operands[0].type.dtype.name, frozenset())
    if op.name == "const":
        small = float(op.attrs["value"]).is_integer() and abs(op.attrs["value"]) <= 256
        return frozenset((bf16, f16)) if small else frozenset()
    if op.name in _REARRANGING:
        return holders(op.operands[0])
    if op.name == "where":
        return holders(op.operands[1]) & holders(op.operands[2])
    return frozenset()


def _natural(*sides: ir.Value) -> set[DType | None]:
    """The types that tiles were cast from."""
    found: set[DType | None] = set()
    for value in sides:
        while value.op is not None and value.op.name in _REARRANGING:
            value = value.op.operands[0]
        found.add(value.op.operands[0].type.dtype if value.op is not None and value.op.name == "cast" else None)
    return found


def _side(emitter: Emitter, source: ir.Value, indices: Sequence[Index], axes: tuple[Axis, Axis],
          inner: tuple[Axis, Dim], dtype: DType, parts: int) -> tuple[list[str], int]:
    """An operand of tl.dot in a type, its smallest part first: full matrices, zeros past the inner limit."""
    x, held = _as_held(emitter, source, indices)
    k, limit = inner
    depth = max(x.depth, depth_of(indices))
    text = emitter.filled(x, axes)
    mask = emitter.mask(k, limit)
    if mask is not None and (k, limit) not in x.zero:
        zero = "0.0" if held.is_float else "0"
        text, depth = f"tl.where({emitter.spread(mask, axes)}, {text}, {zero})", max(depth, mask.depth)
    emitter.count(axes)
    if parts == 1:
        if held != dtype and not (held == int4 and dtype == int8):
            text = f"{text}.to({TRITON_TYPE[dtype.name]})"
        return [text], depth
    text = text if held == f32 else f"{text}.to(tl.float32)"
    helper = f"bf16_parts_{parts}"
    emitter.helpers.add(helper)
    names = [emitter.scopes.name(hint) for hint in ("high", "middle", "low")[:parts]]
    with emitter.scopes.at(depth):
        emitter.scopes.line(f"{', '.join(names)} = {helper}({text})")
    return names[::-1], depth


def _as_held(emitter: Emitter, source: ir.Value, indices: Sequence[Index]) -> tuple[Val, DType]:
    """A tile before the cast that made it f32, where that is all that happened to it."""
    op = source.op
    if op is not None and source.type.dtype == f32 and source not in emitter.pinned:
        if op.name == "cast" and op.operands[0].type.dtype.name in _HELD_BY:
            return emitter.emit(op.operands[0], indices), op.operands[0].type.dtype
        if op.name == "transpose":
            perm = op.attrs["perm"]
            return _as_held(emitter, op.operands[0], [indices[perm.index(axis)] for axis in range(len(perm))])
    return emitter.emit(source, indices), source.type.dtype


def _outer_product(emitter: Emitter, op: ir.Op, value: ir.Value, left: Sequence[Index], x: Val, y: Val,
                   axes: tuple[Axis, ...]) -> tuple[str, int]:
    """K = 1."""
    texts, _, depth = emitter.combine([x, y], axes)
    type_ = TRITON_TYPE[value.type.dtype.name]
    texts = [f"{t}.to({type_})" if v.axes else f"tl.cast({t}, {type_})" for t, v in zip(texts, (x, y))]
    text = f"{texts[0]} * {texts[1]}"
    return (f"tl.broadcast_to({text}, {emitter.shape(axes)})" if axes else text), depth


def _sum_of_products(emitter: Emitter, op: ir.Op, value: ir.Value, left: Sequence[Index], x: Val, y: Val,
                     axes: tuple[Axis, ...]) -> tuple[str, int]:
    """tl.sum(a * b): one row, small or irregular shapes, and the types that tl.dot does not take."""
    k, limit = left[-1].axes[0], _inner_limit(op)
    joint = (*axes, k)
    emitter.count(joint)
    type_ = TRITON_TYPE[value.type.dtype.name]
    texts = []
    for v in (x, y):
        text = emitter.spread(v, joint)
        texts.append(f"{text}.to({type_})" if v.axes else f"tl.cast({text}, {type_})")
    text, depth = f"{texts[0]} * {texts[1]}", max(x.depth, y.depth)
    if set(x.axes) | set(y.axes) != set(joint):
        text = f"tl.broadcast_to({text}, {emitter.shape(joint)})"
    mask = emitter.mask(k, limit)
    if mask is not None and not all((k, limit) in v.zero for v in (x, y)):
        text = f"tl.where({emitter.spread(mask, joint)}, {text}, 0)"
    return f"tl.sum({text}, axis={len(axes)})", depth


RULES: dict[str, Rule] = {"mma": mma}
