"""Linear layers with quantized weights against float64, on the interpreter and on the CPU."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from tessera.errors import InputError
from tessera.ops import kernels
from tessera.ops.kernels.quantized import from_blocks, pack_int4

from .test_kernels import launch, nans

SHAPES = [(1, 32), (7, 64), (33, 96), (50, 1056)]
BACKENDS = pytest.mark.parametrize("backend", ["interp", "cpu"])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, x: Tensor, w: Tensor) -> None:
    bound = (x.shape[1] + 4) * 2.0**-24 * (x.double().abs() @ w.abs().T) + 1e-30
    if actual.dtype == torch.bfloat16:
        bound += 2.0**-8 * (x.double() @ w.T).abs()
    assert ((actual.double() - x.double() @ w.T).abs() <= bound).all()


def linear(backend: str, kind: str, x: Tensor, parts: tuple[Tensor, Tensor, Tensor | None], n: int) -> Tensor:
    quants, scale, minimum = parts
    out = nans(len(x), n)
    if kind == "Q8_0":
        launch(kernels.int8_group_linear_kernel, backend, x, quants, scale, out)
    else:
        launch(kernels.int4_linear_kernel, backend, x, quants, scale, minimum, out)
    return out


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (1, 70, 100), (3, 33, 37), (8, 64, 64), (20, 31, 130)])
def test_int8_with_a_scale_a_row(backend, dtype, m, n, k):
    x = draw(m, k, seed=m).to(dtype)
    quants, scale = (draw(n, k, seed=n) * 50).to(torch.int8), draw(n, seed=k).abs()
    out = nans(m, n, dtype=dtype)
    launch(kernels.int8_linear_kernel, backend, x, quants, scale, out)
    close(out, x, quants.double() * scale.double()[:, None])


@BACKENDS
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("n,k", SHAPES)
def test_blocks_of_a_gguf_file(backend, kind, n, k):
    """What the gguf package packs and unpacks, at several M; a row has the same bits in each."""
    type_ = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(draw(n, k, seed=n * k).numpy(), type_)
    weight = torch.from_numpy(gguf.quants.dequantize(raw, type_)).double()
    parts = from_blocks(torch.from_numpy(raw), kind)
    x = draw(33, k, seed=k)
    full = linear(backend, kind, x, parts, n)
    close(full, x, weight)
    if backend == "cpu":
        for m in (1, 2, 3, 7, 8, 16, 17):
            assert torch.equal(linear(backend, kind, x[:m], parts, n), full[:m]), m


def test_pack_int4():
    quants = torch.arange(-8, 8).repeat(3).reshape(4, 12)
    packed = pack_int4(quants)
    low, high = (packed & 15).int(), (packed >> 4).int()
    back = torch.stack([low, high], -1).reshape(4, 12)
    assert torch.equal(torch.where(back > 7, back - 16, back), quants.int())


def test_what_is_refused():
    with pytest.raises(InputError, match="last dim of 3"):
        pack_int4(torch.zeros(2, 3))
    with pytest.raises(InputError, match="Q5_0"):
        from_blocks(torch.zeros(1, 18, dtype=torch.uint8), "Q5_0")
    with pytest.raises(InputError, match=r"groups \* 18"):
        from_blocks(torch.zeros(1, 20, dtype=torch.uint8), "Q4_0")
