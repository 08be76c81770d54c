"""The meaning of every arithmetic operation of the tile IR, on plain torch tensors.

In: tensors that hold exactly the valid elements of a tile, and the names of the IR (`ir.UNARY`, `ir.BINARY`,
reductions, scans). Out: tensors with the result's dtype, rounded where the IR says and nowhere else.
The interp backend calls it; the tests of the other backends read it as the definition of an operation.

Orders of summation are part of the meaning (see `lane_sum`, `chain_sum`, `mma`), so that two backends can
agree bit for bit. Where floats have no exact answer (exp, sin, ...) this is torch's, good to about an ulp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.types import DType, bool_, fp8_e4m3

LANES = 64  # partial sums of a reduction over the last axis
CHAIN_LIMIT = 1 << 27  # multiply-adds up to which `mma` follows the fused chain exactly
_LOW = 0xFFFFFFFF


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded: torch's own root may be one bit off (MKL)."""
    result = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=result.numpy())
    return result


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2,
    "log1p": torch.log1p, "sqrt": _sqrt, "rsqrt": lambda x: 1 / _sqrt(x), "sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf, "floor": torch.floor,
    "ceil": torch.ceil, "round": torch.round, "softplus": F.softplus, "neg": torch.neg, "abs": torch.abs,
    "not": torch.logical_not,
}


