"""ts.function: what fits passes through unchanged, what does not is refused with a message that says why and where."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Dict, List, Optional, Tuple, Union  # noqa: UP035

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import tessera as ts
from tessera import Tensor, bf16, f32, int4, int32
from tessera.errors import InputError, ShapeError
from tessera.types import floating, integer, one_float


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@ts.function
def rms_norm(x: Tensor["B", "S", "D"], weight: Tensor["D"], eps: float = 1e-6) -> Tensor["B", "S", "D"]:
    """Root mean square norm."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def test_result_and_metadata_are_the_functions_own() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    expected = torch.nn.functional.rms_norm(x.double(), (8,), weight.double(), 1e-6)
    torch.testing.assert_close(rms_norm(x, weight).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rms_norm(weight=weight, x=x, eps=1e-6), rms_norm(x, weight))
    assert rms_norm.__name__ == "rms_norm" and rms_norm.__doc__ == "Root mean square norm."
    assert list(inspect.signature(rms_norm).parameters) == ["x", "weight", "eps"]
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'weight'"):
        rms_norm(x)


def test_message_names_both_values_dims_sizes_and_the_call() -> None:
    line = inspect.currentframe().f_lineno + 2  # type: ignore[union-attr]
    with pytest.raises(ShapeError) as caught:
        rms_norm(t(2, 5, 64), t(63))
    assert str(caught.value) == (
        "rms_norm: weight has D=63 (axis 0 of [63]) but x has D=64 (axis 2 of [2, 5, 64]); "
        f"called at {__file__}:{line}")


@ts.function
def typed(x: Tensor["S", "D", bf16], y: Tensor["S", f32, "cpu"]):
    return None


@ts.function
def halves(x: Tensor["B", "H", "D"], cos: Tensor["B", 1, "D/2"], twice: Tensor["2*D"], more: Tensor["B+1"]):
    return None


@ts.function
def number(x: Tensor["S", "D"], S: int, n: int) -> Tensor["S+n", "D"]:
    return torch.zeros(x.shape[0] + abs(n), x.shape[1])


@ts.function
def free_result(x: Tensor["B", "S"], grow: int) -> Tensor["B", "S+max_new"]:
    return torch.zeros(x.shape[0], x.shape[1] + grow)


@ts.function
def product(x: Tensor["B*S", "D"], y: Tensor["B*S"]):
    return None


@ts.function
def leading(x: Tensor["...", "D"], w: Tensor["D", "E"]) -> Tensor["...", "E"]:
    return (x @ w)[:, :1] if x.shape[0] == 1 else x @ w


@ts.function
def middle(x: Tensor["B", "...", "D"], y: Tensor["B", "...", "D"]):
    return None


@ts.function
def packed(x: Tensor["N", "K", int4], scale: Tensor["N", "K/32"]):
    return None


@ts.function
def narrow(x: Tensor["B", "S", one_float], y: Tensor["S", one_float], w: Tensor["S", f32 | bf16] | None = None,
           ids: Tensor["B", integer] | None = None, wide: bool = False) -> Tensor["B", "S", one_float]:
    return x.double() if wide else x


@ts.function
def masked(x: Tensor["B", "G*H", "S"], k: Tensor["B", "H", "T"],
           mask: Tensor["#S", "#T"] | Tensor["#B", "#G*H", "#S", "#T"] | str | None = None):
    return None


@ts.function
def beside(x: Tensor["...", "D", floating], y: Tensor["...", "D"], z: Tensor["...", "E"]) -> Tensor["...", "D"]:
    return y


@ts.function
def rows(ids: Tensor["...", integer], table: Tensor["V", "D"]) -> Tensor["...", "D"]:
    return table[ids]


@ts.function
def even(x: Tensor["...", "2*F"]) -> Tensor["...", "F"]:
    return x[..., ::2]


BF16, I64 = torch.bfloat16, torch.int64


