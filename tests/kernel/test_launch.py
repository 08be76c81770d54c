"""Launching: what is checked, what is specialised, and how errors read."""

import copy
import pickle
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tessera as ts
from tessera import Tensor, Tile, f32, int4, int32, tile
from tessera.errors import InputError, LaunchError, UnsupportedError
from tessera.kernel.backends.cpu import host


@pytest.fixture(autouse=True)
def interp(monkeypatch):
    """Run on the reference backend."""
    monkeypatch.setenv("TESSERA_BACKEND", "interp")


@ts.kernel
def scaled(x: Tile["S", "D", f32], w: Tile["D", f32], output: Tile["S", "D", f32], factor: float = 2.0):
    tile.store(output, x * w * factor)


def tensors(s=3, d=5):
    return torch.ones(s, d), torch.full((d,), 2.0), torch.zeros(s, d)


def test_positional_keyword_and_default_arguments():
    x, w, o = tensors()
    scaled(x, w, o)
    assert (o == 4).all()
    scaled(output=o, w=w, x=x, factor=3)
    assert (o == 6).all()
    scaled(x, w, o, torch.tensor(0.5))
    assert (o == 1).all()


@pytest.mark.parametrize("change, message", [
    (lambda x, w, o: (x, w, torch.zeros(9, 5)), "kernel scaled: x has S=3 but output has S=9"),
    (lambda x, w, o: (x, torch.ones(4), o), "kernel scaled: x has D=5 but w has D=4"),
    (lambda x, w, o: (x.bfloat16(), w, o), "x is bf16; the signature says f32[S, D]"),
    (lambda x, w, o: (x[0], w, o), "x has 1 axes, shape [5]; expected f32[S, D]"),
    (lambda x, w, o: ([1, 2], w, o), "x=[1, 2] given; expected a tensor f32[S, D]"),
    (lambda x, w, o: (None, w, o), "x=None given; expected a tensor"),
    (lambda x, w, o: (x, w, o, "2"), "factor='2' given; expected float"),
    (lambda x, w, o: (x, w, o, True), "factor=True given; expected float"),
    (lambda x, w, o: (x, w, o.to("meta")), "x is on cpu but output is on meta"),
    (lambda x, w, o: (x.to_sparse(), w, o), "expected a dense tensor"),
    (lambda x, w, o: (x.to(torch.complex64), w, o), "x is torch.complex64"),
])
def test_mismatches_are_named(change, message):
    with pytest.raises(LaunchError) as caught:
        scaled(*change(*tensors()))
    assert message in str(caught.value)


@pytest.mark.parametrize("args, kwargs", [((), {}), ((1, 2, 3, 4, 5), {}), ((1,), {"y": 2})])
def test_wrong_argument_lists(args, kwargs):
    with pytest.raises((TypeError, LaunchError)):
        scaled(*args, **kwargs)


def test_strided_tensors_are_another_specialisation():
    @ts.kernel
    def copy(x: Tile["S", "D", f32], o: Tile["S", "D", f32]):
        o[:] = tile.load(x)

    x = torch.arange(12.0).reshape(3, 4)
    for source in (x, x.T, x[:, ::2], x[1:], x.T[1:, ::2]):
        target = torch.zeros(source.shape)
        copy(source, target)
        assert torch.equal(target, source)
        back = torch.zeros(source.shape[::-1]).T
        copy(source, back)
        assert torch.equal(back, source)
    assert "strided" in copy.ir(x.T) and "strided" not in copy.ir(x)


def test_dtypes_specialise_where_none_is_annotated():
    @ts.kernel
    def double(x: Tensor["N"], o: Tensor["N"]):
        o[:] = x + x

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32):
        x = torch.arange(6).to(dtype)
        o = torch.empty_like(x)
        double(x, o)
        assert torch.equal(o, x + x)


def test_optional_arguments():
    @ts.kernel
    def shifted(x: Tile["N", f32], bias: Tile["N", f32] | None, o: Tile["N", f32], gain: Tile["N", f32] | None = None):
        y = tile.load(x)
        if bias is not None:
            y = y + bias
        if gain is not None:
            y = y * gain
        o[:] = y

    x, b, g = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    o = torch.empty(6)
    for bias in (None, b):
        for gain in (None, g):
            shifted(x, bias, o, gain)
            torch.testing.assert_close(o, (x + (0 if bias is None else b)) * (1 if gain is None else g))
    with pytest.raises(LaunchError, match=r"x has N=6 but bias has N=3"):
        shifted(x, b[:3], o)


