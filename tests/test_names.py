"""Every name outside of kernels that the documents use, and those of torch's that take Tessera's dtypes."""

from __future__ import annotations

import functools

import pytest
import torch

import tessera as ts
from tessera.errors import ShapeError

NAMES = """
KVCache Module all_gather arange autotune cast cat checkpoint checkpoint_region cos cumsum distributed exp eye function
fused gather gemm init jit kernel log matmul mean memory_efficient mesh_reduce module mul_fp8 multinomial no_grad
numerically_stable ones ones_like precision quantized rand randn relu ring_exchange sin sort sqrt stable tensor topk
where zeros zeros_like
dist.Mesh dist.ShardSpec dist.deterministic dist.mesh dist.recv dist.send dist.tensor distributed.get_world_size
graph.capture kernel.fused profile.session profile.summary quantization.context
nn.Buffer nn.CastedLinear nn.Embedding nn.FusedTransformerLayer nn.ModuleList nn.Parameter nn.cross_entropy_safe
nn.embedding nn.l2_normalize nn.log_softmax_stable nn.quantized_matmul nn.softmax_safe nn.swish nn.swish_fp8
nn.utils.clip_grad_norm_
op.flash_attention op.fused_mlp op.matmul op.reduce_scatter op.rmsnorm op.split_heads
ops.flash_attention ops.fused_softmax_cross_entropy ops.stable_contrastive_loss ops.stable_cross_entropy
ops.stable_max_margin_loss ops.softmax_cross_entropy
stable.divide stable.mean_of_squares stable.sqrt tokenizer.GPT2Tokenizer
""".split()


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name):
    assert functools.reduce(getattr, name.split("."), ts) is not None


@pytest.mark.parametrize("dtype", [ts.f32, "bf16", torch.int8, ts.fp8, None])
def test_tensors_of_every_dtype(dtype):
    wanted = torch.float32 if dtype is None else ts.types.dtype_of(dtype).torch
    for made in (ts.zeros(2, 3, dtype=dtype), ts.ones((2, 3), dtype=dtype), ts.full((2, 3), 1, dtype=dtype or ts.f32),
                 ts.eye(2, 3, dtype=dtype), ts.rand(2, 3, dtype=dtype), ts.randn(2, 3, dtype=dtype)):
        assert made.dtype is wanted and made.shape == (2, 3)
    assert ts.arange(3, dtype=dtype).dtype is (torch.int64 if dtype is None else wanted)
    assert ts.tensor([1.0, 2.0], dtype=dtype).dtype is wanted
    assert ts.tensor(torch.ones(2), dtype=dtype).dtype is wanted
    assert ts.eye(2, dtype=bool).dtype is torch.bool


def test_cast_saturates():
    x = torch.tensor([1e9, -1e9, 2.5, -0.3])
    assert ts.cast(x, ts.int8).tolist() == [127, -128, 2, 0]
    assert ts.cast(x, "fp8_e4m3").float().tolist() == [448, -448, 2.5, -0.3125]
    assert ts.cast(ts.cast(x, ts.fp8), ts.f32).dtype is torch.float32
    assert ts.cast(x, ts.int32).dtype is torch.int32


def test_gather_and_split_heads():
    table, ids = torch.randn(7, 3), torch.tensor([[1, 6], [0, 1]])
    assert torch.equal(ts.gather(table, ids), table[ids])
    assert torch.equal(ts.gather(table, ids % 3, dim=1), torch.gather(table, 1, ids % 3))
    qkv = torch.randn(2, 5, (4 + 2 * 2) * 3)
    q, k, v = ts.op.split_heads(qkv, 4, 3, 2)
    assert torch.equal(torch.cat([part.transpose(1, 2).flatten(2) for part in (q, k, v)], -1), qkv)
    assert q.shape == (2, 4, 5, 3) and k.shape == v.shape == (2, 2, 5, 3)
    with pytest.raises(ShapeError, match=r"qkv: \[2, 5, 24\] given; expected \[B, S, 36\]"):
        ts.op.split_heads(qkv, 4, 3)


def test_fused_mlp():
    x, up, gate, down = torch.randn(2, 5, 8), torch.randn(8, 12), torch.randn(8, 12), torch.randn(12, 8)
    expected = (torch.nn.functional.gelu(x @ gate) * (x @ up)) @ down
    torch.testing.assert_close(ts.op.fused_mlp(x, up=up, gate=gate, down=down, activation="gelu"), expected)
    with pytest.raises(ShapeError, match=r"down has F=8 .* but up has F=12"):
        ts.op.fused_mlp(x, up=up, gate=gate, down=up)
