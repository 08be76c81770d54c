"""Norms, activations, rotation and look-ups, at the shapes of a training step and of a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from ops_case import DTYPES, OpCase, leaf
from torch import Tensor

from tessera import ops

EPS = 1e-5


def cases(quick: bool) -> Iterator[OpCase]:
    """See `OpCase`."""
    for name, dtype in DTYPES.items():
        # One rounding of bf16 in the results; sums over all rows, in f32, into the gradients of weights.
        tolerance = 1e-4 if dtype == torch.float32 else 2.0**-6
        for batch, length, width in [(1, 64, 64)] if quick else [(8, 256, 384), (1, 512, 576), (2, 512, 2048)]:
            sizes = f"{batch}x{length}x{width}"
            for made in (*_norms(batch, length, width, dtype), *_activations(batch, length, 3 * width, dtype),
                         _rope(batch, length, width // 64, dtype), _embedding(batch, length, width, dtype)):
                operation, inputs, ours, formula = made
                yield OpCase(group=f"{operation} {name}", label=f"{operation} {name} {sizes}", inputs=inputs, ours=ours,
                             formula=formula, tolerance=tolerance)


def _norms(batch: int, length: int, width: int, dtype: torch.dtype) -> Iterator[tuple]:
    x, residual = (leaf(batch, length, width, dtype=dtype) for _ in range(2))
    weight, bias = leaf(width, dtype=dtype), leaf(width, dtype=dtype)
    yield ("rms_norm", [x, weight], lambda x, w: ops.rms_norm(x, w, EPS),
           lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS))

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (total.shape[-1],), weight, EPS), total

    yield "add_rms_norm", [x, residual, weight], lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), add_norm
    yield ("layer_norm", [x, weight, bias], lambda x, w, b: ops.layer_norm(x, w, b, EPS),
           lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, EPS))


def _activations(batch: int, length: int, width: int, dtype: torch.dtype) -> Iterator[tuple]:
    gate, up = (leaf(batch, length, width, dtype=dtype) for _ in range(2))
    yield "swiglu", [gate, up], ops.swiglu, lambda gate, up: F.silu(gate) * up
    gate_up = leaf(batch, length, 2 * width, dtype=dtype)
    yield ("gated", [gate_up], lambda x: ops.gated_packed(x, "gelu_tanh"),
           lambda x: F.gelu(x[..., :x.shape[-1] // 2], approximate="tanh") * x[..., x.shape[-1] // 2:])
    yield "gelu", [gate], ops.gelu, F.gelu


def _rope(batch: int, length: int, heads: int, dtype: torch.dtype) -> tuple:
    x = leaf(batch, length, heads, 64, dtype=dtype)
    cos, sin, _ = ops.rope_tables(range(length), 64, 10000.0)

    def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)

    return "rope", [x, cos, sin], ops.rotary, formula


def _embedding(batch: int, length: int, width: int, dtype: torch.dtype) -> tuple:
    ids = torch.randint(8192, (batch, length))
    return ("embedding", [leaf(8192, width, dtype=dtype), ids], lambda table, ids: ops.embedding(ids, table),
            lambda table, ids: F.embedding(ids, table))
