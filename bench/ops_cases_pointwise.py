"""Norms, activations, rotation and look-ups, at the shapes of a training step and of a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from ops_case import DTYPES, OpCase, leaf, make, wide
from torch import Tensor

from tessera import ops

EPS = 1e-5
VOCABULARY = 8192
WIDE = ("rms_norm", "layer_norm", "swiglu", "rope")  # measured at all shapes; the others at the first


def cases(quick: bool, fast_bf16: bool) -> Iterator[OpCase]:
    """See `OpCase`."""
    for name, dtype in DTYPES.items():
        shapes = [(1, 64, 64)] if quick else [(8, 256, 576), (2, 1024, 1024), (1, 512, 4096)]
        for number, (batch, length, width) in enumerate(shapes):
            made = [*_norms(batch, length, width, dtype), *_activations(batch, length, width, dtype),
                    *_rope(batch, length, width // 64, dtype), *_tables(batch, length, width, dtype)]
            for operation, *rest in made:
                if number == 0 or operation in WIDE:
                    yield make(operation, name, f"{batch}x{length}x{width}", tuple(rest))


def _norms(batch: int, length: int, width: int, dtype: torch.dtype) -> Iterator[tuple]:
    x, residual = (leaf(batch, length, width, dtype=dtype) for _ in range(2))
    weight, bias = leaf(width, dtype=dtype), leaf(width, dtype=dtype)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, EPS)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x + residual, weight), x + residual

    yield "rms_norm", [x, weight], lambda x, w: ops.rms_norm(x, w, EPS), norm
    yield "add_rms_norm", [x, residual, weight], lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), add_norm
    yield ("layer_norm", [x, weight, bias], lambda x, w, b: ops.layer_norm(x, w, b, EPS),
           lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, EPS))


def _activations(batch: int, length: int, width: int, dtype: torch.dtype) -> Iterator[tuple]:
    gate, up = (leaf(batch, length, width, dtype=dtype) for _ in range(2))
    yield "swiglu", [gate, up], ops.swiglu, lambda gate, up: F.silu(gate) * up
    gate_up = leaf(batch, length, 2 * width, dtype=dtype)
    yield ("gated", [gate_up], lambda x: ops.gated_packed(x, "gelu_tanh"),
           lambda x: F.gelu(x[..., :x.shape[-1] // 2], approximate="tanh") * x[..., x.shape[-1] // 2:])
    yield "silu", [gate], ops.silu, F.silu
    yield "gelu", [gate], ops.gelu, F.gelu


def _rope(batch: int, length: int, heads: int, dtype: torch.dtype) -> Iterator[tuple]:
    x = leaf(batch, length, heads, 64, dtype=dtype)
    cos, sin, _ = ops.rope_tables(range(length), 64, 10000.0)

    def turn(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        return first * cos - second * sin, first * sin + second * cos

    def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat(turn(*wide(x).chunk(2, -1), cos, sin), -1).to(x.dtype)

    def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.stack(turn(*wide(x).unflatten(-1, (-1, 2)).unbind(-1), cos, sin), -1).flatten(-2).to(x.dtype)

    yield "rope", [x, cos, sin], ops.rotary, halves
    yield "rope_interleaved", [x, cos, sin], lambda *args: ops.rotary(*args, interleaved=True), neighbours


def _tables(batch: int, length: int, width: int, dtype: torch.dtype) -> Iterator[tuple]:
    table, ids = leaf(VOCABULARY, width, dtype=dtype), torch.randint(VOCABULARY, (batch, length))
    yield ("embedding", [table, ids], lambda table, ids: ops.embedding(ids, table),
           lambda table, ids: F.embedding(ids, table))
    narrow, scale = ops.quantize_rows(table.detach().float(), torch.int8)
    yield ("casted_embedding", [scale, narrow, ids],
           lambda scale, table, ids: ops.casted_embedding(ids, table, scale, dtype),
           lambda scale, table, ids: (F.embedding(ids, table) * scale[ids].unsqueeze(-1)).to(
               dtype if scale.dtype is torch.float32 else scale.dtype))
    if dtype is torch.float32:
        mask = torch.rand(batch, length, width) > 0.5
        yield ("masked_mean", [leaf(batch, length, width), mask], lambda x, mask: ops.masked_mean(x, mask, -1),
               lambda x, mask: torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1))
