"""Positions without tables of one's own: rotation and its stretched forms in one call, sinusoids, ALiBi.

In: heads and their positions, or sizes. Out: rotated heads, encodings to add, biases for attention. Models that keep
their tables call `ops.rotary` instead; these are for use on their own.

Dims: B batch, S tokens, H heads, D head_dim.
"""

from __future__ import annotations

import math

import torch

from tessera.errors import InputError
from tessera.function.decorator import function
from tessera.ops.attention_scores import ages
from tessera.ops.rotary import RopeScaling, rope_frequencies, rotary
from tessera.types import DType, Tensor, dtype_of, f32, floating, one_float

_SCALINGS = ("linear", "ntk", "yarn")


@function
def rotary_embedding(
    x_BSHD: Tensor["B", "S", "H", "2*R", one_float], position_ids: Tensor["#B", "S"] | None = None,
    base: float = 10000.0, scaling_factor: float = 1.0, *, interleaved: bool = False,
) -> Tensor["B", "S", "H", "2*R", one_float]:
    """Rotate each head by its token's position (RoFormer, arXiv:2104.09864).

    Args:
        x_BSHD: [B, S, H, D], D even.
        position_ids: [B or 1, S]; default 0..S-1.
        base: pair i turns by base^(-2i/D) radians a position.
        scaling_factor: multiplies the positions; 1/4 fits four times the context into the angles of one.
        interleaved: pairs are neighbours, not halves.

    Returns:
        [B, S, H, D] in x's dtype.

    Raises:
        ShapeError: position_ids do not fit, or D is odd.
    """
    frequencies, factor = rope_frequencies(x_BSHD.shape[-1], base)
    return _rotate(x_BSHD, position_ids, frequencies * scaling_factor, factor, interleaved)


@function
def dynamic_rope(
    x_BSHD: Tensor["B", "S", "H", "2*R", one_float], position_ids: Tensor["#B", "S"], base: float = 10000.0,
    max_position: int = 2048, scaling_type: str = "linear",
) -> Tensor["B", "S", "H", "2*R", one_float]:
    """`rotary_embedding`, stretched once the sequence is longer than the context that was trained on.

    Args:
        x_BSHD: [B, S, H, D].
        position_ids: [B or 1, S]; the largest one + 1 is the length.
        base: as for `rotary_embedding`.
        max_position: the context trained on, in tokens.
        scaling_type: with s = length / max_position: "linear" divides positions by s (arXiv:2306.15595), "ntk"
            multiplies the base by s^(D / (D - 2)), "yarn" does either by the pair's frequency and scales the result
            (arXiv:2309.00071).

    Returns:
        [B, S, H, D] in x's dtype.

    Raises:
        InputError: another scaling_type.
    """
    if scaling_type not in _SCALINGS:
        raise InputError(f"scaling_type: {scaling_type!r} given; expected one of {', '.join(_SCALINGS)}")
    width = x_BSHD.shape[-1]
    length = int(position_ids.max()) + 1 if position_ids.numel() else 0
    stretch = length / max_position
    scaling = None
    if stretch > 1 and scaling_type == "ntk":
        base = base * stretch ** (width / (width - 2))
    elif stretch > 1:
        scaling = RopeScaling(kind=scaling_type, factor=stretch, original_max_seq_len=max_position)
    return _rotate(x_BSHD, position_ids, *rope_frequencies(width, base, scaling), False)


@function
def apply_rotary_pos_emb(
    x_BSHD: Tensor["B", "S", "H", "2*R", one_float], cos_BS1R: Tensor["#B", "S", 1, "R", floating],
    sin_BS1R: Tensor["#B", "S", 1, "R", floating],
) -> Tensor["B", "S", "H", "2*R", one_float]:
    """(x1 cos - x2 sin, x1 sin + x2 cos) of the halves of each head.

    Args:
        x_BSHD: [B, S, H, D].
        cos_BS1R, sin_BS1R: [B or 1, S, 1, D / 2], of each token's angles.

    Returns:
        [B, S, H, D] in x's dtype.
    """
    rows = cos_BS1R.shape[:2]
    place = torch.arange(rows.numel(), device=x_BSHD.device).view(rows)
    return rotary(x_BSHD, cos_BS1R.flatten(0, 2), sin_BS1R.flatten(0, 2), place)


