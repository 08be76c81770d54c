"""The kernels of the documents against float64 references, on every backend, at ragged sizes, in f32 and bf16."""

import importlib.util
from pathlib import Path

import pytest
import torch

import tessera as ts
from tessera.errors import LaunchError

from .backends import BACKENDS, launch

SIZES = [1, 7, 33, 1000]
_SPEC = importlib.util.spec_from_file_location(
    "kernels_of_the_documents", Path(__file__).parents[2] / "examples" / "kernels_of_the_documents.py")
doc = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(doc)



def on_backends(names: str, *cases):
    """Parametrize over backends and sizes; under Triton's slow interpreter all but the second size are slow tests."""
    params = []
    for backend in BACKENDS:
        for number, case in enumerate(cases):
            slow = backend == "triton-interpreter" and number != min(1, len(cases) - 1)
            values = case if isinstance(case, tuple) else (case,)
            params.append(pytest.param(backend, *values, marks=[pytest.mark.slow] if slow else []))
    return pytest.mark.parametrize(["backend", *names.split()], params)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def kernel_in(kernel, dtype: torch.dtype):
    """The document's kernel, which is in bf16, or the same in f32."""
    return kernel if dtype == torch.bfloat16 else kernel.retype({ts.bf16: ts.f32})


def near(actual: torch.Tensor, expected: torch.Tensor, size: float = 1.0) -> None:
    """Equal within the rounding of the output's dtype; `size` scales it where sums are long or cancel."""
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[actual.dtype] * size
    torch.testing.assert_close(actual.double(), expected, rtol=unit, atol=unit)


@dtypes
@on_backends("rows", *SIZES)
@pytest.mark.parametrize("width", [1, 33, 1000])
def test_rms_norm(backend, dtype, rows, width):
    if rows * width > 100_000:
        width = 200
    x, weight = draw(rows, width, dtype=dtype, scale=3), draw(width, seed=1)
    out = torch.full_like(x, torch.nan)
    launch(kernel_in(doc.rms_norm_kernel, dtype), backend, x, weight, out, 1e-5)
    x64 = x.double()
    near(out, x64 / torch.sqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * weight, 2)


@dtypes
@on_backends("rows width hidden", (1, 7, 33), (33, 16, 7), (130, 65, 100), (1000, 24, 40))
def test_swiglu(backend, dtype, rows, width, hidden):
    x = draw(rows, width, dtype=dtype)
    gate, up = (draw(width, hidden, seed=s, dtype=dtype, scale=width**-0.5) for s in (1, 2))
    down = draw(hidden, width, seed=3, dtype=dtype, scale=hidden**-0.5)
    out = torch.full_like(x, torch.nan)
    launch(kernel_in(doc.swiglu_fused_kernel, dtype), backend, x, gate, up, down, out, 1.5)
    g = x.double() @ gate.double()
    near(out, (g * torch.sigmoid(1.5 * g) * (x.double() @ up.double())) @ down.double(), 2)


def attention(q, k, v, scale, bias=0.0, causal=False):
    q, k, v = (t.double() for t in (q, k, v))
    scores = q @ k.transpose(1, 2) * scale + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.softmax(scores, -1) @ v


@dtypes
@on_backends("length", 1, 7, 33, 150)
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention(backend, dtype, length, causal):
    q, k, v = (draw(3, length, 16, seed=s, dtype=dtype) for s in range(3))
    out = torch.full_like(q, torch.nan)
    launch(kernel_in(doc.flash_attention_kernel, dtype), backend, q, k, v, out, is_causal=causal, scale=0.25)
    near(out, attention(q, k, v, 0.25, causal=causal), 4)


@on_backends("length", 100, 33)
def test_flash_attention_with_an_additive_mask(backend, length):
    q, k, v = (draw(2, length, 8, seed=s, dtype=torch.bfloat16) for s in range(3))
    mask = draw(length, length, seed=3)
    out = torch.full_like(q, torch.nan)
    launch(doc.flash_attention_kernel, backend, q, k, v, out, mask, scale=0.5)
    near(out, attention(q, k, v, 0.5, bias=mask.double()), 4)


