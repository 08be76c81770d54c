"""Control flow and effects: what is written because it stands in the program, in its order.

`block` walks a block's effects; stores, atomic additions and scatters demand their values, loops and branches
with effects are written in place. A loop without effects is written when one of its results is demanded.
Carried values and the results of branches are Triton variables over the whole tile.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Formatter

from tessera.kernel import ir
from tessera.kernel.backends.cuda import memory
from tessera.kernel.backends.cuda.contract import by_blocks
from tessera.kernel.backends.cuda.emit import MAX_SINGLE, MAX_TILE, TRITON_TYPE, Emitter, Rule, axis_name
from tessera.kernel.backends.cuda.rules import converted
from tessera.kernel.backends.cuda.scopes import INDENT
from tessera.kernel.backends.cuda.values import Axis, Index, Val, order
from tessera.kernel.dims import Dim
from tessera.types import f32

MATRIX_SIDE = 128  # of a product's tile, where a program loops over them
Presets = dict[int, list[Index | None]]  # id(store) -> the indices that the launch grid gives it


def block(emitter: Emitter, body: ir.Block, presets: Presets | None = None, only: set[int] | None = None) -> None:
    """Write the effects of a block (all, or those in `only`, by id) into the innermost scope."""
    emitter.block_depth[id(body)] = emitter.scopes.depth
    for position, op in enumerate(body.ops):
        if only is not None and id(op) not in only:
            continue
        if op.name in ir.WRITES:
            _keep_loads(emitter, body, position)
            _write(emitter, op, (presets or {}).get(id(op)))
        elif op.name == "grid":
            _keep_loads(emitter, body, position)
            _nested_grid(emitter, op, 0)
        elif op.name == "print" and not op.attrs.get("breakpoint"):
            _print(emitter, op)
        elif op.name == "assert":
            condition = emitter.scalar(op.operands[0])
            emitter.scopes.line(f"tl.device_assert({condition.text}, {str(op.attrs.get('text', ''))!r})", op.loc)
        elif op.name in ir.CONTROL and has_effects(op):
            _keep_loads(emitter, body, position)
            lower(emitter, op)


def _print(emitter: Emitter, op: ir.Op) -> None:
    """A line for each value, after the text before it; Triton writes one for each of its elements."""
    values = iter(op.operands)
    for text, field, _, _ in Formatter().parse(str(op.attrs.get("text", "")) or " "):
        if field is None:
            emitter.scopes.line(f"tl.device_print({text!r})", op.loc)
            continue
        x = next(values)
        shown = emitter.emit(x, emitter.whole(x))
        is_small = x.type.dtype.is_float and x.type.dtype.bits < 32
        number = converted(emitter, shown, x.type.dtype, f32) if is_small else shown.text
        emitter.scopes.line(f"tl.device_print({text.strip() or x.hint or 'value'!r}, {number})", op.loc)


def has_effects(op: ir.Op) -> bool:
    """Whether control flow writes, prints or asserts."""
    return any(inner.name in ir.EFFECTS and inner.name != "yield" for region in op.regions for inner in ir.walk(region))


def _keep_loads(emitter: Emitter, body: ir.Block, position: int) -> None:
    """Before memory changes, take into registers what was loaded from it and is used later."""
    op = body.ops[position]
    writes = [op, *(inner for region in op.regions for inner in ir.walk(region))]
    written = {ir.param_of(w.operands[0]) for w in writes if w.name in ir.WRITES}
    earlier = [x for x in body.ops[:position]
               if x.name in ir.READS and ir.param_of(x.operands[0]) in written
               and x.result not in emitter.pinned]
    if not earlier:
        return
    later: set[ir.Value] = set()
    stack = [v for after in body.ops[position + 1:] for v in _uses(after)]
    while stack:
        value = stack.pop()
        if value not in later:
            later.add(value)
            stack += _uses(value.op) if value.op is not None else []
    for read in earlier:
        if read.result not in later:
            continue
        elements = 1
        for dim in read.result.type.shape:
            elements *= emitter.bound(dim) or MAX_SINGLE + 1
        if elements > MAX_SINGLE:
            raise emitter.unsupported(read, "the tile is used after its memory is written; it is too large to keep")
        indices = emitter.whole(read.result)
        kept = emitter.emit(read.result, indices)
        if kept.axes != order(indices):
            kept = emitter.assign("kept", emitter.filled(kept, order(indices)), order(indices), kept.depth)
        emitter.pin(read.result, kept)


def _uses(op: ir.Op) -> list[ir.Value]:
    return [*op.operands, *(v for region in op.regions for inner in ir.walk(region) for v in inner.operands)]


# -- writing -----------------------------------------------------------------------------------------


def _write(emitter: Emitter, op: ir.Op, given: Sequence[Index | None] | None) -> None:
    """A store, atomic addition or scatter, in loops over blocks where the tile is large."""
    x = op.operands[-1]
    pieces = joined_pieces(x) if op.name == "store" else None
    if pieces and (given is None or given[pieces[0]] is None):
        axis, parts, casts = pieces
        low = Dim.of(0)
        for part in parts:
            _write_axes(emitter, op, part, given or [None] * x.type.rank, [], axis, low, casts)
            low = low + part.type.extent(axis)
        return
    _write_axes(emitter, op, x, given or [None] * x.type.rank, [], -1, Dim.of(0), [])


def joined_pieces(x: ir.Value) -> tuple[int, list[ir.Value], list[ir.Value]] | None:
    """(axis, pieces, casts to apply) of a concatenation under casts: its pieces are stored one by one."""
    casts: list[ir.Value] = []
    while x.op is not None and x.op.name == "cast":
        casts.insert(0, x)
        x = x.op.operands[0]
    if x.op is None or x.op.name != "concat":
        return None
    return x.op.attrs["axis"], x.op.operands, casts


def _write_axes(emitter: Emitter, op: ir.Op, x: ir.Value, given: Sequence[Index | None], done: list[Index],
                axis: int, low: Dim, casts: list[ir.Value]) -> None:
    """Choose the index of each axis in turn, opening a loop for one that is too long; then write."""
    position = len(done)
    if position == x.type.rank:
        _write_at(emitter, op, x, done, axis, low, casts)
        return
    preset = given[position]
    if preset is not None:
        _write_axes(emitter, op, x, given, [*done, preset], axis, low, casts)
        return
    block_size = _store_block(emitter, op, x, given, done)
    if block_size == 0:
        index = emitter.full_index(x.type, position, order([i for i in (*done, *given) if i is not None]))
        if index.axes and op.name != "scatter":
            index = emitter.over(index.axes[0], _joint_extent(op, x, position, axis))
        _write_axes(emitter, op, x, given, [*done, index], axis, low, casts)
        return
    dim, limit = x.type.shape[position], _joint_extent(op, x, position, axis)
    name = axis_name(dim)
    start, end = emitter.scopes.name(f"{name}_start"), emitter.size(limit)
    text = emitter.constant(f"BLOCK_{name}", block_size) if block_size > 1 else "1"
    with emitter.scopes.inside(f"for {start} in range(0, {end.text}, {text}):", op.loc):
        index = Index(Val(start, (), emitter.scopes.depth))
        if block_size > 1:
            index = emitter.over(emitter.new_axis(name, start, block_size, text, emitter.scopes.depth), limit)
        _write_axes(emitter, op, x, given, [*done, index], axis, low, casts)


def _joint_extent(op: ir.Op, x: ir.Value, position: int, split: int) -> Dim:
    """What counts of an axis, of the value and of the view."""
    extent, target = x.type.extent(position), op.operands[0].type
    if op.name == "scatter" or position == split or target.valid[position] in (None, extent):
        return extent
    valid = target.extent(position)
    return valid if x.type.valid[position] is None else extent.minimum(valid)


def _store_block(emitter: Emitter, op: ir.Op, x: ir.Value, given: Sequence[Index | None], done: list[Index]) -> int:
    """0 where the axis is taken whole, else the block of a loop over it: inner axes fill registers first."""
    room = MAX_TILE
    for index in (*done, *(i for i in given[len(done):] if i is not None)):
        for axis in index.axes:
            room //= max(1, axis.size)
    for later in range(x.type.rank - 1, len(done) - 1, -1):
        if given[later] is not None:
            continue
        size = emitter.bound(x.type.shape[later])
        fits = min(room, MATRIX_SIDE) if x.type.shape[later] in emitter.matrix_dims else room
        if size is None and not by_blocks(emitter, x, later):
            raise emitter.unsupported(op, f"{x.type.shape[later]} is not known and the value cannot be blocked")
        if size is not None and (size <= max(fits, 1) or not by_blocks(emitter, x, later)):
            block_size = 0
        else:
            block_size = max(1, fits // 4 if fits >= MAX_TILE else fits)
        room //= block_size or size or 1
    return block_size


def _write_at(emitter: Emitter, op: ir.Op, x: ir.Value, indices: list[Index], axis: int, low: Dim,
              casts: list[ir.Value]) -> None:
    value = emitter.emit(x, indices)
    for cast in casts:
        assert cast.op is not None
        text = converted(emitter, value, cast.op.operands[0].type.dtype, cast.type.dtype)
        value = emitter.assign(cast.hint or "cast", text, value.axes, value.depth, op.loc)
    if axis >= 0:
        indices = list(indices)
        indices[axis] = emitter.shift(indices[axis], low, emitter.size(low))
    if op.name == "scatter":
        rank = op.operands[1].type.rank
        indices = [memory.row_index(emitter, op.operands[1], indices[:rank]), *indices[rank:]]
    param, wanted = memory.resolve(emitter, op.operands[0], indices)
    memory.write(emitter, op, x, param, wanted, value)


# -- loops and branches ------------------------------------------------------------------------------


def lower(emitter: Emitter, op: ir.Op) -> None:
    """Write control flow into the innermost scope and pin its results."""
    if op.name == "if":
        _if(emitter, op)
    elif op.name == "while":
        _while(emitter, op)
    else:
        _for(emitter, op)


def on_demand(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """The rule of control flow without effects."""
    with emitter.scopes.at(emitter.home_depth(value)):
        lower(emitter, op)
    return emitter.pinned[value]


def _typed(emitter: Emitter, value: ir.Value, type_: ir.TileTy) -> tuple[str, tuple[Axis, ...], int]:
    """A tile as an expression of exactly its type: what a variable that crosses a branch must be."""
    indices = emitter.whole(value)
    axes = order(indices)
    emitted = emitter.emit(value, indices)
    dtype = TRITON_TYPE[type_.dtype.name]
    plain = emitted.text if not emitted.axes else ""
    depth = max([emitted.depth, *(axis.depth for axis in axes)])
    if not axes:
        known = plain.isidentifier() and plain not in ("True", "False")
        text = plain if known and type_.dtype.is_float else f"tl.cast({plain}, {dtype})" if known \
            else f"tl.full((), {plain}, {dtype})" if _is_literal(plain) else f"tl.cast({plain}, {dtype})"
        return text, (), depth
    if not emitted.axes:
        return f"tl.full({emitter.shape(axes)}, {plain}, {dtype})", axes, depth
    text = emitter.filled(emitted, axes)
    return (text if type_.dtype.is_float else f"{text}.to({dtype})"), axes, depth


def _is_literal(text: str) -> bool:
    return text.lstrip("-")[:1].isdigit() or text.startswith('float("') or text in ("True", "False")


def _carried(emitter: Emitter, op: ir.Op, inits: Sequence[ir.Value]) -> list[Val]:
    """A variable for each carried value, set to its initial value."""
    variables = []
    for result, init in zip(op.results, inits):
        text, axes, _ = _typed(emitter, init, result.type)
        hint = result.hint or init.hint or "carried"
        variables.append(emitter.assign(hint, text, axes, emitter.scopes.depth, op.loc))
    return variables


def _advance(emitter: Emitter, variables: Sequence[Val], values: Sequence[ir.Value], op: ir.Op) -> None:
    """Assign the next values, all at once."""
    texts = [_typed(emitter, value, result.type)[0] for value, result in zip(values, op.results)]
    for number, text in enumerate(texts):
        if any(re.search(rf"\b{v.text}\b", text) for v in variables[:number]):
            texts[number] = emitter.scopes.name("next")
            emitter.scopes.line(f"{texts[number]} = {text}")
    for variable, text in zip(variables, texts):
        if variable.text != text:
            emitter.scopes.line(f"{variable.text} = {text}")


def _enter(emitter: Emitter, args: Sequence[ir.Value], variables: Sequence[Val]) -> None:
    """Inside a region its arguments are the variables."""
    for arg, variable in zip(args, variables):
        emitter.pin(arg, Val(variable.text, variable.axes, emitter.scopes.depth))


def _leave(emitter: Emitter, op: ir.Op, variables: Sequence[Val]) -> None:
    for result, variable in zip(op.results, variables):
        emitter.pin(result, variable)


def _for(emitter: Emitter, op: ir.Op) -> None:
    low, high, step = (emitter.scalar(x).text for x in op.operands[:3])
    variables = _carried(emitter, op, op.operands[3:])
    body = op.regions[0]
    name = emitter.scopes.name(body.args[0].hint or "i")
    if op.attrs.get("early_exit"):
        _for_until(emitter, op, variables, name, (low, high, step))
    else:
        with emitter.scopes.inside(f"for {name} in range({low}, {high}, {step}):", op.loc):
            _enter(emitter, body.args, [_counter(emitter, name), *variables])
            block(emitter, body)
            _advance(emitter, variables, body.terminator.operands, op)
    _leave(emitter, op, variables)


def _counter(emitter: Emitter, name: str) -> Val:
    """A loop counter, in 64 bits where offsets need them."""
    if not emitter.wide:
        return Val(name, (), emitter.scopes.depth)
    return emitter.assign(name, f"tl.cast({name}, tl.int64)", (), emitter.scopes.depth)


def _for_until(emitter: Emitter, op: ir.Op, variables: list[Val], name: str, bounds: tuple[str, str, str]) -> None:
    """A loop that its body can end: Triton has no break, so a flag is tested with the counter."""
    low, high, step = bounds
    body = op.regions[0]
    type_ = "tl.int64" if emitter.wide else "tl.int32"
    stop = emitter.scopes.name("stop")
    emitter.scopes.line(f"{name} = tl.full((), 0, {type_}) + {low}" if not _is_literal(low)
                        else f"{name} = tl.full((), {low}, {type_})", op.loc)
    emitter.scopes.line(f"{name} = tl.cast({name}, {type_})")
    emitter.scopes.line(f"{stop} = tl.full((), False, tl.int1)")
    test = f"{name} > {high}" if step.startswith("-") else f"{name} < {high}"
    with emitter.scopes.inside(f"while ({test}) & ({stop} == 0):", op.loc):
        _enter(emitter, body.args, [Val(name), *variables])
        block(emitter, body)
        flag, *values = body.terminator.operands
        emitter.scopes.line(f"{stop} = tl.cast({emitter.scalar(flag).text}, tl.int1)")
        _advance(emitter, variables, values, op)
        emitter.scopes.line(f"{name} = tl.cast({name} + {step}, {type_})")


def _while(emitter: Emitter, op: ir.Op) -> None:
    variables = _carried(emitter, op, op.operands)
    condition, body = op.regions
    going = emitter.scopes.name("going")
    _condition(emitter, condition, variables, going)
    with emitter.scopes.inside(f"while {going}:", op.loc):
        _enter(emitter, body.args, variables)
        block(emitter, body)
        _advance(emitter, variables, body.terminator.operands, op)
        _condition(emitter, condition, variables, going)
    _leave(emitter, op, variables)


def _condition(emitter: Emitter, region: ir.Block, variables: Sequence[Val], going: str) -> None:
    """Evaluate a loop's condition anew."""
    for op in ir.walk(region):
        for result in op.results:
            emitter.pinned.pop(result, None)
    with emitter.scopes.apart():
        _enter(emitter, region.args, variables)
        block(emitter, region)
        emitter.scopes.line(f"{going} = tl.cast({emitter.scalar(region.terminator.operands[0]).text}, tl.int1)")