@pytest.mark.parametrize("function, args, problem", [
    (rms_norm, (t(5, 64), t(64)), "x has 2 axes, [5, 64]; expected 3"),
    (rms_norm, (3, t(64)), r'x is of type int; expected a tensor ["B", "S", "D"]'),
    (rms_norm, (t(1, 2, 3).numpy(), t(3)), "x is of type numpy.ndarray; expected a tensor"),
    (rms_norm, (None, t(3)), "x is None; expected a tensor"),
    (typed, (t(2, 3), t(2)), "x is torch.float32; expected torch.bfloat16"),
    (typed, (t(2, 3, dtype=torch.bfloat16), t(2).to("meta")), "y is on meta; expected cpu"),
    (typed, (t(2, 3, dtype=torch.bfloat16), t(3)), "y has S=3 (axis 0 of [3]) but x has S=2"),
    (halves, (t(2, 3, 8), t(2, 1, 3), t(16), t(3)),
     "cos has D/2=3 (axis 2 of [2, 1, 3]) but x has D=8 (axis 2 of [2, 3, 8]), so D/2 is 4"),
    (halves, (t(2, 3, 7), t(2, 1, 3), t(14), t(3)), "x has D=7 (axis 2 of [2, 3, 7]), which 2 does not divide"),
    (halves, (t(2, 3, 8), t(2, 2, 4), t(16), t(3)), "cos has 2 (axis 1 of [2, 2, 4]); expected 1"),
    (halves, (t(2, 3, 8), t(2, 1, 4), t(15), t(3)), "twice has 2*D=15 (axis 0 of [15]) but x has D=8"),
    (halves, (t(2, 3, 8), t(2, 1, 4), t(16), t(2)), "more has B+1=2 (axis 0 of [2]) but x has B=2"),
    (number, (t(4, 2), 3, 1), "x has S=4 (axis 0 of [4, 2]) but the argument S is 3"),
    (number, (t(4, 2), 4, -2), "result has S+n=6 (axis 0 of [6, 2])"),
    (number, (t(4, 2), 4, "2"), "the argument n is of type str; expected an int"),
    (free_result, (t(1, 5), -2), "result has S+max_new=3 (axis 1 of [1, 3]), so max_new would be -2"),
    (product, (t(6, 2), t(5)), "y has B*S=5 (axis 0 of [5]) but x has B*S=6"),
    (leading, (t(2, 3, 4), t(5, 6)), "w has D=5 (axis 0 of [5, 6]) but x has D=4 (axis 2 of [2, 3, 4])"),
    (leading, (t(1, 3, 4), t(4, 6)), 'result has [1, 1] for "..." but x has [1, 3]'),
    (leading, (t(), t(4, 6)), "x has 0 axes, []; expected at least 1"),
    (middle, (t(2, 3, 4, 5), t(2, 4, 5)), 'y has [4] for "..." but x has [3, 4]'),
    (middle, (t(2, 3, 5), t(2, 3, 6)), "y has D=6 (axis 2 of [2, 3, 6]) but x has D=5"),
    (narrow, (t(2, 3), t(3, dtype=BF16)), "y is torch.bfloat16 but x is torch.float32; expected one dtype"),
    (narrow, (t(2, 3, dtype=I64), t(3, dtype=I64)), "x is torch.int64; expected one of torch.float32, torch.bfloat16"),
    (narrow, (t(2, 3), t(3), None, None, True), "result is torch.float64 but x is torch.float32; expected one dtype"),
    (narrow, (t(2, 3), t(3), t(3, dtype=torch.float16)),
     'w is torch.float16; expected one of torch.float32, torch.bfloat16: ["S", f32 or bf16]'),
    (narrow, (t(2, 3), t(3), None, t(2)), "ids is torch.float32; expected one of torch.int64"),
    (narrow, (t(2, 3), t(3), None, t(3, dtype=I64)), "ids has B=3 (axis 0 of [3]) but x has B=2 (axis 0 of [2, 3])"),
    (masked, (t(2, 6, 5), t(2, 4, 7)),
     "x has G*H=6 (axis 1 of [2, 6, 5]) but k has H=4 (axis 1 of [2, 4, 7]), and there is no G to that"),
    (masked, (t(2, 6, 5), t(2, 3, 7), t(4, 7)),
     "mask has S=4 (axis 0 of [4, 7]) but x has S=5 (axis 2 of [2, 6, 5]); 1 would fit as well"),
    (masked, (t(2, 6, 5), t(2, 3, 7), t(1, 3, 1, 1)), "mask has G*H=3 (axis 1 of [1, 3, 1, 1]) but x has G*H=6"),
    (even, (t(3, 7),), "x has 2*F=7 (axis 1 of [3, 7]), and there is no F to that"),
    (masked, (t(2, 6, 5), t(2, 3, 7), t(5, 5, 7)), "mask is a tensor [5, 5, 7]"),
    (masked, (t(2, 6, 5), t(2, 3, 7), 3), "mask is of type int"),
    (beside, (t(2, 4), t(3, 4), t(2, 5)), 'y has [3] for "..." but x has [2]'),
    (beside, (t(2, 4), t(2, 5), t(2, 5)), "y has D=5 (axis 1 of [2, 5]) but x has D=4"),
    (beside, (t(2, 4), t(2, 4), t(3, 5)), 'z has [3] for "..." but x has [2]'),
    (packed, (t(3, 32, dtype=torch.uint8), t(3, 1)), "scale has K/32=1 (axis 1 of [3, 1]) but x has K=64"),
])
def test_misfit(function, args, problem) -> None:
    with pytest.raises(ShapeError) as caught:
        function(*args)
    assert problem in str(caught.value)
    assert str(caught.value).count("\n") == 0 and "; called at " in str(caught.value)