def test_products_fractions_and_sums_of_dims():
    @ts.kernel
    def shapes(x: Tile["B*S", "D", f32], half: Tile["S", "D/2", f32], more: Tile["V+1", f32], o: Tile[4, f32]):
        ctx = tile.context()
        o[0] = tile.cast(ctx.B, f32)
        o[1] = tile.cast(ctx.BS, f32)
        o[2] = tile.cast(ctx.D // 2, f32)
        o[3] = tile.cast(ctx.V, f32)

    o = torch.zeros(4)
    shapes(torch.zeros(6, 8), torch.zeros(3, 4), torch.zeros(11), o)
    assert o.tolist() == [2, 6, 4, 10]
    with pytest.raises(LaunchError, match=r"B\*S=7"):
        shapes(torch.zeros(7, 8), torch.zeros(3, 4), torch.zeros(11), o)
    with pytest.raises(LaunchError, match=r"D=7 is not a multiple of 2|D/2"):
        shapes(torch.zeros(6, 7), torch.zeros(3, 3), torch.zeros(11), o)
    with pytest.raises(LaunchError, match=r"half has D/2=5"):
        shapes(torch.zeros(6, 8), torch.zeros(3, 5), torch.zeros(11), o)
    with pytest.raises(LaunchError, match=r"o has 3 on axis 0; expected 4"):
        shapes(torch.zeros(6, 8), torch.zeros(3, 4), torch.zeros(11), torch.zeros(3))


def test_an_unsolvable_product_is_one_size():
    @ts.kernel
    def rows(x: Tile["B*S", "D", f32], o: Tile["B*S", f32]):
        ctx = tile.context()
        for i in tile.grid(ctx.BS):
            o[i] = tile.sum(x[i])

    x, o = torch.ones(6, 4), torch.zeros(6)
    rows(x, o)
    assert o.tolist() == [4.0] * 6
    with pytest.raises(LaunchError, match=r"x has B\*S=6 but o has B\*S=5"):
        rows(x, torch.zeros(5))


def test_any_number_of_leading_axes():
    @ts.kernel
    def softmax(x: Tile["...", "D", f32], o: Tile["...", "D", f32]):
        o[:] = tile.softmax(x)

    for shape in ((5,), (3, 5), (2, 3, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        o = torch.empty_like(x)
        softmax(x, o)
        torch.testing.assert_close(o, x.softmax(-1))


def test_empty_tensors():
    @ts.kernel
    def total(x: Tile["S", "D", f32], o: Tile["S", f32]):
        o[:] = tile.sum(x)

    o = torch.full((3,), 7.0)
    total(torch.zeros(3, 0), o)
    assert o.tolist() == [0, 0, 0]
    total(torch.zeros(0, 4), torch.zeros(0))


def test_packed_int4_has_two_elements_a_byte():
    @ts.kernel
    def unpack(x: Tile["S", "D", int4], o: Tile["S", "D", int32]):
        o[:] = tile.cast(x, int32)

    packed = torch.tensor([[0x21, 0xF8]], dtype=torch.uint8)
    o = torch.zeros(1, 4, dtype=torch.int32)
    unpack(packed, o)
    assert o.tolist() == [[1, 2, -8, -1]]


class Model:
    """An object whose kernel reads its attributes."""

    def __init__(self, width, gain):
        self.weight = torch.arange(float(width * 2)).reshape(width, 2)
        self.gain = gain

    def scale(self, x):
        return x * self.gain

    @ts.kernel
    def project(self, x: Tile["B*S", "D", f32], o: Tile["B*S", "N", f32]):
        tile.store(o, self.scale(tile.mma(x, self.weight)))


def test_methods_take_tensors_and_numbers_from_self():
    for width, gain in ((3, 2.0), (4, 2.0), (4, 5.0)):
        model = Model(width, gain)
        for rows in (1, 6):
            x, o = torch.ones(rows, width), torch.zeros(rows, 2)
            model.project(x, o)
            torch.testing.assert_close(o, x @ model.weight * gain)


def test_schedules_reach_the_kernel():
    @ts.schedule(tile={"BM": 16}, warps=8)
    @ts.kernel
    def block(o: Tile[1, int32]):
        ctx = tile.context()
        o[0] = ctx.block_m

    o = torch.zeros(1, dtype=torch.int32)
    block(o)
    assert o.item() == 16 and block.trace().schedule == {"BM": 16, "warps": 8}
    block.with_schedule(tile={"BM": 32})(o)
    assert o.item() == 32
    with pytest.raises(InputError, match="block size BM=-1"):
        block.with_schedule(BM=-1)
    with pytest.raises(InputError, match="'warp' is not an option"):
        ts.schedule(warp=3)


def test_threads_that_launch_at_once_compile_once(monkeypatch):
    compiled = []
    original = ts.kernel.launch.Variant._compile

    def count(self, values):
        compiled.append(1)
        return original(self, values)

    monkeypatch.setattr(ts.kernel.launch.Variant, "_compile", count)
    fresh = scaled.with_schedule(BM=8)
    outputs = [tensors() for _ in range(8)]
    threads = [threading.Thread(target=fresh, args=t) for t in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    assert all((o == 4).all() for _, _, o in outputs)


class Wrapper(torch.Tensor):
    """A subclass whose elements lie elsewhere, as those of DTensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} is not to be called")


def freed(x):
    x.untyped_storage().resize_(0)
    return x


def fake(x):
    with FakeTensorMode():
        return torch.empty(x.shape)


@pytest.mark.parametrize("make", [Wrapper, freed, fake, torch.Tensor.to_mkldnn])
@pytest.mark.parametrize("place", [0, 1])
def test_tensors_without_memory(make, place, monkeypatch):
    monkeypatch.setenv("TESSERA_BACKEND", "cpu")
    args = [torch.ones(4), torch.ones(4)]
    args[place] = make(args[place])
    with pytest.raises(LaunchError, match=f"{'xo'[place]} is a .* without memory of its own"):
        halved(*args)
    with pytest.raises(LaunchError, match="without memory of its own"):
        torch.func.vmap(lambda x: halved(x, torch.empty(4)))(torch.ones(3, 4))


@pytest.mark.parametrize("place", [0, 1])
def test_fake_tensors_on_the_interpreter(place):
    args = [torch.ones(4), torch.ones(4)]
    args[place] = fake(args[place])
    with pytest.raises(LaunchError, match=f"kernel halved: {'xo'[place]} is a FakeTensor without memory of its own"):
        halved(*args)


@ts.kernel
def halved(x: Tile["N", f32], o: Tile["N", f32]):
    o[:] = x * 0.5


def test_unknown_backend_and_device():
    with pytest.raises(UnsupportedError, match="'tpu' given"):
        scaled.source("tpu")
    with pytest.raises(UnsupportedError, match="'meta': no backend"):
        ts.kernel.backends.for_device("meta")


def test_python_says_which_kernel_lacks_an_argument():
    x, w, o = tensors()
    scaled(x, w, o)
    with pytest.raises(TypeError, match=r"scaled\(\) missing 1 required positional argument: 'output'"):
        scaled(x, w)


def test_dump_prints_the_ir(monkeypatch, capsys):
    monkeypatch.setenv("TESSERA_DUMP", "ir,passes")
    x, w, o = tensors()
    scaled.with_schedule(BM=4)(x, w, o)
    assert "kernel scaled(" in capsys.readouterr().err


def test_a_kernel_is_pickled_by_name_and_copied_as_itself():
    """As functions are: modules that hold one can be copied, and it goes to processes that are spawned."""
    assert copy.deepcopy({"kernel": scaled})["kernel"] is copy.copy(scaled) is scaled
    assert pickle.loads(pickle.dumps(scaled)) is scaled
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(scaled.with_schedule(BM=4))


def test_the_source_for_another_processor(monkeypatch):
    """Text can be looked at where its code could not run."""
    texts = {}
    for choice in ("avx2", "avx512"):
        monkeypatch.setenv("TESSERA_CPU", choice)
        host.target.cache_clear()
        texts[choice] = scaled.source("cpu")
    host.target.cache_clear()
    assert "<32 x float>" in texts["avx512"] and "<32 x float>" not in texts["avx2"]  # two registers
