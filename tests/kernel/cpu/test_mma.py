"""f32 matmul blocks against float64, and their contract: a row's bits do not depend on how it is computed."""

import ctypes
import struct

import pytest
import torch

from tessera.kernel.backends.cpu import jit, mma, threads
from tessera.kernel.backends.cpu.emit import F32, I64, PTR, VOID, Module, const
from tessera.kernel.backends.cpu.host import Target, runs_here, target
from tessera.kernel.backends.cpu.mma_pack import strided, transpose

BLOCK_M, BLOCK_N = 32, 96  # columns: whole panels on every processor
PAIRS = [("row", "row"), ("row", "column"), ("row", "strided"), ("row", "panels"), ("column", "row"),
         ("strided", "row")]
SIZES = [(1, 1, 1), (1, 33, 7), (7, 33, 255), (33, 7, 1000), (64, 100, 300), (13, 255, 33), (5, 9, 0)]


def product_module(host: Target, a_layout: str, w_layout: str, accumulate: bool = False) -> Module:
    """C[m, n] (+)= A @ W over blocks; args: A, W, C, m, n, k."""
    module = Module()

    def sizes(function):
        return [function.builder.load(function.builder.gep(function.args[0], 3 + i, I64), I64) for i in range(3)]

    items = module.function("items_0", I64, [("args", PTR)])
    m, n, _ = sizes(items)
    items.builder.ret(items.builder.mul(items.builder.ceil_div(m, BLOCK_M), items.builder.ceil_div(n, BLOCK_N)))
    body = module.function("body_0", VOID, [("args", PTR), ("begin", I64), ("end", I64)])
    b, (args, begin, end) = body.builder, body.args
    m, n, k = sizes(body)
    a, w, c = (b.load(b.gep(args, i, I64), PTR) for i in range(3))
    scratch = b.alloca(F32, _scratch(host))
    one, columns = const(1, I64), b.ceil_div(n, BLOCK_N)
    strides = {"row": (k, one), "column": (one, m), "strided": (b.mul(k, 2), b.value(2, I64))}
    w_strides = {"row": (one, n), "column": (k, one), "strided": (const(2, I64), b.mul(n, 2))}
    with b.for_(begin, end) as loop:
        i, j = b.mul(b.udiv(loop.i, columns), BLOCK_M), b.mul(b.urem(loop.i, columns), BLOCK_N)
        rows, k_stride = strides[a_layout]
        left = strided(b, b.gep(a, b.mul(i, rows), F32), rows, k_stride)
        if w_layout == "panels":
            right = mma.Panels(pointer=b.gep(w, b.mul(j, k), F32), depth=k)
        else:
            lane, k_stride = w_strides[w_layout]
            right = strided(b, b.gep(w, b.mul(j, lane), F32), lane, k_stride)
        mma.matmul(b, host, m=b.min(b.sub(m, i), BLOCK_M), n=b.min(b.sub(n, j), BLOCK_N), k=k, a=left, w=right,
                   c=b.gep(c, b.add(b.mul(i, n), j), F32), ldc=n, scratch=scratch, accumulate=accumulate)
    b.ret()
    threads.emit_launch(module, 1)
    return module


def _scratch(host: Target) -> int:
    module = Module()
    b = module.function("f", VOID, []).builder
    return mma.scratch_floats(host, b, const(BLOCK_M, I64)).const or 1 << 18


