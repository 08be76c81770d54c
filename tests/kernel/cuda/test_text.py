"""What the generated text looks like, and that ptxas takes it for sm_90, with no GPU."""

import ast
import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
import triton

import tessera as ts
from tessera import Tile, int32, tile
from tessera.errors import UnsupportedError
from tessera.kernel.backends import cuda
from tessera.kernel.dims import Dim
from tessera.types import bf16, f32, uint8

from ..backends import launch
from ..programs import Program
from .test_interpreted import rms_norm

_SPEC = importlib.util.spec_from_file_location(
    "documents", Path(__file__).parents[3] / "examples" / "kernels_of_the_documents.py")
doc = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(doc)
SIZES = {"S": 256, "D": 64, "H": 4, "V": 5000, "D_ff": 96, "block_size": 16}


def text(program: Program, **sizes: int) -> str:
    return cuda.build(program.function, sizes).source


def test_a_row_that_fits_is_loaded_once_and_a_longer_one_is_looped_over():
    short, long = text(rms_norm(bf16), S=9, D=1000), text(rms_norm(bf16), S=9, D=50_000)
    assert short.count("tl.load(x_ptr") == 1 and "for " not in short
    assert long.count("tl.load(x_ptr") == 2 and long.count("for ") == 2


def test_the_text_does_not_depend_on_how_many_rows_there_are():
    compiled = cuda.Compiled(rms_norm(f32).function)
    sources = {compiled.texts([], [1000, rows]).source for rows in (1, 7, 64, 100_000)}
    assert len(sources) == 1


def test_halves_are_loaded_and_stored_where_they_lie():
    """Slices and concatenations are index arithmetic: no tensor is built of both halves."""
    p = Program("swap")
    x = p.load(p.tensor("x", ["S", "2*H"], f32))
    half = Dim.of("H")
    parts = [p.slice(x, [("all",), ("range", 1, half, None)], [p.size(start)]) for start in (half, Dim.of(0))]
    p.output("out", p.concat(parts, 1))
    source = text(p, S=5, H=33)
    assert source.count("tl.load(") == source.count("tl.store(") == 2 and "tl.where" not in source


def test_names_and_lines_of_the_source_are_kept():
    source = doc.rms_norm_kernel.source("cuda")
    ast.parse(source)
    for expected in ("def rms_norm_kernel(", "x_f32 = ", ": x_squared = tile.mul(x_f32, x_f32)"):
        assert expected in source


def test_what_cannot_be_expressed_names_the_line():
    p = Program()
    x = p.tensor("x", ["D"], uint8)
    p.atomic_add(x, p.load(x))
    with pytest.raises(UnsupportedError, match=r"made\.py:1: made: cuda: atomic_add: uint8 cannot be added to"):
        text(p, D=8)


@ts.kernel
def transposed(x: Tile["N", "N", f32]):
    x[:] = x.T


@ts.kernel
def multiplied(x: Tile["M", "N", f32], w: Tile["N", "N", f32]):
    x[:] = x @ w


@ts.kernel
def shifted(x: Tile["M", "N", f32]):
    x[1:] = x[:-1]


@ts.kernel
def looked_up(x: Tile["M", "N", f32], ids: Tile["M", int32]):
    x[:] = tile.gather(x, ids)


@pytest.mark.parametrize("kernel", [transposed, multiplied, shifted, looked_up], ids=lambda kernel: kernel.name)
def test_programs_that_would_read_what_others_write(kernel):
    with pytest.raises(UnsupportedError, match=r"test_text\.py:\d+: cuda: x is written where other programs, which run "
                                               r"at the same time, read it \(.*test_text\.py:\d+\); write to another"):
        cuda.build(kernel.trace(), {"M": 3000, "N": 300})


@ts.kernel
def in_place(x: Tile["M", "N", f32], y: Tile["M", "N", f32], w: Tile["N", "N", f32]):
    x[1:] = x[1:] * tile.rsqrt(tile.reduce_mean(x[1:] * x[1:], axis=-1) + 1.0)[:, None]
    y[:] = x @ w
    x[:] = x - tile.reduce_mean(y, axis=0)


def test_programs_write_where_they_alone_read():
    """Rows of a program's own, one program for all columns, and launches one after the other."""
    x, y, w = torch.randn(300, 40), torch.randn(300, 40), torch.randn(40, 40)
    results = []
    for backend in ("interp", "triton-interpreter"):
        results.append([t.clone() for t in (x, y, w)])
        launch(in_place, backend, *results[-1])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def cubins(kernel, **arguments) -> list[bytes]:
    function = kernel.trace(**arguments)
    return cuda.compile_to_cubin(function, {name: SIZES.get(name, 128) for name in function.sizes})


