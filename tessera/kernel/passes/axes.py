"""Which axes of which values move together: the analysis behind `parallelize`.

In: a function without grids. Out: a partition of all (value, axis) pairs into classes, and the classes
that no operation reduces, scans, splits or indexes across. Two axes are in one class when an operation
maps them onto each other element by element, so that blocking one of them means blocking both.

Parameters are left apart on purpose: `x @ x.T` reads x under two classes, and both may be blocked.
"""

from __future__ import annotations

from tessera.kernel import ir
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Block, Function, Op, Value

Node = tuple[str, int]  # value name, axis


class AxisClasses:
    """Union-find over axes; `fixed` holds the classes that must stay whole."""

    def __init__(self, function: Function) -> None:
        self._parent: dict[Node, Node] = {}
        self._fixed: set[Node] = set()
        self.sizes: dict[Node, Dim] = {}
        self._params = {p.value.name for p in function.params}
        self._visit(function.body)
        self._fix_inconsistent(function.body)

    # -- queries ------------------------------------------------------------------------------------

    def find(self, value: Value, axis: int) -> Node:
        """The representative of the class of an axis."""
        return self._find((value.name, axis))

    def is_free(self, root: Node) -> bool:
        """Whether the class may be cut into blocks that run in any order."""
        return root not in self._fixed

    def axis_of(self, value: Value, root: Node) -> int | None:
        """The axis of a value that belongs to a class."""
        for axis in range(value.type.rank):
            if self.find(value, axis) == root:
                return axis
        return None

    # -- union-find ---------------------------------------------------------------------------------

    def _find(self, node: Node) -> Node:
        parent = self._parent.setdefault(node, node)
        if parent != node:
            parent = self._parent[node] = self._find(parent)
        return parent

    def _join(self, x: Value, i: int, y: Value, j: int) -> None:
        a, b = self._find((x.name, i)), self._find((y.name, j))
        if a != b:
            self._parent[b] = a
            if b in self._fixed:
                self._fixed.add(a)

    def _join_all(self, x: Value, y: Value) -> None:
        for axis in range(x.type.rank):
            self._join(x, axis, y, axis)

    def _fix(self, value: Value, *axes: int) -> None:
        for axis in axes:
            self._fixed.add(self._find((value.name, axis)))

    def _fix_all(self, value: Value) -> None:
        self._fix(value, *range(value.type.rank))

    # -- one rule an operation ----------------------------------------------------------------------

    def _visit(self, block: Block) -> None:
        for op in block.ops:
            for region in op.regions:
                self._visit(region)
            rule = getattr(self, f"_{op.name}", None)
            if rule is not None:
                rule(op)
            elif op.name in ir.ELEMENTWISE or op.name == "rand":
                for operand in op.operands:
                    if operand.type.rank:
                        self._join_all(operand, op.result)
            elif op.name not in ("const", "dim", "full", "iota", "yield"):
                for value in [*op.operands, *op.results]:
                    if value.name not in self._params:
                        self._fix_all(value)

    def _load(self, op: Op) -> None:
        if op.operands[0].name not in self._params:
            self._join_all(op.operands[0], op.result)

    def _store(self, op: Op) -> None:
        if op.operands[0].name not in self._params:
            self._join_all(op.operands[0], op.operands[1])

    _atomic_add = _store

    def _broadcast(self, op: Op) -> None:
        source, result = op.operands[0], op.result
        for axis, origin in enumerate(op.attrs["axes"]):
            if origin is not None and source.type.shape[origin] == result.type.shape[axis]:
                self._join(source, origin, result, axis)

    def _reshape(self, op: Op) -> None:
        source, result = op.operands[0], op.result
        a, b = source.type.shape, result.type.shape
        prefix = 0
        while prefix < min(len(a), len(b)) and a[prefix] == b[prefix]:
            self._join(source, prefix, result, prefix)
            prefix += 1
        suffix = 0
        while suffix < min(len(a), len(b)) - prefix and a[-1 - suffix] == b[-1 - suffix]:
            suffix += 1
            self._join(source, len(a) - suffix, result, len(b) - suffix)
        self._fix(source, *range(prefix, len(a) - suffix))
        self._fix(result, *range(prefix, len(b) - suffix))

    def _transpose(self, op: Op) -> None:
        for axis, origin in enumerate(op.attrs["perm"]):
            self._join(op.operands[0], origin, op.result, axis)

    def _concat(self, op: Op) -> None:
        for operand in op.operands:
            self._join_others(operand, op.result, op.attrs["axis"])
            self._fix(operand, op.attrs["axis"])

    def _join_others(self, x: Value, y: Value, axis: int) -> None:
        for other in range(x.type.rank):
            if other != axis:
                self._join(x, other, y, other)
        self._fix(x, axis)
        self._fix(y, axis)

    def _scan(self, op: Op) -> None:
        self._join_others(op.operands[0], op.result, op.attrs["axis"])

    def _sort(self, op: Op) -> None:
        for result in op.results:
            self._join_others(op.operands[0], result, op.attrs["axis"])

    def _reduce(self, op: Op) -> None:
        source, axis = op.operands[0], op.attrs["axis"]
        self._fix(source, axis)
        for other in range(source.type.rank):
            if other != axis:
                self._join(source, other, op.result, other - (other > axis))

    def _slice(self, op: Op) -> None:
        self._windowed(op, joined=True)

    def _view(self, op: Op) -> None:
        self._windowed(op, joined=op.operands[0].name not in self._params)

    def _windowed(self, op: Op, joined: bool) -> None:
        source, position = op.operands[0], 0
        for axis, entry in enumerate(op.attrs["spec"]):
            if entry[0] == "all":
                if joined:
                    self._join(source, axis, op.result, position)
            elif joined:
                self._fix(source, axis)
            if entry[0] == "range":
                self._fix(op.result, position)
            position += entry[0] != "at"

    def _mma(self, op: Op) -> None:
        a, b, result = op.operands[0], op.operands[1], op.result
        rank = result.type.rank
        self._fix(a, a.type.rank - 1)
        self._fix(b, b.type.rank - 2)
        for axis in range(rank - 1):
            self._join(a, axis, result, axis)
        self._join(b, b.type.rank - 1, result, rank - 1)
        if b.type.rank > 2:
            for axis in range(rank - 2):
                self._join(b, axis, result, axis)
        if len(op.operands) == 3:
            self._join_all(op.operands[2], result)

    def _gather(self, op: Op) -> None:
        view, index = op.operands
        self._indexed(view, index, op.result)

    def _scatter(self, op: Op) -> None:
        self._indexed(*op.operands)

    def _indexed(self, view: Value, index: Value, rows: Value) -> None:
        for axis in range(index.type.rank):
            self._join(index, axis, rows, axis)
        if view.name not in self._params:
            self._fix(view, 0)
            for axis in range(1, view.type.rank):
                self._join(view, axis, rows, index.type.rank + axis - 1)

    def _for(self, op: Op) -> None:
        body, = op.regions
        stop = int(bool(op.attrs.get("early_exit")))
        for init, arg, after, result in zip(
                op.operands[3:], body.args[1:], body.terminator.operands[stop:], op.results):
            for value in (init, arg, after):
                self._join_all(result, value)

    def _while(self, op: Op) -> None:
        before, body = op.regions
        for init, test, arg, after, result in zip(
                op.operands, before.args, body.args, body.terminator.operands, op.results):
            for value in (init, test, arg, after):
                self._join_all(result, value)

    def _if(self, op: Op) -> None:
        for region in op.regions:
            for value, result in zip(region.terminator.operands, op.results):
                self._join_all(result, value)

    # -- consistency --------------------------------------------------------------------------------

    def _fix_inconsistent(self, body: Block) -> None:
        """A class with two sizes, a ragged size, or two axes of one value stays whole."""
        for value in _values(body):
            if value.name in self._params:
                continue
            seen = set()
            for axis, size in enumerate(value.type.shape):
                root = self.find(value, axis)
                if root in seen or value.type.valid[axis] is not None or self.sizes.setdefault(root, size) != size:
                    self._fixed.add(root)
                seen.add(root)


def _values(body: Block) -> list[Value]:
    found = []
    for op in ir.walk(body):
        found += op.results
        for region in op.regions:
            found += region.args
    return found
