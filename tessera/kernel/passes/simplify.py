"""Small rewrites that every compiled backend wants.

  * dead operations go;
  * mma over a concatenation becomes a concatenation of mmas, and a slice of a concatenation its part, so
    that `split(mma(x, concat([Wg, Wu])))` reads both weights where they lie;
  * acc + mma(a, b) becomes mma(a, b, acc): the sum starts from acc and takes no pass of its own;
  * x * y + z becomes fma(x, y, z) where the product has no other use.
"""

from __future__ import annotations

from collections import Counter

from tessera.kernel import ir
from tessera.kernel.build import Builder
from tessera.kernel.ir import Block, Function, Op, Value


def simplify(function: Function) -> None:
    """Rewrite in place until nothing changes."""
    rewriter = _Rewriter(function)
    while rewriter.run(function.body):
        pass
    remove_dead(function)


def remove_dead(function: Function) -> None:
    """Drop operations without effects whose results nobody uses."""
    while True:
        used = {v.name for op in ir.walk(function.body) for v in op.operands}
        for op in ir.walk(function.body):
            # Shapes may depend on run-time scalars through their dims.
            for result in op.results:
                for dim in (*result.type.shape, *result.type.valid):
                    used |= dim.atoms if dim is not None else set()
        if not _sweep_dead(function.body, used):
            return


def _sweep_dead(block: Block, used: set[str]) -> bool:
    kept, changed = [], False
    for op in block.ops:
        for region in op.regions:
            changed |= _sweep_dead(region, used)
        live = op.name in ir.EFFECTS or has_effects(op) or any(r.name in used for r in op.results)
        changed |= not live
        if live:
            kept.append(op)
    block.ops = kept
    return changed


def has_effects(op: Op) -> bool:
    """Whether an operation or one inside its regions writes memory or prints."""
    return any(
        inner.name in ir.EFFECTS - {"yield"} or has_effects(inner) for region in op.regions for inner in region.ops)


class _Rewriter:
    def __init__(self, function: Function) -> None:
        self.function = function
        self.builder = Builder(function)

    def run(self, block: Block) -> bool:
        """One pass over a block and its regions; True where something changed."""
        self.uses = Counter(v.name for op in ir.walk(self.function.body) for v in op.operands)
        self.replaced: dict[str, Value] = {}
        changed = self._block(block)
        if self.replaced:
            for op in ir.walk(self.function.body):
                op.operands = [self._current(v) for v in op.operands]
        return changed

    def _current(self, value: Value) -> Value:
        while value.name in self.replaced:
            value = self.replaced[value.name]
        return value

    def _block(self, block: Block) -> bool:
        rewritten, changed = Block(), False
        for op in block.ops:
            op.operands = [self._current(v) for v in op.operands]
            for region in op.regions:
                changed |= self._block(region)
            self.builder.loc = op.loc
            with self.builder.inside(rewritten):
                new = self._rewrite(op)
            if new is None:
                rewritten.ops.append(op)
            else:
                self.replaced[op.result.name] = new
                changed = True
        block.ops = rewritten.ops
        return changed

    def _rewrite(self, op: Op) -> Value | None:
        rule = getattr(self, f"_{op.name}", None)
        return rule(op) if rule is not None else None

    def _mma(self, op: Op) -> Value | None:
        weight = op.operands[1].op
        if weight is None or weight.name != "concat" or weight.attrs["axis"] != op.operands[1].type.rank - 1 or \
                len(op.operands) == 3:
            return None
        parts = [self.builder.mma(op.operands[0], part) for part in weight.operands]
        return self.builder.concat(parts, op.result.type.rank - 1)

    def _slice(self, op: Op) -> Value | None:
        made = op.operands[0].op
        if made is None or made.name != "concat":
            return None
        axis, spec = made.attrs["axis"], op.attrs["spec"]
        if spec[axis][0] != "range" or any(e[0] != "all" for i, e in enumerate(spec) if i != axis):
            return None
        start = op.operands[spec[axis][1]].expr
        offset = made.operands[0].type.shape[axis] * 0
        for part in made.operands:
            if start == offset and part.type == op.result.type:
                return part
            offset = offset + part.type.extent(axis)
        return None

    def _add(self, op: Op) -> Value | None:
        x, y = op.operands
        for product, other in ((y, x), (x, y)):
            made = product.op
            if made is None or self.uses[product.name] != 1 or not op.result.type.dtype.is_float:
                continue
            if made.name == "mma" and len(made.operands) == 2 and other.type == product.type:
                return self.builder.mma(made.operands[0], made.operands[1], other)
            if made.name == "mul" and other.type.dtype == made.result.type.dtype:
                return self.builder.emit("fma", [*made.operands, other], [op.result.type]).result
        return None
