"""Finds the products whose results go straight into a store, through elementwise operations alone.

In: a function after the passes. Out: for such a store its products. Their results need no memory of their own: the
store computes a chunk of each product and what follows it while the chunk is in the cache (`matmul.store_products`).
The blocks of a loop are chunks already (`resident.py`).
"""

from __future__ import annotations

from tessera.kernel import ir
from tessera.kernel.backends.cpu import resident
from tessera.kernel.backends.cpu.host import Target
from tessera.kernel.backends.cpu.mma_dot import dot_unit
from tessera.kernel.backends.cpu.plan import stored_value
from tessera.kernel.ir import Block, Function, Op

Fused = dict[Op, list[Op]]


def fused_products(function: Function, kept: set[str], target: Target) -> Fused:
    """For each store that computes products itself: these products, in program order.

    Args:
        kept: values that are materialised where they are defined.
    """
    users, looped = ir.users(ir.walk(function.body)), ir.in_loops(function.body)
    found: Fused = {}
    for block in _blocks(function.body):
        for op in block.ops:
            if op.name == "store" and op.operands[1].type.rank >= 2:
                chain = _elementwise_before(op, kept)
                products = [mma for mma in block.ops if mma.name == "mma" and _fits(mma, op, target)
                            and _only_in(mma, chain, users) and not (mma in looped and resident.fits(mma))]
                if products:
                    found[op] = products
    return found


def _blocks(block: Block) -> list[Block]:
    return [block] + [inner for op in block.ops for region in op.regions for inner in _blocks(region)]


def _elementwise_before(store: Op, kept: set[str]) -> set[Op]:
    """The store, and the operations that it computes at the same point as what it stores."""
    chain, pending = {store}, [stored_value(store)]
    if store.operands[1].op is not None and pending[0] is not store.operands[1]:
        chain.add(store.operands[1].op)
    while pending:
        value = pending.pop()
        if value.op is not None and value.op not in chain and value.op.name in ir.ELEMENTWISE and \
                value.name not in kept:
            chain.add(value.op)
            pending += value.op.operands
    return chain


def _fits(mma: Op, store: Op, target: Target) -> bool:
    left, right = (operand.type.dtype for operand in mma.operands[:2])
    return len(mma.operands) == 2 and mma.result.type.shape == store.operands[1].type.shape and \
        dot_unit(left, right, target) is not None


def _only_in(op: Op, chain: set[Op], users: dict[str, list[Op]]) -> bool:
    """Whether all that is computed from an operation's result is part of the chain."""
    seen, pending = {op}, [op]
    while pending:
        for user in users[pending.pop().result.name]:
            if user not in chain:
                return False
            if user.results and user not in seen:
                seen.add(user)
                pending.append(user)
    return True