@on_backends("length", 256, 80)
def test_flash_attention_with_dropout_keeps_the_mean(backend, length):
    """With values of one the output is the share of kept weight over 1 - p, whose mean is 1."""
    q, k = (draw(4, length, 8, seed=s) for s in range(2))
    v = torch.ones(4, length, 8)
    out = torch.full_like(q, torch.nan)
    kernel = kernel_in(doc.flash_attention_kernel, torch.float32)
    launch(kernel, backend, q, k, v, out, dropout_p=0.25, scale=0.1, seed=7)
    rows = out[..., 0]
    assert torch.equal(rows[..., None].expand(out.shape), out)
    spread = (0.25 / 0.75 / length) ** 0.5
    assert abs(rows.mean() - 1) < 0.01 and 0.6 * spread < rows.std() < 1.6 * spread
    assert rows.unique().numel() > 0.9 * rows.numel()  # no two blocks share a pattern
    again = torch.full_like(q, torch.nan)
    launch(kernel, backend, q, k, v, again, dropout_p=0.25, scale=0.1, seed=7)
    assert torch.equal(again, out)


@dtypes
@on_backends("length", *SIZES)
@pytest.mark.parametrize("width", [2, 34])
def test_rotary_embedding(backend, dtype, length, width):
    x = draw(length, 3, width, dtype=dtype)
    angles = draw(length, width // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()
    out = torch.full_like(x, torch.nan)
    launch(kernel_in(doc.rotary_embedding_kernel, dtype), backend, x, cos, sin, out)
    left, right = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    near(out, torch.cat([left * c - right * s, left * s + right * c], -1))


@dtypes
@on_backends("rows", *SIZES)
def test_casted_embedding(backend, dtype, rows):
    table = draw(50, 33, scale=2).to(torch.float8_e4m3fn)
    indices = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(rows)).int()
    out = torch.full((rows, 33), torch.nan, dtype=dtype)
    launch(kernel_in(doc.casted_embedding_kernel, dtype), backend, indices, table, out, 0.7)
    near(out, table.double()[indices.long()] * torch.tensor(0.7).double())


@on_backends("rows inner outer", (1, 7, 33), (7, 33, 5), (33, 100, 40))
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_linear(backend, rows, inner, outer, with_bias):
    bits = torch.Generator().manual_seed(rows)
    x, weight = (torch.randint(-128, 128, s, generator=bits).to(torch.int8) for s in ((rows, inner), (outer, inner)))
    bias, w_scale = draw(outer, seed=1), draw(outer, seed=2).abs()
    out = torch.full((rows, outer), torch.nan, dtype=torch.bfloat16)
    launch(doc.int8_linear_kernel, backend, x, weight, bias if with_bias else None, out, 0.01, w_scale, 0.5)
    scaled = (x.double() @ weight.double().T) * 0.01 * w_scale
    near(out, (scaled + bias if with_bias else scaled) * 0.5, 2)


@on_backends("rows block blocks_in_row", (1, 4, 1), (7, 4, 5), (33, 16, 3))
def test_sparse_embedding(backend, rows, block, blocks_in_row):
    """A table of 12 rows, each of `blocks_in_row` places for blocks of block * block elements, half of them filled."""
    bits = torch.Generator().manual_seed(rows)
    filled = torch.rand(12, blocks_in_row, generator=bits) < 0.5
    pointers = torch.cat([torch.zeros(1), filled.sum(1).cumsum(0)]).int()
    count = max(int(pointers[-1]), 1)
    data = draw(count, block, block, seed=2).to(torch.float8_e4m3fn)
    columns = (filled.nonzero()[:, 1] * block).int()  # the kernel counts places in units of `block`
    columns = torch.cat([columns, torch.zeros(count - len(columns), dtype=torch.int32)])
    scales = draw(count, seed=3)
    width = blocks_in_row * block * block
    indices = torch.randint(0, 12, (rows,), generator=bits).int()
    out = torch.full((rows, width), torch.nan, dtype=torch.bfloat16)
    launch(doc.sparse_embedding_kernel, backend, indices, data, columns, pointers, scales, out)
    table = torch.zeros(12, width, dtype=torch.float64)
    for row in range(12):
        for k in range(int(pointers[row]), int(pointers[row + 1])):
            start = int(columns[k]) * block
            table[row, start:start + block * block] = data[k].double().flatten() * scales[k].double()
    near(out, table[indices.long()])


