"""The LLVM emitter: what its constructs compute, run on this machine, and its constants bit for bit."""

import ctypes
import struct

import numpy as np
import pytest

from tessera.errors import CompileError, UnsupportedError
from tessera.kernel.backends.cpu import jit
from tessera.kernel.backends.cpu.emit import (
    BF16,
    F16,
    F32,
    F64,
    I8,
    I32,
    I64,
    PTR,
    VOID,
    Builder,
    Module,
    Val,
    const,
    elem,
    lanes,
    mangle,
    vec,
)
from tessera.kernel.backends.cpu.host import Target, runs_here, target


def run(emit_body, *arrays: np.ndarray, n: int = 0) -> None:
    """Build void f(ptr..., i64 n) with `emit_body(builder, pointers, n)` and run it on the arrays."""
    module = Module()
    function = module.function("f", VOID, [*((f"p{i}", PTR) for i in range(len(arrays))), ("n", I64)])
    emit_body(function.builder, function.args[:-1], function.args[-1])
    function.builder.ret()
    library = jit.load_object(jit.compile_to_object(module.text(), target()), target())
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arrays), ctypes.c_int64)(library.address("f"))
    call(*(array.ctypes.data for array in arrays), n)


def test_types():
    assert vec(8, F32) == "<8 x float>" and vec(0, F32) == F32
    assert lanes("<16 x i8>") == 16 and lanes(I64) == 0 and elem("<4 x bfloat>") == BF16
    assert mangle("<8 x float>") == "v8f32" and mangle(PTR) == "p0" and mangle(I32) == "i32"


@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -2.5, 0.1, 1e-45, 3e38, 1e39, float("inf"), float("-inf"), float("nan")])
def test_float_constants(x):
    got = np.zeros(1, np.float32), np.zeros(1, np.float64)

    def body(b: Builder, pointers: list[Val], _n: Val) -> None:
        b.store(const(x, F32), pointers[0])
        b.store(const(x, F64), pointers[1])

    run(body, *got)
    with np.errstate(over="ignore"):
        want = np.float32(x)
    assert struct.pack("<f", got[0][0]) == struct.pack("<f", want)
    assert struct.pack("<d", got[1][0]) == struct.pack("<d", x)


def test_half_and_bfloat_constants():
    assert const(1.0, BF16).name == "0xR3F80" and const(1.5, F16).name == "0xH3E00"
    assert const(1.00390625, BF16).name == "0xR3F80"  # a tie goes to even
    assert const(1.01171875, BF16).name == "0xR3F82"


def test_index_arithmetic_is_folded():
    module = Module()
    b = module.function("f", VOID, [("n", I64)]).builder
    n = Val("%n", I64)
    assert b.add(n, 0) is n and b.mul(n, 1) is n and b.mul(const(6, I64), 7).const == 42
    assert not b.function.lines


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 30])
def test_loops_masks_and_carried_values(n):
    x = np.random.default_rng(n).standard_normal(40).astype(np.float32)
    y, total = np.full(40, 7, np.float32), np.zeros(1, np.float32)

    def body(b: Builder, pointers: list[Val], count: Val) -> None:
        px, py, pt = pointers
        with b.for_(0, count, 8) as loop:
            mask = b.lane_mask(b.sub(count, loop.i), 8)
            b.masked_store(b.masked_load(b.gep(px, loop.i, F32), vec(8, F32), mask), b.gep(py, loop.i, F32), mask)
        with b.for_(0, count, carry=[const(0.0, F32)]) as loop:
            loop.next([b.add(loop.carry[0], b.load(b.gep(px, loop.i, F32), F32))])
        b.store(loop.results[0], pt)

    run(body, x, y, total, n=n)
    want = np.float32(0)
    for value in x[:n]:
        want = np.float32(want + value)
    assert np.array_equal(y, np.concatenate([x[:n], np.full(40 - n, 7, np.float32)])) and total[0] == want


@pytest.mark.parametrize("n", [-3, 0, 5])
def test_if_else_gives_values(n):
    out = np.zeros(2, np.int64)

    def body(b: Builder, pointers: list[Val], count: Val) -> None:
        with b.if_(b.cmp("lt", count, 0)) as branch:
            branch.give([b.neg(count)])
        with branch.else_():
            branch.give([b.add(count, 100)])
        b.store(branch.results[0], pointers[0])
        with b.if_(b.cmp("gt", count, 3)):
            b.store(const(1, I64), b.gep(pointers[0], 1, I64))

    run(body, out, n=n)
    assert out.tolist() == [-n if n < 0 else n + 100, int(n > 3)]


def test_reduce_is_a_fixed_tree():
    x = np.random.default_rng(5).standard_normal(8).astype(np.float32)
    out = np.zeros(1, np.float32)
    run(lambda b, p, _n: b.store(b.reduce(b.load(p[0], vec(8, F32)), b.add), p[1]), x, out)
    half = x[:4] + x[4:]
    half = half[:2] + half[2:]
    assert out[0] == half[0] + half[1]


