"""jit and fused: compiled where there is a compiler, and where there is none the same results and one message.

The inductor takes some seconds for a graph; most tests put a stand-in for it in its place.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo.testing

import tessera as ts
from tessera import Tensor, Tile, f32, tile
from tessera.errors import CompileError, InputError, ShapeError
from tessera.function import compiling

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at import
    from torch._inductor import compile_fx as inductor
    from torch._inductor.exc import InvalidCxxCompiler


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "_no_compiler", None)
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that reach the inductor."""
    seen: list[torch.fx.GraphModule] = []

    def compile_fx(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    return seen


def chain(x: Tensor["B", "D"], w: Tensor["D"]) -> Tensor["B", "D"]:
    return torch.tanh((x * w).relu().exp() + 1)


X, W = torch.randn(3, 4), torch.randn(4)


@pytest.mark.slow
@pytest.mark.parametrize("decorator", [ts.jit, ts.fused])
def test_compiled_by_the_inductor(decorator) -> None:
    x = X.clone().requires_grad_()
    got = decorator(chain)(x, W)
    torch.testing.assert_close(got, chain(X, W))
    got.sum().backward()
    want = X.clone().requires_grad_()
    chain(want, W).sum().backward()
    torch.testing.assert_close(x.grad, want.grad)


@pytest.mark.parametrize("decorator", [ts.jit, ts.fused])
def test_one_graph_of_the_body_and_checks_outside(decorator, graphs) -> None:
    compiled = decorator(chain)
    for _ in range(3):
        torch.testing.assert_close(compiled(X, W), chain(X, W))
    assert len(graphs) == 1
    with pytest.raises(ShapeError, match=f"w has D=5 .*called at {__file__}"):
        compiled(X, torch.ones(5))
    assert ts.function(compiled) is compiled


def test_jit_steps_over_what_cannot_be_traced(graphs) -> None:
    calls = []

    @ts.jit
    def f(x):
        y = x * 2
        calls.append(float(y.sum()))
        y += 1
        return y.sin()

    torch.testing.assert_close(f(X), (X * 2 + 1).sin())
    assert len(calls) == 1 and len(graphs) == 2


def test_jit_runs_kernels(graphs) -> None:
    @ts.kernel
    def twice(x: Tile["S", "D", f32], out: Tile["S", "D", f32]):
        tile.store(out, tile.load(x) * 2.0)

    @ts.jit
    def f(x):
        out = torch.empty_like(x)
        twice(x + 1, out)
        return out * 3

    torch.testing.assert_close(f(X), (X + 1) * 6)


def test_registered_operations_stay_whole(graphs) -> None:
    from tessera import ops

    @ts.jit
    def f(x, w):
        return ops.rms_norm(x * 2, w, 1e-5).sin()

    with torch.no_grad():
        torch.testing.assert_close(f(X, W), torch.nn.functional.rms_norm(X * 2, (4,), W, 1e-5).sin())
    assert len(graphs) == 1


def test_fused_must_be_one_graph(graphs) -> None:
    @ts.fused
    def f(x):
        if x.sum() > 0:
            return x.exp()
        return -x

    with pytest.raises(CompileError, match=r"fused: .*f cannot be one graph: .*test_compiling.py"):
        f(X)


def missing(graph, inputs):
    raise InvalidCxxCompiler


def failing(graph, inputs):
    raise RuntimeError("no such register\nand more")


@pytest.mark.parametrize("decorator", [ts.jit, ts.fused])
def test_without_a_compiler_one_message_for_all(monkeypatch, decorator) -> None:
    monkeypatch.setattr(inductor, "compile_fx", missing)
    first, second = decorator(chain), decorator(lambda x: x.exp())
    x = X.clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match=r"chain: no working C\+\+ compiler was found; it runs uncompiled") as seen:
        torch.testing.assert_close(first(x, W), chain(X, W))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(second(X), X.exp())
        torch.testing.assert_close(first(X[:1], W), chain(X[:1], W))
        first(x, W).sum().backward()
    assert x.grad is not None


def test_a_failing_compiler_is_told_once_a_function_and_nothing_runs_twice(monkeypatch) -> None:
    monkeypatch.setattr(inductor, "compile_fx", failing)
    calls = []

    @ts.jit
    def f(x, total):
        total += x.sum()
        calls.append(total.item())
        total += 1
        return total * 2

    total = torch.zeros(())
    with pytest.warns(RuntimeWarning, match=r"f: compiling failed \(RuntimeError: no such register\); it runs") as seen:
        out = f(X, total)
    assert [w.category for w in seen].count(RuntimeWarning) == 1 and len(calls) == 1  # torch 2.11 adds one of its own
    torch.testing.assert_close(out, (X.sum() + 1) * 2)
    torch.testing.assert_close(total, X.sum() + 1)


def test_errors_of_the_function_itself_are_its_own(graphs) -> None:
    @ts.jit
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        f(X)


def test_fused_class_becomes_a_module(graphs) -> None:
    @ts.fused
    class Layer:
        def __init__(self, dim: int):
            self.linear = torch.nn.Linear(dim, dim)

        @ts.function
        def forward(self, x: Tensor["B", "D"]) -> Tensor["B", "D"]:
            return self.linear(x).relu() + x

    layer = Layer(4)
    torch.testing.assert_close(layer(X), layer.linear(X).relu() + X)
    assert len(graphs) == 1 and len(list(layer.parameters())) == 2
    with pytest.raises(ShapeError, match="x has 1 axis"):
        layer(X[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, which looks at the loss between two graphs
def test_classes(graphs) -> None:
    @ts.jit
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 5)

        def forward(self, x: Tensor["B", 4]) -> Tensor["B", 5]:
            return self.linear(x).relu()

    layer = Layer()
    torch.testing.assert_close(layer(X), layer.linear(X).relu())
    assert len(graphs) == 1
    with pytest.raises(ShapeError, match="expected 4"):
        layer(torch.ones(2, 3))

    @ts.jit
    class Trainer:
        """As in the documents: the class and its methods."""

        def __init__(self, model) -> None:
            self.model = model

        @ts.jit
        def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
            loss = self.model(batch["x"]).square().mean()
            loss.backward()
            return {"loss": loss.item()}

    assert Trainer(layer).train_step({"x": X})["loss"] == pytest.approx(layer(X).detach().square().mean().item())
    assert layer.linear.weight.grad is not None
    with pytest.raises(InputError, match="class Nothing has no method `forward`"):
        ts.jit(type("Nothing", (), {}))


def test_inside_another_compilation_it_is_inlined(graphs) -> None:
    inner = ts.jit(chain)
    counter = torch._dynamo.testing.CompileCounter()
    torch.testing.assert_close(torch.compile(lambda x: inner(x, W) + 1, backend=counter)(X), chain(X, W) + 1)
    assert counter.frame_count == 1 and not graphs