@pytest.mark.parametrize("function, args", [
    (typed, (t(2, 3, dtype=torch.bfloat16), t(2))),
    (halves, (t(2, 3, 8), t(2, 1, 4), t(16), t(3))),
    (halves, (t(0, 3, 0), t(0, 1, 0), t(0), t(1))),
    (number, (t(4, 2), 4, 3)), (free_result, (t(1, 5), 0)), (free_result, (t(1, 5), 7)),
    (product, (t(6, 2), t(6))), (leading, (t(4), t(4, 6))), (leading, (t(2, 3, 1, 4), t(4, 6))),
    (middle, (t(2, 5), t(2, 5))), (middle, (t(2, 3, 4, 5), t(2, 3, 4, 5))),
    (packed, (t(3, 32, dtype=torch.uint8), t(3, 2))),
    (narrow, (t(2, 3), t(3), t(3, dtype=BF16), t(2, dtype=torch.int16))),
    (narrow, (t(2, 3, dtype=BF16), t(3, dtype=BF16), t(3), t(2, dtype=torch.uint8))),
    (masked, (t(2, 6, 5), t(2, 3, 7), t(5, 7))), (masked, (t(2, 6, 5), t(2, 3, 7), t(1, 1))),
    (masked, (t(2, 6, 5), t(2, 3, 7), t(2, 6, 1, 7))), (masked, (t(2, 6, 5), t(2, 3, 7), t(1, 1, 5, 1))),
    (masked, (t(2, 6, 5), t(2, 3, 7), "causal")), (masked, (t(0, 6, 5), t(0, 3, 7), None)),
    (beside, (t(4), t(4), t(3))), (beside, (t(2, 3, 4), t(2, 3, 4), t(2, 3, 1))),
])
def test_fit(function, args) -> None:
    function(*args)


@pytest.mark.parametrize("function", [narrow, masked, beside, rows])
def test_usual_calls_are_decided_without_the_matcher(function, monkeypatch) -> None:
    monkeypatch.setitem(function.__globals__, "_ts_match", None)
    arguments = {narrow: (t(2, 3), t(3), t(3), t(2, dtype=I64)), masked: (t(2, 6, 5), t(2, 3, 7), t(2, 1, 5, 7)),
                 beside: (t(2, 4), t(2, 4), t(2, 5)), rows: (t(2, 3, dtype=I64), t(9, 4))}
    function(*arguments[function])


@pytest.mark.parametrize("annotation, good, bad", [
    (Optional[Tensor["S", "S"]], [None, t(3, 3)], [t(3, 4), t(3), 1]),  # noqa: UP045
    (Tensor["S", "S"] | None, [None, t(3, 3)], [t(4, 4)]),
    (Union[Tensor["S", int32], Tensor["S", "D", f32]],  # noqa: UP007
     [t(3, dtype=torch.int32), t(3, 9)], [t(3), t(4, 9), t(3, 9, 1), None]),
    (Tensor["S", "D"] | Tensor["D", "S"], [t(3, 5), t(5, 3)], [t(5, 4)]),
    (Tensor["S", f32] | float, [t(3), 1.5], [t(4), "1", 1]),
    (Dict[str, Tensor["S", "D"]], [{}, {"a": t(3, 5), "b": t(3, 5)}],  # noqa: UP006
     [{"a": t(3, 5), "b": t(3, 6)}, {"a": 1}, [t(3, 5)]]),
    (dict[str, Tensor], [{"a": t(1)}], [{"a": 1}]),
    (List[Tensor["S"]], [[], [t(3), t(3)], (t(3),)], [[t(3), t(4)], {t(3)}, t(3)]),  # noqa: UP006
    (tuple[Tensor["S"], ...], [(), (t(3), t(3))], [(t(3), t(4))]),
    (Tuple[Tensor["S"], int, Tensor["D"]], [(t(3), 1, t(9))], [(t(3), t(9)), (t(2), 1, t(9))]),  # noqa: UP006
    (Tensor, [t(1), t(1, 2)], [1, None]),
    (torch.Tensor, [t(1)], [1]),
    (Annotated[Tensor["S"], "why"], [t(3)], [t(4)]),
    (Tensor[()], [t()], [t(1)]),
    (Tensor[f32], [t()], [t(1), t(dtype=torch.int32)]),
    (dict[str, Tensor["S"] | None], [{"a": None, "b": t(3)}], [{"a": t(4)}]),
])
def test_kinds_of_annotation(annotation, good, bad) -> None:
    def f(x: Tensor["S"], value) -> Tensor["S"]:
        return x

    f.__annotations__["value"] = annotation
    checked = ts.function(f)
    for value in good:
        assert checked(t(3), value).shape == (3,)
    for value in bad:
        with pytest.raises(ShapeError, match=r"f: (value|result)"):
            checked(t(3), value)


