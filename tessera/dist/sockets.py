"""Collectives of a line of ranks through torch.distributed: sockets on CPUs, NCCL on GPUs.

In: torch's process group and the tensors of this rank. Out: the combined tensors; the methods are those of
`shared.SharedLine`, which takes what ranks of one host have in CPU memory. Called by dist.collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tessera.ops.invariant import is_invariant, tree_sum

_OPS = {"sum": torch_dist.ReduceOp.SUM, "max": torch_dist.ReduceOp.MAX, "min": torch_dist.ReduceOp.MIN,
        "prod": torch_dist.ReduceOp.PRODUCT}
# torch 2.13 renamed it.
_all_gather_single = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor


class SocketLine:
    """The ranks of a line and torch's group of them; `here` is this process's place among them."""

    def __init__(self, group: Any, ranks: Sequence[int], here: int) -> None:
        self.group, self.ranks, self.here = group, tuple(ranks), here

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum (max, min, prod) of the ranks' x; 16-bit types in f32, rounded once."""
        if is_invariant() and op == "sum":
            return tree_sum(list(self.all_gather(x.float() if x.dtype.itemsize == 2 else x))).to(x.dtype)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        out = wide.contiguous().clone() if wide is x else wide.contiguous()
        torch_dist.all_reduce(out, _OPS[op], group=self.group)
        return out.to(x.dtype)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's part, of sizes[here] elements, of the sum of the ranks' x, a vector.

        Each rank sums its part of what the others send: half the traffic of all_reduce, in a fixed order.
        """
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        received = wide.new_empty(len(self.ranks), sizes[self.here])
        torch_dist.all_to_all_single(
            received.view(-1), wide, [sizes[self.here]] * len(self.ranks), list(sizes), group=self.group)
        return (tree_sum(list(received)) if is_invariant() else received.sum(0)).to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: what each rank gave."""
        out = x.new_empty(len(self.ranks), *x.shape)
        _all_gather_single(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        """[ranks, ...]: row `here` of what each rank gave, [ranks, ...], dense."""
        received = torch.empty_like(x)
        torch_dist.all_to_all_single(received, x, group=self.group)
        return received

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """What the rank at place `source` gave."""
        out = x.contiguous().clone()
        torch_dist.broadcast(out, self.ranks[source], group=self.group)
        return out

    def ring_exchange(self, x: Tensor, shift: int) -> Tensor:
        """What the rank `shift` places before gave."""
        n_ranks = len(self.ranks)
        sent, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        work = [torch_dist.isend(sent, self.ranks[(self.here + shift) % n_ranks], group=self.group),
                torch_dist.irecv(received, self.ranks[(self.here - shift) % n_ranks], group=self.group)]
        for part in work:
            part.wait()
        return received

    def barrier(self) -> None:
        """Return once every rank has come here."""
        torch_dist.barrier(group=self.group)
