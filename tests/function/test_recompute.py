"""checkpoint, memory_efficient: the same numbers, with less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import tessera as ts
from tessera import Tensor
from tessera.errors import InputError, ShapeError


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def gradients(function, tensors):
    torch.manual_seed(3)
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]


kept: list[StorageWeakRef] = []


def mlp(x: Tensor["B", "S", "D"], up: Tensor["D", "F"], down: Tensor["F", "D"], p: float = 0.0
        ) -> Tensor["B", "S", "D"]:
    hidden = x @ up
    kept.append(StorageWeakRef(hidden.untyped_storage()))
    return torch.nn.functional.dropout(torch.nn.functional.silu(hidden), p) @ down


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("decorator", [ts.checkpoint, ts.memory_efficient])
def test_same_numbers_and_nothing_kept(decorator, p) -> None:
    tensors = inputs((2, 7, 4), (4, 9), (9, 4))
    expected = gradients(lambda *a: mlp(*a, p), tensors)
    for got, want in zip(gradients(lambda *a: decorator(mlp)(*a, p=p), tensors), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    kept.clear()
    plain = mlp(*tensors, p)
    assert not kept[0].expired()
    checkpointed = decorator(mlp)(*tensors, p)
    assert kept[1].expired()
    del plain, checkpointed


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("rows", ["S", "B"])
def test_chunks_of_rows(rows, chunk) -> None:
    tensors = inputs((2, 7, 4), (4, 9), (9, 4), seed=chunk)
    chunked = ts.memory_efficient(rows=rows, chunk=chunk)(mlp)
    for got, want in zip(gradients(chunked, tensors), gradients(mlp, tensors), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(chunked(tensors[0], up=tensors[1], down=tensors[2]), mlp(*tensors))
    kept.clear()
    out = chunked(*tensors)
    assert len(kept) == -(-{"S": 7, "B": 2}[rows] // chunk) and all(r.expired() for r in kept)
    del out


def test_chunks_are_cut_from_every_argument_with_the_dim() -> None:
    def f(x: Tensor["S", "D"], mask: Tensor["S"] | None, names: str, scale: Tensor["S", 1]) -> Tensor["S", "D"]:
        return x * scale if mask is None else x * scale * mask[:, None]

    x, mask, scale = inputs((5, 3), (5,), (5, 1))
    chunked = ts.memory_efficient(rows="S", chunk=2)(f)
    torch.testing.assert_close(chunked(x, mask, "n", scale=scale), f(x, mask, "n", scale))
    torch.testing.assert_close(chunked(x, None, names="n", scale=scale), f(x, None, "n", scale))
    with pytest.raises(ShapeError, match="scale has S=4"):
        chunked(x, None, "n", scale[:4])


def twice(x: Tensor["S", "D"], mask: Tensor["S", "S"]) -> Tensor["S", "D"]:
    return mask @ x


def scalar(x: Tensor["S", "D"]) -> Tensor["D"]:
    return x.sum(0)


@pytest.mark.parametrize("function, options, problem", [
    (twice, {"rows": "S"}, 'S stands in ["S", "S"] of \'mask\''),
    (scalar, {"rows": "S"}, "expected a dim of the result of scalar and of at least one argument"),
    (mlp, {"rows": "Q"}, "rows='Q' given"),
    (mlp, {"rows": "S", "chunk": 0}, "chunk=0 given; expected at least 1"),
])
def test_rows_that_cannot_be_cut(function, options, problem) -> None:
    with pytest.raises(InputError) as caught:
        ts.memory_efficient(**options)(function)
    assert problem in str(caught.value)


@pytest.mark.parametrize("decorator", [ts.checkpoint, ts.memory_efficient])
def test_classes(decorator) -> None:
    @decorator
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor["B", 4]) -> Tensor["B", 4]:
            hidden = self.linear(x).exp()
            kept.append(StorageWeakRef(hidden.untyped_storage()))
            return hidden.square()

    kept.clear()
    block, (x,) = Block(), inputs((3, 4))
    out = block(x)
    assert kept[0].expired()
    out.sum().backward()
    want = torch.autograd.grad(block.linear(x).exp().square().sum(), [x, block.linear.weight])
    torch.testing.assert_close([x.grad, block.linear.weight.grad], list(want))
    with pytest.raises(ShapeError, match=r"x has 5 \(axis 1"):
        block(torch.ones(1, 5))


def test_class_of_static_functions() -> None:
    @ts.memory_efficient
    class Attention:
        @staticmethod
        @ts.function
        def scores(q: Tensor["S", "D"], k: Tensor["T", "D"]) -> Tensor["S", "T"]:
            hidden = (q @ k.T).exp()
            kept.append(StorageWeakRef(hidden.untyped_storage()))
            return hidden / hidden.sum(-1, keepdim=True)

    kept.clear()
    q, k = inputs((3, 4), (5, 4))
    out = Attention.scores(q, k)
    assert kept[0].expired()
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), q),
                               torch.autograd.grad((q @ k.T).softmax(-1).square().sum(), q))


def test_class_without_anything_to_decorate() -> None:
    with pytest.raises(InputError, match="class Empty has no method `forward`"):
        @ts.checkpoint
        class Empty:
            pass


def test_checkpoint_is_also_the_package() -> None:
    import tessera.checkpoint

    assert ts.checkpoint is tessera.checkpoint and callable(tessera.checkpoint)
