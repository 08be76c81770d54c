"""Tensors in few bits: int8, int4 in groups, fp8, and OCP's MXFP4.

In: float tensors. Out: packed values with their scales, and floats again. nn's quantized modules, the KV cache, and
loaders of quantized checkpoints call them. Whatever shares a scale becomes a row, for the kernels as for the plain
expressions, which give the same bits.

Error bounds, for values x and a scale s of their row, group, ...:
    int8, int4  symmetric |error| <= s / 2, s = max|x| / 127 (7); asymmetric |error| <= s, s = (max - min) / 255 (15)
    fp8         |error| <= max(|x| 2^-4, s 2^-10) for e4m3, s = max|x| / 448;
                max(|x| 2^-3, s 2^-17) for e5m2, s = max|x| / 57344
    mxfp4       |error| <= max|x of the block| / 4; s / 4 for |x| <= 2 s (Microscaling Formats v1.0)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tessera.errors import InputError, UnsupportedError
from tessera.function.decorator import function
from tessera.ops.kernels.quantize import (
    LARGEST,
    TINY,
    dequantize_kernel,
    dequantize_packed_kernel,
    fake_quantize_kernel,
    quantize_kernel,
)
from tessera.ops.registration import Operation, is_readable
from tessera.types import Tensor, f32, floating

KINDS = ("int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxfp4")
GRANULARITIES = ("tensor", "row", "channel", "group")
MX_BLOCK = 32

_TORCH = {"int8": torch.int8, "int4": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
          "mxfp4": torch.uint8}  # of codes, a byte each
_KIND = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
_PACKED = ("int4", "mxfp4")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS, _E8M0_NAN = 127, 255


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


@function
def quantize(
    x: Tensor["...", "I", floating], kind: str, *, granularity: str | None = None, group: int = 32,
    symmetric: bool = True,
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
        InputError: x has NaN or infinite values (looked for where they can be read at no cost), or an option is out
            of its range.
        ShapeError: x has no dims, or is no float tensor.
    """
    _check(x, kind, granularity, group, symmetric)
    granularity = granularity or ("group" if kind in _PACKED else "row")
    *lead, width = x.shape
    if granularity == "channel":
        codes, scale, zero = _quantize_op(x.movedim(-1, 0).reshape(width, -1).contiguous(), kind, symmetric)
        codes, shape = codes.view(width, *lead).movedim(0, -1), [1] * len(lead) + [width]
    elif granularity == "tensor":
        codes, scale, zero = _quantize_op(x.reshape(1, -1), kind, symmetric)
        shape = [1] * x.dim()
    elif granularity == "row":
        codes, scale, zero = _quantize_op(_rows(x), kind, symmetric)
        shape = [*lead, 1]
    else:
        values = _in_groups(x, group)
        shape = list(values.shape[:-1])
        codes, scale, zero = _quantize_op(values.flatten(0, -2), kind, symmetric)
        codes = codes.view(*lead, -1) if codes.numel() else codes.view(*lead, 0)
    if granularity != "group":
        codes = codes.view(x.shape)
    codes = _pack(codes) if kind in _PACKED else codes[..., :width].contiguous()
    return Quantized(kind=kind, values=codes, scale=scale.view(shape), zero=zero.view(shape) if zero.numel() else None,
                     group=group if granularity == "group" else 0, shape=tuple(x.shape))


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float tensor that `quantize` stored: (values - zero) * scale in f32, rounded once to `dtype`."""
    values, scale, zero, group = quantized.values, quantized.scale, quantized.zero, quantized.group
    width, kind = quantized.shape[-1], quantized.kind
    if 0 in quantized.shape:
        return scale.new_empty(quantized.shape, dtype=dtype)
    if not group and scale.shape[-1] != 1:  # by channels
        numbers = _numbers(values, kind)[..., :width]
        return ((numbers if zero is None else numbers - zero) * scale).to(dtype)
    if group and kind not in _PACKED:
        values = torch.nn.functional.pad(values.view(torch.uint8), (0, -width % group)).view(values.dtype)
    scale_M = scale.reshape(-1)
    if kind == "mxfp4":
        powers = torch.ldexp(torch.ones_like(scale_M, dtype=torch.float32), scale_M.int() - _E8M0_BIAS)
        scale_M = torch.where(scale_M == _E8M0_NAN, torch.nan, powers)
    numbers = _dequantize_op(
        values.reshape(len(scale_M), -1), scale_M, None if zero is None else zero.reshape(-1), kind, dtype)
    return numbers.view(*quantized.shape[:-1], -1)[..., :width]


def _check(x: Tensor, kind: str, granularity: str | None, group: int, symmetric: bool) -> None:
    if kind not in KINDS:
        raise UnsupportedError(f"kind: {kind!r} given; expected one of {', '.join(KINDS)}")
    if granularity is not None and granularity not in GRANULARITIES:
        raise InputError(f"granularity: {granularity!r} given; expected one of {', '.join(GRANULARITIES)}")
    if kind == "mxfp4" and (granularity not in (None, "group") or group != MX_BLOCK):
        raise UnsupportedError(f"mxfp4: granularity {granularity!r}, group {group} given; it has groups of {MX_BLOCK}")
    if not symmetric and kind not in ("int8", "int4"):
        raise UnsupportedError(f"{kind}: asymmetric given; only int8 and int4 have a zero point")
    if group < 2 or group % 2:
        raise InputError(f"group: {group} given; expected an even number of at least 2")
    if is_readable(x) and not bool(x.isfinite().all()):
        raise InputError("x: NaN or infinite values given; expected finite ones")


def _in_groups(x: Tensor, group: int) -> Tensor:
    """[..., I] -> [..., ceil(I / group), group], the last group filled with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def _safe(scale: Tensor) -> Tensor:
    """A subnormal scale would divide to infinity; what it belongs to is zero in f32 terms."""
    return torch.where(scale < TINY, 1.0, scale)


