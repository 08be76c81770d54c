"""Rules of the operations that work element by element and of those that only rearrange elements.

Each rule gets the emitter, the operation, the result that is asked for and one index an axis; it asks for its
operands at the indices that those elements come from. Called by `emit.Emitter.emit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tessera.kernel import ir
from tessera.kernel.backends.cuda.emit import TRITON_TYPE, Emitter, Rule, at_most, literal
from tessera.kernel.backends.cuda.values import Index, Val, depth_of, order
from tessera.kernel.dims import Dim
from tessera.types import DType, bf16, bool_, f16, f32, f64, fp8_e4m3, fp8_e5m2

INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
         "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
UNARY = {"exp": "tl.exp({})", "exp2": "tl.exp2({})", "log": "tl.log({})", "log2": "tl.log2({})",
         "sqrt": "tl.sqrt({})", "rsqrt": "tl.rsqrt({})", "sigmoid": "tl.sigmoid({})", "sin": "tl.sin({})",
         "cos": "tl.cos({})", "erf": "tl.erf({})", "floor": "tl.floor({})", "ceil": "tl.ceil({})",
         "abs": "tl.abs({})", "neg": "-{}", "not": "({} == 0)",
         # What Triton's language lacks comes from CUDA's device library.
         "tanh": "libdevice.tanh({})", "expm1": "libdevice.expm1({})", "log1p": "libdevice.log1p({})",
         "round": "libdevice.rint({})",
         "softplus": "(tl.maximum({0}, 0.0, tl.PropagateNan.ALL) + libdevice.log1p(tl.exp(-tl.abs({0}))))"}
_POWERS_OF_2 = frozenset(1 << n for n in range(1, 11))
ZERO_OF_ZEROS = frozenset(["add", "sub", "mul", "max", "min", "neg", "abs"])
FLOAT_F64 = {"sigmoid": "(1.0 / (1.0 + tl.exp(-{})))"}


def binary_text(emitter: Emitter, name: str, is_float: bool, x: str, y: str) -> str:
    """The Triton expression of a binary operation."""
    if name in INFIX:
        return f"{x} {INFIX[name]} {y}"
    if name == "div":
        return f"{x} / {y}"
    if name in ("max", "min"):
        return f"tl.{name}imum({x}, {y}{', tl.PropagateNan.ALL' if is_float else ''})"
    if name == "pow":
        if is_float:
            return f"libdevice.pow({x}, {y})"
        emitter.helpers.add("int_pow")
        return f"int_pow({x}, {y})"
    kind = "float" if is_float else "int"
    emitter.helpers |= {f"{kind}_{name}", f"{kind}_mod"} if is_float else {f"{kind}_{name}"}
    return f"{kind}_{name}({x}, {y})"


def elementwise(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """Unary, binary, where, fma."""
    if value.expr is not None and not value.type.rank and op.name in ir.ARITHMETIC and _is_simple(value.expr):
        return emitter.size(value.expr)
    operands = [emitter.emit(x, indices) for x in op.operands]
    texts, axes, depth = emitter.combine(operands, order(indices))
    dtype = op.operands[-1].type.dtype
    if op.name not in INFIX:
        texts = [_exact(x, text) for x, text in zip(op.operands, texts)]
    if op.name == "where":
        text = f"tl.where({', '.join(texts)})"
    elif op.name == "fma":
        text = f"tl.fma({', '.join(texts)})"
    elif op.name in UNARY:
        template = FLOAT_F64.get(op.name) if dtype.bits == 64 and dtype.is_float else None
        text = (template or UNARY[op.name]).format(texts[0])
    else:
        text = _nonnegative_division(op, texts) or binary_text(emitter, op.name, dtype.is_float, *texts)
    depth = emitter.lift(value, depth)
    zero = operands[0].zero
    for other in operands[1:]:
        zero &= other.zero
    return emitter.assign(value.hint or op.name, text, axes, depth, op.loc,
                          zero if op.name in ZERO_OF_ZEROS else frozenset())


def _exact(x: ir.Value, text: str) -> str:
    """A function's f64 constant as such: Triton would round a Python number to f32."""
    while x.op is not None and x.op.name in ("broadcast", "full"):
        x = x.op.operands[0]
    is_constant = x.op is not None and x.op.name == "const" and x.type.dtype == f64
    return f"tl.full((), {text}, tl.float64)" if is_constant else text