def _lay_out(x: torch.Tensor, layout: str, nr: int) -> torch.Tensor:
    if layout == "column":
        return x.t().contiguous()
    if layout == "strided":
        wide = torch.full((x.shape[0], 2 * x.shape[1]), float("nan"))
        wide[:, ::2] = x
        return wide
    if layout == "panels":
        k, n = x.shape
        padded = torch.zeros(k, -(-n // nr) * nr)
        padded[:, :n] = x
        return padded.reshape(k, padded.shape[1] // nr, nr).permute(1, 0, 2).contiguous()
    return x.contiguous()


class Product:
    """A compiled product of one pair of layouts."""

    def __init__(self, a_layout: str, w_layout: str, accumulate: bool = False, host: Target | None = None) -> None:
        self.host = host or target()
        self.layouts = a_layout, w_layout
        text = product_module(self.host, a_layout, w_layout, accumulate).text()
        self._library = jit.load_object(jit.compile_to_object(text, self.host), self.host, threads.symbols())
        self._launch = threads.entry(self._library)

    def __call__(self, a: torch.Tensor, w: torch.Tensor, *, width: int = 2,
                 start: torch.Tensor | None = None) -> torch.Tensor:
        (m, k), n, nr = a.shape, w.shape[1], mma.tiling(self.host).nr
        left, right = _lay_out(a, self.layouts[0], nr), _lay_out(w, self.layouts[1], nr)
        # One guard row on either side: nothing outside C may be written.
        c = torch.full((m + 2, n), float("nan")) if start is None else torch.cat([start[:1], start, start[:1]])
        before = c.clone()
        self._launch(struct.pack("QQQqqq", left.data_ptr(), right.data_ptr(), c[1:].data_ptr(), m, n, k), width)
        assert torch.equal(c[0].view(torch.int32), before[0].view(torch.int32))
        assert torch.equal(c[-1].view(torch.int32), before[-1].view(torch.int32))
        return c[1:-1]


def _operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    return torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)


def _chain(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """acc = fma(a_k, w_k, acc), k ascending, by the definition: the exact product, one rounding a step."""
    total = torch.zeros(a.shape[0], w.shape[1])
    for k in range(a.shape[1]):
        # a * w is exact in f64; the sum with an f32 is off by at most a double rounding.
        total = (a[:, k:k + 1].double() * w[k:k + 1].double() + total.double()).float()
    return total


@pytest.mark.parametrize("a_layout,w_layout", PAIRS)
def test_layouts_sizes_and_rows(a_layout, w_layout):
    product = Product(a_layout, w_layout)
    for m, n, k in SIZES:
        a, w = _operands(m, n, k)
        got = product(a, w)
        bound = (k + 1) * 2.0 ** -24 * (a.double().abs() @ w.double().abs())
        assert ((got.double() - a.double() @ w.double()).abs() <= bound).all(), (m, n, k)
        rows = torch.cat([product(a[i:i + 1], w) for i in range(m)])
        assert torch.equal(got, rows), "a row alone has other bits"
        assert torch.equal(got, torch.cat([product(a[i:i + 4], w) for i in range(0, m, 4)]))
        assert torch.equal(got, product(a, w, width=1)), "the thread count shows in the bits"


def test_all_layouts_give_the_same_bits():
    a, w = _operands(21, 90, 700)
    want = Product("row", "row")(a, w)
    for a_layout, w_layout in PAIRS[1:]:
        assert torch.equal(Product(a_layout, w_layout)(a, w), want)


def test_each_element_is_one_ascending_chain():
    a, w = _operands(9, 40, 600)
    got, want = Product("row", "row")(a, w), _chain(a, w)
    # Through f64 a step may round twice; such a step is rare, and the chains then differ in the last bits.
    assert (got != want).float().mean() < 0.01
    assert torch.allclose(got, want, rtol=0, atol=1e-5)


def test_accumulate_continues_the_chain():
    product, more = Product("row", "column"), Product("row", "column", accumulate=True)
    for m in (1, 3, 20):
        a, w = _operands(m, 45, 500)
        first = product(a[:, :200].contiguous(), w[:200].contiguous())
        assert torch.equal(more(a[:, 200:].contiguous(), w[200:].contiguous(), start=first), product(a, w))


@pytest.mark.parametrize("name", ["generic", "avx2"])
def test_other_targets_give_the_same_bits(name):
    host = target(name)
    if not runs_here(host):
        pytest.skip(f"this machine cannot run {host.cpu}")
    a, w = _operands(17, 50, 90)
    assert torch.equal(Product("row", "column", host=host)(a, w), Product("row", "column")(a, w))


@pytest.mark.parametrize("cpu", ["x86-64-v4", "znver4", "sapphirerapids"])
def test_avx512_kernels_use_whole_registers_without_spills(cpu):
    host = target(cpu)
    module = Module()
    t = mma.tiling(host)
    mma.micro_kernel(module, t, t.mr, 1, packed=True, edge=False)
    keep = module.function("keep", PTR, [])
    keep.builder.ret(keep.builder.gep(next(iter(module.functions.values())).pointer, 0, "i8"))
    asm = jit.compile_to_asm(module.text(), host)
    fmas = [line for line in asm.splitlines() if "vfmadd" in line]
    assert len(fmas) == t.mr * t.vectors and all("zmm" in line for line in fmas)
    assert not any("zmm" in line and "rsp" in line for line in asm.splitlines()), "accumulators are spilled"


@pytest.mark.parametrize("n", [4, 8, 16])
def test_transpose(n):
    module = Module()
    function = module.function("transpose", VOID, [("x", PTR), ("y", PTR)])
    b, (x, y) = function.builder, function.args
    rows = [b.load(b.gep(x, i * n, F32), f"<{n} x float>") for i in range(n)]
    for i, column in enumerate(transpose(b, rows)):
        b.store(column, b.gep(y, i * n, F32))
    b.ret()
    library = jit.load_object(jit.compile_to_object(module.text(), target()), target())
    data, out = torch.randn(n, n, generator=torch.Generator().manual_seed(n)), torch.zeros(n, n)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(library.address("transpose"))(
        data.data_ptr(), out.data_ptr())
    assert torch.equal(out, data.t())