def _floordiv(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(_wide(x), _wide(y), rounding_mode="floor").to(x.dtype)


def _mod(x: Tensor, y: Tensor) -> Tensor:
    return torch.remainder(_wide(x), _wide(y)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Floats in f64, so that quotient and remainder are rounded once."""
    return x.double() if x.is_floating_point() else x


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "floordiv": _floordiv,
    "mod": _mod, "pow": torch.pow, "max": torch.maximum, "min": torch.minimum,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
}


def cast(x: Tensor, dtype: DType) -> Tensor:
    """x in another dtype.

    Float to float rounds to nearest even; float to int truncates, saturates at the ends of the int type and
    takes NaN to 0; int to int keeps the low bits; to bool is `!= 0`.
    """
    if dtype == bool_:
        return x != 0
    if x.is_floating_point() and dtype.is_int:
        limits = torch.iinfo(dtype.torch)
        whole = torch.nan_to_num(x.double(), nan=0.0).trunc()
        below = whole < float(limits.max)  # an int64's largest value is not a float64, so it is set apart
        kept = torch.where(below, whole, 0.0).clamp(min=float(limits.min)).long()
        return torch.where(below, kept, limits.max).to(dtype.torch)
    if x.is_floating_point() and x.element_size() == 1 and dtype.is_float:
        x = x.float()  # fp8 to f64, f16 and the other fp8 go through f32, which is exact
    if dtype == fp8_e4m3 and x.dtype != torch.bool:
        x = x.clamp(-448.0, 448.0)  # as torch 2.13 does; 2.11 makes NaN of what is larger
    return x.to(dtype.torch)


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z, rounded once for f32 (exactly) and ints; f64 is within one more rounding of that."""
    if x.dtype != torch.float32:
        return x * y + z
    return round_odd_sum(x.double() * y.double(), z.double()).float()


def round_odd_sum(p: Tensor, z: Tensor) -> Tensor:
    """p + z in f64, rounded to odd, so that a later rounding to f32 is the only one that shows.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
    """
    total = p + z
    back = total - p
    error = (p - (total - back)) + (z - back)  # exact (Knuth's two-sum); NaN where the sum is not finite
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & torch.isfinite(error) & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64)


def mma(a: Tensor, b: Tensor, acc: Tensor | None) -> Tensor:
    """a @ b + acc: [*, M, K] x [*, K, N], `b` with or without the batch dims.

    Floats: every element is the chain acc = fma(a[k], b[k], acc), k ascending, in f32. Past `CHAIN_LIMIT`
    multiply-adds the sum is made in f64 and rounded once, which is as good but not the same bits.
    f64 operands give torch's f64 matmul. Ints: exact modulo 2**32.
    """
    if not a.is_floating_point():
        product = (a.long() @ b.long()) if acc is None else (a.long() @ b.long()) + acc.long()
        return product.to(torch.int32)
    if a.dtype == torch.float64:
        return a @ b if acc is None else a @ b + acc
    a, b = a.double(), b.double()
    start = torch.zeros(()) if acc is None else acc
    total = start.double().expand(*a.shape[:-1], b.shape[-1])
    if a.numel() * b.shape[-1] > CHAIN_LIMIT:
        return (a @ b + total).float()
    for i in range(a.shape[-1]):
        product = a[..., :, i, None] * b[..., i, None, :]  # exact: two 24-bit significands fit in 53 bits
        total = round_odd_sum(product, total).float().double()
    return total.float()


def lane_sum(x: Tensor) -> Tensor:
    """Sum over the last axis in the fixed order of the language.

    Element i goes to lane i % 64; lanes add in ascending order from 0; a halving tree joins them.
    """
    if not x.is_floating_point():
        return x.long().sum(-1).to(x.dtype)
    padded = F.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    lanes = padded.new_zeros(*x.shape[:-1], LANES)
    for i in range(padded.shape[-2]):
        lanes = lanes + padded[..., i, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def chain_sum(x: Tensor, axis: int) -> Tensor:
    """Sum over an axis in ascending order from 0."""
    if not x.is_floating_point():
        return x.long().sum(axis).to(x.dtype)
    total = x.new_zeros(_without(x.shape, axis))
    for row in x.unbind(axis):
        total = total + row
    return total


def reduce(kind: str, x: Tensor, axis: int) -> Tensor:
    """sum, mean, max, min, argmax, argmin, any, all over one axis, which is dropped.

    Over no elements: sum 0, mean NaN, max -inf, min inf (the ends of an int type), any False, all True.

    Raises:
        ValueError: argmax or argmin of no elements.
    """
    if kind in ("sum", "mean"):
        total = lane_sum(x) if axis == x.dim() - 1 else chain_sum(x, axis)
        return total if kind == "sum" else total / x.shape[axis]
    if kind in ("any", "all"):
        return x.any(axis) if kind == "any" else x.all(axis)
    exact = _comparable(x)
    if kind.startswith("arg"):
        if not x.shape[axis]:
            raise ValueError(f"reduce_{kind} of no elements")
        found = exact.argmax(axis) if kind == "argmax" else exact.argmin(axis)
        return found.to(torch.int32)
    if not x.shape[axis]:
        return torch.full(_without(x.shape, axis), _worst(x.dtype, kind)).to(x.dtype)
    return (exact.amax(axis) if kind == "max" else exact.amin(axis)).to(x.dtype)


def scan(kind: str, x: Tensor, axis: int) -> Tensor:
    """cumsum (an ascending chain of sums) or cummax along an axis."""
    if not x.shape[axis]:
        return x.clone()
    if kind == "cummax":
        return torch.cummax(x, axis).values
    if not x.is_floating_point():
        return x.long().cumsum(axis).to(x.dtype)
    rows = [x.select(axis, 0)]
    for i in range(1, x.shape[axis]):
        rows.append(rows[-1] + x.select(axis, i))
    return torch.stack(rows, axis)


def sort(x: Tensor, axis: int, descending: bool) -> tuple[Tensor, Tensor]:
    """Stable sort along an axis: values and int32 indices; NaN is the largest."""
    values, indices = torch.sort(_comparable(x), dim=axis, descending=descending, stable=True)
    return values.to(x.dtype), indices.to(torch.int32)


def _comparable(x: Tensor) -> Tensor:
    """x in a dtype that torch can order: f32 holds every low-precision float."""
    return x.float() if x.is_floating_point() and x.element_size() < 4 else x


def _without(shape: torch.Size, axis: int) -> list[int]:
    return [size for i, size in enumerate(shape) if i != axis]


def _worst(dtype: torch.dtype, kind: str) -> float | int:
    if dtype.is_floating_point:
        return -torch.inf if kind == "max" else torch.inf
    return torch.iinfo(dtype).min if kind == "max" else torch.iinfo(dtype).max


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 values -8..7 of bytes that hold two each along the last axis, the even index in the low nibble."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def rand(seed: Tensor, offset: Tensor) -> Tensor:
    """Uniform f32 in [0, 1): Philox4x32-10 of (seed, offset), Triton's `tl.rand` bit for bit.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    high = offset >> 32 if offset.dtype == torch.int64 else torch.zeros_like(offset)
    c0, c1, seed = offset.long() & _LOW, high.long() & _LOW, seed.long()
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        high_a, low_a = _multiply(c0, 0xD2511F53)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    signed = c0.to(torch.int32)
    return torch.where(signed < 0, ~signed, signed).float() * torch.tensor(4.6566127342e-10)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product, in int64 without overflow."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
