"""Rotary tables and rotation against complex arithmetic and transformers' frequencies."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tessera import ops


@pytest.mark.parametrize("rotated", [16, 10])
def test_rotation_is_a_complex_product(rotated):
    generator = torch.Generator().manual_seed(rotated)
    x = torch.randn(2, 7, 3, 16, generator=generator)
    positions = torch.randint(0, 5000, (2, 7), generator=generator)
    actual = ops.rotary(x, *ops.rope_tables(positions, rotated, 1e4))
    angle = positions[:, :, None, None].double() * 1e4 ** (-torch.arange(0, rotated, 2).double() / rotated)
    half = rotated // 2
    z = torch.complex(x[..., :half].double(), x[..., half:rotated].double())
    z = z * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((z.real, z.imag, x[..., rotated:].double()), -1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)  # f32 angles of up to 5000 radians


@pytest.mark.parametrize("name, length, ours, theirs", [
    ("linear", 10, {"factor": 4.0}, {"factor": 4.0}),
    ("dynamic", 100, {"factor": 2.0, "original_max_seq_len": 4096}, {"factor": 2.0}),
    ("dynamic", 5000, {"factor": 2.0, "original_max_seq_len": 4096}, {"factor": 2.0}),
    ("llama3", 1, {"factor": 8.0, "original_max_seq_len": 8192},
     {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    ("yarn", 1, {"factor": 4.0, "original_max_seq_len": 1024},
     {"factor": 4.0, "original_max_position_embeddings": 1024}),
    ("yarn", 1, {"factor": 32.0, "original_max_seq_len": 4096, "truncate": False},
     {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}),
])
@pytest.mark.parametrize("theta, d_head", [(1e4, 64), (5e5, 128)])
def test_frequencies(name, length, ours, theirs, theta, d_head):
    config = LlamaConfig(
        hidden_size=2 * d_head, num_attention_heads=2, max_position_embeddings=4096,
        rope_parameters={"rope_type": name, "rope_theta": theta, **theirs})
    expected, factor = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), seq_len=length)
    actual, actual_factor = ops.rope_frequencies(d_head, theta, ops.RopeScaling(kind=name, **ours), seq_len=length)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    assert actual_factor == pytest.approx(factor, rel=1e-9)