def _quantize_reference(x_MK: Tensor, kind: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [M, K], scale [M], zero [M], or [0] where 0 stands for 0)."""
    x_MK, no_zero = x_MK.float(), torch.empty(0, dtype=torch.int8, device=x_MK.device)
    if x_MK.numel() == 0:
        codes_MK, scale_M, zero_M = _empty_codes(x_MK, kind, symmetric)
        return codes_MK, torch.ones_like(scale_M), torch.zeros_like(zero_M)
    if kind == "mxfp4":
        return *_quantize_mxfp4(x_MK), no_zero
    if symmetric:
        scale_M1 = _safe(x_MK.abs().amax(-1, keepdim=True) / LARGEST[kind])
        codes_MK = x_MK / scale_M1 if kind.startswith("fp8") else (x_MK / scale_M1).round()
        return codes_MK.to(_TORCH[kind]), scale_M1.squeeze(-1), no_zero
    top = LARGEST[kind]
    low_M1, high_M1 = x_MK.amin(-1, keepdim=True).clamp(max=0.0), x_MK.amax(-1, keepdim=True).clamp(min=0.0)
    scale_M1 = _safe(high_M1 / (2 * top + 1) - low_M1 / (2 * top + 1))  # 0 has a code of its own
    zero_M1 = (-top - 1 - low_M1 / scale_M1).round()
    codes_MK = ((x_MK / scale_M1).round() + zero_M1).clamp(-top - 1, top)
    return codes_MK.to(torch.int8), scale_M1.squeeze(-1), zero_M1.to(torch.int8).squeeze(-1)


def _quantize_mxfp4(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in E2M1 of rows with a power of two: 2^(floor(log2(max|x|)) - 2) (Microscaling Formats v1.0, 6.3)."""
    largest_M1 = x_MK.abs().amax(-1, keepdim=True)
    _, exponent_M1 = torch.frexp(largest_M1)  # largest = m 2^exponent with m in [0.5, 1)
    exponent_M1 = torch.where(largest_M1 == 0, -_E8M0_BIAS, (exponent_M1 - 3).clamp(-_E8M0_BIAS, _E8M0_BIAS))
    # Two steps, each a normal power of two: 2^127 has no reciprocal among the normal numbers.
    half_M1 = exponent_M1 // 2
    magnitude_MK = torch.ldexp(torch.ldexp(x_MK.abs(), -half_M1), half_M1 - exponent_M1)
    codes_MK = torch.zeros_like(magnitude_MK, dtype=torch.uint8)
    for code, (below, above) in enumerate(itertools.pairwise(_E2M1), 1):
        middle = (below + above) / 2
        codes_MK += (magnitude_MK >= middle) if code % 2 == 0 else (magnitude_MK > middle)  # ties to the even code
    return codes_MK | (x_MK < 0).to(torch.uint8) << 3, (exponent_M1 + _E8M0_BIAS).to(torch.uint8).squeeze(-1)


