"""Linear layers that store their weights in 8 bits.

In: activations. Out: activations. Made from float layers by `from_float`; nn.FusedTransformerLayer is built of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import UnsupportedError
from tessera.ops.quantize import dequantize_rows, is_quantized, quantize_rows
from tessera.ops.quantized_linear import casted_linear, int8_linear
from tessera.types import DType, dtype_of

# Largest rounding error of a value: relative to the value, and in units of its row's scale.
_ROUNDING = {torch.int8: (0.0, 0.5), torch.float8_e4m3fn: (2.0**-4, 2.0**-10), torch.float8_e5m2: (2.0**-3, 2.0**-17)}


class CastedLinear(nn.Module):
    """y = x @ (weight * weight_scale)^T + bias, with the weight in 8 bits and sums in f32.

    The weight and its scales are frozen; the bias is a parameter. A new layer has a random weight of variance
    1 / in_features; `from_float` takes one that was trained.

    Args:
        in_features, out_features: widths.
        bias: whether there is one.
        weight_dtype: int8, fp8_e4m3 or fp8_e5m2.
        activation_dtype: x is brought to it, and y is in it.
        accumulate_dtype: f32, or f64 (slow, for comparison).

    Raises:
        UnsupportedError: another dtype.
    """

    weight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, weight_dtype: DType | torch.dtype | str = "int8",
        activation_dtype: DType | torch.dtype | str = "bf16", accumulate_dtype: DType | torch.dtype | str = "f32",
    ) -> None:
        super().__init__()
        storage, self.activation_dtype = dtype_of(weight_dtype).torch, dtype_of(activation_dtype).torch
        self.accumulate_dtype = dtype_of(accumulate_dtype).torch
        if not is_quantized(storage):
            raise UnsupportedError(f"weight_dtype: {weight_dtype} given; expected int8, fp8_e4m3 or fp8_e5m2")
        if self.accumulate_dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(f"accumulate_dtype: {accumulate_dtype} given; expected f32 or f64")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=storage), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, 1))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.activation_dtype)) if bias else None
        if not self.weight.is_meta:
            self.set_weight(torch.randn(out_features, in_features) * max(in_features, 1) ** -0.5)

    @classmethod
    def from_float(cls, linear: nn.Module, **dtypes: Any) -> CastedLinear:
        """The layer with a float layer's weight [out, in] and bias, rounded.

        Args:
            linear: torch.nn.Linear, nn.Linear, or any module with such a `weight` and perhaps a `bias`.
            dtypes: weight_dtype and the others; activation_dtype is by default the float weight's.
        """
        weight, bias = linear.weight.detach(), getattr(linear, "bias", None)
        dtypes = {"activation_dtype": weight.dtype, **dtypes}
        with weight.device:
            made = cls(weight.shape[1], weight.shape[0], bias is not None, **dtypes)
        made.set_weight(weight)
        if bias is not None:
            with torch.no_grad():
                made.bias.copy_(bias)
        return made.train(linear.training)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Store a float weight [out, in], each row rounded in units of its own scale."""
        quantized, scale = quantize_rows(weight, self.weight.dtype)
        self.weight.copy_(quantized)
        self.weight_scale.copy_(scale.unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.activation_dtype)
        if self.accumulate_dtype is torch.float64:
            bias = None if self.bias is None else self.bias.double()
            weight = dequantize_rows(self.weight, self.weight_scale.squeeze(-1), torch.float64)
            return nn.functional.linear(x.double(), weight, bias).to(self.activation_dtype)
        return casted_linear(x, self.weight, self.weight_scale, self.bias)

    @torch.no_grad()
    def error_bound(self, x: Tensor) -> Tensor:
        """How far an output can be from that of the float layer that this one was made from, [..., out].

        |x| @ (rounding of each weight)^T, the rounding of x and y to the activation's dtype, and the sums' in f32.
        """
        x = x.double()
        relative, units = _ROUNDING[self.weight.dtype]
        scale = self.weight_scale.double()
        weight = self.weight.double().abs() * scale
        # The stored value is off by the rounding; 1 + 2 * relative makes up for it.
        rounding = weight * relative * (1 + 2 * relative) + units * scale
        sums = x.abs() @ (weight + rounding).t()
        if self.bias is not None:
            sums = sums + self.bias.double().abs()
        steps = torch.finfo(self.activation_dtype).eps + x.shape[-1] * torch.finfo(torch.float32).eps
        return x.abs() @ rounding.t() + 2 * steps * sums

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features} -> {out_features}, bias={self.bias is not None}, {self.weight.dtype}"


class Int8Linear(CastedLinear):
    """`CastedLinear` with int8 weights whose input is rounded to int8 too, a scale for each row; sums are exact.

    Args:
        in_features, out_features, bias, activation_dtype: as for `CastedLinear`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        activation_dtype: DType | torch.dtype | str = "bf16",
    ) -> None:
        super().__init__(in_features, out_features, bias, torch.int8, activation_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x.to(self.activation_dtype), self.weight, self.weight_scale, self.bias)

    @torch.no_grad()
    def error_bound(self, x: Tensor) -> Tensor:
        """As for `CastedLinear`, and max|x| / 254 of each row times the sum of the weights' magnitudes."""
        step = x.double().abs().amax(-1, keepdim=True) / 254
        weight = (self.weight.double().abs() + 0.5) * self.weight_scale.double()
        return super().error_bound(x) + 1.01 * step * weight.sum(-1)
