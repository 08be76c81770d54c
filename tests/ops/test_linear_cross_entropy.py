"""linear_cross_entropy against torch's linear and cross_entropy in float64; its memory; shards of the vocabulary."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tessera as ts
from tessera.errors import InputError, ShapeError, UnsupportedError
from tessera.ops.linear_cross_entropy import (
    _rows_op,
    _sum_op,
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
)
from tessera.ops.registration import implementation
from tests.ops.test_losses import expected

# Several chunks of rows; all rows in one; vocabulary in blocks with a ragged last one; one row, one class.
SHAPES = [((3, 70), 17, 300), ((9,), 5, 77), ((40,), 12, 70000), ((1,), 3, 1), ((33,), 8, 4099)]
OPTIONS = [(0.0, 0.0, "mean"), (0.1, 1e-3, "sum"), (0.3, 1e-3, "none")]


def case(
    seed: int, shape: tuple[int, ...], width: int, n_classes: int, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(n_classes, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(n_classes, shape, generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)


def wide_case(hidden: Tensor, weight: Tensor, targets: Tensor, options: tuple) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return hidden, weight, expected(hidden @ weight.t(), targets, *options)


def relative(actual: Tensor, reference: Tensor) -> float:
    return ((actual.double() - reference).abs().max() / reference.abs().max().clamp(min=0.1)).item()


@pytest.mark.parametrize("choice, dtype, bound", [
    ("auto", torch.float32, 5e-6), ("auto", torch.bfloat16, 1e-2), ("reference", torch.float16, 2e-3)])
@pytest.mark.parametrize("smoothing, z_loss, reduction", OPTIONS)
@pytest.mark.parametrize("shape, width, n_classes", SHAPES)
def test_loss_and_gradients(shape, width, n_classes, smoothing, z_loss, reduction, dtype, bound, choice):
    hidden, weight, targets = case(len(shape) + n_classes, shape, width, n_classes, dtype)
    wide_hidden, wide_weight, reference = wide_case(hidden, weight, targets, (smoothing, z_loss, reduction))
    slopes = torch.rand(reference.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    with implementation(choice):
        loss = linear_cross_entropy(hidden, weight, targets, -100, smoothing, reduction, z_loss)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    (loss * slopes).sum().backward()
    (reference * slopes).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert relative(hidden.grad, wide_hidden.grad) < bound and relative(weight.grad, wide_weight.grad) < bound
    with torch.no_grad(), implementation(choice):
        again = linear_cross_entropy(hidden, weight, targets, -100, smoothing, reduction, z_loss)
    torch.testing.assert_close(again, loss.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    hidden, weight, targets = case(2, (5,), 3, 4, torch.float64)
    for choice in ("auto", "reference"):
        with implementation(choice):
            assert torch.autograd.gradcheck(
                lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, -100, 0.1, reduction, 0.01),
                (hidden, weight))


@pytest.mark.parametrize("emulated", [True, False], ids=["emulated", "native"])
def test_mixed_dtypes_and_autocast(emulated, monkeypatch):
    """bf16 activations against an f32 master weight: its gradient keeps f32's digits."""
    halves = frozenset((torch.bfloat16, torch.float16)) if emulated else frozenset()
    monkeypatch.setattr(importlib.import_module("tessera.ops.matmul"), "_EMULATED", halves)
    hidden, weight, targets = case(3, (200,), 16, 90)
    low = hidden.detach().bfloat16().requires_grad_()
    wide_hidden, wide_weight, reference = wide_case(low, weight.detach().bfloat16(), targets, (0.0, 0.0, "mean"))
    reference.backward()
    loss = linear_cross_entropy(low, weight, targets)
    loss.backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    assert weight.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert relative(weight.grad, wide_weight.grad) < 4e-3 and relative(low.grad, wide_hidden.grad) < 1e-2
    for mode in (torch.autocast("cpu", torch.bfloat16), ts.precision(compute=ts.bf16)):
        with mode:
            torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), loss)


