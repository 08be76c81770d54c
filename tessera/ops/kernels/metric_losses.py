"""Losses of scores against each other: maximum margin, and contrast of similarities; with their gradients."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32, int32


@kernel
def max_margin_kernel(scores: Tile["N", "C"], targets: Tile["N"], loss: Tile["N", f32], rival: Tile["N", int32],
                      margin: float):
    """loss = max(0, margin + scores[rival] - scores[target]); the rival is the best of the others.

    Args:
        scores: [N, C].
        targets: [N] ints in [0, C).
        loss: [N]; 0 where every other score is -inf.
        rival: [N], written.
        margin: by how much the target should win.
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        target = targets[row]
        own = tile.cast(scores[row, target], f32)
        others = tile.where(tile.arange(ctx.C) == target, -float("inf"), tile.cast(tile.load(scores[row]), f32))
        best = tile.reduce_max(others)
        ahead = tile.where(best == own, 0.0, best - own)  # inf - inf is a tie
        loss[row] = tile.where(best == -float("inf"), 0.0, tile.relu(ahead + margin))
        rival[row] = tile.cast(tile.argmax(others), int32)


@kernel
def max_margin_backward_kernel(grad: Tile["N"], loss: Tile["N"], targets: Tile["N"], rival: Tile["N"],
                               out: Tile["N", "C"]):
    """out = grad at the rival and -grad at the target of rows whose loss is positive; else 0.

    Args:
        grad, loss: [N].
        targets, rival: [N] ints.
        out: [N, C].
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        slope = tile.where(tile.cast(loss[row], f32) > 0.0, tile.cast(grad[row], f32), 0.0)
        places = tile.arange(ctx.C)
        gain = tile.where(places == rival[row], slope, 0.0)
        tile.store(out[row], tile.where(places == targets[row], -slope, gain))


@kernel
def contrastive_kernel(similarity: Tile["N", "N"], labels: Tile["N"], loss: Tile["N", f32], all_lse: Tile["N", f32],
                       positive_lse: Tile["N", f32]):
    """loss = lse over the others - lse over the others of the same label, of each row; 0 where there are none.

    Args:
        similarity: [N, N].
        labels: [N] ints.
        loss: [N].
        all_lse, positive_lse: [N], written: the two log-sum-exps, the second -inf where there are no positives.
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        others = tile.arange(ctx.N) != row
        alike = tile.logical_and(tile.load(labels) == labels[row], others)
        x = tile.cast(tile.load(similarity[row]), f32)
        every = tile.where(others, x, -float("inf"))
        positive = tile.where(alike, x, -float("inf"))
        top, positive_top = tile.reduce_max(every), tile.reduce_max(positive)
        shift = tile.where(top == -float("inf"), 0.0, top)
        positive_shift = tile.where(positive_top == -float("inf"), 0.0, positive_top)
        spread = tile.log(tile.reduce_sum(tile.exp(every - shift)))
        positive_spread = tile.log(tile.reduce_sum(tile.exp(positive - positive_shift)))
        all_lse[row] = shift + spread
        positive_lse[row] = positive_shift + positive_spread
        value = (shift - positive_shift) + (spread - positive_spread)
        loss[row] = tile.where(positive_top == -float("inf"), 0.0, value)


@kernel
def contrastive_backward_kernel(grad: Tile["N"], similarity: Tile["N", "N"], labels: Tile["N"], all_lse: Tile["N"],
                                positive_lse: Tile["N"], out: Tile["N", "N"]):
    """out = grad * (softmax over the others - softmax over the positives), of rows that have positives.

    Args: as in `contrastive_kernel`; grad [N]; out [N, N].
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        below = tile.cast(positive_lse[row], f32)
        if below == -float("inf"):
            tile.store(out[row], tile.zeros((ctx.N,), f32))
        else:
            others = tile.arange(ctx.N) != row
            alike = tile.logical_and(tile.load(labels) == labels[row], others)
            x = tile.cast(tile.load(similarity[row]), f32)
            share = tile.where(others, tile.exp(x - tile.cast(all_lse[row], f32)), 0.0)
            positive_share = tile.where(alike, tile.exp(x - below), 0.0)
            tile.store(out[row], (share - positive_share) * tile.cast(grad[row], f32))
