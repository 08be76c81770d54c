"""Packed products against float64, and their contract: a row's bits do not depend on how it is computed.

The kernels for processors with dot instructions run here too, with plain arithmetic in place of the instructions;
their machine code is read.
"""

import ctypes
import struct
from dataclasses import replace

import pytest
import torch

from tessera.kernel.backends.cpu import entries, jit, mma, threads
from tessera.kernel.backends.cpu.emit import F32, I8, I16, I64, PTR, VOID, Module, const
from tessera.kernel.backends.cpu.host import Target, runs_here, target
from tessera.kernel.backends.cpu.mma_dot import Dot, dot_unit
from tessera.kernel.backends.cpu.mma_micro import Kernel, tile_kernel
from tessera.kernel.backends.cpu.mma_pack import Source, interleave, strided, transpose
from tessera.kernel.dims import Dim
from tessera.types import bf16, f32, int8, uint8

BLOCK_M, BLOCK_N = 32, 96  # columns: whole panels on every processor
PAIRS = [("row", "row"), ("row", "column"), ("row", "strided"), ("row", "panels"), ("column", "row"),
         ("strided", "row"), ("column", "column")]
SIZES = [(1, 1, 1), (1, 33, 7), (7, 33, 255), (33, 7, 1000), (40, 100, 300), (13, 255, 33), (5, 9, 0)]
TYPES = {"f32": (f32, f32), "bf16": (bf16, bf16), "int8": (int8, int8), "uint8": (uint8, int8)}
# This machine, and the code for AVX-512 with dot instructions.
HOSTS = {"host": target(), "dots": replace(
    target(), vector_bits=512, vector_registers=32, has_avx512bf16=True, has_vnni=True, emulates_dots=True)}


def source(b, dot: Dot, pointer, lane, k, *, left: bool) -> Source:
    """An operand in memory that holds the dot's elements: the shift is added as the lowering does."""
    plain = strided(b, pointer, lane, k, dot.element)
    if not (left and dot.shift):
        return plain
    return replace(plain, direct=None, read=lambda *at: b.add(plain.read(*at), -dot.shift))


