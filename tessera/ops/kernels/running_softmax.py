"""A softmax over keys that come block after block: the tile function that the attention kernels share."""

from __future__ import annotations

from tessera.kernel import lang as tile


def softmax_step(scores, top, total, factor, exp):
    """The next block of keys: its weights, and what that makes of the rows' maximum and sum (arXiv:1805.02867).

    Args:
        scores: [M, N] f32, -inf where a key is hidden.
        top, total: [M], the largest score so far, and the sum of the weights so far relative to it.
        factor: weights are exp(factor * (score - top)); > 0.
        exp: tile.exp, or tile.exp2 with a factor that has log2(e) in it.

    Returns:
        The weights [M, N], the new top and total [M], and what earlier weights have to be multiplied with, [M].
    """
    new_top = tile.maximum(top, tile.reduce_max(scores, axis=-1))
    # A row that has seen only hidden keys has -inf here, and -inf - -inf would be NaN.
    safe_top = tile.where(new_top == -float("inf"), 0.0, new_top)
    # The difference first: it is exactly 0 for the largest score, however large that is.
    weights = exp((scores - safe_top[:, None]) * factor)
    shrink = exp((top - safe_top) * factor)
    return weights, new_top, total * shrink + tile.reduce_sum(weights, axis=-1), shrink
