"""Tile functions written in the tile language itself: the frontend inlines them where a kernel calls them."""

from __future__ import annotations

from tessera.kernel import lang as tile
from tessera.kernel.lang.core import require
from tessera.types import f32


def softmax(x, axis=-1):
    """exp(x - max) / sum(exp(x - max)) along an axis, in f32."""
    shifted = tile.exp(x - tile.reduce_max(x, axis=axis, keepdim=True))
    return shifted / tile.reduce_sum(shifted, axis=axis, keepdim=True)


def rms_norm(x, weight=None, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight along the last axis, in f32 (Zhang & Sennrich 2019).

    Args:
        x: tile or parameter [*, D].
        weight: [D], optional.
        eps: added to the mean square.
    """
    values = tile.cast(tile.load(x), f32) if x.dtype.bits < 32 else tile.load(x)
    scale = tile.rsqrt(tile.reduce_mean(values * values, axis=-1, keepdim=True) + eps)
    if weight is None:
        return values * scale
    return values * scale * tile.load(weight)


def apply_rope(x, cos, sin):
    """Rotate the halves of the last axis: (x1 cos - x2 sin, x1 sin + x2 cos) (Su et al. 2021).

    Args:
        x: tile or parameter [*, S, H, D]; D even.
        cos, sin: [S, D/2], of each position's angles.

    Returns:
        A tile of x's shape, f32.
    """
    values = tile.load(x)
    require(values.ndim >= 3, "apply_rope: {} given; expected [*, S, H, D]", values)
    half = values.shape[-1] // 2
    first, second = tile.split(values, 2, axis=-1)
    cos = tile.reshape(tile.load(cos), (cos.shape[0], 1, half))
    sin = tile.reshape(tile.load(sin), (sin.shape[0], 1, half))
    return tile.concat([first * cos - second * sin, first * sin + second * cos], axis=-1)


def apply_causal_mask(scores, query_start=0, key_start=0):
    """Scores of keys after their query set to -inf.

    Args:
        scores: tile [*, M, N] of queries against keys.
        query_start, key_start: positions of the first row and column.

    As a statement it changes the tile that it is given.
    """
    require(scores.ndim >= 2, "apply_causal_mask: {} given; expected [*, M, N]", scores)
    rows = tile.arange(scores.shape[-2]) + query_start
    columns = tile.arange(scores.shape[-1]) + key_start
    return tile.where(rows[:, None] >= columns[None, :], scores, -float("inf"))


def flash_attention(q, k, v, causal=False, scale=None, dropout=0.0, seed=0):
    """softmax(q k^T * scale) v in blocks of keys, without a score matrix (Dao et al. 2022).

    Args:
        q, k, v: tiles or parameters [B, S, H, D].
        causal: keys after their query do not count.
        scale: by default 1 / sqrt(D).
        dropout: probability that a weight is dropped.

    Returns:
        A tile [B, S, H, D], f32.
    """
    for operand in (q, k, v):
        require(operand.ndim == 4, "flash_attention: {} given; expected [B, S, H, D]", operand)
    require(k.shape[2] == q.shape[2] and v.shape[2] == q.shape[2],
            "flash_attention: {}, {} and {} differ in heads", q, k, v)
    ctx = tile.context()
    block = ctx.block_n
    queries = tile.transpose(tile.load(q), 0, 2, 1, 3)
    keys = tile.transpose(tile.load(k), 0, 2, 1, 3)
    values = tile.transpose(tile.load(v), 0, 2, 1, 3)
    batch, heads, length, width = queries.shape
    factor = 1.0 / tile.sqrt(width) if scale is None else scale
    top = tile.full((batch, heads, length), -float("inf"), f32)
    total = tile.zeros((batch, heads, length), f32)
    result = tile.zeros((batch, heads, length, width), f32)
    for start in tile.range(0, keys.shape[2], block):
        scores = tile.mma(queries, tile.transpose(keys[:, :, start:start + block])) * factor
        if causal:
            scores = apply_causal_mask(scores, 0, start)
        new_top = tile.maximum(top, tile.reduce_max(scores, axis=-1))
        # A row that has seen only masked keys has -inf here, and -inf - -inf would be NaN.
        safe_top = tile.where(new_top == -float("inf"), 0.0, new_top)
        weights = tile.exp(scores - safe_top[..., None])
        rescale = tile.exp(top - safe_top)
        total = total * rescale + tile.reduce_sum(weights, axis=-1)
        weights = tile.dropout(weights, dropout, seed=seed, offset=start * length)
        result = result * rescale[..., None] + tile.mma(weights, values[:, :, start:start + block])
        top = new_top
    return tile.transpose(result / total[..., None], 0, 2, 1, 3)


# Called as a statement, it changes the scores that it is given.
setattr(apply_causal_mask, "__tile_inplace__", "scores")  # noqa: B010
