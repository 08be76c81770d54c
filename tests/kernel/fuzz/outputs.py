"""What a program writes, and what must then stand in its outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tessera import types as ts
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Value

from . import approx
from .approx import Approx
from .control import either
from .maker import Maker
from .moves import run_time_int
from .node import Memo, Node

Place = tuple[Any, ...]


def finish(m: Maker) -> None:
    """Store the last tile and perhaps others; work out what must be in the outputs."""
    chosen = {m.pool[-1]: None}
    for _ in range(m.random.randint(0, 2)):
        chosen[m.random.choice(m.pool)] = None
    for node in chosen:
        if node.dtype == ts.int4:  # parameters of it are read-only
            node = m.cast(node, ts.int8)
        ways = [_stored]
        if m.words.wide:
            ways += [_stored, _guarded, _added, *([] if m.indices or not node.type.rank else [_by_rows, _scattered])]
        m.random.choice(ways)(m, node) if len(ways) > 1 else _stored(m, node)


def programs(m: Maker) -> Iterator[Memo]:
    """A memo for every program of the grid; one when there is none."""
    if not m.indices:
        yield {}
        return
    counts = [range(-(-m.case.sizes["M"] // m.block)), *([range(m.columns)] if m.columns else [])]
    for place in itertools.product(*counts):
        yield {"place": place, "block": place[0] * m.block}


class _Output:
    """A new output with a place for every program's tile."""

    def __init__(self, m: Maker, node: Node) -> None:
        self.m, type_ = m, node.type
        ragged = [axis for axis, valid in enumerate(type_.valid) if valid is not None]
        self.axis = ragged[0] if m.indices and len(ragged) == 1 and type_.shape[ragged[0]] == Dim.of(m.block) else None
        shape, self.lead = list(type_.shape), len(m.indices)
        if self.axis is not None:
            shape[self.axis] = Dim.of("M")
            self.lead -= 1
        elif self.lead:
            shape.insert(0, Dim.of("M").ceildiv(m.block))
        elif not shape:
            shape, self.lead = [Dim.of(1)], 1
        if m.columns:
            shape.insert(0, Dim.of(m.columns))
        self.view = m.program.tensor(f"out{len(m.case.outputs)}", shape, node.dtype, output=True)
        self.before = torch.full([dim.value(m.case.sizes) for dim in shape], 3).to(node.dtype.torch)
        start = approx.exact(self.before.float() if node.dtype.is_float and node.dtype.bits < 32 else self.before)
        self.result = Approx(start.x.clone(), start.e.clone())
        m.case.outputs.append(self.before)

    def target(self, node: Node) -> Value:
        """The window for this program's tile."""
        m, view = self.m, self.view
        leading = [n.value for n in reversed(m.indices)] if m.indices else [m.program.const(0)] if self.lead else []
        if self.lead:
            spec = [("at", i + 1) for i in range(self.lead)] + [("all",)] * node.type.rank
            view = m.program.view(view, spec, leading[:self.lead])
        if self.axis is not None:
            view = m.program.view(view, m.block_spec(view.type, self.axis), [m.first_row])
        return view

    def parts(self, memo: Memo, now: Approx) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the values and the errors of a program's tile belong, and they."""
        for target, source in ((self.result.x, now.x), (self.result.e, now.e)):
            place = target
            if self.m.indices:
                for i in list(reversed(memo["place"]))[:self.lead]:
                    place = place[i]
            elif self.lead:
                place = place[0]
            if self.axis is not None:
                rows = min(source.shape[self.axis], place.shape[self.axis] - memo["block"])  # of the last block
                place, source = place.narrow(self.axis, memo["block"], rows), source.narrow(self.axis, 0, rows)
            yield place[tuple(slice(0, size) for size in source.shape)], source

    def done(self, same: bool) -> None:
        self.m.case.expected.append(self.result)
        self.m.case.same.append(same)


def _stored(m: Maker, node: Node) -> None:
    """out = node."""
    output = _Output(m, node)
    m.program.store(output.target(node), node.value)
    for memo in programs(m):
        for place, source in output.parts(memo, approx.cast(node.at(memo), node.dtype)):
            place.copy_(source)
    output.done(node.same)


def _guarded(m: Maker, node: Node) -> None:
    """if condition: out = node."""
    output = _Output(m, node)
    condition = m.binary("lt", run_time_int(m, 2), m.fixed(1), 1.0)
    target = output.target(node)

    def write() -> list[Node]:
        m.program.store(target, node.value)
        return []

    either(m, condition, write, list)
    for memo in programs(m):
        if condition.at(memo).x:
            for place, source in output.parts(memo, approx.cast(node.at(memo), node.dtype)):
                place.copy_(source)
    output.done(node.same)


def _added(m: Maker, node: Node) -> None:
    """out += node, atomically; in a grid all programs that have no rows of their own add to the same place."""
    if node.dtype not in (ts.f32, ts.f64, ts.int32, ts.int64) or node.bound > 1e6:
        return _stored(m, node)
    if any(valid is not None for valid in node.type.valid):
        return _stored(m, node)
    indices, columns, m.indices, m.columns = m.indices, m.columns, [], 0  # one place for all programs
    output = _Output(m, node)
    m.program.atomic_add(output.target(node), node.value)
    m.indices, m.columns = indices, columns
    total = output.result
    for memo in programs(m):
        now = node.at(memo).move(lambda x: x.reshape(output.before.shape))
        total = approx.binary("add", total, now, node.dtype, contracted=node.dtype.is_float)
    output.result = total
    output.done(not node.dtype.is_float)
    return None


def _by_rows(m: Maker, node: Node) -> None:
    """for i in range(n): out[i] = node[i]."""
    if not node.whole:
        return _stored(m, node)
    output = _Output(m, node)
    rest = [("all",)] * (node.type.rank - 1)
    high = m.program.size(node.type.shape[0])

    def row(i: Value) -> list[Value]:
        part = m.program.slice(node.value, [("at", 1), *rest], [i])
        m.program.store(m.program.view(output.view, [("at", 1), *rest], [i]), part)
        return []

    m.program.loop(m.program.const(0), high, m.program.const(1), [], row)
    output.result = approx.cast(node.at({}), node.dtype)
    output.done(node.same)
    return None


def _scattered(m: Maker, node: Node) -> None:
    """out[permutation] = node."""
    if not node.whole:
        return _stored(m, node)
    order = torch.randperm(node.type.shape[0].value(m.case.sizes), generator=m.values).int()
    index = m.program.tensor(f"x{len(m.case.inputs)}", node.type.shape[:1], ts.int32)
    m.case.inputs.append(order)
    output = _Output(m, node)
    m.program.scatter(output.view, m.program.load(index), node.value)
    now = approx.cast(node.at({}), node.dtype)
    output.result.x[order.long()], output.result.e[order.long()] = now.x, now.e
    output.done(node.same)
    return None
