"""Tensors in few bits: int8, int4 in groups, fp8, and OCP's MXFP4.

In: float tensors. Out: packed values with their scales, and floats again. nn's quantized modules, the KV cache, and
loaders of quantized checkpoints call them. All are plain torch, for any device, done once for each tensor.

Error bounds, for values x and a scale s of their row, group, ...:
    int8, int4  symmetric |error| <= s / 2, s = max|x| / 127 (7); asymmetric |error| <= s, s = (max - min) / 255 (15)
    fp8         |error| <= max(|x| 2^-4, s 2^-10) for e4m3, s = max|x| / 448;
                max(|x| 2^-3, s 2^-17) for e5m2, s = max|x| / 57344
    mxfp4       |error| <= max|x of the block| / 4; s / 4 for |x| <= 2 s (Microscaling Formats v1.0)
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import InputError, ShapeError, UnsupportedError

KINDS = ("int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxfp4")
GRANULARITIES = ("tensor", "row", "channel", "group")
MX_BLOCK = 32

# Largest finite magnitude of each 8-bit storage type: what a row's largest weight maps to.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
_TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_BITS = {"int8": 8, "int4": 4}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS, _E8M0_NAN = 127, 255

_SCALES: contextvars.ContextVar[Mapping[str, float] | None] = contextvars.ContextVar("tessera_scales", default=None)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A tensor in few bits.

    Args:
        kind: of `KINDS`.
        values: int8 or fp8 values in the tensor's shape; for int4 and mxfp4 uint8 [..., ceil(I / 2)], the even
            places in the low nibbles, I rounded up to whole groups.
        scale: f32, broadcast against the values; [..., groups] for groups; uint8 exponents (E8M0) for mxfp4.
        zero: int8, of the scale's shape: what stands for 0 in asymmetric int8 and int4; else None.
        group: how many values along the last dim share a scale, 0 for no groups.
        shape: of the tensor.
    """

    kind: str
    values: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group: int = 0
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that values, scales and zeros take."""
        return self.values.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that is stood for, computed in f32 and rounded once to `dtype`."""
        return dequantize(self, dtype)