@function
def cos_sin_embedding(
    seq_len: int, dim: int, base: float = 10000.0, dtype: DType | torch.dtype | str = f32,
) -> tuple[Tensor["seq_len", "dim"], Tensor["seq_len", "dim"]]:
    """Cosines and sines of each position's angles (arXiv:1706.03762), each angle at two neighbouring places.

    Args:
        seq_len: S, positions 0..S-1.
        dim: width, even.
        base: place 2i has the angle position * base^(-2i / dim).
        dtype: of the results.

    Returns:
        (cos, sin), [S, dim] each.

    Raises:
        InputError: seq_len or dim below 0, or dim odd.
    """
    if seq_len < 0 or dim < 0 or dim % 2:
        raise InputError(f"seq_len, dim: {seq_len}, {dim} given; expected counts, dim even")
    steps = torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(base) / max(dim, 1))
    angles = torch.arange(seq_len, dtype=torch.float64)[:, None] * steps.exp()
    angles = angles.repeat_interleave(2, dim=-1)
    target = dtype_of(dtype).torch
    return angles.cos().to(target), angles.sin().to(target)


@function
def alibi_slopes(num_heads: int, dtype: DType | torch.dtype | str = f32) -> Tensor["num_heads"]:
    """2^(-8 h / H) for heads h = 1..H: how fast each head's attention falls off (arXiv:2108.12409).

    Returns:
        [H].

    Raises:
        InputError: num_heads below 1.
    """
    if num_heads < 1:
        raise InputError(f"num_heads: {num_heads} given; expected at least 1")
    exponents = torch.arange(1, num_heads + 1, dtype=torch.float64) * (-8 / num_heads)
    return exponents.exp2().to(dtype_of(dtype).torch)


@function
def alibi_bias(
    seq_len: int, num_heads: int, dtype: DType | torch.dtype | str = f32,
) -> Tensor["num_heads", "seq_len", "seq_len"]:
    """What ALiBi adds to the scores: slope * (key - query), 0 or less for the keys that a causal query sees.

    Returns:
        [H, S, S], queries before keys.
    """
    places = torch.arange(seq_len, dtype=torch.float64)
    distances = places[None, :] - places[:, None]
    return (alibi_slopes(num_heads, torch.float64)[:, None, None] * distances).to(dtype_of(dtype).torch)


@function
def apply_causal_mask(
    scores: Tensor["...", "M", "N", one_float], q_start: int = 0, k_start: int = 0,
) -> Tensor["...", "M", "N", one_float]:
    """Scores with -inf where a key stands behind its query, for a block of queries against a block of keys.

    Args:
        scores: [..., M, N] of queries at places q_start.. and keys at places k_start...
        q_start, k_start: places of the first query and key in their sequence.

    Returns:
        The masked scores.
    """
    return scores.masked_fill(ages(scores, q_start, k_start) < 0, -torch.inf)


def _rotate(
    x_BSHD: Tensor, position_ids: Tensor | None, frequencies: Tensor, factor: float, interleaved: bool,
) -> Tensor:
    device = x_BSHD.device
    if position_ids is None:
        position_ids = torch.arange(x_BSHD.shape[1], device=device)[None]
    angles = position_ids.reshape(-1, 1).float() * frequencies.to(device)
    rows = torch.arange(position_ids.numel(), device=device).view(position_ids.shape)
    return rotary(x_BSHD, angles.cos() * factor, angles.sin() * factor, rows, interleaved=interleaved)