def test_sizes_that_only_an_optional_argument_has() -> None:
    @ts.function
    def f(x: Tensor["S"], a: Tensor["M"] | None = None, b: Tensor["M"] = None) -> Tensor["S"]:
        return x

    f(t(2)), f(t(2), t(3)), f(t(2), None, t(4)), f(t(2), t(3), t(3))
    with pytest.raises(ShapeError, match=r"b has M=4 .* but a has M=3"):
        f(t(2), t(3), t(4))


def test_every_kind_of_parameter() -> None:
    @ts.function
    def f(a: Tensor["N"], /, b: Tensor["N"], *rest: Tensor["N"], c: Tensor["N"], d: int = 2, **more: Tensor["N"]):
        return a, b, rest, c, d, more

    a, b, c = t(2), t(2), t(2)
    assert f(a, b, c=c) == (a, b, (), c, 2, {})
    assert f(a, b, c, c=c, d=3, e=b)[2:] == ((c,), c, 3, {"e": b})
    for bad in (lambda: f(a, b, t(3), c=c), lambda: f(a, b, c=t(3)), lambda: f(a, b, c=c, e=t(3))):
        with pytest.raises(ShapeError, match="N=3"):
            bad()

    @ts.function
    def g(a: Tensor["N"], *, c: Tensor["N"], d: int = 2):
        return d

    assert g(a, c=c) == 2
    with pytest.raises(TypeError, match="positional"):
        g(a, c)


def test_results_in_containers() -> None:
    @ts.function
    def tables(seq_len: int, dim: int) -> Tuple[Tensor["seq_len", "dim"], Tensor["seq_len", "dim"]]:  # noqa: UP006
        return torch.zeros(seq_len, dim), torch.zeros(max(seq_len, 2), dim)

    @ts.function
    def named(x: Tensor["N"]) -> dict[str, Tensor["N"]]:
        return {"y": x[1:]}

    tables(3, 4)
    with pytest.raises(ShapeError, match=r"result\[1\] has seq_len=2 \(axis 0 of \[2, 4\]\) but the argument seq_len"):
        tables(1, 4)
    with pytest.raises(ShapeError, match=r"result\['y'\] has N=4"):
        named(t(5))


@pytest.mark.parametrize("text, problem", [
    ('x: Tensor["B", "C ~ 3"]', "annotation of 'x': dim: 'C ~ 3' is not a size"),
    ('x: Tensor["...", "B", "..."]', '"..." can stand once'),
    ('x: Tensor["B", 1.5]', "cannot be evaluated: Tensor[...]: dim 1.5"),
    ('x: Tensor["B", missing]', "annotation of 'x': Tensor['B', missing] cannot be evaluated: name 'missing'"),
    ('x: ts.Tile["B"]', "Tile[...] describes a kernel's parameter"),
    ('x: list[Callable[[Tensor["B"]], None]]', "can stand in tuples, lists, dict values and unions"),
    ('x: int) -> list[Iterator[Tensor["B"]]]', "the result's annotation"),
])
def test_unreadable_annotation(text, problem, tmp_path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("from __future__ import annotations\nimport tessera as ts\nfrom tessera import Tensor\n"
                    "from collections.abc import Callable, Iterator\n\n@ts.function\n"
                    f"def f(y: int,\n      {text}{'' if '->' in text else ')'}:\n    ...\n")
    with pytest.raises(InputError) as caught:
        exec(compile(file.read_text(), str(file), "exec"), {"__name__": "wrong"})
    assert problem in str(caught.value) and str(caught.value).startswith(f"{file}:8: function f: ")


def test_only_functions_are_decorated() -> None:
    with pytest.raises(InputError, match="expected a Python function"):
        ts.function(3)


def test_methods() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 5)

        @ts.function
        def forward(self, x: Tensor["B", 4]) -> Tensor["B", 5]:
            return self.linear(x)

        @staticmethod
        @ts.function
        def double(x: Tensor["B"]) -> Tensor["B"]:
            return x + x

        @ts.function
        @classmethod
        def name(cls, x: Tensor["B", "B"]) -> str:
            return cls.__name__

    layer = Layer()
    torch.testing.assert_close(layer(t(3, 4)), layer.linear(t(3, 4)))
    assert layer.double(t(2)).shape == (2,) and Layer.name(t(2, 2)) == "Layer"
    for bad in (lambda: layer(t(3, 5)), lambda: layer.double(t(2, 2)), lambda: layer.name(t(2, 3))):
        with pytest.raises(ShapeError, match=re.escape(f"called at {__file__}")):
            bad()


