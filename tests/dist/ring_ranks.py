"""What the ranks of test_ring_attention run; kept apart from the tests, since ranks import it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tessera as ts


def draw(case: dict[str, Any]) -> tuple[Tensor, ...]:
    """q, k, v and the result's gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(case["length"])
    heads, kv_heads = case["heads"]
    return tuple(torch.randn(2, n, case["length"], 16, generator=generator).to(case["dtype"])
                 for n in (heads, kv_heads, kv_heads, heads))


def attend(cases: list[dict[str, Any]]) -> list[tuple[Tensor, ...]]:
    """Ring attention of each case: the whole result and the gradients as this rank has them, made whole."""
    ts.init(timeout=60)
    mesh = ts.dist.mesh()
    results = []
    for case in cases:
        *inputs, grad = (ts.dist.zigzag_shard(x, mesh, dim=2) if case["is_sharded"] else x for x in draw(case))
        leaves = [x.requires_grad_() for x in inputs]
        out = ts.dist.ring_attention(*leaves, mesh, is_causal=case["is_causal"], scale=0.3,
                                     is_sharded=case["is_sharded"])
        found = (out.detach(), *torch.autograd.grad(out, leaves, grad))
        results.append(tuple(ts.dist.zigzag_gather(x, mesh, dim=2) for x in found) if case["is_sharded"] else found)
    return results
