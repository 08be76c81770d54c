"""The production kernels against float64, on the interpreter and on the CPU, at ragged sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from tessera.kernel import Kernel, backends
from tessera.ops import kernels

BACKENDS = ["interp", "cpu"]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [(1, 1), (3, 7), (5, 33), (2, 64), (9, 200), (2, 1000)]

pytestmark = [pytest.mark.parametrize("backend", BACKENDS),
              pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])]


@pytest.fixture
def randn(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(len(request.node.name))
    return lambda *shape: torch.randn(shape, generator=generator)


def launch(kernel: Kernel, backend: str, *args: object, **kwargs: object) -> None:
    """Launch a fresh copy of a kernel, compiled by one backend."""
    with mock.patch.object(backends, "get", return_value=importlib.import_module(f"tessera.kernel.backends.{backend}")):
        kernel.retype({})(*args, **kwargs)


def check(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Within a few f32 roundings, or one rounding to the result's dtype."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2**-8
    assert actual.isfinite().all()
    assert (actual.double() - expected).abs().max() <= tolerance * scale * max(1.0, expected.abs().max().item())


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("shape", ROWS)
def test_rms_norm(backend, dtype, shape, randn):
    x, weight, out = randn(*shape).to(dtype), randn(shape[1]), nans(*shape, dtype=dtype)
    launch(kernels.rms_norm_kernel, backend, x[None], weight, out[None], eps=1e-5)
    check(out, torch.rms_norm(x.double(), shape[1:], weight.double(), 1e-5))


@pytest.mark.parametrize("shape", ROWS)
def test_layer_norm(backend, dtype, shape, randn):
    x, weight, bias, out = randn(*shape).to(dtype), randn(shape[1]), randn(shape[1]), nans(*shape, dtype=dtype)
    launch(kernels.layer_norm_kernel, backend, x[None] + 3, weight, bias, out[None])
    check(out, torch.layer_norm((x + 3).double(), shape[1:], weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("shape", ROWS)
def test_softmax(backend, dtype, shape, randn):
    x, out = (randn(*shape) * 4).to(dtype), nans(*shape, dtype=dtype)
    launch(kernels.softmax_kernel, backend, x, out)
    check(out, x.double().softmax(-1))


@pytest.mark.parametrize("shape", ROWS)
def test_cross_entropy(backend, dtype, shape, randn):
    x = (randn(*shape) * 4).to(dtype)
    targets = (randn(shape[0]).abs() * 1e6).long() % shape[1]
    targets[-1] = -100 if shape[0] > 1 else 0
    loss = nans(shape[0])
    launch(kernels.cross_entropy_kernel, backend, x, targets.int(), loss)
    check(loss, torch.nn.functional.cross_entropy(x.double(), targets, reduction="none"))


@pytest.mark.parametrize("shape", ROWS)
def test_swiglu(backend, dtype, shape, randn):
    gate, up, out = randn(*shape).to(dtype), randn(*shape).to(dtype), nans(*shape, dtype=dtype)
    launch(kernels.gated_kernel, backend, gate[None], up[None], out[None])
    check(out, torch.nn.functional.silu(gate.double()) * up.double())


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 8), (5, 3, 66), (2, 9, 128)])
def test_rope(backend, dtype, shape, randn):
    x, out = randn(*shape).to(dtype), nans(*shape, dtype=dtype)
    angles = randn(shape[0], shape[2] // 2)
    launch(kernels.rope_kernel, backend, x[None], angles.cos(), angles.sin(), out[None])
    first, second = x.double().chunk(2, -1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    check(out, torch.cat([first * cos - second * sin, first * sin + second * cos], -1))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("count,width", [(1, 1), (7, 33), (40, 100)])
def test_casted_embedding(backend, dtype, table_dtype, count, width, randn):
    table = (randn(11, width) * 8).to(table_dtype)
    ids = (randn(count).abs() * 1e6).int() % 11
    out = nans(count, width, dtype=dtype)
    launch(kernels.casted_embedding_kernel, backend, ids, table, out, 0.25)
    check(out, table.double()[ids] * 0.25)


@pytest.mark.parametrize("m,k,n", [(1, 1, 1), (7, 33, 5), (65, 40, 70), (1, 300, 130)])
def test_gemm_and_linear(backend, dtype, m, k, n, randn):
    a, b = randn(m, k).to(dtype), randn(k, n).to(dtype)
    for kernel, right in ((kernels.gemm_kernel, b), (kernels.linear_kernel, b.t().contiguous())):
        out = nans(m, n, dtype=dtype)
        launch(kernel, backend, a, right, out)
        check(out, a.double() @ b.double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads,kv_heads,length,keys,width", [
    (1, 1, 1, 1, 8), (2, 1, 7, 33, 16), (4, 2, 70, 70, 24), (1, 1, 130, 130, 64)])
def test_flash_attention(backend, dtype, causal, heads, kv_heads, length, keys, width, randn):
    q, out = randn(2, heads, length, width).to(dtype), nans(2, heads, length, width, dtype=dtype)
    k, v = (randn(2, kv_heads, keys, width).to(dtype) for _ in range(2))
    launch(kernels.flash_attention_kernel, backend, q, k, v, out, width**-0.5, causal=causal)
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length) if causal else None
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    check(out, expected, 2)