def _if(emitter: Emitter, op: ir.Op) -> None:
    condition = emitter.scalar(op.operands[0])
    depth = emitter.scopes.depth
    names = [emitter.scopes.name(result.hint or "chosen") for result in op.results]
    axes = [order(emitter.whole(result)) for result in op.results]
    branches = []
    for region in op.regions:
        with emitter.scopes.aside() as lines:
            block(emitter, region)
            for name, value, result in zip(names, region.terminator.operands, op.results):
                emitter.scopes.line(f"{name} = {_typed(emitter, value, result.type)[0]}")
        branches.append(lines)
    emitter.scopes.line(f"if {condition.text}:", op.loc)
    emitter.scopes.stack[-1].lines += branches[0]
    if branches[1:] and branches[1] != [INDENT + "pass"]:
        emitter.scopes.stack[-1].lines += ["else:", *branches[1]]
    _leave(emitter, op, [Val(name, a, depth) for name, a in zip(names, axes)])


def _nested_grid(emitter: Emitter, op: ir.Op, position: int) -> None:
    """A grid that is not the launch's: its iterations one after the other, or those that fall to this program."""
    body = op.regions[0]
    if position == len(op.operands):
        block(emitter, body)
        return
    name = emitter.scopes.name(body.args[position].hint or "i")
    count, bounds = emitter.scalar(op.operands[position]).text, "0, {}"
    if op is emitter.open_grid and position == 0:
        bounds = "tl.program_id(0), {}, tl.num_programs(0)"
    with emitter.scopes.inside(f"for {name} in range({bounds.format(count)}):", op.loc):
        _enter(emitter, [body.args[position]], [_counter(emitter, name)])
        _nested_grid(emitter, op, position + 1)


RULES: dict[str, Rule] = {"for": on_demand, "while": on_demand, "if": on_demand}
