"""Subscripts: `x[i]`, `x[i:i+Br, :]`, `x[..., :h]`, `x[:, None]`, and writes to elements and slices of tiles.

A range `i:i+n` of a dim S has the nominal extent n; where i + n may pass S, only min(n, S - i) elements
count. Open ends (`:h`, `h:`) are taken at their word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.kernel import lang
from tessera.kernel.build import Builder, TypeRuleError, show
from tessera.kernel.dims import Dim, Term
from tessera.kernel.ir import Block, TileTy, Value, ViewTy
from tessera.kernel.lang.core import builder, describe, dim_of, scalar_of, tile_of
from tessera.types import bool_, int64


@dataclass(frozen=True)
class Range:
    """`start:stop:step`; None is an open end."""

    start: Any
    stop: Any
    step: int = 1


@dataclass(frozen=True)
class Index:
    """A subscript, resolved against a type: `spec` and `starts` as the IR wants them."""

    spec: list[tuple[Any, ...]]
    starts: list[Value]
    new_axes: list[int]  # positions in the result

    @property
    def is_element(self) -> bool:
        """Whether every axis is indexed."""
        return all(entry[0] == "at" for entry in self.spec)


def resolve(base: Value, items: Sequence[Any]) -> Index:
    """Check a subscript's items against a tile or view.

    Raises:
        TypeRuleError: too many items, a float index, a constant index out of range, a reversed range.
    """
    used = sum(item is not None and item is not Ellipsis for item in items)
    if used > base.type.rank:
        raise TypeRuleError(f"index: {used} indices given for {show(base)}", base)
    expanded: list[Any] = []
    for item in items:
        expanded += [Range(None, None)] * (base.type.rank - used) if item is Ellipsis else [item]
    if Ellipsis not in items:
        expanded += [Range(None, None)] * (base.type.rank - used)
    index = Index([], [], [])
    position = axis = 0
    for item in expanded:
        if item is None:
            index.new_axes.append(position)
            position += 1
            continue
        entry = _range(base, axis, item, index) if isinstance(item, Range) else _at(base, axis, item, index)
        index.spec.append(entry)
        position += entry[0] != "at"
        axis += 1
    return index


def read(base: Value, items: Sequence[Any]) -> Value:
    """The value of base[items]: a view of a view, else a tile; an int tile as the first index gathers rows."""
    first = items[0] if items else None
    if isinstance(first, Value) and first.type.rank and isinstance(base.type, ViewTy):
        _check_rows(first)
        rows = builder().gather(base, tile_of(first))
        rest = [Range(None, None)] * first.type.rank + list(items[1:])
        return read(rows, rest) if len(items) > 1 else rows
    if any(map(_has_step, items)):
        return read(*_by_steps(base, items))
    index = resolve(base, items)
    if index.new_axes:
        base = tile_of(base)
    if isinstance(base.type, ViewTy):
        return builder().view(base, index.spec, index.starts)
    if index.is_element and base.type.rank:
        result = builder().extract(base, index.starts)
    elif all(entry[0] == "all" for entry in index.spec):
        result = base
    else:
        result = builder().slice(base, index.spec, index.starts)
    for position in index.new_axes:
        result = builder().expand_dims(result, position)
    return result


def write_view(base: Value, items: Sequence[Any], x: Any) -> None:
    """Store x to base[items], a parameter's slice; an int tile as the index writes rows.

    Raises:
        TypeRuleError: x does not fit, or there are more indices beside an int tile.
    """
    first = items[0] if items else None
    if any(map(_has_step, items)):
        raise TypeRuleError(f"index: a slice with a step of the parameter {show(base)} cannot be written to; join the "
                            "parts along a new last axis, tile.concat([x[..., None], y[..., None]], axis=-1), and "
                            "reshape", base)
    if not (isinstance(first, Value) and first.type.rank):
        lang.store(read(base, items), x)
        return
    _check_rows(first)
    if any(item is not Ellipsis and item != Range(None, None) for item in items[1:]):
        raise TypeRuleError(f"index: {show(first)} and more indices given to write {show(base)}; expected the rows' "
                            "index alone", first, base)
    make, index = builder(), tile_of(first)
    value = tile_of(x, base.type.dtype if isinstance(x, (int, float)) else None)
    shape = index.type.shape + base.type.shape[1:]
    if not value.type.rank:
        value = make.full(shape, make.cast(value, base.type.dtype))
    lang.scatter(base, index, value)


def _has_step(item: Any) -> bool:
    return isinstance(item, Range) and item.step != 1


def _by_steps(base: Value, items: Sequence[Any]) -> tuple[Value, list[Any]]:
    """`x[..., 1::2]` of a size 2*D is `x.reshape(..., D, 2)[..., 1]`: the tile and the items to take of it.

    Raises:
        TypeRuleError: the step does not divide the size, or the slice does not run to the end.
    """
    spread = list(items)
    if Ellipsis in spread:
        at = spread.index(Ellipsis)
        count = base.type.rank - sum(item is not None for item in items) + 1
        spread[at:at + 1] = [Range(None, None)] * count
    shape: list[Dim] = []
    taken: list[Any] = []
    axis = 0
    for item in spread:
        taken.append(item)
        if item is None:
            continue
        if axis >= base.type.rank:
            raise TypeRuleError(f"index: more indices given than {show(base)} has axes", base)
        size = base.type.shape[axis]
        shape.append(size)
        if _has_step(item):
            start, step = 0 if item.start is None else item.start, item.step
            if item.stop is not None or not isinstance(start, int) or not 0 <= start < step:
                raise TypeRuleError(f"index: a slice with the step {step} given for axis {axis} of {show(base)}; "
                                    f"expected one from a start below {step} to the end", base)
            if size // step * step != size or base.type.valid[axis] is not None:
                raise TypeRuleError(f"index: {size}, the size of axis {axis} of {show(base)}, is not known to divide "
                                    f"by the step {step}; name it \"{step}*N\" in the parameter's annotation", base)
            shape[-1:] = [size // step, Dim.of(step)]
            taken[-1:] = [Range(None, None), start]
        axis += 1
    return builder().reshape(tile_of(base), (*shape, *base.type.shape[axis:])), taken


def _check_rows(index: Value) -> None:
    """Refuse a mask where rows are picked: how many it picks is not known."""
    if index.type.dtype == bool_:
        raise TypeRuleError(f"index: the mask {show(index)} given; how many elements it picks is not known: choose "
                            "element by element with tile.where", index)


def write(base: Value, items: Sequence[Any], x: Any) -> Value:
    """The tile `base` with base[items] replaced by x.

    Raises:
        TypeRuleError: x does not fit the slice.
    """
    if any(map(_has_step, items)):
        return builder().reshape(write(*_by_steps(base, items), x), base.type.shape)
    index = resolve(base, items)
    if index.new_axes:
        raise TypeRuleError("index: None cannot be written to", base)
    if index.is_element:
        return builder().insert(base, scalar_of(x, base.type.dtype, "element"), index.starts)
    shape = tuple(base.type.shape[a] if e[0] == "all" else e[2] for a, e in enumerate(index.spec) if e[0] != "at")
    value = tile_of(x, base.type.dtype if isinstance(x, float) else None)
    if not value.type.rank:
        value = builder().full(shape, builder().cast(value, base.type.dtype))
    if value.type.shape != shape:
        raise TypeRuleError(f"index: {show(value)} written to a slice of shape {list(shape)} of {show(base)}",
                            value, base)
    _end_early(base, index, value)
    if all(entry[0] == "all" for entry in index.spec):
        return builder().cast(value, base.type.dtype)
    written = [axis for axis, entry in enumerate(index.spec) if entry[0] != "all"]
    kept = [axis for axis, entry in enumerate(index.spec) if entry[0] != "at"]
    fits = all(value.type.valid[i] == base.type.valid[axis] for i, axis in enumerate(kept) if axis not in written)
    # Where two axes may end early, a tile between would have a size that no block bounds.
    open_ended = [axis for axis in written if index.spec[axis][0] == "range" and (
        index.spec[axis][3] is not None or value.type.valid[kept.index(axis)] is not None)]
    if fits and len(open_ended) <= 1 and all(base.type.valid[axis] is None for axis in written):
        for axis in (axis for axis in written if axis not in kept):
            value = builder().expand_dims(value, axis)
        order = sorted(written, key=lambda axis: axis in open_ended)
        return _write_slice(base, index, builder().cast(value, base.type.dtype), order)
    return _write_elements(base, index, value)


def _end_early(base: Value, index: Index, value: Value) -> None:
    """Make a range of each whole axis that ends early in `value` but not in `base`: the rest of `base` stays."""
    position = 0
    for axis, entry in enumerate(index.spec):
        valid = value.type.valid[position] if entry[0] != "at" else None
        position += entry[0] != "at"
        if entry[0] == "all" and valid is not None and base.type.valid[axis] is None:
            index.starts.append(builder().const(0))
            index.spec[axis] = ("range", len(index.starts), base.type.shape[axis], valid)


def _write_slice(base: Value, index: Index, value: Value, axes: Sequence[int]) -> Value:
    """What lies before the slice along the first of the axes, the slice written along the others, what lies behind.

    `value` has every axis of `base`.
    """
    make = builder()
    if not axes:
        return value
    axis, entry = axes[0], index.spec[axes[0]]
    start = index.starts[entry[1] - 1]
    assert start.expr is not None
    if entry[0] == "at":
        count = Dim.of(1)
    else:
        valid = value.type.valid[axis]
        count = entry[2] if entry[3] is None else entry[3]
        count = count if valid is None else count.minimum(valid)
        if valid is not None or count != entry[2]:
            value = _part(value, axis, make.const(0), count)
    behind = start.expr + count
    pieces = [
        _part(base, axis, make.const(0), start.expr),
        _write_slice(_part(base, axis, start, count), index, value, axes[1:]),
        _part(base, axis, make.size(behind), base.type.shape[axis] - behind)]
    sizes = (start.expr, count, base.type.shape[axis] - behind)
    return make.concat([piece for piece, size in zip(pieces, sizes) if size.const != 0], axis)


def _part(x: Value, axis: int, start: Value, extent: Dim) -> Value:
    spec: list[tuple[Any, ...]] = [("all",)] * x.type.rank
    spec[axis] = ("range", 1, extent, None)
    return builder().slice(x, spec, [start])


def _write_elements(base: Value, index: Index, value: Value) -> Value:
    """A loop nest that inserts element by element; the rows past a ragged end are left alone."""
    make = builder()
    counts: list[Value] = []
    for axis, entry in enumerate(index.spec):
        if entry[0] != "at":
            extent = base.type.shape[axis] if entry[0] == "all" else entry[2] if entry[3] is None else entry[3]
            valid = value.type.valid[len(counts)]
            counts.append(make.size(extent if valid is None else extent.minimum(valid)))

    def nest(tile: Value, depth: int, indices: list[Value]) -> Value:
        if depth < len(counts):
            return sequential_for(make, counts[depth], tile, lambda i, t: nest(t, depth + 1, [*indices, i]))
        inner = iter(indices)
        target = []
        for entry in index.spec:
            if entry[0] == "at":
                target.append(index.starts[entry[1] - 1])
            elif entry[0] == "all":
                target.append(next(inner))
            else:
                target.append(make.binary("add", next(inner), index.starts[entry[1] - 1]))
        return make.insert(tile, make.extract(value, indices), target)

    return nest(base, 0, [])


def sequential_for(make: Builder, count: Value, initial: Value, body: Callable[[Value, Value], Value]) -> Value:
    """Emit `for i in range(count)` that carries one tile."""
    block = Block([make.argument(TileTy((), int64)), make.argument(initial.type)])
    with make.inside(block):
        make.emit("yield", [body(block.args[0], block.args[1])])
    operands = [make.const(0), count, make.const(1), initial]
    return make.emit("for", operands, [initial.type], [block]).result


def _at(base: Value, axis: int, item: Any, index: Index) -> tuple[Any, ...]:
    size = base.type.shape[axis]
    if isinstance(item, (bool, float)) or not isinstance(item, (int, Dim, Value)):
        raise TypeRuleError(f"index: {describe(item)} given for axis {axis} of {show(base)}; expected an int", base)
    if isinstance(item, Value):
        start = tile_of(item)
        if start.type.rank:
            _check_rows(start)
        if start.type.rank or not start.type.dtype.is_int:
            raise TypeRuleError(f"index: {show(start)} given for axis {axis} of {show(base)}; expected an int scalar",
                                start, base)
    else:
        number = Dim.of(item)
        if number.const is not None and size.const is not None and not -size.const <= number.const < size.const:
            raise TypeRuleError(f"index: {number.const} is outside axis {axis} of {show(base)}", base)
        if number.const is not None and number.const < 0:
            number = size + number
        start = builder().size(number)
    index.starts.append(start)
    return ("at", len(index.starts))


def _range(base: Value, axis: int, item: Range, index: Index) -> tuple[Any, ...]:
    size, known = base.type.shape[axis], base.type.extent(axis)
    if item.start is None and item.stop is None:
        return ("all",)
    start = _bound(item.start, size, Dim.of(0))
    stop = _bound(item.stop, size, size)
    extent = stop - start
    if extent.const is not None and extent.const < 0:
        raise TypeRuleError(f"index: range {start}:{stop} of axis {axis} of {show(base)} runs backwards", base)
    if start.const == 0 and extent == size:
        return ("all",)
    open_end = (item.start is None or item.stop is None) and base.type.valid[axis] is None
    exact = open_end or is_nonnegative(known - stop)
    value = tile_of(item.start) if isinstance(item.start, Value) else builder().size(start)
    index.starts.append(value)
    return ("range", len(index.starts), extent, None if exact else extent.minimum(known - start))


def _bound(x: Any, size: Dim, default: Dim) -> Dim:
    if x is None:
        return default
    dim = dim_of(x, "index")
    return size + dim if dim.const is not None and dim.const < 0 else dim


def is_nonnegative(dim: Dim) -> bool:
    """Whether a size is provably >= 0: no negative terms, and only named dims (run-time scalars may be negative)."""
    return all(factor >= 0 and all(_is_size(atom) for atom in monomial) for monomial, factor in dim.terms)


def _is_size(atom: str | Term) -> bool:
    if isinstance(atom, str):
        return not atom.startswith("%")
    return atom.op != "%" and is_nonnegative(atom.left) and is_nonnegative(atom.right)