def quantize(
    x: Tensor, kind: str, *, granularity: str | None = None, group: int = 32, symmetric: bool = True,
) -> Quantized:
    """Round a tensor to few bits.

    Args:
        x: [..., I], any float dtype, finite.
        kind: "int8", "int4", "fp8_e4m3", "fp8_e5m2" or "mxfp4".
        granularity: what shares a scale: the whole "tensor", a "row" (the last dim), a "channel" (an index of the
            last dim), or a "group" of values along the last dim. By default "row" for 8 bits, "group" for 4; mxfp4
            has groups of 32.
        group: size of a group; even. A last group may be short.
        symmetric: for int8 and int4, whether 0 is stood for by 0; else the values' range is shifted to use all
            codes, which suits values of one sign.

    Raises:
        UnsupportedError: another kind, or a combination that it does not have.
        InputError: x has NaN or infinite values, or an option is out of its range.
        ShapeError: x has no dims.
    """
    _check(x, kind, granularity, group, symmetric)
    granularity = granularity or ("group" if kind in ("int4", "mxfp4") else "row")
    if kind == "mxfp4":
        return _quantize_mxfp4(x)
    grouped, width = granularity == "group", x.shape[-1]
    values = _in_groups(x.float(), group if grouped else 2)  # nibbles come in pairs
    values = values if grouped else values.flatten(-2)
    if kind in _TORCH:
        codes, scale = _scaled_float(values, _TORCH[kind], granularity)
        zero = None
    else:
        codes, scale, zero = _scaled_int(values, _BITS[kind], granularity, symmetric)
    codes = codes.flatten(-2) if grouped else codes
    codes = _pack(codes) if kind == "int4" else codes[..., :width].contiguous()
    if grouped:
        scale, zero = scale.squeeze(-1), None if zero is None else zero.squeeze(-1)
    elif granularity == "channel":
        scale, zero = scale[..., :width], None if zero is None else zero[..., :width]
    return Quantized(
        kind=kind, values=codes, scale=scale, zero=zero, group=group if grouped else 0, shape=tuple(x.shape))


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float tensor that `quantize` stored: (values - zero) * scale in f32, rounded once to `dtype`."""
    values, scale, zero = quantized.values, quantized.scale, quantized.zero
    width, group = quantized.shape[-1], quantized.group
    if quantized.kind == "mxfp4":
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=values.device)
        numbers = table[_nibbles(values).long()]
        exponents = scale.to(torch.int32) - _E8M0_BIAS
        powers = torch.ldexp(torch.ones(scale.shape, device=scale.device), exponents)
        scale = torch.where(scale == _E8M0_NAN, torch.nan, powers)
    else:
        numbers = (_signed(_nibbles(values)) if quantized.kind == "int4" else values).float()
    if group:
        numbers = _in_groups(numbers, group)
        numbers = numbers if zero is None else numbers - zero.unsqueeze(-1)
        return (numbers * scale.unsqueeze(-1)).flatten(-2)[..., :width].to(dtype)
    numbers = numbers[..., :width]
    return ((numbers if zero is None else numbers - zero) * scale).to(dtype)


def _check(x: Tensor, kind: str, granularity: str | None, group: int, symmetric: bool) -> None:
    if kind not in KINDS:
        raise UnsupportedError(f"kind: {kind!r} given; expected one of {', '.join(KINDS)}")
    if granularity is not None and granularity not in GRANULARITIES:
        raise InputError(f"granularity: {granularity!r} given; expected one of {', '.join(GRANULARITIES)}")
    if kind == "mxfp4" and (granularity not in (None, "group") or group != MX_BLOCK):
        raise UnsupportedError(f"mxfp4: granularity {granularity!r}, group {group} given; it has groups of {MX_BLOCK}")
    if not symmetric and kind not in _BITS:
        raise UnsupportedError(f"{kind}: asymmetric given; only int8 and int4 have a zero point")
    if group < 2 or group % 2:
        raise InputError(f"group: {group} given; expected an even number of at least 2")
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(f"x: {x.dtype} {list(x.shape)} given; expected floats with at least one dim")
    if not bool(x.isfinite().all()):
        raise InputError("x: NaN or infinite values given; expected finite ones")


def _in_groups(x: Tensor, group: int) -> Tensor:
    """[..., I] -> [..., ceil(I / group), group], the last group filled with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def _extent(x: Tensor, granularity: str, largest: bool) -> Tensor:
    """The largest (smallest) value that shares a scale, with the reduced dims kept; "group": of the last dim."""
    if granularity == "tensor":
        dims = tuple(range(x.dim()))
    elif granularity == "channel":
        dims = tuple(range(x.dim() - 1))
    else:
        dims = (-1,)
    if not dims:  # torch would reduce all of them
        return x
    if x.numel() == 0:
        return x.new_zeros([1 if i in dims or i - x.dim() in dims else n for i, n in enumerate(x.shape)])
    return x.amax(dims, keepdim=True) if largest else x.amin(dims, keepdim=True)


