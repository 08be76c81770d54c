"""What the tests of operations share: inputs of any layout, and a comparison of values and gradients with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
# Of the largest value: a few roundings of f32, one rounding of the narrow types.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-12}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that need a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def layouts(x: Tensor) -> list[Tensor]:
    """The values of x, contiguous and as three other views; each is a leaf that needs a gradient."""
    x = x.detach()
    wide = torch.stack((x, x + 1), -1)
    views = [x.clone(), wide[..., 0], torch.cat((x, x + 1), -1)[..., :x.shape[-1]]]
    if x.dim() > 1:
        views.append(x.transpose(0, -1).contiguous().transpose(0, -1))
    return [view.requires_grad_() for view in views]


def check_against_float64(
    function: Callable[..., Any], reference: Callable[..., Any], tensors: Sequence[Tensor], *, factor: float = 1.0,
) -> None:
    """Values and gradients of `function` against those of `reference` on the same tensors in float64.

    Args:
        function, reference: of the tensors, giving a tensor or several.
        tensors: all need gradients.
        factor: on the tolerance of the dtype.
    """
    actual = _as_tuple(function(*tensors))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = _as_tuple(reference(*wide))
    grads = [normal(i, *out.shape, dtype=out.dtype).detach() for i, out in enumerate(actual)]
    actual_grads = torch.autograd.grad(actual, tensors, grads, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, wide, [g.double() for g in grads], allow_unused=True)
    for name, a, e in [*(("value", a, e) for a, e in zip(actual, expected)),
                       *(("gradient", a, e) for a, e in zip(actual_grads, expected_grads))]:
        if e is None:
            assert a is None or not a.any(), name
            continue
        assert a.shape == e.shape, (name, a.shape, e.shape)
        assert a.isfinite().all(), name
        if a.numel():
            bound = factor * TOLERANCE[a.dtype] * max(1.0, e.abs().max().item())
            error = (a.double() - e).abs().max().item()
            assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


def check_compiled(function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """torch.compile keeps the operation whole, with its gradient, and gives what eager gives."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        outs = _as_tuple(run(*tensors))
        total = sum(out.float().square().sum() for out in outs)
        results.append([*outs, *torch.autograd.grad(total, tensors)])
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager)


def _as_tuple(outs: Any) -> tuple[Tensor, ...]:
    return outs if isinstance(outs, tuple) else (outs,)
