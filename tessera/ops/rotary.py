"""Rotary position embedding: tables of angles, and the rotation.

In: positions, and q or k split into heads. Out: cosine/sine tables in f32, kept from call to call, and the rotated
heads. nn.Attention and models.gpt call it.

Dims: B batch, S new tokens, H heads, D head_dim, R turned pairs (2R <= D), T rows of the tables, C = B or 1.
The rotation is half-split (dim i turns with dim i + R), the layout of Hugging Face checkpoints, or interleaved (dim 2i
with dim 2i + 1), that of RoFormer's and Llama's own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tessera.errors import InputError, ShapeError, UnsupportedError
from tessera.function.decorator import function
from tessera.ops import invariant
from tessera.ops.kernels.rope import rope_interleaved_kernel, rope_kernel
from tessera.ops.layout import empty_like, widen
from tessera.ops.registration import Operation, is_readable, is_recording, is_watched, launches
from tessera.ops.rope_scaling import RopeScaling, rope_frequencies
from tessera.types import Tensor, floating, integer, one_float

_MIN_TABLE = 256  # rows


RopeTables = tuple[Tensor, Tensor, Tensor | None]
"""(cos, sin, rows): what `rope_tables` makes and `rotary` takes."""


def rope_tables(
    positions: Tensor | range, dim: int, theta: float, scaling: RopeScaling | None = None,
    *, seq_len: int = 0, device: torch.device | str = "cpu",
) -> RopeTables:
    """What `rotary` needs: cosine and sine tables, and which rows of them the tokens take.

    Args:
        positions: of the tokens, an int tensor [B or 1, S], or a range that all rows of the batch share (quickest:
            the result is a view of a table that is kept).
        dim, theta, scaling: as in `rope_frequencies`.
        seq_len: tokens in the sequence, cached ones included, for "dynamic" scaling. While a step is recorded
            positions cannot be read: they must be below it.
        device: of the tables for a range; those for a tensor lie beside it.

    Returns:
        (cos [T, R], sin [T, R], rows): f32; rows is int [C, S], or None where token s takes row s.

    Raises:
        InputError: a negative position.
        UnsupportedError: "dynamic" scaling past the trained context in a step that is recorded.
    """
    stretched = 0
    if scaling is not None and scaling.kind == "dynamic" and seq_len > (scaling.original_max_seq_len or 0):
        stretched = seq_len
    if isinstance(positions, range) and (positions.step != 1 or positions.start < 0):
        raise InputError(f"positions: {positions} given; expected consecutive numbers from 0 on")
    if stretched or is_watched():  # a cache of tables is nothing that can be traced
        return _fresh_tables(positions, dim, theta, scaling, seq_len, device)
    if isinstance(positions, range):
        cos, sin = _table(dim, theta, scaling, positions.stop, device)
        return cos[positions.start:positions.stop], sin[positions.start:positions.stop], None
    if is_recording():
        return *_table(dim, theta, scaling, seq_len, positions.device), positions
    if not is_readable(positions):
        return _fresh_tables(positions, dim, theta, scaling, seq_len, positions.device)
    low, high = (int(bound) for bound in torch.aminmax(positions)) if positions.numel() else (0, 0)
    if low < 0:
        raise InputError(f"positions: {low} given; expected 0 or more")
    return *_table(dim, theta, scaling, high + 1, positions.device), positions


def _fresh_tables(
    positions: Tensor | range, dim: int, theta: float, scaling: RopeScaling | None, seq_len: int,
    device: torch.device | str,
) -> RopeTables:
    """Tables of these positions alone, not kept: their values are unknown here, or the next call has others."""
    if is_recording():
        raise UnsupportedError(f"rope_scaling: kind 'dynamic' given for {seq_len} tokens; a recorded step's tables "
                               "do not change with the length")
    if isinstance(positions, range):
        positions = torch.arange(positions.start, positions.stop, device=device)[None]
    frequencies, factor = rope_frequencies(dim, theta, scaling, seq_len=seq_len)
    cos, sin = _cos_sin(positions.reshape(-1), frequencies.to(positions.device), factor)
    if positions.shape[0] == 1:
        return cos, sin, None
    return cos, sin, torch.arange(positions.numel(), device=positions.device).view(positions.shape)


def _table(
    dim: int, theta: float, scaling: RopeScaling | None, n_rows: int, device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Tables of at least n_rows positions, kept; a longer one is made when it is needed, of twice the rows."""
    size = max(_MIN_TABLE, 1 << (n_rows - 1).bit_length())
    return _kept_table(dim, float(theta), scaling, size, device, invariant.is_invariant())


@functools.lru_cache(maxsize=32)
def _kept_table(
    dim: int, theta: float, scaling: RopeScaling | None, n_rows: int, device: torch.device | str, is_invariant: bool,
) -> tuple[Tensor, Tensor]:
    # The tables outlive the call: nothing of its modes (recording, inference, fake tensors) may stick to them.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        frequencies, factor = rope_frequencies(dim, theta, scaling)
        cos, sin = _cos_sin(torch.arange(n_rows, device="cpu"), frequencies, factor)
        return cos.to(device), sin.to(device)


