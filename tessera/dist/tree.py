"""The fixed binary tree of sums that the deterministic mode stands on, cut over ranks.

In: terms, each a tensor, numbered 0..n-1 (logical leaves: blocks of a matmul's inner dim, samples of a batch),
of which a rank has a range. Out: their sum, added in the order of ops.invariant.tree_sum, which depends on n
alone, however the terms are spread over ranks. Called by dist.deterministic.

The tree over leaves [a, b) splits at its middle, the left half being the larger: a + ceil((b - a) / 2).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tessera.errors import InputError


def nodes_of(start: int, stop: int, n_leaves: int) -> list[tuple[int, int]]:
    """The largest subtrees of the tree over n_leaves whose leaves all lie in [start, stop), in order.

    A rank that owns these leaves sums each such subtree by itself; there are at most 2 log2(n_leaves).
    """
    return list(_cover(0, n_leaves, start, stop))


def _cover(low: int, high: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    if start >= high or stop <= low:
        return
    if start <= low and high <= stop:
        yield low, high
        return
    middle = low + (high - low + 1) // 2
    yield from _cover(low, middle, start, stop)
    yield from _cover(middle, high, start, stop)


def finish_tree(nodes: dict[tuple[int, int], Tensor], n_leaves: int) -> Tensor:
    """The root, from the sums of subtrees that together cover the leaves.

    Raises:
        InputError: leaves are missing.
    """
    def total(low: int, high: int) -> Tensor:
        if (low, high) in nodes:
            return nodes[low, high]
        if high - low == 1:
            raise InputError(f"nodes: leaf {low} of {n_leaves} is in none of them")
        middle = low + (high - low + 1) // 2
        return total(low, middle) + total(middle, high)

    return total(0, n_leaves)


def path_to(leaf: int, n_leaves: int) -> list[tuple[int, int, int]]:
    """The inner nodes above a leaf, from the root down, as (first leaf, first leaf of the right half, end)."""
    low, high, path = 0, n_leaves, []
    while high - low > 1:
        middle = low + (high - low + 1) // 2
        path.append((low, middle, high))
        low, high = (low, middle) if leaf < middle else (middle, high)
    return path