def test_frozen_parts_and_scaled_loss():
    hidden, weight, targets = case(4, (30,), 6, 50)
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    (3 * loss).backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()  # adds to what the first left
    torch.testing.assert_close(hidden.grad, first * 4 / 3)
    hidden.grad = None
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    wide = wide_case(hidden, weight, targets, (0.0, 0.0, "mean"))
    wide[2].backward()
    assert hidden.grad is None and relative(weight.grad, wide[1].grad) < 1e-5
    torch.testing.assert_close(first.double(), 3 * wide[0].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_classes", [50, 70000])
def test_strided_hidden_and_extremes(n_classes):
    """Every second column of a wider tensor; logits of 1e30 and rows of which all logits are -inf."""
    hidden, weight, targets = case(5, (20,), 8, n_classes)
    strided = torch.stack([hidden.detach(), hidden.detach()], -1)[..., 0].requires_grad_()
    torch.testing.assert_close(
        linear_cross_entropy(strided, weight, targets), linear_cross_entropy(hidden.detach(), weight, targets))
    huge = torch.zeros(3, 1)
    huge[0], huge[1] = 1e30, -1.0
    huge.requires_grad_()
    weight = torch.zeros(n_classes, 1)
    weight[:2], weight[2:] = 1.0, -1.0
    loss = linear_cross_entropy(huge, weight, torch.tensor([1, 5, -100]), reduction="none")
    torch.testing.assert_close(loss[[0, 2]], torch.tensor([2.0, 1.0]).log())
    loss.sum().backward()
    assert huge.grad.isfinite().all() and huge.grad[2] == 0
    dead = linear_cross_entropy(torch.tensor([[-torch.inf]]), torch.ones(n_classes, 1), torch.tensor([0]))
    assert dead == torch.inf


def test_nothing_to_count():
    for shape, targets in (((4,), torch.full((4,), -100)), ((0,), torch.zeros(0, dtype=torch.long))):
        hidden, weight, _ = case(6, shape, 5, 9)
        for reduction in ("mean", "none"):
            loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
            loss.backward()
            assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_wrong_arguments():
    hidden, weight, targets = case(7, (4,), 5, 9)
    with pytest.raises(ShapeError, match=r"weight has D=4 .* but hidden has D=5"):
        linear_cross_entropy(hidden, weight[:, :4], targets)
    with pytest.raises(ShapeError, match=r"targets has \[3\] for .* but hidden has \[4\]"):
        linear_cross_entropy(hidden, weight, targets[:3])
    for wants_grad in (True, False):
        with torch.set_grad_enabled(wants_grad), pytest.raises(InputError, match=r"targets: 9 given in row 1"):
            linear_cross_entropy(hidden, weight, torch.tensor([0, 9, 1, 2]))
    with pytest.raises(UnsupportedError, match="create_graph given"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration(dtype):
    hidden, weight, targets = case(8, (5,), 4, 9, dtype)
    torch.library.opcheck(_rows_op.registered, (hidden, weight, targets, -100, 0.1, 0.01))
    torch.library.opcheck(
        _sum_op.registered, (hidden, weight, targets, torch.tensor(0.2, dtype=dtype), -100, 0.1, 0.01, True),
        test_utils=("test_schema", "test_faketensor"))  # the gradients among its results have none themselves


def test_compiled_whole():
    hidden, weight, targets = case(9, (2, 7), 4, 30)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for options in ({}, {"reduction": "none", "z_loss": 0.1}):
        eager = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, **options).sum(), (hidden, weight))
        actual = torch.autograd.grad(compiled(hidden, weight, targets, **options).sum(), (hidden, weight))
        torch.testing.assert_close(actual, eager)


def in_ranks(n_ranks: int, run: Callable[[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], None]) -> None:
    """Run a function on threads that stand for ranks, with the maximum and the sum over them."""
    barrier, given, failures = threading.Barrier(n_ranks, timeout=60), [torch.empty(0)] * n_ranks, []

    def work(rank: int) -> None:
        def reduction(join: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def reduce(x: Tensor) -> Tensor:
                given[rank] = x
                barrier.wait()
                result = join(torch.stack(given))
                barrier.wait()
                return result

            return reduce

        try:
            run(rank, reduction(lambda x: x.amax(0)), reduction(lambda x: x.sum(0)))
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("smoothing, z_loss, reduction", OPTIONS)
def test_vocabulary_on_three_ranks(smoothing, z_loss, reduction, dtype, bound):
    hidden, weight, targets = case(10, (4, 9), 6, 50, dtype)
    wide_hidden, wide_weight, reference = wide_case(hidden, weight, targets, (smoothing, z_loss, reduction))
    reference.sum().backward()
    bounds = [0, 20, 37, 50]

    def run(rank: int, reduce_max: Callable[[Tensor], Tensor], reduce_sum: Callable[[Tensor], Tensor]) -> None:
        own = hidden.detach().clone().requires_grad_()
        shard = weight.detach()[bounds[rank]:bounds[rank + 1]].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(
            own, shard, targets, first_class=bounds[rank], n_classes=50, reduce_max=reduce_max, reduce_sum=reduce_sum,
            label_smoothing=smoothing, reduction=reduction, z_loss=z_loss)
        torch.testing.assert_close(loss.double(), reference.detach(), rtol=1e-5, atol=1e-5)
        loss.sum().backward()
        assert relative(own.grad, wide_hidden.grad) < bound
        assert relative(shard.grad, wide_weight.grad[bounds[rank]:bounds[rank + 1]]) < bound

    in_ranks(3, run)


MEMORY = """
import re, sys, torch
import torch.nn.functional as F
from tessera.ops.linear_cross_entropy import linear_cross_entropy
loss = linear_cross_entropy if sys.argv[1] == "ours" else lambda h, w, t: F.cross_entropy(F.linear(h, w), t)
def kilobytes(name):
    return int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
for _ in range(2):  # the first run compiles or loads the kernels
    hidden, weight = torch.randn(1024, 64, requires_grad=True), torch.randn(8192, 64, requires_grad=True)
    targets = torch.randint(8192, (1024,))
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    before = kilobytes("VmRSS")
    loss(hidden, weight, targets).backward()
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_an_eighth_of_what_the_logits_take():
    """What a process of its own takes at its peak beyond the inputs, the gradients included."""
    def run(which: str) -> int:
        command = [sys.executable, "-c", MEMORY, which]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert run("ours") * 8 < run("torch")
