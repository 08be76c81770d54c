"""Cross-entropy of rows of logits against one class each: the loss, its gradient, both at once, and by blocks.

A row's statistics are its largest logit, `top`, and `spread` = log(sum(exp(x - top))), kept apart: their sum, the
log-sum-exp, loses the spread where the logits are large. A row whose logits are all -inf gives no class any
probability: its loss is +inf and its gradient zero.
"""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def cross_entropy_kernel(logits: Tile["N", "V"], targets: Tile["N"], loss: Tile["N"], ignore_index: int = -100,
                         smoothing: Optional[float] = None, z_loss: Optional[float] = None,  # noqa: UP045
                         top: Optional[Tile["N"]] = None, spread: Optional[Tile["N"]] = None):  # noqa: UP045
    """loss = lse(x) - x[target], in f32; 0 where the target is `ignore_index`.

    Args:
        logits: [N, V].
        targets: [N] ints, each in [0, V) or `ignore_index`.
        loss: [N].
        ignore_index: the target of rows that do not count.
        smoothing: share of the target's probability that all classes get alike (arXiv:1512.00567).
        z_loss: factor of lse(x)^2, added to the loss (arXiv:2204.02311).
        top, spread: [N], written: the statistics that the backward kernel reads.
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        target = targets[row]
        x = tile.cast(tile.load(logits[row]), f32)
        largest = tile.reduce_max(x)
        shift = tile.where(largest == -float("inf"), 0.0, largest)
        log_total = tile.log(tile.reduce_sum(tile.exp(x - shift)))
        if top is not None:
            top[row] = shift
            spread[row] = log_total
        if target == ignore_index:
            loss[row] = 0.0
        else:
            kept = 1.0 if smoothing is None else 1.0 - smoothing
            value = log_total - kept * (tile.cast(logits[row, target], f32) - shift)
            if smoothing is not None:
                value = value - smoothing * tile.reduce_mean(x - shift)
            if z_loss is not None:
                value = value + z_loss * (shift + log_total) * (shift + log_total)
            loss[row] = tile.where(log_total == -float("inf"), float("inf"), value)


@kernel
def cross_entropy_backward_kernel(grad: Tile["N"], logits: Tile["N", "C"], targets: Tile["N"], top: Tile["N"],
                                  spread: Tile["N"], out: Tile["N", "C"], ignore_index: int = -100,
                                  smoothing: Optional[float] = None, z_loss: Optional[float] = None,  # noqa: UP045
                                  start: int = 0, n_classes: Optional[int] = None):  # noqa: UP045
    """out = grad * (softmax(x) (1 + 2 z_loss lse(x)) - (1 - smoothing) [c == target] - smoothing / n_classes).

    Args:
        grad: [N], of each row's loss.
        logits: [N, C], a block of the classes; `out` may be the same memory.
        targets: [N] ints among all classes, or `ignore_index`; such rows get zeros, as do those with grad 0
            whatever their logits are.
        top, spread: [N], the rows' statistics over all classes.
        out: [N, C].
        ignore_index, smoothing, z_loss: as in the forward kernel.
        start: the class of the block's first column.
        n_classes: how many classes there are in all; by default C.
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        target = targets[row]
        shift, log_total, slope = tile.cast(top[row], f32), tile.cast(spread[row], f32), tile.cast(grad[row], f32)
        if target == ignore_index or log_total == -float("inf") or slope == 0.0:
            tile.store(out[row], tile.zeros((ctx.C,), f32))
        else:
            x = tile.cast(tile.load(logits[row]), f32)
            factor = slope
            if z_loss is not None:
                factor = slope * (1.0 + 2.0 * z_loss * (shift + log_total))
            value = tile.exp(x - shift - log_total) * factor
            kept = slope
            if smoothing is not None:
                kept = slope * (1.0 - smoothing)
                value = value - slope * smoothing / (ctx.C if n_classes is None else n_classes)
            tile.store(out[row], value - tile.where(tile.arange(ctx.C) + start == target, kept, 0.0))


@kernel
def cross_entropy_both_kernel(grad: Tile["N"], logits: Tile["N", "V"], targets: Tile["N"], loss: Tile["N"],
                              out: Tile["N", "V"], ignore_index: int = -100,
                              smoothing: Optional[float] = None, z_loss: Optional[float] = None):  # noqa: UP045
    """The loss of each row and, in `out`, its gradient times `grad`, while the row is in the cache.

    Args: as in `cross_entropy_kernel` and `cross_entropy_backward_kernel`; `out` may be the memory of `logits`.
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        target = targets[row]
        x = tile.cast(tile.load(logits[row]), f32)
        largest = tile.reduce_max(x)
        if target == ignore_index or largest == -float("inf"):
            loss[row] = tile.where(target == ignore_index, 0.0, float("inf"))
            tile.store(out[row], tile.zeros((ctx.V,), f32))
        else:
            log_total = tile.log(tile.reduce_sum(tile.exp(x - largest)))
            slope = tile.cast(grad[row], f32)
            value = log_total
            factor, kept = slope, slope
            picked = tile.cast(logits[row, target], f32) - largest
            if smoothing is not None:
                value = value - (1.0 - smoothing) * picked - smoothing * tile.reduce_mean(x - largest)
                kept = slope * (1.0 - smoothing)
            else:
                value = value - picked
            if z_loss is not None:
                lse = largest + log_total
                value = value + z_loss * lse * lse
                factor = slope * (1.0 + 2.0 * z_loss * lse)
            loss[row] = value
            gradient = tile.exp(x - largest - log_total) * factor
            if smoothing is not None:
                gradient = gradient - slope * smoothing / ctx.V
            tile.store(out[row], gradient - tile.where(tile.arange(ctx.V) == target, kept, 0.0))


@kernel
def logsumexp_update_kernel(logits: Tile["N", "C"], targets: Tile["N"], top: Tile["N"], total: Tile["N"],
                            picked: Tile["N"], start: int, sums: Optional[Tile["N"]] = None):  # noqa: UP045
    """Take a block of the classes into the statistics of rows whose classes come block by block (arXiv:1805.02867).

    Args:
        logits: [N, C].
        targets: [N] ints among all classes; others are in no block.
        top: [N] f32, read and written: the largest logit so far; -inf before the first block.
        total: [N] f32, read and written: the sum of exp(x - top) so far; 0 before the first block.
        picked: [N] f32, written where the target is in this block: its logit.
        start: the class of the block's first column.
        sums: [N] f32, read and written: the sum of the logits so far (for label smoothing).
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        x = tile.cast(tile.load(logits[row]), f32)
        before = top[row]
        after = tile.maximum(before, tile.reduce_max(x))
        shift = tile.where(after == -float("inf"), 0.0, after)
        total[row] = total[row] * tile.exp(before - shift) + tile.reduce_sum(tile.exp(x - shift))
        top[row] = after
        if sums is not None:
            sums[row] = sums[row] + tile.reduce_sum(x)
        place = targets[row] - start
        if place >= 0 and place < ctx.C:
            picked[row] = tile.cast(logits[row, place], f32)
