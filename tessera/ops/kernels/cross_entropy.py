"""Cross-entropy of rows of logits against one class each."""

from __future__ import annotations

from tessera import kernel
from tessera.kernel import lang as tile
from tessera.types import Tile, f32


@kernel
def cross_entropy_kernel(logits: Tile["N", "V"], targets: Tile["N"], loss: Tile["N"], ignore_index: int = -100):
    """loss = log(sum(exp(x - max(x)))) + max(x) - x[target], in f32; 0 where the target is `ignore_index`.

    Args:
        logits: [N, V].
        targets: [N] ints, each in [0, V) or `ignore_index`.
        loss: [N].
        ignore_index: the target of rows that do not count.
    """
    ctx = tile.context()
    for row in tile.grid(ctx.N):
        target = targets[row]
        if target == ignore_index:
            loss[row] = 0.0
        else:
            x = tile.cast(tile.load(logits[row]), f32)
            top = tile.reduce_max(x)
            loss[row] = tile.log(tile.reduce_sum(tile.exp(x - top))) + top - tile.cast(logits[row, target], f32)
