"""Softmax, losses and products, at the shapes of a training step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from ops_case import DTYPES, OpCase, leaf
from torch import Tensor

from tessera import ops


def cases(quick: bool) -> Iterator[OpCase]:
    """See `OpCase`."""
    for name, dtype in DTYPES.items():
        tolerance = 1e-4 if dtype == torch.float32 else 2.0**-6
        for rows, width, classes in [(64, 32, 1000)] if quick else [(2048, 384, 8192), (512, 576, 49152)]:
            made = (*_rows(rows, classes, dtype), _linear_cross_entropy(rows, width, classes, dtype))
            for operation, inputs, ours, formula in made:
                yield OpCase(
                    group=f"{operation} {name}", label=f"{operation} {name} {rows}x{width}x{classes}", inputs=inputs,
                    ours=ours, formula=formula, tolerance=tolerance)
        x, labels = leaf(64 if quick else 1024, 128, dtype=dtype), torch.arange(64 if quick else 1024) // 2
        yield OpCase(
            group=f"contrastive {name}", label=f"contrastive {name} {len(x)}x128", inputs=[x, labels],
            ours=lambda x, labels: ops.contrastive_loss(x, labels, 0.1), formula=_contrastive, tolerance=tolerance)


def _rows(rows: int, classes: int, dtype: torch.dtype) -> Iterator[tuple]:
    x, targets = leaf(rows, classes, dtype=dtype), torch.randint(classes, (rows,))
    yield "softmax", [x], ops.softmax, lambda x: x.softmax(-1)
    yield "log_softmax", [x], ops.log_softmax, lambda x: x.log_softmax(-1)
    yield "cross_entropy", [x, targets], ops.cross_entropy, lambda x, targets: F.cross_entropy(_wide(x), targets)
    yield ("max_margin", [x, targets], ops.max_margin_loss,
           lambda x, targets: F.relu(_wide(x).scatter(1, targets[:, None], -torch.inf).max(1)[0] + 1
                                     - _wide(x).gather(1, targets[:, None])[:, 0]).mean())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _linear_cross_entropy(rows: int, width: int, classes: int, dtype: torch.dtype) -> tuple:
    """torch's products of bf16 where the processor has instructions for them, else of f32, which is then faster."""
    keep = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()

    def formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden, weight = (hidden, weight) if keep else (_wide(hidden), _wide(weight))
        return F.cross_entropy(_wide(F.linear(hidden, weight)), targets)

    weight = (torch.randn(classes, width) * 0.05).to(dtype).requires_grad_()
    inputs = [leaf(rows, width, dtype=dtype), weight, torch.randint(classes, (rows,))]
    return "linear_cross_entropy", inputs, ops.linear_cross_entropy, formula


def _contrastive(x: Tensor, labels: Tensor) -> Tensor:
    x = F.normalize(_wide(x), dim=1)
    similarity = x @ x.T / 0.1
    others = ~torch.eye(len(x), dtype=torch.bool)
    alike = (labels[:, None] == labels) & others
    every = similarity.masked_fill(~others, -torch.inf).logsumexp(1)
    return (every - similarity.masked_fill(~alike, -torch.inf).logsumexp(1)).mean()
