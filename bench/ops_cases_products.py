"""Matrix products, plain and in 8 bits, gated MLPs and a whole layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from ops_case import DTYPES, OpCase, leaf, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tessera import nn, ops

_EIGHT_BITS = 2.0**-6  # sums of rounded inputs, beside the same with other roundings at ties


def cases(quick: bool, fast_bf16: bool) -> Iterator[OpCase]:
    """See `OpCase`. Products of bf16 are compared where the processor has instructions for them."""
    for name in ("f32", "bf16") if fast_bf16 else ("f32",):
        dtype = DTYPES[name]
        for rows, width, inner in [(16, 32, 64)] if quick else [(512, 576, 1536), (2048, 1024, 1024)]:
            sizes = f"{rows}x{width}x{inner}"
            for operation, *made in _linear(rows, width, inner, dtype):
                yield make(operation, name, sizes, tuple(made))
        rows, width, inner = (16, 32, 64) if quick else (512, 576, 1536)
        for operation, *made in _mlps(rows, width, inner, dtype):
            yield make(operation, name, f"{rows}x{width}x{inner}", tuple(made))
        yield make("fused_layer", name, "1x64x64" if quick else "2x256x576", _layer(quick, dtype))
    for rows in (1, 16):
        width, inner = (32, 64) if quick else (576, 1536)
        for operation, *made in _quantized(rows, width, inner):
            yield make(operation, "f32", f"{rows}x{width}x{inner}", tuple(made), _EIGHT_BITS)


def _linear(rows: int, width: int, inner: int, dtype: torch.dtype) -> Iterator[tuple]:
    x, weight, bias = leaf(rows, width, dtype=dtype), leaf(inner, width, dtype=dtype), leaf(inner, dtype=dtype)
    yield "linear", [x, weight, bias], ops.linear, F.linear
    yield "matmul", [x, leaf(width, inner, dtype=dtype)], ops.matmul, torch.matmul


def _mlps(rows: int, width: int, inner: int, dtype: torch.dtype) -> Iterator[tuple]:
    x, down = leaf(rows, width, dtype=dtype), leaf(inner, width, dtype=dtype, scale=0.05)
    gate, up = (leaf(width, inner, dtype=dtype, scale=0.05) for _ in range(2))

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate) * (x @ up)) @ down

    yield "fused_mlp", [x, gate, up, down], ops.swiglu, mlp
    yield "swiglu_chunked", [x, gate, up, down], ops.swiglu_memory_efficient, mlp
    yield ("swiglu_recomputed", [x, gate, up, down], ops.swiglu_memory_efficient,  # beside torch's own recomputation
           lambda *args: checkpoint(mlp, *args, use_reentrant=False))


def _layer(quick: bool, dtype: torch.dtype) -> tuple:
    batch, length, width, heads = (1, 64, 64, 2) if quick else (2, 256, 576, 9)
    layer = nn.FusedTransformerLayer(width, heads, weight_dtype=dtype, dtype=dtype)
    cos, sin, _ = ops.rope_tables(range(length), width // heads, 10000.0)
    names, weights = zip(*layer.named_parameters())

    def turn(x: Tensor) -> Tensor:
        c, s = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        first, second = x.chunk(2, -1)
        return torch.cat([first * c - second * s, first * s + second * c], -1)

    def formula(x: Tensor, *values: Tensor) -> Tensor:
        w = dict(zip(names, values))
        normed = F.rms_norm(x, (width,), w["norm1.weight"], 1e-6)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in F.linear(normed, w["qkv.weight"]).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (turn(q), turn(k), v)), is_causal=True).transpose(1, 2).flatten(-2)
        x = x + F.linear(mixed, w["out_proj.weight"])
        gate, up = F.linear(F.rms_norm(x, (width,), w["norm2.weight"], 1e-6), w["mlp_gate_up.weight"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, w["mlp_down.weight"])

    return [leaf(batch, length, width, dtype=dtype), *weights], lambda x, *_: layer(x), formula


def _quantized(rows: int, width: int, inner: int) -> Iterator[tuple]:
    x, wide = torch.randn(rows, width), torch.randn(inner, width)
    weight, scale = ops.quantize_rows(wide, torch.int8)

    def product(scale: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype) * scale[:, None])

    def rounded(scale: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return product(scale, (x / step).round() * step, weight)

    yield "casted_linear", [scale, x, weight], lambda s, x, w: ops.casted_linear(x, w, s), product
    yield "int8_linear", [scale, x, weight], lambda s, x, w: ops.int8_linear(x, w, s), rounded
    shapes = (width, inner), (width, inner), (inner, width)
    *packed, scales = ops.quantize_swiglu(*(torch.randn(shape) * 0.05 for shape in shapes))
    factors = [scales[f"{part}_weight"] for part in ("gate", "up", "down")]

    def mlp(x: Tensor, *parts: Tensor) -> Tensor:
        gate, up, down = (part.to(x.dtype) * factor for part, factor in zip(parts[:3], parts[3:]))
        return (F.silu(x @ gate) * (x @ up)) @ down

    yield ("swiglu_quantized", [x, *packed, *factors], lambda x, *_: ops.swiglu_quantized(x, *packed, scales), mlp)
    yield "quantize", [torch.randn(2048, width)], lambda x: ops.fake_quantize_rows(x, torch.int8), _round_rows


def _round_rows(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step