def test_text_annotations_see_the_scopes_around_them() -> None:
    half = ts.f16

    class Outer:
        other = ts.int8

        @staticmethod
        @ts.function
        def method(x: Tensor["N", half], y: Tensor["N", other]):
            return True

    assert Outer.method(t(2, dtype=torch.float16), t(2, dtype=torch.int8))
    with pytest.raises(ShapeError, match=r"expected torch\.int8"):
        Outer.method(t(2, dtype=torch.float16), t(2))


def test_above_decorators_of_others() -> None:
    @ts.function
    @torch.no_grad()
    def generate(input_ids: Tensor["B", "S", "i32"], max_new_tokens: int = 2) -> Tensor["B", "S+max_new", "i32"]:
        assert not torch.is_grad_enabled()
        return torch.cat([input_ids, input_ids[:, :max_new_tokens]], 1)

    ids = t(2, 5, dtype=torch.int32)
    assert generate(ids).shape == (2, 7)
    with pytest.raises(ShapeError, match=r"input_ids is torch.int64; expected torch.int32"):
        generate(ids.long())


def test_nothing_is_checked_twice() -> None:
    assert ts.function(rms_norm) is rms_norm
    once = ts.checkpoint(rms_norm)
    assert once.__wrapped__ is not rms_norm
    with pytest.raises(ShapeError):
        once(t(2, 5, 64), t(63))


def test_without_tensors_the_function_is_not_wrapped() -> None:
    def f(x: int) -> int:
        return x

    assert ts.function(f) is f


def test_coroutines_and_generators_check_their_arguments() -> None:
    @ts.function
    def parts(x: Tensor["N"], y: Tensor["N"]) -> list[Tensor["N"]]:
        yield x
        yield y

    assert len(list(parts(t(2), t(2)))) == 2
    with pytest.raises(ShapeError, match="y has N=3"):
        parts(t(2), t(3))


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_under_torch_compile_checks_cost_no_graph_break(dynamic) -> None:
    torch._dynamo.reset()
    calls = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, w: rms_norm(x, w) + 1, backend=calls, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 8), (2, 5, 8)):
        x, w = torch.randn(shape), torch.randn(8)
        torch.testing.assert_close(compiled(x, w), rms_norm(x, w) + 1)
    assert calls.frame_count == (1 if dynamic else 2)
    q, k, mask = t(2, 6, 5), t(2, 3, 7), torch.ones(5, 7, dtype=torch.bool)
    torch.compile(lambda: (masked(q, k, mask), narrow(t(2, 3), t(3)), beside(q, q, q)), backend=calls, fullgraph=True,
                  dynamic=dynamic)()
    with pytest.raises(Exception, match="weight has D=63"):
        torch.compile(lambda x, w: rms_norm(x, w) + 1, backend="eager")(t(2, 5, 64), t(63))
    torch._dynamo.reset()


def test_fake_tensors_and_symbolic_sizes() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        assert rms_norm(t(2, 3, 8), t(8)).shape == (2, 3, 8)
        with pytest.raises(ShapeError, match="D=7"):
            rms_norm(t(2, 3, 8), t(7))
    traced = make_fx(lambda x, w: rms_norm(x, w), tracing_mode="symbolic")(torch.randn(2, 3, 8), torch.randn(8))
    x, w = torch.randn(4, 1, 8), torch.randn(8)
    torch.testing.assert_close(traced(x, w), rms_norm(x, w))


def test_vmap_and_grad_pass_through() -> None:
    x, w = torch.randn(5, 2, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(rms_norm, (0, None))(x, w), torch.stack([rms_norm(i, w) for i in x]))
    assert torch.autograd.gradcheck(rms_norm, (x[0].requires_grad_(), w.requires_grad_()))
