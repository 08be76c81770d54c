"""Rotation with kept tables and without, its gradients, sinusoids, ALiBi."""

from __future__ import annotations

import math

import pytest
import torch

from tessera import ops
from tessera.errors import InputError, ShapeError, UnsupportedError
from tessera.kernel.recording import record
from tessera.ops import RopeScaling
from tessera.ops.rotary import _ROTARY
from tests.ops.checks import DTYPES, check_against_float64, check_compiled, layouts, normal


def turn(x, angles, interleaved):
    """The rotation as a complex product; angles [B, S, R]."""
    n_pairs = angles.shape[-1]
    turning, rest = x[..., :2 * n_pairs], x[..., 2 * n_pairs:]
    parts = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    z = torch.complex(*(part.contiguous() for part in parts))
    z = z * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    turned = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((turned, rest), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape, rotated", [
    ((1, 1, 1, 2), 2), ((2, 7, 3, 16), 16), ((2, 33, 2, 20), 10), ((1, 5, 4, 66), 66), ((0, 4, 2, 8), 8),
    ((2, 0, 2, 8), 8)])
def test_values_and_gradients(shape, rotated, interleaved, dtype):
    generator = torch.Generator().manual_seed(rotated)
    positions = torch.randint(0, 40, shape[:2], generator=generator)
    tables = ops.rope_tables(positions, rotated, 100.0)
    frequencies = 100.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = positions[:, :, None] * frequencies
    for x in layouts(normal(1, *shape, dtype=dtype)):
        check_against_float64(
            lambda x: ops.rotary(x, *tables, interleaved=interleaved), lambda x: turn(x, angles, interleaved), (x,))
        with torch.no_grad():
            expected = ops.rotary(x, *tables, interleaved=interleaved)
            changed = x.detach().clone()
            assert ops.rotary_(changed, *tables, interleaved=interleaved) is changed
            assert torch.equal(changed, expected)


def test_tables_of_a_range_are_those_of_its_positions():
    x = normal(1, 2, 9, 3, 8).detach()
    for scaling in (None, RopeScaling(kind="linear", factor=4.0),
                    RopeScaling(kind="dynamic", factor=2.0, original_max_seq_len=6),
                    RopeScaling(kind="yarn", factor=8.0, original_max_seq_len=16)):
        for start in (0, 5, 300):
            tensor = torch.arange(start, start + 9).expand(2, 9)
            options = {"scaling": scaling, "seq_len": start + 9}
            by_range = ops.rotary(x, *ops.rope_tables(range(start, start + 9), 8, 1e4, **options))
            torch.testing.assert_close(by_range, ops.rotary(x, *ops.rope_tables(tensor, 8, 1e4, **options)))


def test_tables_are_kept():
    assert ops.rope_tables(range(5), 8, 1e4)[0].data_ptr() == ops.rope_tables(range(7), 8, 1e4)[0].data_ptr()
    with torch.inference_mode():
        cos, sin, _ = ops.rope_tables(range(6), 8, 77.0)
    assert not cos.is_inference()
    x = normal(1, 1, 6, 1, 8)
    ops.rotary(x, cos, sin).sum().backward()


def test_a_fused_projection_is_rotated_in_place():
    """Query and key heads side by side in one tensor, beside values that stay."""
    qkv = normal(1, 2, 5, 7 * 8).detach()
    heads = qkv.view(2, 5, 7, 8)
    tables = ops.rope_tables(range(5), 8, 1e4)
    expected = torch.cat((ops.rotary(heads[:, :, :6], *tables), heads[:, :, 6:]), 2)
    ops.rotary_(heads[:, :, :6], *tables)
    assert torch.equal(qkv, expected.flatten(2))
    with pytest.raises(InputError, match="needs a gradient"):
        ops.rotary_(normal(1, 2, 5, 6, 8), *tables)


def test_a_recorded_step_reads_its_positions_when_it_runs():
    positions, x = torch.tensor([[3]]), normal(1, 1, 1, 2, 8).detach()
    with record("test") as recorded:
        ops.rotary(x, *ops.rope_tables(positions, 8, 1e4, seq_len=10))
    assert len(recorded.launches) == 1
    stretched = RopeScaling(kind="dynamic", factor=2.0, original_max_seq_len=6)
    with pytest.raises(UnsupportedError, match="kind 'dynamic' given for 10 tokens"), record("test"):
        ops.rope_tables(positions, 8, 1e4, stretched, seq_len=10)


def test_registration():
    x, cos, sin = normal(1, 2, 5, 3, 8), normal(2, 5, 4).detach(), normal(3, 5, 4).detach()
    rows = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    for arguments in ((x, cos, sin, None, 1.0, False), (x, cos, sin, rows, -1.0, True)):
        torch.library.opcheck(_ROTARY.registered, arguments)