def _numbers(values: Tensor, kind: str) -> Tensor:
    """What codes stand for, in multiples of their scale, f32."""
    if kind == "mxfp4":
        return torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=values.device)[_nibbles(values).long()]
    return (_signed(_nibbles(values)) if kind == "int4" else values).float()


def _dequantize_reference(
    codes_MK: Tensor, scale_M: Tensor, zero_M: Tensor | None, kind: str, dtype: torch.dtype,
) -> Tensor:
    numbers_MK = _numbers(codes_MK, kind)
    return ((numbers_MK if zero_M is None else numbers_MK - zero_M.unsqueeze(-1)) * scale_M.unsqueeze(-1)).to(dtype)


def _quantize_kernel(x_MK: Tensor, kind: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes_MK, scale_M, zero_M = _empty_codes(x_MK, kind, symmetric)
    quantize_kernel(x_MK, codes_MK, scale_M, None if symmetric else zero_M, kind)
    return codes_MK, scale_M, zero_M


def _empty_codes(x_MK: Tensor, kind: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = x_MK.shape[0]
    return (x_MK.new_empty(x_MK.shape, dtype=_TORCH[kind]),
            x_MK.new_empty(rows, dtype=torch.uint8 if kind == "mxfp4" else torch.float32),
            x_MK.new_empty(0 if symmetric else rows, dtype=torch.int8))


def _dequantize_kernel(
    codes_MK: Tensor, scale_M: Tensor, zero_M: Tensor | None, kind: str, dtype: torch.dtype,
) -> Tensor:
    out_MK = _empty_numbers(codes_MK, scale_M, zero_M, kind, dtype)
    if kind in _PACKED:
        dequantize_packed_kernel(codes_MK, scale_M, out_MK, zero_M, kind == "mxfp4")
    else:
        dequantize_kernel(codes_MK, scale_M, out_MK, zero_M)
    return out_MK


def _empty_numbers(
    codes_MK: Tensor, scale_M: Tensor, zero_M: Tensor | None, kind: str, dtype: torch.dtype,
) -> Tensor:
    rows, width = codes_MK.shape
    return scale_M.new_empty(rows, 2 * width if kind in _PACKED else width, dtype=dtype)


def _pack(codes: Tensor) -> Tensor:
    """[..., n] codes of 4 bits -> [..., ceil(n / 2)] bytes, the even places in the low nibbles."""
    codes = torch.nn.functional.pad(codes.view(torch.uint8) & 15, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2 n] codes 0..15."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _signed(codes: Tensor) -> Tensor:
    """Codes 0..15 as two's complement -8..7."""
    return ((codes ^ 8).to(torch.int8) - 8)


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype needs a scale for each row."""
    return dtype in _KIND


@function
def quantize_rows(
    weight: Tensor["...", "I", floating], dtype: torch.dtype,
) -> tuple[Tensor["...", "I"], Tensor["...", f32]]:
    """Round each row to 8 bits, scaled so that its largest magnitude is the type's largest.

    Args:
        weight: [..., I], any float dtype.
        dtype: float8_e4m3fn, float8_e5m2 or int8.

    Returns:
        (quantized [..., I], scale [...] f32) with weight ~ quantized * scale; a row of zeros has scale 1.

    Raises:
        UnsupportedError: another dtype.
    """
    codes_MK, scale_M, _ = _quantize_op(_rows(weight), _kind(dtype), True)
    return codes_MK.view(weight.shape), scale_M.view(weight.shape[:-1])


@function
def dequantize_rows(
    quantized: Tensor["...", "I"], scale: Tensor["..."], dtype: torch.dtype,
) -> Tensor["...", "I"]:
    """The weight that `quantize_rows` stored: quantized * scale, the product rounded once to dtype."""
    return (quantized.float() * scale.unsqueeze(-1)).to(dtype)


@function
def fake_quantize_rows(
    weight: Tensor["...", "I", floating], dtype: torch.dtype,
) -> Tensor["...", "I", floating]:
    """Weight rounded as `quantize_rows` stores it; gradients pass straight through (arXiv:1308.3432)."""
    return _fake_quantize_op(_rows(weight), _kind(dtype)).view(weight.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _kind(dtype: torch.dtype) -> str:
    if dtype not in _KIND:
        raise UnsupportedError(f"dtype: {dtype} given; rows are quantized to {', '.join(map(str, _KIND))}")
    return _KIND[dtype]


def _fake_quantize_kernel(x_MK: Tensor, kind: str) -> Tensor:
    out_MK = x_MK.new_empty(x_MK.shape)
    fake_quantize_kernel(x_MK, out_MK, kind)
    return out_MK


def _fake_quantize_reference(x_MK: Tensor, kind: str) -> Tensor:
    codes_MK, scale_M, _ = _quantize_reference(x_MK.detach(), kind, True)
    rounded_MK = dequantize_rows(codes_MK, scale_M, x_MK.dtype)
    return x_MK + (rounded_MK - x_MK.detach()) if x_MK.requires_grad else rounded_MK


_quantize_op = Operation(
    "quantize(Tensor x, str kind, bool symmetric) -> (Tensor, Tensor, Tensor)",
    kernel=_quantize_kernel, reference=_quantize_reference, fake=_empty_codes)
_dequantize_op = Operation(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, str kind, ScalarType dtype) -> Tensor",
    kernel=_dequantize_kernel, reference=_dequantize_reference, fake=_empty_numbers,
    dtypes=tuple(set(_TORCH.values())))
_fake_quantize_op = Operation(
    "fake_quantize(Tensor x, str kind) -> Tensor", kernel=_fake_quantize_kernel, reference=_fake_quantize_reference,
    fake=lambda x_MK, kind: x_MK.new_empty(x_MK.shape), save=lambda inputs, output: (),
    backward=lambda saved, grad: (grad, None))


class context(TorchFunctionMode):
    """What the numbers of fp8 operations inside are multiples of, by name.

    `mul_fp8` gives multiples of scales["hidden"], which the product that reads them takes as its input_scale;
    without that name, multiples of 1. The innermost context holds.

    Raises:
        InputError: a scale is not a positive number.
    """

    # One of torch's modes, which changes nothing: torch.compile traces their stack as it is.
    def __init__(self, scales: Mapping[str, float]) -> None:
        super().__init__()
        for name, scale in scales.items():
            if not 0 < scale < float("inf"):
                raise InputError(f"scales: {name!r} is {scale}; expected a positive number")
        self.scales = dict(scales)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def context_scale(name: str) -> float:
    """The scale of that name in the innermost `context`; 1 where there is none."""
    for i in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(i)
        if isinstance(mode, context):
            return mode.scales.get(name, 1.0)
    return 1.0
