"""FusedTransformerLayer against the same layer written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.errors import InputError, ShapeError
from tessera.nn.fused_layer import FusedTransformerLayer
from tessera.nn.quantized import CastedLinear
from tessera.ops.quantize import dequantize_rows


def weight_of(linear: torch.nn.Module) -> Tensor:
    if isinstance(linear, CastedLinear):
        return dequantize_rows(linear.weight, linear.weight_scale.squeeze(-1), torch.float64)
    return linear.weight.double()


def written_out(layer: FusedTransformerLayer, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """The layer step by step, scores in memory."""
    batch, length, dim = x.shape
    width = dim // layer.num_heads

    def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight.double()

    def heads(x: Tensor) -> Tensor:
        return x.view(batch, length, layer.num_heads, width).transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        frequencies = layer.rope_theta ** (-torch.arange(0, width, 2).double() / width)
        angles = positions.double()[:, None, :, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    q, k, v = (heads(part) for part in (norm(x, layer.norm1) @ weight_of(layer.qkv).T).chunk(3, -1))
    scores = turned(q) @ turned(k).mT / width**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf) if mask.dtype is torch.bool else scores + mask[:, None]
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + out @ weight_of(layer.out_proj).T
    gate, up = (norm(x, layer.norm2) @ weight_of(layer.mlp_gate_up).T).chunk(2, -1)
    return x + torch.nn.functional.silu(gate) * up @ weight_of(layer.mlp_down).T


@pytest.mark.parametrize("weight_dtype, dtype, bound", [
    ("f32", "f32", 1e-5), ("int8", "f32", 1e-5), ("fp8_e4m3", "f32", 1e-5), ("int8", "bf16", 0.03),
    ("bf16", "bf16", 0.03)])
@pytest.mark.parametrize("seed, batch, length, dim, heads", [(1, 1, 1, 4, 1), (2, 3, 7, 24, 3), (3, 2, 33, 48, 4)])
def test_forward_and_gradient(seed, batch, length, dim, heads, weight_dtype, dtype, bound):
    torch.manual_seed(seed)
    layer = FusedTransformerLayer(dim, heads, 2.5, weight_dtype=weight_dtype, dtype=dtype)
    torch.nn.init.uniform_(layer.norm1.weight, 0.5, 1.5)
    x = torch.randn(batch, length, dim, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    positions = torch.arange(length).expand(batch, length) + torch.arange(batch)[:, None] * 5
    allowed = torch.rand(batch, length, length) > 0.4
    allowed |= torch.eye(length, dtype=torch.bool)
    added = torch.randn(batch, length, length)
    for place, mask in ((None, None), (positions, None), (positions, allowed), (None, added.to(x.dtype))):
        own, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        out = layer(own, place, mask)
        known = torch.arange(length).expand(batch, length) if place is None else place
        expected = written_out(layer, wide, known, mask)
        assert out.dtype == x.dtype
        torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound * expected.abs().max().item())
        slopes = torch.randn_like(x)
        out.backward(slopes)
        expected.backward(slopes.double())
        largest = wide.grad.abs().max().item()
        torch.testing.assert_close(own.grad.double(), wide.grad, rtol=bound, atol=2 * bound * largest)


def test_parameters_take_gradients():
    layer = FusedTransformerLayer(16, 2, weight_dtype="f32", dtype="f32")
    layer(torch.randn(2, 5, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    frozen = FusedTransformerLayer(16, 2)
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == {"norm1.weight", "norm2.weight"}


def test_dropout_only_in_training():
    torch.manual_seed(4)
    layer = FusedTransformerLayer(32, 4, dropout=0.5, weight_dtype="f32", dtype="f32")
    x = torch.randn(1, 20, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_wrong_arguments():
    for dim, heads in ((15, 3), (16, 3), (16, 0)):
        with pytest.raises(InputError, match=f"num_heads: {heads} given for dim {dim}"):
            FusedTransformerLayer(dim, heads)
    with pytest.raises(InputError, match=r"dropout: 1\.0"):
        FusedTransformerLayer(12, 3, dropout=1.0)
    layer = FusedTransformerLayer(12, 3)
    with pytest.raises(ShapeError, match=r"x: \[2, 12\] given"):
        layer(torch.randn(2, 12))
    with pytest.raises(ShapeError, match=r"attention_mask: \[2, 4, 5\] given; expected \[2, 4, 4\]"):
        layer(torch.randn(2, 4, 12), attention_mask=torch.ones(2, 4, 5, dtype=torch.bool))