def test_compiled():
    x = normal(1, 2, 5, 3, 8)
    tables = ops.rope_tables(range(5), 8, 1e4)
    check_compiled(lambda x: ops.rotary(x, *tables), (x,))
    check_compiled(lambda x: ops.rotary(x, *ops.rope_tables(torch.arange(5)[None], 8, 1e4)), (x,))


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference(interleaved):
    x, tables = normal(1, 2, 5, 3, 8, dtype=torch.float64), ops.rope_tables(range(5), 6, 1e4)
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, *tables, interleaved=interleaved), x)


def test_errors():
    x, tables = torch.ones(2, 5, 3, 8), ops.rope_tables(range(5), 8, 1e4)
    with pytest.raises(ShapeError, match=r"a row for each of 5 tokens"):
        ops.rotary(x, *ops.rope_tables(range(4), 8, 1e4))
    with pytest.raises(ShapeError, match=r"x_BSHD has 2\*R\+still=8 .*, so still would be -2"):
        ops.rotary(x, *ops.rope_tables(range(5), 10, 1e4))
    with pytest.raises(ShapeError, match=r"x_BSHD has 3 axes, \[5, 3, 8\]; expected 4"):
        ops.rotary(x[0], *tables)
    with pytest.raises(ShapeError, match=r"rows_CS has B=3 .* but x_BSHD has B=2 .*; 1 would fit as well"):
        ops.rotary(x, *tables[:2], torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(InputError, match="positions: -1 given"):
        ops.rope_tables(torch.tensor([[0, -1]]), 8, 1e4)
    with pytest.raises(InputError, match="expected consecutive numbers"):
        ops.rope_tables(range(0, 10, 2), 8, 1e4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions, factor", [
    (None, 1.0), (None, 0.25), (torch.tensor([[5, 0, 2, 9, 9, 1], [0, 1, 2, 3, 4, 5]]), 0.5)])
def test_rotary_embedding(positions, factor, interleaved, dtype):
    """The function of the documents: positions given or not, scaled or not."""
    x = normal(1, 2, 6, 3, 12, dtype=dtype)
    places = torch.arange(6).expand(2, 6) if positions is None else positions
    angles = places[:, :, None] * 1e4 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12) * factor
    check_against_float64(
        lambda x: ops.rotary_embedding(x, positions, scaling_factor=factor, interleaved=interleaved),
        lambda x: turn(x, angles, interleaved), (x,))
    if not interleaved:
        cos, sin = angles.cos()[:, :, None].float(), angles.sin()[:, :, None].float()
        check_against_float64(
            lambda x: ops.apply_rotary_pos_emb(x, cos, sin), lambda x: turn(x, angles, False), (x,))
    with pytest.raises(ShapeError, match=r"x_BSHD has 2\*R=5 .* there is no R to that"):
        ops.rotary_embedding(torch.ones(1, 2, 3, 5))


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_dynamic_rope(kind):
    x = normal(1, 1, 40, 2, 16)
    positions = torch.arange(40)[None]
    torch.testing.assert_close(
        ops.dynamic_rope(x, positions, max_position=40, scaling_type=kind), ops.rotary_embedding(x, positions))
    stretch, frequencies = 40 / 10, 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    factor = 1.0
    if kind == "linear":
        frequencies = frequencies / stretch
    elif kind == "ntk":
        frequencies = (1e4 * stretch ** (16 / 14)) ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    else:
        scaling = RopeScaling(kind="yarn", factor=stretch, original_max_seq_len=10)
        frequencies, factor = ops.rope_frequencies(16, 1e4, scaling)  # held to transformers' in test_rotary
    check_against_float64(
        lambda x: ops.dynamic_rope(x, positions, max_position=10, scaling_type=kind),
        lambda x: turn(x, positions[:, :, None] * frequencies.double(), False) * factor, (x,), factor=2)
    with pytest.raises(InputError, match="scaling_type: 'longrope' given"):
        ops.dynamic_rope(x, positions, scaling_type="longrope")


def test_cos_sin_embedding():
    cos, sin = ops.cos_sin_embedding(50, 6)
    assert cos.shape == sin.shape == (50, 6)
    for place in (0, 1, 49):
        for i in range(6):
            angle = place * 1e4 ** (-(i // 2 * 2) / 6)
            assert cos[place, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[place, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert ops.cos_sin_embedding(3, 4, dtype="bf16")[0].dtype == torch.bfloat16
    with pytest.raises(InputError, match="dim even"):
        ops.cos_sin_embedding(3, 5)


def test_alibi():
    assert ops.alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert ops.alibi_slopes(3)[0].item() == pytest.approx(2 ** (-8 / 3))
    bias = ops.alibi_bias(5, 4)
    for head, query, key in ((0, 4, 1), (3, 2, 2), (2, 0, 3)):
        assert bias[head, query, key].item() == pytest.approx(2 ** (-2.0 * (head + 1)) * (key - query))
    with pytest.raises(InputError, match="num_heads: 0 given"):
        ops.alibi_slopes(0)