def _cos_sin(positions_T: Tensor, frequencies_R: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """[T, R] each; the angles are rounded to f32, as Hugging Face does."""
    angles = positions_T[:, None].float() * frequencies_R
    if invariant.is_invariant():
        cos, sin = invariant.pointwise("cos", angles, torch.cos), invariant.pointwise("sin", angles, torch.sin)
    else:
        cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


@function
def rotary(
    x_BSHD: Tensor["B", "S", "H", "2*R+still", one_float], cos_TR: Tensor["T", "R", floating],
    sin_TR: Tensor["T", "R", floating], rows_CS: Tensor["#B", "S", integer] | None = None, *,
    interleaved: bool = False,
) -> Tensor["B", "S", "H", "2*R+still", one_float]:
    """Rotate each head by its token's position (RoFormer, arXiv:2104.09864).

    Args:
        x_BSHD: q or k, or both side by side, [B, S, H, D], any strides.
        cos_TR, sin_TR, rows_CS: from `rope_tables`; dims 2R..D of every head are left as they are.
        interleaved: pairs are neighbours, not halves.

    Returns:
        The rotated heads, [B, S, H, D], dtype of x_BSHD, rounded once from f32.

    Raises:
        ShapeError: the tables do not fit.
    """
    _check(x_BSHD, cos_TR, rows_CS)
    return _ROTARY(x_BSHD, cos_TR, sin_TR, rows_CS, 1.0, interleaved)


@function
def rotary_(
    x_BSHD: Tensor["B", "S", "H", "2*R+still", one_float], cos_TR: Tensor["T", "R", floating],
    sin_TR: Tensor["T", "R", floating], rows_CS: Tensor["#B", "S", integer] | None = None, *,
    interleaved: bool = False,
) -> Tensor["B", "S", "H", "2*R+still", one_float]:
    """`rotary` in place, where no gradient is recorded: x_BSHD, changed; it may be a view of a fused projection.

    Raises:
        InputError: x_BSHD needs a gradient.
        ShapeError: the tables do not fit.
    """
    if x_BSHD.requires_grad and torch.is_grad_enabled():
        raise InputError("x_BSHD: a tensor that needs a gradient given; expected torch.no_grad(), or rotary")
    if interleaved or not launches(x_BSHD) or x_BSHD.dtype == torch.float64:
        return x_BSHD.copy_(rotary(x_BSHD, cos_TR, sin_TR, rows_CS, interleaved=interleaved))
    _check(x_BSHD, cos_TR, rows_CS)
    rope_kernel(x_BSHD, cos_TR, sin_TR, x_BSHD, rows_CS, 1.0)
    return x_BSHD


def _check(x_BSHD: Tensor, cos_TR: Tensor, rows_CS: Tensor | None) -> None:
    """What the annotations do not say."""
    if rows_CS is None and cos_TR.shape[0] != x_BSHD.shape[1]:
        raise ShapeError(f"cos_TR: {list(cos_TR.shape)} given without rows_CS; expected a row for each of "
                         f"{x_BSHD.shape[1]} tokens of x_BSHD {list(x_BSHD.shape)}")


def _kernel(
    x_BSHD: Tensor, cos_TR: Tensor, sin_TR: Tensor, rows_CS: Tensor | None, direction: float, interleaved: bool,
) -> Tensor:
    out = empty_like(x_BSHD)
    kernel = rope_interleaved_kernel if interleaved else rope_kernel
    kernel(x_BSHD, cos_TR, sin_TR, out, rows_CS, direction)
    return out


def _reference(
    x_BSHD: Tensor, cos_TR: Tensor, sin_TR: Tensor, rows_CS: Tensor | None, direction: float, interleaved: bool,
) -> Tensor:
    x = widen(x_BSHD)
    cos, sin = ((table if rows_CS is None else table[rows_CS])[..., None, :] for table in (cos_TR, direction * sin_TR))
    n_pairs = cos.shape[-1]
    turning, rest = x[..., :2 * n_pairs], x[..., 2 * n_pairs:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    else:
        first, second = turning[..., :n_pairs], turning[..., n_pairs:]
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return torch.cat((turned, rest), -1).to(x_BSHD.dtype)


def _fake(x_BSHD: Tensor, cos_TR: Tensor, sin_TR: Tensor, rows_CS: Tensor | None, *_: Any) -> Tensor:
    return empty_like(x_BSHD)


def _backward(saved: Any, grad: Tensor) -> tuple[Any, ...]:
    cos, sin, rows, direction, interleaved = saved
    return _ROTARY(grad, cos, sin, rows, -direction, interleaved), None, None, None, None, None


_ROTARY = Operation(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? rows, float direction, bool interleaved) -> Tensor",
    kernel=_kernel, reference=_reference, fake=_fake, save=lambda inputs, output: tuple(inputs[1:]),
    backward=_backward)
