"""Code that two threads make, share by share: the same results and bytes as one thread's, from many callers at
once."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tessera.kernel.backends.cpu import halves, jit
from tessera.kernel.backends.cpu.emit import F32, I64, PTR, VOID, Module
from tessera.kernel.backends.cpu.host import target
from tessera.ops import kernels


def chain(count: int, *, counted: bool = False) -> str:
    """f(x, n) calls functions that call each other: y = x[i] * 1.5 + k for k = count .. 1."""
    module = Module()
    below = None
    for k in range(1, count + 1):
        helper = module.function(f"step_{k}", F32, [("x", F32)], internal=True, inline=False)
        b = helper.builder
        y = helper.args[0] if below is None else b.call(below, helper.args[0])
        b.ret(b.add(b.mul(y, 1.5), float(k)))
        below = helper
    function = module.function("f", VOID, [("x", PTR), ("n", I64)])
    b, (x, n) = function.builder, function.args
    if counted:
        b.store(n, module.global_bytes("calls", 8))
    with b.for_(0, n) as loop:
        at = b.gep(x, loop.i, F32)
        b.store(b.call(below, b.load(at, F32)), at)
    b.ret()
    return module.text()


def run(data: bytes) -> torch.Tensor:
    x = torch.linspace(-1, 1, 9)
    library = jit.load_object(data, target())
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(library.address("f"))(x.data_ptr(), 9)
    return x


def test_functions_of_two_objects_call_each_other(monkeypatch):
    text = chain(12)
    whole = jit.compile_to_object(text, target())
    monkeypatch.setattr(halves, "LARGE", 0)
    parts = jit.compile_to_object(text, target())
    assert parts != whole and int.from_bytes(parts[:8], "little") == halves.SHARES
    assert torch.equal(run(parts), run(whole))


def test_each_function_is_defined_once_and_declared_once():
    shares = halves.split(str(jit.optimized_ir(chain(12), target())))
    for name in ["f", *(f"step_{k}" for k in range(1, 13))]:
        assert sorted(line.split()[0] for share in shares for line in share.splitlines()
                      if f"@{name}(" in line and line.startswith("de")) == ["declare"] * (len(shares) - 1) + ["define"]
    assert all("define" in share for share in shares)


def test_a_module_of_one_function_is_one_share():
    module = Module()
    module.function("f", VOID, []).builder.ret()
    assert len(halves.split(module.text())) == 1


def test_without_a_second_handle_of_the_library_one_thread_does_it(monkeypatch):
    monkeypatch.setattr(halves, "LARGE", 0)
    monkeypatch.setattr(halves, "_library", lambda: None)
    data = jit.compile_to_object(chain(3), target())
    assert int.from_bytes(data[:8], "little") == 1
    run(data)


def test_a_variable_stays_in_one_object(monkeypatch):
    monkeypatch.setattr(halves, "LARGE", 0)
    data = jit.compile_to_object(chain(3, counted=True), target())
    assert int.from_bytes(data[:8], "little") == 1
    run(data)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_a_kernel_has_the_same_bits(rows, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, 70, generator=generator), torch.randn(50, 70, generator=generator)
    found = []
    for large, place in ((0, "halves"), (1 << 30, "whole")):
        monkeypatch.setattr(halves, "LARGE", large)
        monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path / place))
        found.append(torch.empty(rows, 50))
        kernels.linear_kernel.retype({})(x, w, found[-1])
    assert torch.equal(*found)


def test_several_threads_compile_at_once(monkeypatch):
    monkeypatch.setattr(halves, "LARGE", 0)
    texts = [chain(k) for k in (5, 9, 14)]
    alone = [jit.compile_to_object(text, target()) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda text: jit.compile_to_object(text, target()), texts * 6)) == alone * 6
