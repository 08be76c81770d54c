"""checkpoint_region: nothing of the block is kept, and every gradient is what it was without it."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

import tessera as ts
from tessera import Tile, f64, tile
from tessera.errors import InputError


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


kept: list[StorageWeakRef] = []


def keep(x: torch.Tensor) -> torch.Tensor:
    kept.append(StorageWeakRef(x.untyped_storage()))
    return x


def swiglu(x, gate, up, down, chunk=5, p=0.0, region=ts.checkpoint_region):
    """The documents' swiglu_memory_efficient."""
    out = torch.zeros_like(x)
    for i in range(0, gate.shape[-1], chunk):
        with region():
            hidden = keep(F.silu(x @ gate[:, i:i + chunk])) * (x @ up[:, i:i + chunk])
            hidden = keep(F.dropout(hidden, p))
            out += hidden @ down[i:i + chunk]
    return out


SHAPES = ((3, 8), (8, 16), (8, 16), (16, 8))


@pytest.mark.parametrize("outer", [lambda f: f, ts.checkpoint], ids=["plain", "inside ts.checkpoint"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [3, 16])
def test_documents_swiglu(chunk, p, outer) -> None:
    tensors = inputs(*SHAPES, seed=chunk)
    results = []
    for region in (contextlib.nullcontext, ts.checkpoint_region):
        torch.manual_seed(1)
        out = outer(swiglu)(*tensors, chunk, p, region)
        results.append([out, *torch.autograd.grad(out.pow(3).sum(), tensors)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_memory_goes_when_the_block_ends() -> None:
    tensors = inputs(*SHAPES)
    kept.clear()
    plain = swiglu(*tensors, p=0.5, region=contextlib.nullcontext)
    assert not any(ref.expired() for ref in kept)
    del plain
    kept.clear()
    out = swiglu(*tensors, p=0.5)
    gc.collect()
    assert all(ref.expired() for ref in kept)
    out.sum().backward()


def test_second_derivatives() -> None:
    tensors = inputs((2, 3), (3, 4), (3, 4), (4, 3))
    assert torch.autograd.gradcheck(swiglu, tensors)
    assert torch.autograd.gradgradcheck(swiglu, tensors)


def grads(block, *tensors):
    """Gradients of a block without and with a region, from the same random numbers."""
    found = []
    for region in (contextlib.nullcontext, ts.checkpoint_region):
        torch.manual_seed(5)
        with region():
            out = block(*tensors)
        found.append(torch.autograd.grad(out.sum(), tensors, retain_graph=True))
        found.append(torch.autograd.grad(out.sum(), tensors))
    return found


def in_place(x, y):
    a = x * 2
    b = a.exp()          # depends on a as it was
    a.add_(1)
    return a.sin() * b * a * y


def in_place_on_a_view(x, y):
    a = torch.zeros_like(x)
    a[:, 0] = x[:, 1]
    b = a.exp().sin() * x
    a[:, 1:].mul_(3).add_(y[:, 1:])
    return (a * b).exp()


def noise(x, y):
    mask = torch.empty_like(x).bernoulli_(0.5)
    return (x * mask * torch.rand_like(x) + torch.randn(3, 4, dtype=x.dtype) * y).exp().sin()


def views(x, y):
    q, k = (x @ y.t()).view(3, 3, 1).transpose(0, 1).chunk(2, 0)
    return torch.cat([q.exp().squeeze(-1), k.sin().squeeze(-1)]).t().softmax(-1) ** 2


def several_results(x, y):
    values, _ = x.sort(-1)
    mean, var = torch.var_mean(values * y, -1)
    return (mean * var.exp()).sin()


def own_generator(x, y):
    generator = torch.Generator().manual_seed(2)
    return (x * torch.rand(3, 4, generator=generator, dtype=x.dtype)).exp() * y.exp()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        squared = x * x
        ctx.save_for_backward(x, squared)
        return squared * x

    @staticmethod
    def backward(ctx, grad):
        _, squared = ctx.saved_tensors
        return grad * 3 * squared


def own_function(x, y):
    return Cube.apply(x.sin()) * y.exp()


@pytest.mark.parametrize("block", [
    in_place, in_place_on_a_view, noise, views, several_results, own_generator, own_function])
def test_blocks(block) -> None:
    first, again, region, region_again = grads(block, *inputs((3, 4), (3, 4)))
    for other in (again, region, region_again):
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_what_a_kernel_writes_is_kept() -> None:
    @ts.kernel
    def twice(x: Tile["S", "D", f64], out: Tile["S", "D", f64]):
        tile.store(out, tile.load(x) * 2.0)

    def block(x):
        out = torch.zeros_like(x)
        twice(x.detach(), out)  # torch sees zeros only
        late = x.detach() * 1.0
        twice(x.detach(), late)
        return x.exp() * out.sin() * (x * late).sin()

    first, _, region, _ = grads(block, *inputs((3, 4)))
    torch.testing.assert_close(region, first, rtol=0, atol=0)


def test_an_input_changed_before_the_backward_pass_is_an_error() -> None:
    x, = inputs((3,))
    weight = torch.ones(3, dtype=torch.float64)
    with ts.checkpoint_region():
        out = (x * weight).exp().sin()
    weight.zero_()
    with pytest.raises(InputError, match=r"a tensor \[3\] that it read was changed in place"):
        out.sum().backward()


def test_inside_out() -> None:
    x, y = inputs((3, 4), (3, 4))
    with ts.checkpoint_region():
        a = (x * y).exp()
        with ts.checkpoint_region():
            b = a.sin() * a
        out = b.exp()
    want = ((x * y).exp().sin() * (x * y).exp()).exp()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, y)), torch.autograd.grad(want.sum(), (x, y)))


def test_without_gradients_and_after_an_error() -> None:
    x, = inputs((3,))
    with torch.no_grad(), ts.checkpoint_region():
        assert not x.exp().requires_grad
    region = ts.checkpoint_region()
    with pytest.raises(ZeroDivisionError), region:
        _ = 1 / 0
    assert torch._C._len_torch_dispatch_stack() == 0
    region = ts.checkpoint_region()
    with region, pytest.raises(InputError, match="entered twice"), region:
        pass
