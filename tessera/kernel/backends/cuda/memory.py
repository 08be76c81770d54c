"""Rules of the operations on memory: load, gather, store, scatter, atomic_add.

A view is resolved to its parameter and one index an axis of it; the address is the parameter's pointer plus
index times stride, scalars first, so that they are added once.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.kernel import ir
from tessera.kernel.backends.cuda.emit import Emitter, Rule, at_most, param_name
from tessera.kernel.backends.cuda.rules import through_spec
from tessera.kernel.backends.cuda.shared_loads import coarse_index, grouped_position, split_bytes, spread_groups
from tessera.kernel.backends.cuda.values import Axis, Index, Val, order
from tessera.types import int4


def resolve(emitter: Emitter, view: ir.Value, indices: Sequence[Index]) -> tuple[ir.Param, list[Index]]:
    """A parameter and the indices into it behind the indices into a view of it."""
    while view.op is not None:
        indices = through_spec(emitter, view.op, indices)
        view = view.op.operands[0]
    param = next(p for p in emitter.function.params if p.value is view)
    return param, list(indices)


def address(emitter: Emitter, param: ir.Param, indices: Sequence[Index]) -> tuple[str, tuple[Axis, ...], int]:
    """The pointer expression to the elements, its axes and depth."""
    axes = order(indices)
    last = len(indices) - 1
    terms: list[tuple[int, str]] = []
    depth = 0
    for position, index in enumerate(indices):
        if index.value.text == "0":
            continue
        text = emitter.spread(index.value, axes)
        if position != last or not param.unit_stride:
            text = f"{text} * {param_name(param)}_s{position}"
        terms.append((len(index.axes), text))
        depth = max(depth, index.depth)
    terms.sort(key=lambda term: term[0])
    return " + ".join([f"{param_name(param)}_ptr", *(text for _, text in terms)]), axes, depth


def in_bounds(emitter: Emitter, type_: ir.TileTy, indices: Sequence[Index]) -> Val | None:
    """The mask of a load: what counts of the demand, and whatever keeps it inside the tensor."""
    masks = [emitter.limits_mask(indices)]
    for index, dim in zip(indices, type_.shape):
        if not index.axes or index.guards or index.start is None or any(at_most(end, dim) for end in index.ends()):
            continue
        size = emitter.size(dim)
        text = f"{index.value.text} < {size.text}"
        masks.append(emitter.assign("inside", text, index.axes, max(index.depth, size.depth)))
    return emitter.both(masks, order(indices))


def load(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    depth = emitter.home_depth(value)
    param, wanted = resolve(emitter, op.operands[0], indices)
    return _load(emitter, op, value, param, wanted, depth)


def _load(emitter: Emitter, op: ir.Op, value: ir.Value, param: ir.Param, wanted: Sequence[Index], depth: int) -> Val:
    wanted = list(wanted)
    if param.value.type.dtype is int4:
        return _load_int4(emitter, op, value, param, wanted, depth)
    position = grouped_position(wanted)
    if position is None:
        return _load_at(emitter, op, value, param, wanted, depth)
    fine = wanted[position]
    coarse = coarse_index(emitter, fine, fine.shared)
    if coarse is None:
        return _load_at(emitter, op, value, param, wanted, depth)
    wanted[position] = coarse
    loaded = _load_at(emitter, op, value, param, wanted, depth)
    return spread_groups(emitter, loaded, fine.axes[0], coarse.axes[0], fine.shared, fine)


def _load_int4(emitter: Emitter, op: ir.Op, value: ir.Value, param: ir.Param, wanted: list[Index], depth: int) -> Val:
    """Two elements a byte: bytes are loaded once and taken apart; scattered elements each load their byte."""
    last, hint = wanted[-1], value.hint or param_name(param)
    others = {axis for index in wanted[:-1] for axis in index.axes}
    if last.axes and last.value.text == last.axes[0].offsets and last.axes[0] not in others and param.unit_stride:
        coarse = coarse_index(emitter, last, 2)
        if coarse is not None:
            loaded = _load_at(emitter, op, value, param, [*wanted[:-1], coarse], depth)
            return split_bytes(emitter, loaded, last.axes[0], coarse.axes[0], last, hint)
    at = Val(f"({last.value.text} // 2)", last.axes, last.depth)
    loaded = _load_at(emitter, op, value, param, [*wanted[:-1], last.moved(at, None)], depth)
    shift = emitter.spread(last.value, loaded.axes)
    nibble = f"((({loaded.text} >> ({shift} % 2 * 4).to(tl.uint8)) & 15) ^ 8).to(tl.int8) - 8"
    if not last.axes:
        nibble = f"tl.cast((({loaded.text} >> ({shift} % 2 * 4)) & 15) ^ 8, tl.int8) - 8"
    return emitter.assign(hint, nibble, loaded.axes, max(loaded.depth, last.value.depth), op.loc)


def _load_at(emitter: Emitter, op: ir.Op, value: ir.Value, param: ir.Param, wanted: Sequence[Index],
             depth: int) -> Val:
    pointer, axes, at = address(emitter, param, wanted)
    mask = in_bounds(emitter, param.value.type, wanted)
    depth = max(depth, at)
    if id(op) in emitter.reread or param.value in emitter.written:
        with emitter.scopes.at(depth):
            emitter.scopes.line("tl.debug_barrier()")  # other threads of this program may have written it
    zero: frozenset[tuple[Axis, object]] = frozenset()
    text = f"tl.load({pointer})"
    if mask is not None:
        depth = max(depth, mask.depth)
        text = f"tl.load({pointer}, mask={emitter.spread(mask, axes)}, other={_zero(value)})"
        zero = frozenset(pair for index in wanted for pair in index.limits)
    return emitter.assign(value.hint or param_name(param), text, axes, depth, op.loc, zero)  # type: ignore[arg-type]


def _zero(value: ir.Value) -> str:
    return "0.0" if value.type.dtype.is_float else "0"


def gather(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """Rows of a view: the row numbers are loaded, or computed, at the leading indices."""
    depth = emitter.home_depth(value)
    view, rows = op.operands
    row = row_index(emitter, rows, indices[:rows.type.rank])
    param, wanted = resolve(emitter, view, [row, *indices[rows.type.rank:]])
    return _load(emitter, op, value, param, wanted, depth)


def row_index(emitter: Emitter, rows: ir.Value, indices: Sequence[Index]) -> Index:
    """An index that is itself a tile of row numbers."""
    value = emitter.emit(rows, indices)
    if value.axes != order(indices):
        value = Val(emitter.filled(value, order(indices)), order(indices), value.depth)
    if emitter.wide:
        value = Val(f"{value.text}.to(tl.int64)" if value.axes else f"tl.cast({value.text}, tl.int64)",
                    value.axes, value.depth)
    limits = frozenset(pair for index in indices for pair in index.limits)
    return Index(value, None, limits, tuple(guard for index in indices for guard in index.guards))


def write(emitter: Emitter, op: ir.Op, x: ir.Value, param: ir.Param, wanted: Sequence[Index],
          value: Val) -> None:
    """Emit a store, or an atomic addition, of an emitted value at indices of a parameter."""
    pointer, axes, _ = address(emitter, param, wanted)
    mask = emitter.limits_mask(wanted)
    if not axes and value.axes:
        raise emitter.unsupported(op, "every element would be written to one place")
    text = emitter.filled(value, axes) if axes else value.text
    if op.name != "atomic_add" and not value.axes:
        text = value.text  # tl.store broadcasts a scalar
    condition = f", mask={emitter.filled(mask, axes)}" if mask is not None else ""
    emitter.written.add(param.value)
    if op.name == "atomic_add" and param.value.type.dtype.bits < 16:
        raise emitter.unsupported(op, f"{param.value.type.dtype} cannot be added to; expected 16 bits or more")
    call = "tl.atomic_add" if op.name == "atomic_add" else "tl.store"
    if call == "tl.atomic_add" and axes and not value.axes:
        text = f"tl.full({emitter.shape(axes)}, {value.text}, {param_name(param)}_ptr.dtype.element_ty)"
    emitter.scopes.line(f"{call}({pointer}, {text}{condition})", op.loc)


RULES: dict[str, Rule] = {"load": load, "gather": gather}