def _safe(scale: Tensor) -> Tensor:
    """A subnormal scale would divide to infinity; what it belongs to is zero in f32 terms."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _scaled_float(x: Tensor, dtype: torch.dtype, granularity: str) -> tuple[Tensor, Tensor]:
    scale = _safe(_extent(x.abs(), granularity, True) / _LARGEST[dtype])
    return (x / scale).to(dtype), scale


def _scaled_int(
    x: Tensor, bits: int, granularity: str, symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    top = (1 << (bits - 1)) - 1
    if symmetric:
        scale = _safe(_extent(x.abs(), granularity, True) / top)
        return (x / scale).round().to(torch.int8), scale, None
    low, high = (_extent(x, granularity, largest) for largest in (False, True))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # 0 has a code of its own
    scale = _safe(high / (2 * top + 1) - low / (2 * top + 1))
    zero = (-top - 1 - low / scale).round()
    codes = ((x / scale).round() + zero).clamp(-top - 1, top)
    return codes.to(torch.int8), scale, zero.to(torch.int8)


def _quantize_mxfp4(x: Tensor) -> Quantized:
    """Blocks of 32 in E2M1 with a power of two: 2^(floor(log2(max|x|)) - 2) (Microscaling Formats v1.0, 6.3)."""
    blocks = _in_groups(x.float(), MX_BLOCK)
    largest = _extent(blocks.abs(), "group", True)
    _, exponent = torch.frexp(largest)  # largest = m 2^exponent with m in [0.5, 1)
    exponent = torch.where(largest == 0, -_E8M0_BIAS, (exponent - 3).clamp(-_E8M0_BIAS, _E8M0_BIAS))
    # Two steps, each a normal power of two: 2^127 has no reciprocal among the normal numbers.
    half = exponent // 2
    magnitude = torch.ldexp(torch.ldexp(blocks.abs(), -half), half - exponent)
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for code, (below, above) in enumerate(itertools.pairwise(_E2M1), 1):
        middle = (below + above) / 2
        codes += (magnitude >= middle) if code % 2 == 0 else (magnitude > middle)  # ties to the even code
    codes = codes | (blocks < 0).to(torch.uint8) << 3
    scale = (exponent + _E8M0_BIAS).to(torch.uint8).squeeze(-1)
    return Quantized(kind="mxfp4", values=_pack(codes.flatten(-2)), scale=scale, group=MX_BLOCK, shape=tuple(x.shape))


def _pack(codes: Tensor) -> Tensor:
    """[..., 2 n] codes of 4 bits -> [..., n] bytes, the even places in the low nibbles."""
    low, high = (codes.to(torch.uint8) & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2 n] codes 0..15."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _signed(codes: Tensor) -> Tensor:
    """Codes 0..15 as two's complement -8..7."""
    return ((codes ^ 8).to(torch.int8) - 8)


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype needs a scale for each row."""
    return dtype in _LARGEST


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits, scaled so that its largest magnitude is the type's largest.

    Args:
        weight: [..., I], any float dtype.
        dtype: float8_e4m3fn, float8_e5m2 or int8.

    Returns:
        (quantized [..., I], scale [...] f32) with weight ~ quantized * scale; a row of zeros has scale 1.

    Raises:
        UnsupportedError: another dtype.
    """
    if dtype not in _LARGEST:
        raise UnsupportedError(f"dtype: {dtype} given; rows are quantized to {', '.join(map(str, _LARGEST))}")
    weight = weight.float()
    scale = _safe(weight.abs().amax(-1) / _LARGEST[dtype])
    quantized = weight / scale.unsqueeze(-1)
    return (quantized.round() if dtype is torch.int8 else quantized).to(dtype), scale


def dequantize_rows(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `quantize_rows` stored: quantized * scale, the product rounded once to dtype."""
    return (quantized.float() * scale.unsqueeze(-1)).to(dtype)


def fake_quantize_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight rounded as `quantize_rows` stores it; gradients pass straight through (arXiv:1308.3432)."""
    rounded = dequantize_rows(*quantize_rows(weight.detach(), dtype), weight.dtype)
    return weight + (rounded - weight.detach())


@contextlib.contextmanager
def context(scales: Mapping[str, float]) -> Iterator[None]:
    """What the numbers of fp8 operations inside are multiples of, by name.

    `mul_fp8` gives multiples of scales["hidden"], which the product that reads them takes as its input_scale;
    without that name, multiples of 1.

    Raises:
        InputError: a scale is not a positive number.
    """
    for name, scale in scales.items():
        if not 0 < scale < float("inf"):
            raise InputError(f"scales: {name!r} is {scale}; expected a positive number")
    token = _SCALES.set(dict(scales))
    try:
        yield
    finally:
        _SCALES.reset(token)


def context_scale(name: str) -> float:
    """The scale of that name in the innermost `context`; 1 where there is none."""
    return (_SCALES.get() or {}).get(name, 1.0)