def _nonnegative_division(op: ir.Op, texts: list[str]) -> str | None:
    """C's and Python's integer division agree where neither side is negative."""
    if op.name not in ("floordiv", "mod") or any(x.expr is None or not at_most(Dim.of(0), x.expr) for x in op.operands):
        return None
    return f"{texts[0]} {'//' if op.name == 'floordiv' else '%'} {texts[1]}"


def _is_simple(expr: Dim) -> bool:
    """A size expression of names only, which reads better as such than as a chain of operations."""
    return all(not atom.startswith("%") for atom in expr.atoms) and at_most(Dim.of(0), expr)


def cast(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """Conversion; masked zeros stay zeros."""
    source, target = op.operands[0].type.dtype, value.type.dtype
    if not value.type.rank and value.expr is not None and (value.expr.const is not None or _is_simple(value.expr)):
        return emitter.size(value.expr)
    x = emitter.emit(op.operands[0], indices)
    if source.bits == 4 and target.name == "int8":
        return x  # int4 is held as int8 once it is loaded
    text = converted(emitter, x, source, target)
    return emitter.assign(value.hint or "cast", text, x.axes, emitter.lift(value, x.depth), op.loc, x.zero)


def converted(emitter: Emitter, x: Val, source: DType, target: DType) -> str:
    """The text of a conversion. 8-bit floats, and small ones on their way to ints, go by way of f32, which is exact."""
    def to(text: str, dtype: DType) -> str:
        type_ = TRITON_TYPE[dtype.name]
        return f"{text}.to({type_})" if x.axes else f"tl.cast({text}, {type_})"

    text = x.text
    for one, other in ((source, target), (target, source)):
        if one in (fp8_e4m3, fp8_e5m2) and other not in (f32, f16, bf16):
            text, source = to(text, f32), f32
            break
    if target == bool_:
        return f"{text} != 0"
    if source.is_float and target.is_int:
        text = to(text, f32) if source.bits < 32 else text  # an int's range may not fit the smaller type
        emitter.helpers.add("saturated")
        low = 0 if target.kind == "uint" else -2 ** (target.bits - 1)
        high = 2 ** (target.bits - (target.kind == "int")) - 1
        return f"saturated({text}, {low}, {high}, {TRITON_TYPE[target.name]})"
    return to(text, target)


def const(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    return Val(literal(op.attrs["value"], value.type.dtype))


def dim(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    return emitter.size(op.attrs["expr"])


def full(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    return emitter.scalar(op.operands[0])


def iota(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    return indices[op.attrs["axis"]].value


def rand(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """Philox on (seed, offset); offsets are ints of at most 64 bits, as in tl.rand."""
    seed, offset = emitter.scalar(op.operands[0]), emitter.emit(op.operands[1], indices)
    depth = emitter.lift(value, max(seed.depth, offset.depth))
    text = f"tl.rand({seed.text}, {offset.text})"
    return emitter.assign(value.hint or "rand", text, offset.axes, depth, op.loc)


# -- rearranging -------------------------------------------------------------------------------------


def broadcast(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    source = op.operands[0]
    wanted: list[Index] = [Index(Val("0"), Dim.of(0))] * source.type.rank
    for index, dim_, axis in zip(indices, value.type.shape, op.attrs["axes"]):
        if axis is not None and (source.type.shape[axis] == dim_ or source.type.shape[axis].const != 1):
            wanted[axis] = index
    return emitter.emit(source, wanted)


def transpose(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    perm = op.attrs["perm"]
    return emitter.emit(op.operands[0], [indices[perm.index(axis)] for axis in range(len(perm))])


def slice_(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    return emitter.emit(op.operands[0], through_spec(emitter, op, indices))


def through_spec(emitter: Emitter, op: ir.Op, indices: Sequence[Index]) -> list[Index]:
    """The indices into the base of a slice or view."""
    remaining = iter(indices)
    wanted: list[Index] = []
    for entry in op.attrs["spec"]:
        if entry[0] == "all":
            wanted.append(next(remaining))
            continue
        start = op.operands[entry[1]]
        text = emitter.scalar(start)
        wanted.append(Index(text, start.expr) if entry[0] == "at"
                      else emitter.shift(next(remaining), start.expr, text))
    return wanted


def extract(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    return emitter.emit(op.operands[0], [Index(emitter.scalar(i), i.expr) for i in op.operands[1:]])


def insert(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """x with one element replaced: a comparison of every position with that of the element."""
    base, scalar = emitter.emit(op.operands[0], indices), emitter.scalar(op.operands[1])
    hits = []
    for index, at in zip(indices, op.operands[2:]):
        place = emitter.scalar(at)
        texts, axes, depth = emitter.combine([index.value, place])
        hits.append(emitter.assign("hit", f"{texts[0]} == {texts[1]}", axes, depth, op.loc))
    hit = emitter.both(hits, order(indices)) or Val("True")
    texts, axes, depth = emitter.combine([hit, scalar, base], order(indices))
    return emitter.assign(value.hint or "insert", f"tl.where({', '.join(texts)})", axes, depth, op.loc)


def concat(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """The piece that the wanted elements lie in; all of them, selected by position, where that is open."""
    axis = op.attrs["axis"]
    index, low = indices[axis], Dim.of(0)
    pieces: list[tuple[ir.Value, Dim, Dim]] = []
    for piece in op.operands:
        pieces.append((piece, low, low + piece.type.extent(axis)))
        low = low + piece.type.extent(axis)
    ends = index.ends()
    for piece, low, high in pieces:
        if index.start is not None and at_most(low, index.start) and any(at_most(end, high) for end in ends):
            return emitter.emit(piece, _from(emitter, indices, axis, low))
    result: Val | None = None
    for piece, low, high in reversed(pieces):
        lower, upper = emitter.size(low), emitter.size(high)
        depth = max(index.depth, lower.depth, upper.depth)
        text = f"({index.value.text} >= {lower.text}) & ({index.value.text} < {upper.text})"
        inside = emitter.assign("inside", text, index.axes, depth, op.loc)
        shifted = _from(emitter, indices, axis, low)
        shifted[axis] = replace(shifted[axis], start=None, guards=(*index.guards, inside))
        part = emitter.emit(piece, shifted)
        if result is None:
            result = part
            continue
        texts, axes, depth = emitter.combine([inside, part, result], order(indices))
        result = emitter.assign(value.hint or "concat", f"tl.where({', '.join(texts)})", axes, depth, op.loc)
    assert result is not None
    return result


def _from(emitter: Emitter, indices: Sequence[Index], axis: int, low: Dim) -> list[Index]:
    """The indices with one of them counted from `low`."""
    moved = list(indices)
    moved[axis] = emitter.shift(indices[axis], -low, emitter.size(-low))
    return moved


def reshape(emitter: Emitter, op: ir.Op, value: ir.Value, indices: Sequence[Index]) -> Val:
    """Row-major positions are kept: every smallest group of axes with equal products is flattened and re-split."""
    source = op.operands[0].type.shape
    wanted: list[Index] = []
    for mine, theirs in _groups(value.type.shape, source):
        if len(mine) == len(theirs) == 1:
            wanted.append(indices[mine[0]])
            continue
        flat = _flatten(emitter, [indices[i] for i in mine], [value.type.shape[i] for i in mine])
        wanted += _split(emitter, flat, [source[i] for i in theirs])
    return emitter.emit(op.operands[0], wanted)


def _groups(left: tuple[Dim, ...], right: tuple[Dim, ...]) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes paired up so that each pair of groups has the same number of elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) or j < len(right):
        mine: list[int] = []
        theirs: list[int] = []
        a = b = Dim.of(1)
        while True:
            if (not mine or _fewer(a, b)) and i < len(left):
                mine.append(i)
                a, i = a * left[i], i + 1
            elif j < len(right):
                theirs.append(j)
                b, j = b * right[j], j + 1
            elif i < len(left):
                mine.append(i)
                a, i = a * left[i], i + 1
            else:
                break
            if mine and theirs and a == b:
                break
        groups.append((mine, theirs))
    return groups


def _fewer(a: Dim, b: Dim) -> bool:
    """Whether the product b holds factors that a lacks."""
    if a.const is not None and b.const is not None:
        return a.const < b.const
    return len(a.terms[0][0]) < len(b.terms[0][0]) if a.terms and b.terms else False


def _flatten(emitter: Emitter, indices: list[Index], shape: list[Dim]) -> Index:
    if not indices:
        return Index(Val("0"), Dim.of(0))
    whole, parts = emitter.splits.get(tuple(index.value.text for index in indices), (None, None))
    if whole is not None and parts == shape:  # what was taken apart is put together again
        return replace(whole, limits=frozenset().union(*(index.limits for index in indices)),
                       guards=tuple(dict.fromkeys(guard for index in indices for guard in index.guards)))
    flat = indices[0]
    for index, dim_ in zip(indices[1:], shape[1:]):
        limits, guards = flat.limits | index.limits, (*flat.guards, *index.guards)
        size = emitter.size(dim_)
        if flat.value.text == "0":
            value = index.value
        else:
            texts, axes, depth = emitter.combine([flat.value, index.value])
            more = "" if texts[1] == "0" else f" + {texts[1]}"
            value = Val(f"({texts[0]} * {size.text}{more})", axes, max(depth, size.depth))
        start = flat.start * dim_ + index.start if not flat.axes and flat.start and index.start is not None else None
        flat = Index(value, start, limits, guards)
    return flat


def _split(emitter: Emitter, flat: Index, shape: list[Dim]) -> list[Index]:
    wanted: list[Index] = []
    for position, dim_ in enumerate(shape):
        if dim_.const == 1:
            wanted.append(Index(Val("0"), Dim.of(0)))
            continue
        inner = Dim.of(1)
        for later in shape[position + 1:]:
            inner = inner * later
        if inner.const == 1 and all(d.const == 1 for d in shape[:position]):
            wanted.append(flat)
            continue
        text = flat.value.text
        depth = flat.value.depth
        shared = 1
        if inner.const != 1:
            size = emitter.size(inner)
            text, depth = f"({text} // {size.text})", max(depth, size.depth)
            if flat.axes and flat.value.text == flat.axes[0].offsets and inner.const in _POWERS_OF_2:
                shared = inner.const
        if any(d.const != 1 for d in shape[:position]):
            size = emitter.size(dim_)
            text, depth, shared = f"({text} % {size.text})", max(depth, size.depth), 1
        wanted.append(Index(Val(text, flat.axes, depth), None, flat.limits, flat.guards, shared))
    emitter.splits[tuple(index.value.text for index in wanted)] = flat, shape
    return wanted


RULES: dict[str, Rule] = {
    **dict.fromkeys(ir.UNARY | ir.BINARY | {"where", "fma"}, elementwise),
    "cast": cast, "const": const, "dim": dim, "full": full, "iota": iota, "rand": rand, "broadcast": broadcast,
    "transpose": transpose, "slice": slice_, "extract": extract, "insert": insert, "concat": concat, "reshape": reshape,
}

__all__ = ["RULES", "binary_text", "depth_of", "through_spec"]
