"""What may stand between q k^T and the softmax, for blocks: softcap, ALiBi, a mask, and dropout behind it.

In: scaled scores of queries against keys, in either order of the axes. Out: the scores that the softmax takes, and
what dropout multiplies the weights with. The attention kernels share these tile functions.
"""

from __future__ import annotations

from tessera.kernel import lang as tile
from tessera.types import f32, int64


def load_mask(mask, batch, head, first, rows, start, columns):
    """The mask [M, N] of a block of queries from `first` and keys from `start`; None without one."""
    if mask is None:
        return None
    return tile.load(mask[batch, head, first:first + rows, start:start + columns])


def load_slope(slopes, head):
    """A head's slope, f32; None without slopes."""
    return None if slopes is None else tile.cast(slopes[head], f32)


def vary(scores, ages, softcap, slope, mask):
    """softcap * tanh(scores / softcap) - slope * ages, and what the mask says: bool hides, floats are added."""
    if softcap is not None:
        scores = softcap * tile.tanh(scores / softcap)
    if slope is not None:
        scores = scores - slope * tile.cast(ages, f32)
    if mask is not None:
        if mask.dtype.kind == "bool":
            scores = tile.where(mask, scores, -float("inf"))
        else:
            scores = scores + tile.cast(mask, f32)
    return scores


def keep_factors(p, seed, row, first, rows, start, columns, length):
    """0 with probability p, else 1 / (1 - p), [M, N], as `attention_dropout_kernel` draws it; None without dropout."""
    if p is None:
        return None
    queries = (tile.cast(tile.arange(rows), int64) + first)[:, None] * length
    draws = tile.rand(seed + row, queries + (tile.cast(tile.arange(columns), int64) + start)[None, :])
    return tile.where(draws >= p, 1.0 / (1.0 - p), 0.0)
