"""Expressions of a kernel's body: what each Python expression means over tiles, sizes and constants.

In: syntax nodes. Out: IR values, or compile-time objects (numbers, sizes, dtypes, tuples, functions).
Whatever is known at compile time is folded here, so that the IR holds only what runs.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tessera.errors import CompileError, InputError
from tessera.kernel import lang
from tessera.kernel.build import Builder, TypeRuleError
from tessera.kernel.diagnostics import compile_error, did_you_mean
from tessera.kernel.dims import Dim
from tessera.kernel.frontend import indexing
from tessera.kernel.frontend.frame import Context, Frame, Method, SelfObject, Undefined
from tessera.kernel.frontend.indexing import Range
from tessera.kernel.frontend.merge import Mismatch, is_leaf, join_types, materialise
from tessera.kernel.frontend.reads import Reads, fingerprint
from tessera.kernel.frontend.source import MISSING
from tessera.kernel.ir import Block, Location, Op, Value, ViewTy, walk
from tessera.kernel.lang.core import describe, is_number, tile_of, tiles_of
from tessera.kernel.lang.elementwise import binary, plain
from tessera.types import DType, bool_, dtype_of

_BINARY: dict[type, str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor", ast.LShift: "shl", ast.RShift: "shr",
}
_COMPARE: dict[type, str] = {
    ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne",
}
METHODS: dict[str, Any] = {
    "reshape": lang.reshape, "view": lang.reshape, "to": lang.cast, "cast": lang.cast, "transpose": lang.transpose,
    "permute": lang.transpose, "sum": lang.sum, "mean": lang.mean, "max": lang.max, "min": lang.min,
    "argmax": lang.argmax, "argmin": lang.argmin, "cumsum": lang.cumsum, "exp": lang.exp, "abs": lang.abs,
    "sqrt": lang.sqrt, "rsqrt": lang.rsqrt, "load": lang.load,
}
_ELEMENTWISE = "combine tiles element by element with &, | and ~"
_EFFECTS = frozenset(["load", "gather", "extract", "atomic_add", "store", "scatter", "for", "while", "if"])


class Expressions:
    """Evaluates expressions in the current frame; the statements' half is in `tracer`."""

    builder: Builder
    frames: list[Frame]
    calls: list[Location]
    retypes: dict[DType, DType]
    reads: Reads

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    def call(self, node: ast.Call) -> Any:
        """Defined by `calls`."""
        raise NotImplementedError

    # -- places -------------------------------------------------------------------------------------

    @contextmanager
    def at(self, node: ast.AST) -> Iterator[None]:
        """Stamp operations with a node's place, and turn broken type rules into errors that point there."""
        before = self.builder.loc
        if not self.frame.library:
            self.builder.loc = self.frame.source.location(node)
        try:
            yield
        except TypeRuleError as error:
            raise self.error(str(error), None, *error.operands) from None
        except CompileError:
            raise
        except InputError as error:
            raise self.error(str(error), None) from None
        finally:
            self.builder.loc = before

    def error(self, message: str, node: ast.AST | None, *operands: Value) -> CompileError:
        """The error to raise for a node (None: the place that is stamped now)."""
        inlined = bool(self.frames) and self.frame.library
        loc = self.builder.loc if node is None or inlined else self.frame.source.location(node)
        return compile_error(message, loc, operands, [c for c in self.calls if c != loc], scalars=self._scalar_names())

    def _scalar_names(self) -> dict[str, str]:
        """The program's names of the run-time scalars that sizes are made of."""
        return {str(value.expr): name for frame in self.frames for name, value in frame.env.items()
                if isinstance(value, Value) and value.expr is not None}

    # -- dispatch -----------------------------------------------------------------------------------

    def eval(self, node: ast.expr) -> Any:
        """The value of an expression."""
        method: Callable[[Any], Any] | None = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            raise self.error(f"{CONSTRUCTS.get(type(node).__name__, type(node).__name__)} cannot be compiled", node)
        return method(node)

    def _Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, (complex, bytes)):
            raise self.error(f"{node.value!r} cannot be used in a kernel", node)
        return node.value

    def _Name(self, node: ast.Name) -> Any:
        found = self.frame.env.get(node.id, MISSING)
        if found is MISSING:
            self.reads.note(self.frame.source.function, [node.id])
            return self._outside(node)
        if isinstance(found, Undefined):
            raise self.error(found.reason, node)
        return found

    def _outside(self, node: ast.expr) -> Any:
        """The value of a dotted name whose first is no variable of the function; `reads` has noted it."""
        if isinstance(node, ast.Attribute):
            owner = self._outside(node.value)
            with self.at(node):
                return self.attribute(owner, node.attr)
        assert isinstance(node, ast.Name)
        found = self.constant(self.frame.source.lookup(node.id))
        if found is MISSING:
            raise self.error(f"unknown name {node.id!r}{did_you_mean(node.id, self._known_names())}", node)
        return found

    def _known_names(self) -> list[str]:
        source = self.frame.source
        return [*self.frame.env, *source.closure, *source.function.__globals__]

    def constant(self, x: Any) -> Any:
        """A global or closure object as the program sees it: dtypes are Tessera's, retyped where asked."""
        if isinstance(x, torch.dtype):
            x = dtype_of(x)
        return self.retypes.get(x, x) if isinstance(x, DType) else x

    def _Tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self._elements(node.elts))

    def _List(self, node: ast.List) -> list[Any]:
        return self._elements(node.elts)

    def _elements(self, nodes: list[ast.expr]) -> list[Any]:
        items: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                items += self.sequence(node.value)
            else:
                items.append(self.scalar_now(self.eval(node)))
        return items

    def sequence(self, node: ast.expr) -> list[Any]:
        """A compile-time sequence's items."""
        value = self.eval(node)
        if not isinstance(value, (tuple, list, range)):
            raise self.error(f"{describe(value)} cannot be unpacked; expected a tuple", node)
        return list(value)

    def scalar_now(self, x: Any) -> Any:
        """One element of a parameter is read where it is named; larger views stay views."""
        if isinstance(x, Value) and isinstance(x.type, ViewTy) and not x.type.rank:
            return self.builder.load(x)
        return x

    def _JoinedStr(self, node: ast.JoinedStr) -> str:
        parts = []
        for piece in node.values:
            value = self.eval(piece.value) if isinstance(piece, ast.FormattedValue) else self.eval(piece)
            if isinstance(value, Value):
                with self.at(node):
                    raise TypeRuleError(f"f-string: {describe(value)} is known only when the kernel runs; "
                                        "give print the tile itself", value)
            parts.append(value if isinstance(value, str) else describe(value))
        return "".join(parts)

    # -- operators ----------------------------------------------------------------------------------

    def _BinOp(self, node: ast.BinOp) -> Any:
        left, right = self.eval(node.left), self.eval(node.right)
        with self.at(node):
            return self.operate(node.op, left, right, node)

    def operate(self, op: ast.operator, left: Any, right: Any, node: ast.AST) -> Any:
        """left op right."""
        if isinstance(op, ast.MatMult):
            return lang.mma(left, right)
        for kind in (tuple, list, str):
            if isinstance(left, kind) and isinstance(right, kind) and isinstance(op, ast.Add):
                return left + right  # type: ignore[operator]
        if isinstance(left, (tuple, list)) and isinstance(op, ast.Mult) and isinstance(right, int):
            return left * right
        return binary(_BINARY[type(op)], left, right)

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            value = self.condition(node.operand, _ELEMENTWISE)
            with self.at(node):
                return (not value) if isinstance(value, bool) else self.builder.unary("not", value)
        value = self.eval(node.operand)
        with self.at(node):
            if isinstance(node.op, ast.UAdd):
                return value
            if isinstance(node.op, ast.USub):
                return -value if is_number(value) else lang.neg(value)
            if isinstance(value, int) and not isinstance(value, bool):
                return ~value
            return lang.logical_not(value)

    def _Compare(self, node: ast.Compare) -> Any:
        result: Any = True
        left = self.eval(node.left)
        for op, comparator in zip(node.ops, node.comparators):
            right = self.eval(comparator)
            with self.at(node):
                part = self._compare(op, left, right, node)
                if part is False or result is True:
                    result = part
                elif part is not True:
                    result = binary("and", result, part)
            if result is False:
                return False
            left = right
        return result

    def _compare(self, op: ast.cmpop, left: Any, right: Any, node: ast.AST) -> Any:
        if isinstance(op, (ast.Is, ast.IsNot)):
            if not any(x is None or isinstance(x, (bool, Value, DType)) for x in (left, right)):
                self.reads.give_up()  # which object it is
            same = left is right or (isinstance(left, DType) and left == right)
            return same == isinstance(op, ast.Is)
        if isinstance(op, (ast.In, ast.NotIn)):
            self.reads.need_settled(left, right)
            if isinstance(left, Value) or not isinstance(right, (tuple, list, str, dict, frozenset, set)):
                raise TypeRuleError(f"in: {describe(left)} in {describe(right)}; both must be known at compile time")
            return (left in right) == isinstance(op, ast.In)
        if _is_plain(left) or _is_plain(right):
            self.reads.need_settled(left, right)
            if not isinstance(op, (ast.Eq, ast.NotEq)) and not (isinstance(left, str) and isinstance(right, str)):
                raise TypeRuleError(f"{_COMPARE[type(op)]}: {describe(left)} and {describe(right)} cannot be compared",
                                    *[v for v in (left, right) if isinstance(v, Value)])
            if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
                return self._compare_sequences(op, left, right)
            return (left == right) == isinstance(op, ast.Eq)
        return binary(_COMPARE[type(op)], left, right)

    def _compare_sequences(self, op: ast.cmpop, left: Any, right: Any) -> bool:
        pairs = [binary("eq", a, b) for a, b in zip(left, right)]
        if any(isinstance(p, Value) for p in pairs):
            raise TypeRuleError(f"eq: {describe(left)} and {describe(right)} are not known at compile time")
        return (len(left) == len(right) and all(pairs)) == isinstance(op, ast.Eq)

    def _BoolOp(self, node: ast.BoolOp) -> Any:
        stop = isinstance(node.op, ast.Or)  # the value that decides
        name = "or" if stop else "and"
        result: Any = not stop
        for operand in node.values:
            if result is stop:
                return stop
            if isinstance(result, Value):
                result = self._lazily(node, name, result, operand)
            else:
                result = self.condition(operand, _ELEMENTWISE)
        return result

    def _lazily(self, node: ast.AST, name: str, left: Value, operand: ast.expr) -> Any:
        """left and/or operand: where the operand reads memory, it is evaluated only if it decides."""
        block = Block()
        with self.builder.inside(block):
            right = self.condition(operand, _ELEMENTWISE)
        with self.at(node):
            if isinstance(right, bool):
                return left if right == (name == "and") else right
            if not any(map(_is_guarded, walk(block))):
                self.builder.block.ops.extend(block.ops)
                return self.builder.binary(name, left, right)
            other = Block()
            with self.builder.inside(block):
                self.builder.emit("yield", [right])
            with self.builder.inside(other):
                self.builder.emit("yield", [self.builder.const(name == "or")])
            regions = [block, other] if name == "and" else [other, block]
            return self.builder.emit("if", [left], [right.type], regions).result

    def condition(self, node: ast.expr, instead: str = "") -> bool | Value:
        """A condition: a bool known now, or a bool scalar of the run time; `instead`: what a tile may be meant for.

        Raises:
            CompileError: it is a tile with axes, or not a condition at all.
        """
        value = self.eval(node)
        with self.at(node):
            if isinstance(value, Dim):
                return binary("ne", value, 0)
            if isinstance(value, Value):
                value = tile_of(value)
                if value.type.rank:
                    ways = f"{instead}, or reduce it" if instead else "reduce it"
                    raise TypeRuleError(
                        f"condition: {describe(value)} is a tile; {ways} with tile.any or tile.all", value)
                return value if value.type.dtype == bool_ else binary("ne", value, 0)
            if isinstance(value, (Context, Method, types.FunctionType)):
                raise TypeRuleError(f"condition: {describe(value)} is always true")
            return bool(value)

    def _IfExp(self, node: ast.IfExp) -> Any:
        condition = self.condition(node.test, "choose element by element with tile.where")
        if isinstance(condition, bool):
            return self.eval(node.body if condition else node.orelse)
        blocks = [Block(), Block()]
        values = []
        for block, branch in zip(blocks, (node.body, node.orelse)):
            with self.builder.inside(block):
                values.append(self.scalar_now(self.eval(branch)))
        with self.at(node):
            if not any(_is_guarded(op) for block in blocks for op in walk(block)):
                self.builder.block.ops.extend([*blocks[0].ops, *blocks[1].ops])
                return self.builder.where(condition, *tiles_of(*values, what="conditional expression"))
            try:
                if not all(map(is_leaf, values)):
                    raise Mismatch(f"{describe(values[0])} and {describe(values[1])} are of two kinds")
                type_ = join_types(*values)
            except Mismatch as error:
                raise TypeRuleError(f"conditional expression: {error}",
                                    *[v for v in values if isinstance(v, Value)]) from None
            for block, value in zip(blocks, values):
                with self.builder.inside(block):
                    self.builder.emit("yield", [materialise(self.builder, value, type_.dtype)])
            return self.builder.emit("if", [condition], [type_], blocks).result

    # -- attributes and subscripts ------------------------------------------------------------------

    def _Attribute(self, node: ast.Attribute) -> Any:
        names = dotted(node)
        if names and names[0] not in self.frame.env:
            self.reads.note(self.frame.source.function, names)
            return self._outside(node)
        owner = self.eval(node.value)
        if not isinstance(owner, (Value, Context, SelfObject)) and fingerprint(owner) is None:
            self.reads.give_up()
        with self.at(node):
            return self.attribute(owner, node.attr)

    def attribute(self, owner: Any, name: str) -> Any:
        """owner.name.

        Raises:
            TypeRuleError: there is no such attribute.
        """
        if isinstance(owner, Context):
            return owner.get(name)
        if isinstance(owner, Value):
            return self._value_attribute(owner, name)
        if isinstance(owner, SelfObject):
            return self._self_attribute(owner, name)
        found = getattr(owner, name, MISSING)
        if found is MISSING or (owner is lang and name not in lang.__all__):
            label = ("tile" if owner is lang else "tile.warp" if owner is lang.warp
                     else getattr(owner, "__name__", describe(owner)))
            known = lang.__all__ if owner is lang else dir(owner)
            raise TypeRuleError(f"{label} has no {name!r}{did_you_mean(name, known)}")
        return self.constant(found)

    def _value_attribute(self, owner: Value, name: str) -> Any:
        if name == "shape":
            return tuple(plain(d) for d in owner.type.shape)
        if name == "dtype":
            return owner.type.dtype
        if name in ("ndim", "rank"):
            return owner.type.rank
        if name == "T":
            return lang.transpose(owner)
        if name in METHODS:
            return Method(METHODS[name], owner)
        hint = f"; write tile.{name}(...)" if name in lang.__all__ else \
            did_you_mean(name, [*METHODS, "shape", "dtype", "ndim", "T"])
        raise TypeRuleError(f"a tile has no {name!r}{hint}", owner)

    def _self_attribute(self, owner: SelfObject, name: str) -> Any:
        path = f"{owner.path}.{name}"
        if path in owner.tensors:
            return owner.tensors[path]
        found = getattr(owner.object, name, MISSING)
        if found is MISSING:
            raise TypeRuleError(f"{owner.path} has no {name!r}{did_you_mean(name, dir(owner.object))}")
        if found is None or isinstance(found, (bool, int, float, str, tuple, DType, torch.dtype)) or (callable(
                found) and not isinstance(found, torch.nn.Module)):
            return self.constant(found)
        return SelfObject(found, path, owner.tensors)

    def _Subscript(self, node: ast.Subscript) -> Any:
        base = self.eval(node.value)
        items = self.index_items(node.slice)
        with self.at(node):
            if isinstance(base, Value):
                return indexing.read(base, items)
            return self._constant_item(base, items)

    def _constant_item(self, base: Any, items: list[Any]) -> Any:
        if not isinstance(base, (tuple, list, dict, str)) or len(items) != 1:
            raise TypeRuleError(f"index: {describe(base)} cannot be indexed")
        item = items[0]
        if isinstance(item, Value):
            raise TypeRuleError(f"index: {describe(item)} into a tuple; expected an int known at compile time", item)
        try:
            return base[slice(item.start, item.stop, item.step) if isinstance(item, Range) else item]
        except KeyError:
            raise TypeRuleError(f"index: no {item!r}; there are {', '.join(map(repr, base))}") from None
        except (IndexError, TypeError) as error:
            raise TypeRuleError(f"index: {error}") from None

    def index_items(self, node: ast.expr) -> list[Any]:
        """The items of a subscript: numbers, values, `Range`, Ellipsis, None."""
        nodes = node.elts if isinstance(node, ast.Tuple) else [node]
        return [self._index_item(item) for item in nodes]

    def _index_item(self, node: ast.expr) -> Any:
        if not isinstance(node, ast.Slice):
            return self.scalar_now(self.eval(node))
        step = 1 if node.step is None else self.eval(node.step)
        if not isinstance(step, int) or step < 1:
            raise self.error(f"index: a slice has the step {describe(step)}; expected a positive int known at compile "
                             "time", node)
        start, stop = (None if n is None else self.scalar_now(self.eval(n)) for n in (node.lower, node.upper))
        return Range(start, stop, step)

    def _Call(self, node: ast.Call) -> Any:
        return self.call(node)


def dotted(node: ast.expr) -> list[str]:
    """The names of `a.b.c`, of `a`; none of other expressions."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _is_guarded(op: Op) -> bool:
    """Whether an operation may only run where the program gets to it: it touches memory, or divides ints."""
    if op.name in ("floordiv", "mod"):
        divisor = op.operands[1]
        return divisor.type.dtype.is_int and not (divisor.op is not None and divisor.op.name == "const")
    return op.name in _EFFECTS


def _is_plain(x: Any) -> bool:
    """Whether x is a compile-time object that is not a number."""
    return not (isinstance(x, (Value, Dim)) or is_number(x))


CONSTRUCTS = {
    "Lambda": "a lambda", "ListComp": "a list comprehension", "GeneratorExp": "a generator expression",
    "DictComp": "a dict comprehension", "SetComp": "a set comprehension", "Dict": "a dict", "Set": "a set",
    "Await": "await", "Yield": "yield", "YieldFrom": "yield from", "NamedExpr": "an assignment expression (:=)",
    "Starred": "a starred expression", "Slice": "a slice",
}