def test_gather_scatter_shuffle_atomic():
    x, index = np.arange(32, dtype=np.int32) * 3, np.array([5, 0, 31, 8], np.int64)
    out, counter = np.zeros(32, np.int32), np.array([40], np.int64)

    def body(b: Builder, pointers: list[Val], _n: Val) -> None:
        px, pi, po, pc = pointers
        at, mask = b.load(pi, vec(4, I64)), b.lane_mask(const(3, I64), 4)
        b.scatter(b.gather(b.gep(px, at, I32), vec(4, I32), mask), b.gep(po, at, I32), mask)
        b.store(b.cast("trunc", b.atomic_add(pc, 2), I8), b.gep(po, 1, I32))

    run(body, x, index, out, counter)
    want = np.zeros(32, np.int32)
    want[index[:3]] = x[index[:3]]
    want[1] = 40
    assert np.array_equal(out, want) and counter[0] == 42


def test_misuse_is_told():
    module = Module()
    b = module.function("f", VOID, []).builder
    with pytest.raises(TypeError, match="expected a value of type"):
        b.add(const(1, I64), const(1, I32))
    with pytest.raises(ValueError, match="already defined"):
        module.function("f", VOID, [])
    with pytest.raises(ValueError, match="directly follow"), b.if_(Val("%c", "i1")) as branch, branch.else_():
        pass


def test_invalid_text_and_damaged_objects_are_refused():
    with pytest.raises(CompileError, match="invalid LLVM"):
        jit.compile_to_object("define void @f() { ret i32 1 }", target())
    # An intrinsic with a wrong signature would end the process if it reached the code generator.
    with pytest.raises(CompileError, match="invalid LLVM"):
        jit.compile_to_object(
            "declare <4 x float> @llvm.fma.v8f32(<4 x float>, float)\n"
            "define <4 x float> @f(<4 x float> %x) {\n"
            "  %y = call <4 x float> @llvm.fma.v8f32(<4 x float> %x, float 1.0)\n  ret <4 x float> %y\n}", target())
    with pytest.raises(CompileError, match="cannot load"):
        jit.load_object(b"\x7fELF damaged", target())
    library = jit.load_object(jit.compile_to_object("define void @f() { ret void }", target()), target())
    with pytest.raises(CompileError, match="no symbol 'g'"):
        library.address("g")


def test_code_for_a_larger_processor_is_not_loaded():
    wide = target("sapphirerapids")
    data = jit.compile_to_object("define void @f() { ret void }", wide)
    if runs_here(wide):
        assert jit.load_object(data, wide).address("f")
    else:
        with pytest.raises(UnsupportedError, match="cannot run on this machine"):
            jit.load_object(data, wide)


def test_targets():
    host = target("host")
    assert isinstance(host, Target) and host.vector_bits in (128, 256, 512) and 0 < host.l1 < host.l2
    assert host.lanes(32) * 32 == host.vector_bits and host.key != target("generic").key
    assert target("sapphirerapids").has_avx512bf16 and target("x86-64-v4").vector_bits == 512
    assert not target("x86-64-v4").has_vnni and target("avx2").vector_registers == 16


def test_code_apart_reads_what_is_around_it():
    x, found = np.arange(7, dtype=np.float32), np.zeros(7, np.float32)

    def body(b: Builder, pointers: list[Val], n: Val) -> None:
        source, to = pointers
        slot = b.alloca(F32)
        with b.for_(0, n) as row:
            scale = b.cast("sitofp", row.i, F32)
            with b.apart("outer"):
                with b.for_(0, 3, carry=[const(0.0, F32)]) as loop:
                    loop.next([b.fma(scale, b.load(b.gep(source, row.i, F32), F32), loop.carry[0])])
                b.store(loop.results[0], slot)
                with b.if_(b.cmp("gt", row.i, 2)), b.apart("inner"):
                    b.store(b.add(b.load(slot, F32), 1.0), slot)
            b.store(b.load(slot, F32), b.gep(to, row.i, F32))
        assert len(b.module.functions) == 3

    run(body, x, found, n=7)
    assert np.array_equal(found, 3 * x * x + (x > 2))


@pytest.mark.parametrize("helper", [False, True])
def test_little_code_stays_where_it_is(helper):
    """Instructions of functions that are inlined count."""
    module = Module()
    function = module.function("f", VOID, [("x", PTR)])
    b, (x,) = function.builder, function.args

    def long(made):
        inner, total = made.builder, made.args[0]
        for _ in range(20):
            total = inner.add(total, 1.0)
        inner.ret(total)

    with b.apart("part", least=15):
        y = b.load(x, F32)
        b.store(b.call(module.helper("long", F32, [("x", F32)], long), y) if helper else b.add(y, 1.0), x)
    b.ret()
    assert len(module.functions) == (3 if helper else 1)
    found = np.full(1, 2.0, np.float32)
    library = jit.load_object(jit.compile_to_object(module.text(), target()), target())
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(library.address("f"))(found.ctypes.data)
    assert found[0] == (22 if helper else 3)
