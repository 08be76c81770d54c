"""The Python half of a launch on a GPU, without one: Triton compiles for a driver that notes what it shall start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import tessera as ts
from tessera import Tile, bf16, f32, tile
from tessera.errors import CompileError, LaunchError, UnsupportedError
from tessera.kernel.backends.cuda.kernel import KernelText
from tessera.kernel.backends.cuda.launch import _Kernel


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it lies on a GPU; its number is that of the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    number = 0

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)

    def get_device(self) -> int:
        return self.number


def on_gpu(x: torch.Tensor, number: int = 0) -> OnGpu:
    made = x.as_subclass(OnGpu)
    made.number = number
    return made


class Driver:
    """Triton's driver for an H200, as far as a launch asks for it; `started` are its launches."""

    def __init__(self, shared: int = 232_448, broken: str = "") -> None:
        self.current, self.started, self.loaded, self.shared, self.broken = 0, [], set(), shared, broken
        self.utils = SimpleNamespace(load_binary=self._load)
        self.get_device_capability = lambda device: (9, 0)

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def _load(self, name: str, code: bytes, shared: int, device: int) -> tuple[object, ...]:
        if self.broken:
            raise RuntimeError(self.broken)
        self.loaded.add((name, shared, device))
        return None, name, 32, 0, 1024  # no module: nothing is unloaded at the end

    def launcher_cls(self, source, metadata):
        assert metadata.global_scratch_size == 0  # a CUDA graph could not allocate it

        def start(x, y, z, stream, function, packed, about, enter, leave, *args):
            self.started.append(SimpleNamespace(
                grid=(x, y, z), stream=stream, kernel=function, stages=metadata.num_stages,
                args=[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]))

        return start


@contextmanager
def on_device(driver: Driver, number: int) -> Iterator[None]:
    driver.current, before = number, driver.current
    yield
    driver.current = before


@pytest.fixture
def make_driver(monkeypatch, tmp_path):
    """A function that makes a driver Triton's own for the test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def make(**options) -> Driver:
        driver = Driver(**options)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: driver.shared)
        monkeypatch.setattr(torch.cuda, "current_device", driver.get_current_device)
        monkeypatch.setattr(torch.cuda, "device", lambda number: on_device(driver, number))
        return driver

    return make


@ts.kernel
def scaled(x: Tile["S", "D"], out: Tile["S", "D"], by: float = 2.0):
    tile.store(out, tile.load(x) * by)


def test_what_is_started(make_driver):
    """Grid, stream and arguments: pointers, strides of rows, the number, sizes, block sizes."""
    driver = make_driver()
    x, out = (on_gpu(torch.zeros(5, 4000)[:, :3000]) for _ in range(2))
    scaled.retype({})(x, out, 3.0)
    (start,) = driver.started
    assert start.grid == (5 * 3, 1, 1) and start.stream == 1000 and start.kernel == "scaled"
    assert start.args == [x.data_ptr(), 4000, out.data_ptr(), 4000, 3.0, 3000, 1024]


def test_sizes_of_one_power_of_two_share_what_triton_compiled(make_driver, monkeypatch):
    """Decoding grows by one row at a time: a kernel is made and loaded for the sizes that Triton tells apart."""
    driver, compile, made = make_driver(), triton.compiler.compile, []
    monkeypatch.setattr(triton.compiler, "compile", lambda *a, **options: made.append(a) or compile(*a, **options))
    kernel = scaled.retype({})
    for rows in range(17, 55):
        kernel(*(on_gpu(torch.zeros(rows, 33)) for _ in range(2)))
    assert len(driver.started) == 38 and len(made) == 2  # multiples of 16, and the others


def test_tensors_on_another_gpu_are_computed_there(make_driver):
    driver = make_driver()
    kernel = scaled.retype({})
    kernel(*(on_gpu(torch.zeros(4, 64), 1) for _ in range(2)))
    kernel(*(on_gpu(torch.zeros(4, 64), 0) for _ in range(2)))
    assert [start.stream for start in driver.started] == [1001, 1000] and driver.current == 0
    assert {device for *_, device in driver.loaded} == {1, 0}


def test_tensors_of_two_devices(make_driver):
    make_driver()
    with pytest.raises(LaunchError, match="kernel scaled: x is on cuda:0 but out is on cuda:1"):
        scaled.retype({})(on_gpu(torch.zeros(4, 64)), on_gpu(torch.zeros(4, 64), 1))
    with pytest.raises(LaunchError, match="kernel scaled: x is on cuda:0 but out is on cpu"):
        scaled.retype({})(on_gpu(torch.zeros(4, 64)), torch.zeros(4, 64))


def test_tensors_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TESSERA_BACKEND", "cuda")
    with pytest.raises(LaunchError, match="kernel scaled: tensors on cpu given; the cuda backend expects cuda"):
        scaled.retype({})(torch.zeros(4, 64), torch.zeros(4, 64))


def test_a_first_launch_that_a_graph_refuses(make_driver, monkeypatch):
    make_driver(broken="Triton Error [CUDA]: operation not permitted when stream is capturing")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(LaunchError, match=r"kernel scaled: its first launch cannot be captured.*call it once before"):
        scaled.retype({})(*(on_gpu(torch.zeros(4, 64)) for _ in range(2)))


@ts.kernel
def product(x: Tile["M", "K", bf16], w: Tile["K", "N", bf16], out: Tile["M", "N", f32]):
    tile.store(out, tile.mma(tile.load(x), tile.load(w)))


def operands(m: int) -> list[OnGpu]:
    return [on_gpu(x) for x in (torch.zeros(m, 512).bfloat16(), torch.zeros(512, 128).bfloat16(), torch.zeros(m, 128))]


def test_fewer_loads_are_kept_ahead_on_a_gpu_with_less_shared_memory(make_driver):
    driver = make_driver(shared=40_000)
    kernel = product.with_schedule(BM=64, BN=64, BK=64, stages=3)
    for m in (128, 112):
        kernel(*operands(m))
    assert [start.stages for start in driver.started] == [2, 2]  # found once, for all sizes of one text


def test_what_does_not_fit_at_all_is_told(make_driver):
    make_driver(shared=1_000)
    with pytest.raises(UnsupportedError, match=r"cuda: kernel product: out of resource: shared memory.*smaller blocks"):
        product.with_schedule(BM=64, BN=64, BK=64, stages=1)(*operands(128))


class Refusing:
    """A kernel whose launch raises an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid):
        def run(**options):
            raise self.error

        return run


@pytest.mark.parametrize(("error", "raised", "match"), [
    (CompilationError(None, None, "no"), CompileError, r"cuda: kernel k: Triton does not take the text: (.|\n)*no"),
    (OutOfResources(2048, 1024, "threads"), UnsupportedError, "out of resource: threads"),
    (ValueError("other"), ValueError, "other")])
def test_errors(error, raised, match):
    kernel = _Kernel(Refusing(error), KernelText(name="k", source="", arguments=(), stages=1))
    with pytest.raises(raised, match=match):
        kernel((1,), (), ())
