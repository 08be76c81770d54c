"""The deterministic mode: the same bits at any batch composition, prompt chunking, and number of ranks.

In: `with dist.deterministic(reduce_tree="fixed"): ...` around calls of a model, a loss or collectives. Out:
operations take the way of ops.invariant, and what is summed over ranks is summed in one binary tree over
logical leaves: a rank that owns a subtree sums it, the collective finishes the tree. Called by users,
trainers and engines; `row_parallel_linear` by models.gpt_plan.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tessera import ops
from tessera.dist.collectives import all_gather, all_reduce
from tessera.dist.mesh import Mesh
from tessera.dist.tree import finish_tree, nodes_of
from tessera.errors import InputError, UnsupportedError
from tessera.ops.invariant import block_products, invariant, is_invariant, tree_sum


@contextlib.contextmanager
def deterministic(reduce_tree: str = "fixed", *, model: nn.Module | None = None) -> Iterator[None]:
    """Inside, equal weights and tokens give equal bits; see docs/determinism.md for what it costs.

    Args:
        reduce_tree: "fixed" is the only one there is.
        model: one that will run inside, to be refused now rather than at its first forward pass.

    Raises:
        InputError: another reduce_tree.
        UnsupportedError: the model is cut over ranks where the fixed tree cannot be.
    """
    if reduce_tree != "fixed":
        raise InputError(f"reduce_tree: {reduce_tree!r} given; expected 'fixed'")
    if model is not None:
        check_cuts(model)
    with invariant():
        yield


def check_cuts(model: nn.Module) -> None:
    """See that the fixed tree can be summed where a model is cut.

    Raises:
        UnsupportedError: a module's ranks end within a block of the tree.
    """
    for module in model.modules():
        if isinstance(module, CutColumns) and module.blocks is not None:
            leaf_ranges(module.blocks, module.sizes)


@runtime_checkable
class CutColumns(Protocol):
    """A module whose ranks add partial products (models.gpt_plan); `blocks` are the leaves of the whole."""

    blocks: Sequence[int] | None
    sizes: Sequence[int]


def refuse_gradient(x: Tensor, n_ranks: int) -> Tensor:
    """x, which n_ranks have computed together in the deterministic mode; a backward pass through it is refused.

    The ranks' parts of a gradient would be added in a tree over ranks, which one device does not have.
    """
    def refuse(_: Tensor) -> None:
        raise gradients_refused(n_ranks)

    if x.requires_grad:
        x.register_hook(refuse)
    return x


def gradients_refused(n_ranks: int) -> UnsupportedError:
    """Why there are no gradients of what n_ranks compute together."""
    return UnsupportedError(
        f"deterministic: gradients of a model cut over {n_ranks} tensor-parallel ranks are not the same bits as "
        "those of a whole one; spread samples over data-parallel ranks (dist.GradientTree), or leave the mode")


def row_parallel_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, *, blocks: Sequence[int] | None, sizes: Sequence[int],
    mesh: Mesh, axis: str,
) -> Tensor:
    """x @ weight^T when each rank has some of the columns: partial products, added over the ranks.

    Args:
        x: [..., own columns], this rank's part.
        weight, scale: [O, own columns] and, for 8-bit types, [O].
        blocks: the leaves of the whole inner dim in the deterministic mode.
        sizes: how many columns each rank of the axis has.
        mesh, axis: the ranks.

    Returns:
        [..., O] in x's dtype, the same on every rank.

    Raises:
        UnsupportedError: in the deterministic mode, when the ranks' columns do not end between blocks, and from
            a backward pass.
    """
    if not is_invariant() or blocks is None:
        return all_reduce(ops.linear(x, weight, None, scale), mesh, axis=axis, replicated=True)
    weight = weight.to(x.dtype) if scale is None else ops.dequantize_rows(weight, scale, x.dtype)
    ranges = leaf_ranges(blocks, sizes)
    first, last = ranges[mesh.get_coordinate(axis)]
    leaves = block_products(x, weight, blocks[first:last])
    return refuse_gradient(sum_leaves(leaves, ranges, mesh, axis).to(x.dtype), len(sizes))


def leaf_ranges(blocks: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Which blocks [first, last) each rank has, from the sizes of the blocks and of the ranks' parts.

    Raises:
        UnsupportedError: a part ends within a block.
    """
    edges = [0, *itertools.accumulate(blocks)]
    ends = [0, *itertools.accumulate(sizes)]
    if not set(ends) <= set(edges):
        raise UnsupportedError(
            f"deterministic: {len(sizes)} ranks cut {edges[-1]} columns at {ends[1:-1]}, which does not fall between "
            f"the {len(blocks)} blocks of the fixed tree; expected ranks that share the blocks (1, 2, 4 or 8 do)")
    places = [edges.index(end) for end in ends]
    return list(itertools.pairwise(places))


def sum_leaves(leaves: Sequence[Tensor], ranges: Sequence[tuple[int, int]], mesh: Mesh, axis: str) -> Tensor:
    """The sum of all ranks' leaves in the fixed tree, on every rank.

    Each rank sums the subtrees that it owns whole; these are gathered, and every rank finishes the tree.

    Args:
        leaves: this rank's, of one shape on all ranks; at least one.
        ranges: the leaves [first, last) of each rank; together 0..n - 1, in order.
        mesh, axis: the ranks.
    """
    n_leaves = ranges[-1][1]
    names = [nodes_of(first, last, n_leaves) for first, last in ranges]
    here = mesh.get_coordinate(axis)
    origin = ranges[here][0]
    own = [tree_sum(leaves[low - origin: high - origin]) for low, high in names[here]]
    gathered = all_gather(
        torch.stack(own), mesh, axis=axis, sizes=[len(nodes) for nodes in names], replicated=True)
    return finish_tree(dict(zip(itertools.chain(*names), gathered)), n_leaves)
