"""The emitter: writes the Triton text of one kernel, driven by what its effects demand.

In: a function's operations and the power-of-two bounds of its sizes. Out: lines of Triton. Callers: `kernel`
(which walks the effects) and the rules of single operations (`rules`, `contract`, `memory`, `control`).

Nothing is emitted because it stands in the program; `emit(value, indices)` is called for what a store, a
reduction or a branch needs, at the elements that it needs, and asks in turn for the operands. So slices,
concatenations, reshapes and transposes become index arithmetic in loads, a tile that is too long for
registers is computed block by block in the loop of its consumer, and what two consumers share is emitted
once. Loop-carried tiles are the exception: they are Triton tensors of their own (`pin`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tessera.errors import UnsupportedError
from tessera.kernel import ir
from tessera.kernel.backends.cuda.scopes import Scopes
from tessera.kernel.backends.cuda.values import (
    Axis,
    Index,
    Val,
    at_most,
    depth_of,
    minimum_parts,
    next_power_of_2,
    order,
)
from tessera.kernel.dims import Dim, Term, split_fraction
from tessera.types import DType

MAX_TILE = 16384  # elements of one tensor that are held in registers (64 a thread at 8 warps)
MAX_SINGLE = 65536  # the same for what cannot be computed by blocks: sort, scan, carried tiles
MAX_EMITTED = 5_000  # operations of one text: longer ones Triton compiles for minutes
TRITON_TYPE = {
    "f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16",
    "fp8_e4m3": "tl.float8e4nv", "fp8_e5m2": "tl.float8e5", "int64": "tl.int64", "int32": "tl.int32",
    "int8": "tl.int8", "uint8": "tl.uint8", "int4": "tl.int8", "bool": "tl.int1",
}

Rule = Callable[["Emitter", ir.Op, ir.Value, Sequence[Index]], Val]


class Emitter:
    """Writes one kernel. `sizes` bounds every named size and integer argument (exact values are fine)."""

    def __init__(self, function: ir.Function, sizes: dict[str, int], wide: bool, rules: dict[str, Rule]) -> None:
        self.function = function
        self.sizes = sizes
        self.wide = wide  # offsets need 64 bits
        self.rules = rules
        self.scopes = Scopes()
        self.helpers: set[str] = set()
        self.constants: dict[str, int] = {}  # constexpr parameters
        self.asked: dict[Dim, int] = {}  # the bounds that the text depends on
        self.largest = 1  # elements of the largest tensor, for the choice of warps
        self.emitted = 0  # operations written so far
        self.dot_elements = 0  # accumulators of all tl.dots; twice where they run without tensor cores
        self.open_grid: ir.Op | None = None  # whose iterations the programs share out among themselves
        self.block_depth: dict[int, int] = {}
        self.pinned: dict[ir.Value, Val] = {}
        self.block_free: dict[tuple[ir.Value, int], bool] = {}  # what `contract.by_blocks` found
        self.written: set[ir.Value] = set()  # parameters that the text has stored to
        self.reread = _reads_after_writes(function)
        self.splits: dict[tuple[str, ...], tuple[Index, list[Dim]]] = {}  # indices that an index was taken apart into
        self._axes: dict[tuple[Dim, int], Axis] = {}
        self._home: dict[ir.Value, ir.Block] = {}
        self._values: dict[str, ir.Value] = {}
        self.matrix_dims = _dims_of_matrices(function)
        self._index_values(function.body)
        for param in function.params:
            self._values[param.value.name] = param.value
            if not param.is_view:
                self.pinned[param.value] = Val(self.scopes.name(param_name(param)))
            else:
                for suffix in ("ptr", *(f"s{axis}" for axis in range(param.value.type.rank))):
                    self.scopes.name(f"{param_name(param)}_{suffix}")
        # "B*S", bound as a whole, is B_x_S; a size named as a scalar or as something of Triton's is told apart.
        self.size_names = {size: self.scopes.name(axis_name(Dim.atom(size))) for size in function.sizes}

    def _index_values(self, block: ir.Block) -> None:
        for value in block.args:
            self._values[value.name], self._home[value] = value, block
        for op in block.ops:
            for value in op.results:
                self._values[value.name], self._home[value] = value, block
            for region in op.regions:
                self._index_values(region)

    # -- demands ------------------------------------------------------------------------------------

    def emit(self, value: ir.Value, indices: Sequence[Index]) -> Val:
        """The elements of a tile at one index an axis. The result's axes are those that it varies along."""
        key = (value, tuple(index.key for index in indices))
        if (found := self.scopes.find(key)) is not None:
            return found
        if value in self.pinned:
            return self.scopes.keep(key, self.element_of(value, self.pinned[value], indices))
        op = value.op
        if op is None:
            raise UnsupportedError(f"cuda: {value.hint or value.name} is used outside its loop")
        rule = self.rules.get(op.name)
        if rule is None:
            raise self.unsupported(op, "no rule for this operation")
        self.emitted += 1
        if self.emitted > MAX_EMITTED:
            raise self.unsupported(op, f"more than {MAX_EMITTED} operations: each slice and concatenation of a slice "
                                       "or concatenation computes what it is made of again; store to a parameter in "
                                       "between")
        result = rule(self, op, value, indices)
        return self.scopes.keep(key, result) if value not in self.pinned else self.emit(value, indices)

    def scalar(self, value: ir.Value) -> Val:
        """A rank-0 tile."""
        return self.emit(value, ())

    def whole(self, value: ir.Value) -> list[Index]:
        """The indices of every element of a tile."""
        indices: list[Index] = []
        for position in range(value.type.rank):
            indices.append(self.full_index(value.type, position, order(indices)))
        return indices

    def full_index(self, type_: ir.TileTy, position: int, taken: Iterable[Axis]) -> Index:
        """All of one axis of a tile; `taken` are axes that the demand uses already."""
        dim = type_.shape[position]
        if dim.const == 1:
            return Index(Val("0"), Dim.of(0))
        return self.over(self.axis(dim, taken), type_.extent(position))

    def over(self, axis: Axis, limit: Dim) -> Index:
        """An index that runs over an axis, of which `limit` positions count."""
        return Index(Val(axis.offsets, (axis,), axis.depth), Dim.of(0), frozenset([(axis, limit)]))

    def home_depth(self, value: ir.Value) -> int:
        """The depth of the block that defines a value."""
        block = self._home.get(value)
        return self.block_depth.get(id(block), 0) if block is not None else 0

    def lift(self, value: ir.Value, depth: int) -> int:
        """How far out an operation may be written that needs only what is known at `depth`."""
        return max(depth, self.scopes.branch_of(self.home_depth(value)))

    def value_named(self, name: str) -> ir.Value:
        """The SSA value behind an atom of a Dim."""
        return self._values[name]

    # -- axes and masks -----------------------------------------------------------------------------

    def bound(self, dim: Dim) -> int | None:
        """The power of two that a size is rounded up to in this text; None when it is known at run time only."""
        for part in minimum_parts(dim):
            try:
                size = next_power_of_2(part.value(self.sizes))
            except KeyError:
                continue
            if part.const is None:
                self.asked[part] = size
            return size
        return None

    def axis(self, dim: Dim, taken: Iterable[Axis] = ()) -> Axis:
        """The axis over all of a dim that is not taken: equal dims share axes, in order of use."""
        taken = tuple(taken)
        for count in range(len(taken) + 1):
            axis = self._axes.get((dim, count)) or self._new_axis(dim, count)
            if axis not in taken:
                return axis
        raise AssertionError("more axes taken than there are")

    def _new_axis(self, dim: Dim, count: int) -> Axis:
        size = self.bound(dim)
        if size is None or size > 1 << 20:
            raise UnsupportedError(f"cuda: a tile of {dim} elements does not fit registers and cannot be blocked here")
        if dim in self.matrix_dims:
            size = max(16, size)
        name = axis_name(dim)
        text = str(size) if dim.const is not None else self.constant(f"P_{name}", size)
        axis = self.new_axis(name, "0", size, text, depth=0)
        self._axes[dim, count] = axis
        return axis

    def new_axis(self, name: str, start: str, size: int, text: str, depth: int) -> Axis:
        """An axis of `size` positions from a start; its offsets are written at the given depth."""
        offsets = self.scopes.name(f"i_{name}")
        with self.scopes.at(depth):
            steps = f"tl.arange(0, {text})" + (".to(tl.int64)" if self.wide else "")
            self.scopes.line(f"{offsets} = {steps if start == '0' else f'{start} + {steps}'}")
        return Axis(name, offsets, size, text, depth, start)

    def constant(self, name: str, value: int) -> str:
        """A constexpr parameter of the kernel."""
        if self.constants.setdefault(name, value) != value:
            return self.constant(name + "_", value)
        return name

    def mask(self, axis: Axis, limit: Dim) -> Val | None:
        """`offsets < limit` on one axis; None where every position counts."""
        parts = minimum_parts(limit)
        if axis.blocked and limit.const is not None and limit.const % axis.size == 0:
            return None  # blocks begin at multiples of their size
        if not axis.blocked:
            if any(part.const is not None and part.const >= axis.size for part in parts[1:]):
                kept = [part for part in parts[1:] if part.const is None or part.const < axis.size]
                if not kept:
                    return None
                limit = kept[0]
                for part in kept[1:]:
                    limit = limit.minimum(part)
            elif limit.const is not None and limit.const >= axis.size:
                return None
        key = ("mask", axis, limit)
        if (found := self.scopes.find(key)) is not None:
            return found
        end = self.size(limit)
        depth = max(axis.depth, end.depth)
        name = self.scopes.name(f"in_{axis.name}")
        with self.scopes.at(depth):
            self.scopes.line(f"{name} = {axis.offsets} < {end.text}")
            return self.scopes.keep(key, Val(name, (axis,), depth))

    def size(self, dim: Dim) -> Val:
        """The text of a symbolic size."""
        depth = 0
        terms = []
        for monomial, factor in dim.terms:
            factors = [] if factor == 1 and monomial else [str(factor)]
            for atom in monomial:
                text, at = self._atom(atom)
                depth = max(depth, at)
                factors.append(text)
            terms.append(" * ".join(factors))
        text = " + ".join(terms).replace("+ -", "- ") or "0"
        return Val(text if text.isidentifier() or text.isdigit() else f"({text})", (), depth)

    def _atom(self, atom: str | Term) -> tuple[str, int]:
        if isinstance(atom, Term):
            left, right = self.size(atom.left), self.size(atom.right)
            depth = max(left.depth, right.depth)
            if atom.op in ("min", "max"):
                return f"tl.{atom.op}imum({left.text}, {right.text})", depth
            return f"({left.text} {atom.op} {right.text})", depth
        if atom.startswith("%"):
            value = self.scalar(self.value_named(atom))
            return value.text, value.depth
        name, divisor = split_fraction(atom)
        name = self.size_names[name]
        return (name if divisor == 1 else f"({name} // {divisor})"), 0

    # -- combining values ---------------------------------------------------------------------------

    def spread(self, value: Val, axes: Sequence[Axis]) -> str:
        """A value's text with its dims placed among `axes` (size 1 where it does not vary)."""
        if not value.axes or tuple(axes) == value.axes:
            return value.text
        text = value.text
        placed = [axis for axis in axes if axis in value.axes]
        if tuple(placed) != value.axes:
            if len(placed) == 2:
                text = f"tl.trans({text})"
            else:
                text = f"tl.permute({text}, {tuple(value.axes.index(axis) for axis in placed)})"
        if len(axes) > len(placed):
            text = text if text.isidentifier() or text.startswith("tl.") else f"({text})"
            text += "[" + ", ".join(":" if axis in value.axes else "None" for axis in axes) + "]"
        return text

    def filled(self, value: Val, axes: Sequence[Axis]) -> str:
        """A value's text as a tensor of exactly these axes."""
        text = self.spread(value, axes)
        if set(value.axes) == set(axes):
            return text
        return f"tl.broadcast_to({text}, {self.shape(axes)})"

    def shape(self, axes: Sequence[Axis]) -> str:
        """The shape tuple of a tensor."""
        return "(" + ", ".join(axis.size_text for axis in axes) + ("," if len(axes) == 1 else "") + ")"

    def combine(self, values: Sequence[Val], first: Sequence[Axis] = ()) -> tuple[list[str], tuple[Axis, ...], int]:
        """Texts that broadcast against each other, their joint axes (in the order of `first`) and depth."""
        present = dict.fromkeys(axis for value in values for axis in value.axes)
        axes = tuple(axis for axis in first if axis in present)
        axes += tuple(axis for axis in present if axis not in axes)
        return [self.spread(v, axes) for v in values], axes, max((v.depth for v in values), default=0)

    def assign(self, hint: str, text: str, axes: tuple[Axis, ...], depth: int,
               loc: ir.Location | None = None, zero: frozenset[tuple[Axis, Dim]] = frozenset()) -> Val:
        """Write `name = text` at a depth."""
        name = self.scopes.name(hint)
        self.count(axes)
        with self.scopes.at(depth):
            self.scopes.line(f"{name} = {text}", loc)
        return Val(name, axes, depth, zero)

    def count(self, axes: Sequence[Axis]) -> int:
        """Elements of a tensor; keeps the largest in mind."""
        elements = 1
        for axis in axes:
            elements *= axis.size
        if elements > 1 << 20:  # Triton's own limit
            raise UnsupportedError(f"cuda: a tensor of {elements} elements is needed at once; at most {1 << 20} can be")
        self.largest = max(self.largest, elements)
        return elements

    def both(self, masks: Sequence[Val | None], axes: Sequence[Axis]) -> Val | None:
        """The conjunction of conditions, written out where there are several."""
        present = list(dict.fromkeys(mask for mask in masks if mask is not None))
        if len(present) <= 1:
            return present[0] if present else None
        key = ("and", tuple(present), tuple(axes))
        if (found := self.scopes.find(key)) is not None:
            return found
        texts, joint, depth = self.combine(present, axes)
        return self.scopes.keep(key, self.assign("mask", " & ".join(f"({t})" for t in texts), joint, depth))

    def limits_mask(self, indices: Sequence[Index]) -> Val | None:
        """What counts of a demand."""
        pairs = dict.fromkeys(pair for index in indices for pair in sorted(index.limits, key=str))
        masks = [self.mask(axis, limit) for axis, limit in pairs]
        return self.both([*masks, *(guard for index in indices for guard in index.guards)], order(indices))

    def shift(self, index: Index, by: Dim | None, text: Val) -> Index:
        """The index counted from an origin further left: index + by."""
        start = None if by is None or index.start is None else index.start + by
        if text.text == "0":
            return index
        if start is not None and len(index.axes) == 1:  # as short as it can be said
            axis, origin = index.axes[0], self.size(start)
            if start == Dim.of(0):
                return index.moved(Val(axis.offsets, (axis,), axis.depth), start)
            depth = max(axis.depth, origin.depth)
            return index.moved(Val(f"({origin.text} + {axis.offsets})", (axis,), depth), start)
        if index.value.text == "0":
            return index.moved(text, start)
        texts, axes, depth = self.combine([text, index.value])
        return index.moved(Val(f"({texts[0]} + {texts[1]})", axes, depth), start)

    # -- pinned tiles -------------------------------------------------------------------------------

    def element_of(self, value: ir.Value, tensor: Val, indices: Sequence[Index]) -> Val:
        """Elements of a tile that is held in registers over its whole axes."""
        return self.picked(value, tensor, self.whole(value), indices)

    def picked(self, value: ir.Value, tensor: Val, own: Sequence[Index], wanted: Sequence[Index]) -> Val:
        """Elements of a tensor that was computed at the indices `own`, at those that are `wanted`.

        One element along an axis is a masked sum, a stretch of one axis a tl.gather; what mixes axes is
        gathered from the flattened tensor.
        """
        moved = [i for i, (mine, theirs) in enumerate(zip(own, wanted))
                 if mine.axes and mine.value.text != theirs.value.text]
        for position in [i for i in moved if not wanted[i].axes]:
            tensor = self._one_element(value, tensor, own[position].axes[0], wanted[position].value)
            moved.remove(position)
        kept = [axis for i, mine in enumerate(own) if i not in moved for axis in mine.axes if axis in tensor.axes]
        targets = [axis for i in moved for axis in wanted[i].axes]
        if len(targets) == len(moved) and len({*targets, *kept}) == len(targets) + len(kept):
            for position in moved:
                tensor = self._stretch(value, tensor, own[position].axes[0], wanted[position])
            return tensor
        return self._scattered(value, tensor, own, wanted)

    def _one_element(self, value: ir.Value, tensor: Val, axis: Axis, at: Val) -> Val:
        hit = self.spread(Val(f"({axis.offsets} == {at.text})", (axis,)), tensor.axes)
        text = f"tl.sum(tl.where({hit}, {tensor.text}, 0), axis={tensor.axes.index(axis)})"
        if value.type.dtype.bits < 32:
            text = f"tl.cast({text}, {TRITON_TYPE[value.type.dtype.name]})"
        axes = tuple(a for a in tensor.axes if a is not axis)
        return self.assign(value.hint or "element", text, axes, max(tensor.depth, at.depth))

    def _stretch(self, value: ir.Value, tensor: Val, axis: Axis, wanted: Index) -> Val:
        axes = tuple(wanted.axes[0] if a is axis else a for a in tensor.axes)
        at = self.filled(wanted.value, axes)
        # Positions that do not count may lie outside: the mask keeps the gather inside the tensor.
        text = f"tl.gather({tensor.text}, ({at} & {axis.size - 1}).to(tl.int32), axis={tensor.axes.index(axis)})"
        return self.assign(value.hint or "part", text, axes, max(tensor.depth, wanted.depth))

    def _scattered(self, value: ir.Value, tensor: Val, own: Sequence[Index], wanted: Sequence[Index]) -> Val:
        sources = {mine.axes[0]: theirs.value for mine, theirs in zip(own, wanted) if mine.axes}
        terms, step = [], 1
        for axis in reversed(tensor.axes):
            at = sources[axis]
            terms.append(Val(f"({at.text} & {axis.size - 1}) * {step}", at.axes, at.depth))
            step *= axis.size
        texts, axes, depth = self.combine(terms, order(wanted))
        elements = self.count(axes)
        flat = f"tl.reshape({tensor.text}, ({step},))"
        at_text = f"tl.reshape(tl.broadcast_to({' + '.join(texts)}, {self.shape(axes)}), ({elements},)).to(tl.int32)"
        text = f"tl.reshape(tl.gather({flat}, {at_text}, axis=0), {self.shape(axes)})"
        return self.assign(value.hint or "elements", text, axes, max(tensor.depth, depth))

    def pin(self, value: ir.Value, tensor: Val) -> None:
        """From here on the tile is this tensor, over its whole axes."""
        self.pinned[value] = tensor
        self.block_free.clear()

    # -- errors -------------------------------------------------------------------------------------

    def unsupported(self, op: ir.Op, why: str) -> UnsupportedError:
        """An error that names the operation and the source line."""
        place = f"{op.loc}: {op.loc.text.strip()}: " if op.loc else ""
        return UnsupportedError(f"{place}cuda: {op.name}: {why}")