def product_module(host: Target, dot: Dot, a_layout: str, w_layout: str, accumulate: bool = False) -> Module:
    """C[m, n] (+)= A @ W over blocks; args: A, W, C, m, n, k, scratch bytes an item, scratch."""
    module = Module()

    def sizes(function):
        return [function.builder.load(function.builder.gep(function.args[0], 3 + i, I64), I64) for i in range(4)]

    items = module.function("items_0", I64, [("args", PTR)])
    m, n, *_ = sizes(items)
    items.builder.ret(items.builder.mul(items.builder.ceil_div(m, BLOCK_M), items.builder.ceil_div(n, BLOCK_N)))
    body = module.function("body_0", VOID, [("args", PTR), ("begin", I64), ("end", I64)])
    b, (args, begin, end) = body.builder, body.args
    m, n, k, room = sizes(body)
    a, w, c, memory = (b.load(b.gep(args, i, I64), PTR) for i in (0, 1, 2, 7))
    one, columns = const(1, I64), b.ceil_div(n, BLOCK_N)
    strides = {"row": (k, one), "column": (one, m), "strided": (b.mul(k, 2), b.value(2, I64))}
    w_strides = {"row": (one, n), "column": (k, one), "strided": (const(2, I64), b.mul(n, 2))}
    with b.for_(begin, end) as loop:
        i, j = b.mul(b.udiv(loop.i, columns), BLOCK_M), b.mul(b.urem(loop.i, columns), BLOCK_N)
        rows, k_stride = strides[a_layout]
        left = source(b, dot, b.gep(a, b.mul(i, rows), dot.element), rows, k_stride, left=True)
        if w_layout == "panels":
            depth = b.ceil_div(k, dot.pack)
            right = mma.Panels(pointer=b.gep(w, b.mul(j, depth), F32), depth=depth)
        else:
            lane, k_stride = w_strides[w_layout]
            right = source(b, dot, b.gep(w, b.mul(j, lane), dot.element), lane, k_stride, left=False)
        mma.matmul(b, [mma.Product(
            b=b, target=host, dot=dot, k=k, a=left, w=right, memory=b.gep(memory, b.mul(room, loop.i), I8),
            width=const(BLOCK_N // 3, I64), c=b.gep(c, b.add(b.mul(i, n), j), F32), ldc=n, accumulate=accumulate)],
            m=b.min(b.sub(m, i), BLOCK_M), n=b.min(b.sub(n, j), BLOCK_N))
    b.ret()
    entries.emit_launch(module, 1)
    return module


class Product:
    """A compiled product of one pair of layouts."""

    def __init__(self, a_layout: str, w_layout: str, accumulate: bool = False, host: Target = HOSTS["host"],
                 kind: str = "f32") -> None:
        self.host, self.kind = host, kind
        self.layouts = a_layout, w_layout
        dot = dot_unit(*TYPES[kind], host)
        assert dot is not None
        # Without bf16 instructions the lowering widens while it packs; here such operands come as f32.
        self.dot, self.element = dot, {F32: torch.float32, I16: torch.int16, I8: torch.int8}[dot.element]
        text = product_module(self.host, dot, a_layout, w_layout, accumulate).text()
        self._library = jit.load_object(jit.compile_to_object(text, self.host), self.host, threads.symbols())
        self._launch = threads.entry(self._library)

    def __call__(self, a: torch.Tensor, w: torch.Tensor, *, width: int = 2,
                 start: torch.Tensor | None = None) -> torch.Tensor:
        (m, k), n = a.shape, w.shape[1]
        left, right = self._lay_out(a, self.layouts[0]), self._lay_out(w, self.layouts[1])
        # One guard row on either side: nothing outside C may be written.
        dtype = torch.float32 if a.is_floating_point() else torch.int32
        c = torch.full((m + 2, n), -77, dtype=dtype) if start is None else torch.cat([start[:1], start, start[:1]])
        before = c.clone()
        room = mma.scratch(mma.tiling(self.host), self.dot, Dim.of(BLOCK_N), Dim.of(k)).total.const or 0
        room = -(-room // 64) * 64
        items = -(-m // BLOCK_M) * -(-n // BLOCK_N)
        memory = torch.full((room * items + 64,), 0x7F, dtype=torch.uint8)
        self._launch(struct.pack("QQQqqqqQ", left.data_ptr(), right.data_ptr(), c[1:].data_ptr(), m, n, k, room,
                                 -(-memory.data_ptr() // 64) * 64), width)
        assert torch.equal(c[0].view(torch.int32), before[0].view(torch.int32))
        assert torch.equal(c[-1].view(torch.int32), before[-1].view(torch.int32))
        return c[1:-1]

    def _lay_out(self, x: torch.Tensor, layout: str) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            x = x.float() if self.element == torch.float32 else x.view(torch.int16)
        x = x.to(self.element) if not x.is_floating_point() else x
        if layout == "column":
            return x.t().contiguous()
        if layout == "strided":
            wide = torch.full((x.shape[0], 2 * x.shape[1]), 111, dtype=x.dtype)
            wide[:, ::2] = x
            return wide
        if layout == "panels":
            (k, n), nr, pack = x.shape, mma.tiling(self.host).nr, self.dot.pack
            padded = torch.zeros(-(-k // pack) * pack, -(-n // nr) * nr, dtype=x.dtype)
            padded[:k, :n] = x
            return padded.reshape(-1, pack, padded.shape[1] // nr, nr).permute(2, 0, 3, 1).contiguous()
        return x.contiguous()


def _operands(m: int, n: int, k: int, kind: str = "f32") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    if kind in ("int8", "uint8"):
        low, high, dtype = (-128, 128, torch.int8) if kind == "int8" else (0, 256, torch.uint8)
        return (torch.randint(low, high, (m, k), generator=generator).to(dtype),
                torch.randint(-128, 128, (k, n), generator=generator).to(torch.int8))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return torch.randn(m, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)


def _check(got: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> None:
    want = a.double() @ w.double()
    bound = (a.shape[1] + 1) * 2.0 ** -24 * (a.double().abs() @ w.double().abs()) if a.is_floating_point() else 0.0
    assert ((got.double() - want).abs() <= bound).all(), (a.shape, w.shape)


def _chain(a: torch.Tensor, w: torch.Tensor, order: list[int]) -> torch.Tensor:
    """acc = fma(a_k, w_k, acc) for k in `order`, by the definition: the exact product, one rounding a step."""
    total = torch.zeros(a.shape[0], w.shape[1])
    for k in order:
        # a * w is exact in f64; the sum with an f32 is off by at most a double rounding.
        total = (a[:, k:k + 1].double() * w[k:k + 1].double() + total.double()).float()
    return total


@pytest.mark.parametrize("a_layout,w_layout", PAIRS)
def test_layouts_sizes_and_rows(a_layout, w_layout):
    product = Product(a_layout, w_layout)
    for m, n, k in SIZES:
        a, w = _operands(m, n, k)
        got = product(a, w)
        _check(got, a, w)
        rows = torch.cat([product(a[i:i + 1], w) for i in range(m)])
        assert torch.equal(got, rows), "a row alone has other bits"
        assert torch.equal(got, torch.cat([product(a[i:i + 4], w) for i in range(0, m, 4)]))
        assert torch.equal(got, product(a, w, width=1)), "the thread count shows in the bits"


def test_all_layouts_give_the_same_bits():
    a, w = _operands(21, 90, 1100)
    want = Product("row", "row")(a, w)
    for a_layout, w_layout in PAIRS[1:]:
        assert torch.equal(Product(a_layout, w_layout)(a, w), want)


@pytest.mark.parametrize("kind,host", [("bf16", "dots"), ("int8", "host"), ("int8", "dots"), ("uint8", "dots")])
@pytest.mark.parametrize("a_layout,w_layout", [("row", "column"), ("column", "row"), ("strided", "strided"),
                                               ("row", "panels")])
def test_dots(kind, host, a_layout, w_layout):
    product = Product(a_layout, w_layout, host=HOSTS[host], kind=kind)
    for m, n, k in [(1, 33, 7), (33, 100, 301), (29, 50, 2400), (3, 5, 0)]:
        a, w = _operands(m, n, k, kind)
        got = product(a, w)
        _check(got, a, w)
        assert torch.equal(got, torch.cat([product(a[i:i + 5], w) for i in range(0, m, 5)]))


def test_each_element_is_one_ascending_chain():
    a, w = _operands(9, 40, 1100)
    got, want = Product("row", "row")(a, w), _chain(a, w, list(range(1100)))
    # Through f64 a step may round twice; such a step is rare, and the chains then differ in the last bits.
    assert (got != want).float().mean() < 0.01
    assert torch.allclose(got, want, rtol=0, atol=1e-5)


def test_bf16_pairs_are_added_in_the_order_of_the_instruction():
    a, w = _operands(9, 40, 601, "bf16")
    got = Product("row", "column", host=HOSTS["dots"], kind="bf16")(a, w)
    want = _chain(a, w, [k for pair in range(301) for k in (2 * pair + 1, 2 * pair) if k < 601])
    assert (got != want).float().mean() < 0.01
    assert torch.allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind,host", [("f32", "host"), ("bf16", "dots"), ("int8", "host"), ("int8", "dots")])
def test_accumulate_continues_the_chain(kind, host):
    product = Product("row", "column", host=HOSTS[host], kind=kind)
    more = Product("row", "column", accumulate=True, host=HOSTS[host], kind=kind)
    for m in (1, 3, 20):
        a, w = _operands(m, 45, 500, kind)
        first = product(a[:, :200].contiguous(), w[:200].contiguous())
        assert torch.equal(more(a[:, 200:].contiguous(), w[200:].contiguous(), start=first), product(a, w))


@pytest.mark.parametrize("name", ["generic", "avx2"])
def test_other_targets_give_the_same_bits(name):
    host = target(name)
    if not runs_here(host):
        pytest.skip(f"this machine cannot run {host.cpu}")
    for kind in ("f32", "int8"):
        a, w = _operands(17, 50, 90, kind)
        assert torch.equal(Product("row", "column", host=host, kind=kind)(a, w),
                           Product("row", "column", kind=kind)(a, w))


@pytest.mark.parametrize("kind,instruction,cpu", [
    ("f32", "vfmadd", "x86-64-v4"), ("f32", "vfmadd", "znver4"), ("f32", "vfmadd", "sapphirerapids"),
    ("bf16", "vdpbf16ps", "znver4"), ("bf16", "vdpbf16ps", "sapphirerapids"), ("int8", "vpdpbusd", "znver4"),
    ("uint8", "vpdpbusd", "sapphirerapids"), ("int8", "vpmaddwd", "x86-64-v4"), ("f32", "vfmadd", "x86-64-v3"),
    ("int8", "vpmaddwd", "x86-64-v3")])
@pytest.mark.parametrize("rows_of_a", [True, False])
def test_kernels_use_whole_registers_without_spills(kind, instruction, cpu, rows_of_a):
    host = target(cpu)
    dot = dot_unit(*TYPES[kind], host)
    t, register = mma.tiling(host), "zmm" if host.has_avx512 else "ymm"
    kernel = Kernel(target=host, dot=dot, lanes=t.lanes, mr=t.mr, nr=t.nr, pitch=t.kc + 16 if rows_of_a else 0)
    module = Module()
    function = tile_kernel(module, kernel)
    module.function("keep", PTR, []).builder.ret(function.pointer)
    asm = [line.split("#")[0] for line in jit.compile_to_asm(module.text(), host).splitlines()]
    found = [line for line in asm if instruction in line]
    assert len(found) == t.mr * t.vectors and all(register in line for line in found)
    assert not any(register in line and "rsp" in line for line in asm), "sums are spilled"
    first, last = (asm.index(line) for line in (found[0], found[-1]))
    assert not any(line.strip().startswith("j") for line in asm[first:last]), "the sums are not in one loop"


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


@pytest.mark.parametrize("count", [1, 2, 4])
def test_interleave(count):
    module = Module()
    function = module.function("interleave", VOID, [("x", PTR), ("y", PTR)])
    b, (x, y) = function.builder, function.args
    result = interleave(b, [b.load(b.gep(x, i * 8, I8), f"<8 x {I8}>") for i in range(count)])
    b.store(result, y, align=1)
    b.ret()
    library = jit.load_object(jit.compile_to_object(module.text(), target()), target())
    data, out = torch.arange(8 * count, dtype=torch.uint8), torch.zeros(8 * count, dtype=torch.uint8)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(library.address("interleave"))(
        data.data_ptr(), out.data_ptr())
    assert torch.equal(out, data.reshape(count, 8).t().reshape(-1))