def check(kernel, **arguments) -> None:
    for code in cubins(kernel, **arguments):
        assert code[:4] == b"\x7fELF"


def test_cubin_of_embedding_and_cross_entropy():
    check(doc.casted_embedding_kernel)
    check(doc.stable_cross_entropy_kernel)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm_kernel", "swiglu_fused_kernel", "rotary_embedding_kernel",
                                  "int8_linear_kernel", "sparse_embedding_kernel",
                                  "fused_softmax_cross_entropy_kernel"])
def test_cubin_of_the_document_kernels(name):
    check(getattr(doc, name))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_cubin_of_flash_attention(causal):
    check(doc.flash_attention_kernel, is_causal=causal, scale=0.125)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sort", "cumsum", "argmax", "tanh"])
def test_cubin_of_row_operations(kind):
    p = Program(kind)
    x = p.load(p.tensor("x", ["S", "D"], f32))
    made = {"sort": lambda: p.sort(x, descending=True)[0], "cumsum": lambda: p.scan("cumsum", x),
            "argmax": lambda: p.reduce("argmax", x), "tanh": lambda: p.unary("tanh", x)}[kind]()
    p.output("out", made)
    assert all(code[:4] == b"\x7fELF" for code in cuda.compile_to_cubin(p.function, {"S": 8, "D": 100}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 1000), (5, 131072)])
def test_rms_norm_on_the_gpu(rows, width):
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight, out = torch.randn(width, device="cuda"), torch.empty_like(x)
    doc.rms_norm_kernel(x, weight, out, 1e-5)
    expected = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("length", [7, 150, 1024])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_on_the_gpu_and_in_a_graph(length, causal):
    q, k, v = (torch.randn(6, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(q)

    def run() -> None:
        doc.flash_attention_kernel(q, k, v, out, is_causal=causal, scale=0.125)

    run()
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    torch.testing.assert_close(out.double(), expected, rtol=2**-6, atol=2**-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    first = out.clone()
    out.zero_()
    graph.replay()
    assert torch.equal(out, first)


def test_attention_takes_blocks_that_fit_the_tensor_cores():
    """128 queries at a time in 16 bits, one tl.dot each for scores and values, eight warps."""
    from tessera.ops.kernels import flash_attention_kernel

    source = flash_attention_kernel.source("cuda", q=bf16, k=bf16, v=bf16, out=bf16, causal=True)
    assert source.count("tl.dot(") == 2 and "tl.full((128,)" in source
    function = flash_attention_kernel.trace(q=bf16, k=bf16, v=bf16, out=bf16, causal=True)
    assert function.schedule["mixed_dot"] == "bf16"


def attention_gradient(name: str, dtype):
    """(kernel, the dtypes of its arguments)."""
    from tessera.ops.kernels import flash_attention_backward

    written = {"q": ("out", "grad_q"), "kv": ("grad_k", "grad_v")}[name]
    arguments = dict.fromkeys(("grad", "q", "k", "v", *written), dtype)
    return getattr(flash_attention_backward, f"flash_attention_grad_{name}_kernel"), {**arguments, "causal": True}


@pytest.mark.parametrize(("name", "dots"), [("q", 3), ("kv", 4)])
def test_gradients_of_attention_multiply_what_they_computed_as_it_lies(name, dots):
    """One tl.dot a product, in bf16 or three of tf32; no weight is transposed through shared memory."""
    kernel, arguments = attention_gradient(name, bf16)
    source = kernel.source("cuda", **arguments)
    assert source.count("tl.dot(") == dots and "tl.trans(weights" not in source and "tl.trans(slopes" not in source
    kernel, arguments = attention_gradient(name, f32)
    assert kernel.source("cuda", **arguments).count('input_precision="tf32x3"') == dots


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "kv"])
def test_gradients_of_attention_stay_in_registers(name, tmp_path):
    kernel, arguments = attention_gradient(name, bf16)
    function = kernel.trace_for("cuda", (), arguments)
    (code,) = cuda.compile_to_cubin(function, {n: {"D": 64, "H": 8, "H_kv": 8}.get(n, 1024) for n in function.sizes})
    (tmp_path / "code.cubin").write_bytes(code)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", tmp_path / "code.cubin"], capture_output=True, text=True, check=True)
    assert "STACK:0 " in usage.stdout