def literal(value: Any, dtype: DType) -> str:
    """A compile-time scalar in Triton."""
    if dtype.is_float:
        text = repr(float(value))
        return text if text.lstrip("-")[0].isdigit() else f'float("{text}")'
    return str(value)


def param_name(param: ir.Param) -> str:
    """A parameter's name in generated code; tensors of a method's object have dots in theirs."""
    return param.name.replace(".", "_")


def axis_name(dim: Dim) -> str:
    """A name for the positions along a dim."""
    text = str(dim).replace("*", "_x_").replace("/", "_by_").replace("%", "v").replace("+", "_plus_")
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in text).strip("_")
    return name if len(name) <= 24 else name[:24].rstrip("_")


def _dims_of_matrices(function: ir.Function) -> set[Dim]:
    """Dims of the operands and results of mma: tl.dot wants at least 16 of each."""
    dims: set[Dim] = set()
    for op in ir.walk(function.body):
        if op.name == "mma":
            for value in (*op.operands[:2], op.result):
                dims |= set(value.type.shape[-2:])
    return dims


def _reads_after_writes(function: ir.Function) -> set[int]:
    """Loads (by id) in a loop that also writes their parameter: an iteration may read what the last one wrote."""
    found: set[int] = set()
    for loop in ir.walk(function.body):
        if loop.name in ("for", "while"):
            inner = [op for region in loop.regions for op in ir.walk(region)]
            written = {ir.param_of(op.operands[0]) for op in inner if op.name in ir.WRITES}
            found |= {id(op) for op in inner if op.name in ir.READS and ir.param_of(op.operands[0]) in written}
    return found


__all__ = ["MAX_SINGLE", "MAX_TILE", "TRITON_TYPE", "Emitter", "Rule", "at_most", "axis_name", "depth_of", "literal"]
