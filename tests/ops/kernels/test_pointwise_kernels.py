"""The kernels of norms, activations, rotation and look-ups, and of their gradients, on every backend: against the plain
expressions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera import ops
from tessera.ops import activations, mlp, norm
from tessera.ops.kernels import activations as activation_kernels
from tessera.ops.kernels import embedding as embedding_kernels
from tessera.ops.kernels import layer_norm as layer_norm_kernels
from tessera.ops.kernels import rms_norm as rms_norm_kernels
from tessera.ops.kernels.rope import rope_interleaved_kernel, rope_kernel
from tessera.ops.rotary import _ROTARY
from tests.kernel.backends import BACKENDS, launch

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
EPS = 1e-5


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def check(actual: Tensor, expected: Tensor) -> None:
    """Relative to the largest value: a few roundings of f32, or one of the result's type."""
    assert actual.isfinite().all()
    tolerance = (2e-5 if actual.dtype == torch.float32 else 2**-7) * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("n, width", [(5, 33), (37, 300)])
def test_norms_and_their_gradients(backend, dtype, n, width):
    x, residual, grad, upstream = (normal(i, n, width, dtype=dtype) for i in range(4))
    weight, bias = normal(5, width), normal(6, width)
    wide = [t.double() for t in (grad, x, weight)]
    out, total = nans(1, n, width, dtype=dtype), nans(1, n, width, dtype=dtype)
    launch(rms_norm_kernels.add_rms_norm_kernel, backend, x[None], residual[None], weight, out, total, EPS)
    assert torch.equal(total[0], x + residual)
    check(out[0], norm._rms_norm_reference(total[0].double(), weight.double(), EPS))
    for extra in (None, upstream):
        grad_x, partial, grad_weight = nans(n, width, dtype=dtype), nans(2, width), nans(width)
        launch(rms_norm_kernels.rms_norm_backward_kernel, backend, grad, x, weight, extra, grad_x, partial,
               grad_weight, EPS)
        expected = norm._rms_norm_backward_reference(*wide, None if extra is None else extra.double(), EPS)
        check(grad_x, expected[0])
        check(grad_weight, expected[1])
    grad_x, partial, partial_bias = nans(n, width, dtype=dtype), nans(2, width), nans(2, width)
    grad_weight, grad_bias = nans(width), nans(width)
    launch(layer_norm_kernels.layer_norm_backward_kernel, backend, grad, x, weight, grad_x, partial, partial_bias,
           grad_weight, grad_bias, EPS)
    expected = norm._layer_norm_backward_reference(*wide, bias.double(), EPS)
    for actual, wanted in zip((grad_x, grad_weight, grad_bias), expected):
        check(actual, wanted)


@pytest.mark.parametrize("scale", [1e30, 1e-20])
def test_norms_at_the_ends_of_the_range(backend, scale):
    x, weight, out = normal(1, 1, 4, 40) * scale, normal(2, 40), nans(1, 4, 40)
    x[0, 2] = normal(3, 40)
    launch(rms_norm_kernels.rms_norm_kernel, backend, x, weight, out, EPS)
    check(out, norm._rms_norm_reference(x.double(), weight.double(), EPS))


@pytest.mark.parametrize("kind, dtype", [
    ("silu", torch.bfloat16), *((kind, torch.float32) for kind in (*ops.ACTIVATIONS, "softcap"))])
def test_activations_and_their_gradients(backend, kind, dtype):
    x, up, grad = (normal(i, 2, 3, 33, dtype=dtype) * 2 for i in range(3))
    wide = [t.double() for t in (grad, x, up)]
    beta = 1.5
    out, first, second = (nans(2, 3, 33, dtype=dtype) for _ in range(3))
    launch(activation_kernels.activation_kernel, backend, x, out, kind, beta)
    check(out, activations.reference(wide[1], kind, beta))
    launch(activation_kernels.activation_backward_kernel, backend, grad, x, out, kind, beta)
    check(out, wide[0] * activations.reference_slope(wide[1], kind, beta))
    packed = nans(2, 3, 33, dtype=dtype)
    launch(activation_kernels.gated_kernel, backend, x, up, out, kind, beta)
    launch(activation_kernels.gated_packed_kernel, backend, torch.cat((x, up), -1), packed, kind, beta)
    check(out, mlp._reference(*wide[1:], kind, beta))
    assert torch.equal(out, packed)
    launch(activation_kernels.gated_backward_kernel, backend, grad, x, up, first, second, kind, beta)
    for actual, expected in zip((first, second), mlp._backward_reference(*wide, kind, beta)):
        check(actual, expected)


@DTYPES
@pytest.mark.parametrize("rest, rows", [(0, None), (5, [[3, 0, 8, 8]]), (0, [[1, 2, 3, 4], [8, 0, 0, 5]])])
def test_rotation(backend, dtype, rest, rows):
    x, out = normal(1, 2, 4, 3, 10 + rest, dtype=dtype), nans(2, 4, 3, 10 + rest, dtype=dtype)
    places = None if rows is None else torch.tensor(rows)
    angles = normal(2, 4 if rows is None else 9, 5)
    tables = angles.cos(), angles.sin()
    launch(rope_kernel, backend, x, *tables, out, places, -1.0)
    wide = [t.double() for t in tables]
    check(out, _ROTARY.reference(x.double(), *wide, places, -1.0, False))
    launch(rope_interleaved_kernel, backend, x, *tables, out, places, 1.0)
    check(out, _ROTARY.reference(x.double(), *wide, places, 1.0, True))


@DTYPES
@pytest.mark.parametrize("width", [33, 130])
def test_look_ups_and_the_gradient_of_the_table(backend, dtype, width):
    table, ids, scale = normal(1, 11, width), torch.tensor([3, 0, 10, 3, 3]), normal(2, 11).abs()
    codes, out = ops.quantize_rows(table, torch.int8)[0], nans(5, width, dtype=dtype)
    for scales in (scale, scale[:1]):
        launch(embedding_kernels.scaled_embedding_kernel, backend, ids, codes, scales, out)
        check(out, codes.double()[ids] * scales.double().expand(11)[ids, None])
    grad, grad_table = normal(3, 5, width, dtype=dtype), torch.zeros(11, width)
    launch(embedding_kernels.embedding_backward_kernel, backend, grad, ids, grad_table)
    check(grad_table, torch.zeros(11, width, dtype=torch.float64).index_add(0, ids, grad.double()))
    sparse = ops.to_block_sparse(table, 0.4, block_size=4, dtype=torch.int8)
    launch(embedding_kernels.sparse_embedding_kernel, backend, ids, sparse.blocks_MRC, sparse.pointers, sparse.columns,
           sparse.scales, out)
    check(out, sparse.to_dense()[ids])