@dtypes
@pytest.mark.parametrize("rows", [1, 33])
@on_backends("vocabulary", *SIZES)
def test_stable_cross_entropy(backend, dtype, rows, vocabulary):
    logits = draw(rows, vocabulary, dtype=dtype, scale=30)
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0)).int()
    targets[::5] = -100
    loss = torch.full((rows,), torch.nan)
    launch(kernel_in(doc.stable_cross_entropy_kernel, dtype), backend, logits, targets, loss, vocabulary)
    expected = torch.nn.functional.cross_entropy(logits.double(), targets.long(), reduction="none")
    near(loss, expected, 20)


@dtypes
@on_backends("classes", 1, 7, 33, 300)
def test_fused_softmax_cross_entropy(backend, dtype, classes):
    logits = draw(5, classes, dtype=dtype, scale=3)
    targets = torch.randint(0, classes, (5,), generator=torch.Generator().manual_seed(0)).int()
    loss = torch.full((5,), torch.nan)
    launch(kernel_in(doc.fused_softmax_cross_entropy_kernel, dtype), backend, logits, targets, loss, classes)
    near(loss, torch.nn.functional.cross_entropy(logits.double(), targets.long(), reduction="none"), 20)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def dequantized(layer) -> torch.Tensor:
    return layer.weight.double() * layer.weight_scale.double()


@dtypes
@on_backends("batch length", (1, 1), (2, 7), (3, 33))
def test_fused_attention_block(backend, dtype, batch, length):
    torch.manual_seed(length)
    width, heads = 24, 3
    layer = doc.FusedTransformerLayer(width, heads)
    x = draw(batch * length, width, dtype=dtype)
    angles = draw(length, width // heads // 2, seed=1)
    out = torch.full_like(x, torch.nan)
    launch(kernel_in(layer.fused_attention_block, dtype), backend, x, angles.cos(), angles.sin(), None, out)
    qkv = rms(x.double()) @ dequantized(layer.qkv).T
    q, k, v = (t.view(batch, length, heads, -1) for t in qkv.chunk(3, -1))
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    q, k = (torch.cat([t[..., :4] * cos - t[..., 4:] * sin, t[..., :4] * sin + t[..., 4:] * cos], -1) for t in (q, k))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    near(out, mixed.transpose(1, 2).reshape(batch * length, width) @ dequantized(layer.out_proj).T, 4)


@dtypes
@on_backends("rows", 1, 7, 33, 200)
def test_fused_mlp_block(backend, dtype, rows):
    torch.manual_seed(rows)
    layer = doc.FusedTransformerLayer(24, 3)
    x = draw(rows, 24, dtype=dtype)
    out = torch.full_like(x, torch.nan)
    launch(kernel_in(layer.fused_mlp_block, dtype), backend, x, out)
    gate, up = (rms(x.double()) @ dequantized(layer.mlp_gate_up).T).chunk(2, -1)
    near(out, (torch.nn.functional.silu(gate) * up) @ dequantized(layer.mlp_down).T, 4)


def test_an_index_outside_the_vocabulary_is_an_error_on_interp():
    out = torch.zeros(1, 4, dtype=torch.bfloat16)
    with pytest.raises(LaunchError, match=r"embeddings.*index 9 of an axis of 5"):
        launch(doc.casted_embedding_kernel, "interp", torch.tensor([9], dtype=torch.int32),
               torch.zeros(5, 4).to(torch.float8_e4m3fn), out, 1.0)
