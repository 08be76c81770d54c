"""Rounding rows to few bits, and back; a row is whatever shares a scale: of a matrix, or a group of its values.

`kind` is "int8", "int4", "fp8_e4m3", "fp8_e5m2" or "mxfp4"; 4-bit codes are written a byte each and read two a byte.
"""

from __future__ import annotations

from typing import Optional

from tessera import kernel
from tessera.kernel import constexpr
from tessera.kernel import lang as tile
from tessera.types import Tile, f32, int4, int8, int32, uint8

TINY = 1.1754943508222875e-38  # a smaller scale would divide to infinity; what it belongs to counts as zero
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}  # magnitude of a code


def safe(scale):
    """A scale to divide by."""
    return tile.where(scale < TINY, 1.0, scale)


def step_of(values, kind, keepdim=False):
    """The scale of a row, or of each, by which its largest magnitude becomes the largest code."""
    return safe(tile.reduce_max(tile.abs(values), axis=-1, keepdim=keepdim) / LARGEST[kind])


def _zero_of(row, top):
    """(scale, zero) by which a row's range, which has 0 in it, takes all codes from -top - 1 to top."""
    low, high = tile.minimum(tile.reduce_min(row), 0.0), tile.maximum(tile.reduce_max(row), 0.0)
    scale = safe(high / (2.0 * top + 1.0) - low / (2.0 * top + 1.0))
    return scale, tile.round(-top - 1.0 - low / scale)


def _power_of(row):
    """2^(floor(log2(max|x|)) - 2), the power of a block of MXFP4, as its exponent (Microscaling Formats v1.0, 6.3)."""
    largest = tile.reduce_max(tile.abs(row))
    guess = tile.maximum(tile.floor(tile.log2(largest)), -125.0)
    power = tile.exp2(guess)  # log2 may round up to a whole number, or down from one
    return tile.clamp(tile.where(power > largest, guess - 1.0, tile.where(
        power * 2.0 <= largest, guess + 1.0, guess)) - 2.0, -127.0, 127.0)


def _e2m1(row, exponent):
    """The codes of x / 2^exponent: 0, 0.5, 1, 1.5, 2, 3, 4, 6 to nearest, halves to even, and 8 for a sign."""
    half = tile.floor(exponent * 0.5)  # two steps, each a normal power of two
    size = tile.abs(row) * tile.exp2(-half) * tile.exp2(half - exponent)
    code = tile.where(size <= 2.0, tile.round(2.0 * size), tile.where(
        size <= 4.0, 2.0 + tile.round(size), 4.0 + tile.round(0.5 * size)))
    return tile.minimum(code, 7.0) + tile.where(row < 0.0, 8.0, 0.0)


@kernel
def quantize_kernel(x: Tile["M", "K"], codes: Tile["M", "K"], scale: Tile["M"],
                    zero: Optional[Tile["M", int8]] = None, kind: constexpr = "int8"):  # noqa: UP045
    """codes = x / scale to nearest, or + zero where there is one; scale and zero from each row's range.

    Args:
        x: [M, K], finite.
        codes: [M, K], of the kind's type; uint8 for mxfp4.
        scale: [M] f32; for mxfp4 uint8, the exponent + 127.
        zero: [M], written: what stands for 0 in rows whose whole range takes the codes.
        kind: int8, fp8_e4m3, ...
    """
    for index in tile.grid(tile.context().M):
        row = tile.cast(tile.load(x[index]), f32)
        if kind == "mxfp4":
            exponent = _power_of(row)
            scale[index] = tile.cast(exponent + 127.0, uint8)
            tile.store(codes[index], tile.cast(_e2m1(row, exponent), uint8))
        elif zero is not None:
            step, place = _zero_of(row, LARGEST[kind])
            scale[index], zero[index] = step, tile.cast(place, int8)
            code = tile.clamp(tile.round(row / step) + place, -LARGEST[kind] - 1.0, LARGEST[kind])
            tile.store(codes[index], tile.cast(code, codes.dtype))
        else:
            step = step_of(row, kind)
            scale[index] = step
            tile.store(codes[index], tile.cast(_nearest(row / step, kind), codes.dtype))


def _nearest(code, kind):
    """Ints by rounding; floats round where they are stored."""
    return tile.round(code) if kind == "int8" or kind == "int4" else code


@kernel
def fake_quantize_kernel(x: Tile["M", "K"], out: Tile["M", "K"], kind: constexpr = "int8"):
    """out = (x / scale to nearest) * scale: what `quantize_kernel` stores, as numbers.

    Args:
        x, out: [M, K].
        kind: int8, fp8_e4m3, ...
    """
    for index in tile.grid(tile.context().M):
        row = tile.cast(tile.load(x[index]), f32)
        step = step_of(row, kind)
        code = _nearest(row / step, kind)
        tile.store(out[index], (code if kind == "int8" else tile.cast(tile.cast(code, kind), f32)) * step)


@kernel
def dequantize_kernel(codes: Tile["M", "K"], scale: Tile["M", f32], out: Tile["M", "K"],
                      zero: Optional[Tile["M", int8]] = None):  # noqa: UP045
    """out = (codes - zero) * scale, in f32, rounded once.

    Args:
        codes: [M, K] int8 or fp8.
        scale, zero: [M], of each row.
        out: [M, K].
    """
    for row in tile.grid(tile.context().M):
        _store_numbers(out[row], tile.cast(tile.load(codes[row]), f32), scale[row], None if zero is None else zero[row])


@kernel
def dequantize_packed_kernel(codes: Tile["M", "K", int4], scale: Tile["M", f32], out: Tile["M", "K"],
                             zero: Optional[Tile["M", int8]] = None, is_e2m1: constexpr = False):  # noqa: UP045
    """`dequantize_kernel` of codes that lie two a byte.

    Args:
        codes: [M, K], uint8 [M, K/2] in memory, the even places in the low nibbles.
        scale, zero, out: as there.
        is_e2m1: codes are those of MXFP4, not ints from -8 to 7.
    """
    for row in tile.grid(tile.context().M):
        code = tile.cast(tile.load(codes[row]), int32)
        number = tile.cast(code, f32)
        if is_e2m1:
            exponent, odd = (code >> 1) & 3, tile.cast(code & 1, f32)
            size = tile.where(exponent == 0, 0.5 * odd, (0.5 + 0.25 * odd) * tile.cast(1 << exponent, f32))
            number = tile.where(code < 0, -size, size)
        _store_numbers(out[row], number, scale[row], None if zero is None else zero[row])


def _store_numbers(out, number, scale, zero):
    """out = (number - zero) * scale."""
    if zero is not None:
        number = number - tile.cast(zero, f32)
    tile.store(out, number * scale)
