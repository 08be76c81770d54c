"""Control flow: sequential loops, conditions, and the tiles that loops carry.

A carried tile lives in one scratch buffer that each iteration updates in place; a carried scalar lives
in a register. An update that would overwrite what another update still reads goes through a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tessera.kernel import ir
from tessera.kernel.backends.cpu import emit
from tessera.kernel.backends.cpu.context import Context, Memory, register_type
from tessera.kernel.backends.cpu.elements import index64, load
from tessera.kernel.backends.cpu.emit import I1, I64, Builder, Val
from tessera.kernel.backends.cpu.loops import write
from tessera.kernel.ir import Block, Op, Value

LowerBlock = Callable[[Context, Block], None]
_ALIGNED = ir.ELEMENTWISE | {"rand"}
_OWNED = frozenset("mma scan sort insert concat".split())  # operations with a buffer of their own for their result


def lower_for(ctx: Context, op: Op, lower_block: LowerBlock) -> None:
    """for(lo, hi, step, init...), with or without early exit."""
    low, high, step = (index64(ctx, ctx.scalars[v.name]) for v in op.operands[:3])
    body, early = op.regions[0], bool(op.attrs.get("early_exit"))
    carried = _Carried(ctx, op, op.operands[3:], body.args[1:])
    b = ctx.b

    def iteration(index: Val, scalars: Sequence[Val]) -> list[Val]:
        ctx.scalars[body.args[0].name] = _as_register(b, index, body.args[0])
        carried.bind(scalars)
        lower_block(ctx, body)
        return carried.advance(body.terminator.operands)

    if not early:
        with b.for_(low, high, step, carry=carried.scalars) as loop, ctx.scope():
            loop.next(iteration(loop.i, loop.carry))
        carried.finish(loop.results)
        return
    start = [low, emit.const(0, I1), *carried.scalars]

    def test(state: Sequence[Val]) -> Val:
        return b.and_(b.cmp("lt", state[0], high), b.not_(state[1]))

    def once(state: Sequence[Val]) -> list[Val]:
        return [b.add(state[0], step), *iteration(state[0], state[2:])]

    carried.finish(loop_while(ctx, start, test, once)[2:])


def lower_while(ctx: Context, op: Op, lower_block: LowerBlock) -> None:
    """while(init...) {condition} {body}."""
    before, body = op.regions
    carried = _Carried(ctx, op, op.operands, body.args)

    def test(state: Sequence[Val]) -> Val:
        carried.bind(state, before.args)
        lower_block(ctx, before)
        return ctx.scalars[before.terminator.operands[0].name]

    def once(state: Sequence[Val]) -> list[Val]:
        carried.bind(state)
        lower_block(ctx, body)
        return carried.advance(body.terminator.operands)

    carried.finish(loop_while(ctx, carried.scalars, test, once))


def lower_if(ctx: Context, op: Op, lower_block: LowerBlock) -> None:
    """if(c) {then} {else}: tiles come out in buffers, scalars in registers."""
    buffers = {r.name: _changed_in_place(ctx, op, i) or ctx.buffer(r) for i, r in enumerate(op.results) if r.type.rank}
    condition = ctx.scalars[op.operands[0].name]

    def arm(region: Block) -> list[Val]:
        lower_block(ctx, region)
        given = []
        for value, result in zip(region.terminator.operands, op.results):
            if not result.type.rank:
                given.append(ctx.scalars[value.name])
            elif ctx.memory.get(value.name) is not buffers[result.name]:
                write(ctx, buffers[result.name], value)
        return given

    with ctx.b.if_(condition) as branch, ctx.scope():
        branch.give(arm(op.regions[0]))
    with branch.else_(), ctx.scope():
        branch.give(arm(op.regions[1]))
    ctx.memory.update(buffers)
    for result, value in zip([r for r in op.results if not r.type.rank], branch.results):
        ctx.scalars[result.name] = value


def _changed_in_place(ctx: Context, op: Op, number: int) -> Memory | None:
    """The memory of a tile that one arm hands on as it is and the other changes, if nobody else reads it.

    `if late: scores = mask(scores)` then costs nothing where it is not late.
    """
    yields = [region.terminator.operands for region in op.regions]
    for kept, changed in (yields, yields[::-1]):
        old, new = kept[number], changed[number]
        made = old.op
        if made is None or made.name not in _OWNED or old.type != op.results[number].type or old.name not in ctx.memory:
            continue
        inside = [inner for region in op.regions for inner in ir.walk(region)]
        users = [user for user in ir.walk(ctx.function.body) if old in user.operands]
        if all(user in inside for user in users) and _reads_own_place(ctx, changed, new, old):
            return ctx.memory[old.name]
    return None


def _reads_own_place(ctx: Context, yielded: Sequence[Value], new: Value, old: Value) -> bool:
    """Whether `new` alone reads `old`, each element its own position."""
    return new.op is not None and _reads(ctx, new).get(old.name, False) and \
        not any(old.name in _reads(ctx, other) for other in yielded if other is not new)


def loop_while(ctx: Context, start: Sequence[Val], test: Callable[[Sequence[Val]], Val],
               once: Callable[[Sequence[Val]], list[Val]]) -> list[Val]:
    """A loop that tests before each iteration; returns the final state."""
    b, number = ctx.b, ctx.llvm.unique()
    before, lines = b.block, ctx.llvm.lines
    b.line(f"br label %head{number}")
    b.start_block(f"head{number}")
    state = [ctx.llvm.named(f"%w{number}.{k}", v.ty) for k, v in enumerate(start)]
    phis = len(lines)
    lines.extend([""] * len(state))
    with ctx.scope():
        condition = test(state)
        b.line(f"br {condition}, label %body{number}, label %exit{number}")
        b.start_block(f"body{number}")
        nxt = once(state)
    latch = b.block
    b.line(f"br label %head{number}")
    for k, (phi, first, last) in enumerate(zip(state, start, nxt)):
        lines[phis + k] = f"  {phi.name} = phi {phi.ty} [ {first.name}, %{before} ], [ {last.name}, %{latch} ]"
    b.start_block(f"exit{number}")
    return state


class _Carried:
    """The values that a loop carries: buffers for tiles, registers for scalars."""

    def __init__(self, ctx: Context, op: Op, inits: Sequence[Value], args: Sequence[Value]) -> None:
        self.ctx, self.op, self.args = ctx, op, list(args)
        self.buffers: dict[int, Memory] = {}
        self.scalars: list[Val] = []
        for i, (init, arg) in enumerate(zip(inits, args)):
            if arg.type.rank:
                self.buffers[i] = ctx.buffer(arg)
                write(ctx, self.buffers[i], init)
                ctx.memory[arg.name] = self.buffers[i]
            else:
                self.scalars.append(ctx.scalars[init.name])
        if op.name == "for":
            self._forward_accumulators()

    def bind(self, scalars: Sequence[Val], args: Sequence[Value] | None = None) -> None:
        """Name the state for one iteration."""
        remaining = iter(scalars)
        for i, arg in enumerate(args or self.args):
            if i in self.buffers:
                self.ctx.memory[arg.name] = self.buffers[i]
            else:
                self.ctx.scalars[arg.name] = next(remaining)

    def _forward_accumulators(self) -> None:
        """acc = f(acc) + a @ b: the matmul adds straight into the carried buffer."""
        body = self.op.regions[0]
        yielded = body.terminator.operands[int(bool(self.op.attrs.get("early_exit"))):]
        users = ir.users(ir.walk(body))
        for i, memory in self.buffers.items():
            value = yielded[i]
            if value.op is None or value.op.name != "mma" or len(value.op.operands) < 3 or value.op not in body.ops:
                continue
            link = self.args[i]
            while link is not value.op.operands[2]:
                mine = users[link.name]
                if len(mine) != 1 or mine[0].name not in _ALIGNED or not mine[0].results:
                    break
                link = mine[0].result
            else:
                if users[link.name] == [value.op]:
                    self.ctx.destinations[value.name] = memory

    def advance(self, yielded: Sequence[Value]) -> list[Val]:
        """Write the next state of every carried tile; returns that of the scalars, stop flag first."""
        ctx = self.ctx
        flag = [ctx.scalars[yielded[0].name]] if self.op.attrs.get("early_exit") else []
        yielded = yielded[len(flag):]
        scalars = [ctx.scalars[v.name] for i, v in enumerate(yielded) if i not in self.buffers]
        pending = {i for i in self.buffers
                   if yielded[i] is not self.args[i] and ctx.memory.get(yielded[i].name) is not self.buffers[i]}
        copies: list[tuple[int, Memory]] = []
        reads = {i: _reads(ctx, yielded[i]) for i in pending}
        while pending:
            ready = [i for i in pending if self._may_overwrite(i, reads, pending)]
            for i in ready or [min(pending)]:
                if ready:
                    write(ctx, self.buffers[i], yielded[i])
                else:
                    copies.append((i, ctx.buffer(self.args[i])))
                    write(ctx, copies[-1][1], yielded[i])
                pending.discard(i)
        for i, memory in copies:
            write(ctx, self.buffers[i], self.args[i], partial(load, ctx, memory))
        return flag + scalars

    def _may_overwrite(self, i: int, reads: dict[int, dict[str, bool]], pending: set[int]) -> bool:
        name = self.args[i].name
        return reads[i].get(name, True) and not any(name in reads[j] for j in pending if j != i)

    def finish(self, scalars: Sequence[Val]) -> None:
        """Name the results after the loop."""
        remaining = iter(scalars)
        for i, result in enumerate(self.op.results):
            if i in self.buffers:
                self.ctx.memory[result.name] = self.buffers[i]
            else:
                self.ctx.scalars[result.name] = next(remaining)


def _reads(ctx: Context, value: Value, aligned: bool = True) -> dict[str, bool]:
    """The memory that a lazy value reads; True where each element reads only its own position."""
    if value.name in ctx.memory:
        return {value.name: aligned}
    found: dict[str, bool] = {}
    if value.op is not None:
        for operand in value.op.operands:
            for name, same in _reads(ctx, operand, aligned and value.op.name in _ALIGNED).items():
                found[name] = found.get(name, True) and same
    return found


def _as_register(b: Builder, index: Val, arg: Value) -> Val:
    ty = register_type(arg.type.dtype)
    return index if ty == I64 else b.cast("trunc", index, ty)


