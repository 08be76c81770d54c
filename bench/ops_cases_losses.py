"""Softmax and losses, at the shapes of attention scores and of a training step's logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from ops_case import DTYPES, OpCase, leaf, make, wide
from torch import Tensor

from tessera import ops


def cases(quick: bool, fast_bf16: bool) -> Iterator[OpCase]:
    """See `OpCase`."""
    for name, dtype in DTYPES.items():
        for rows, classes in [(64, 100)] if quick else [(4096, 512), (2048, 2048)]:
            for operation, *made in _softmax(rows, classes, dtype):
                yield make(operation, name, f"{rows}x{classes}", tuple(made))
        for rows, classes in [(64, 1000)] if quick else [(1024, 8192), (256, 49152)]:
            for operation, *made in _rows(rows, classes, dtype):
                yield make(operation, name, f"{rows}x{classes}", tuple(made))
        for rows, width, classes in [(64, 32, 1000)] if quick else [(2048, 384, 8192), (512, 576, 49152)]:
            yield make("linear_cross_entropy", name, f"{rows}x{width}x{classes}",
                       _linear_cross_entropy(rows, width, classes, dtype, fast_bf16))
        rows = 64 if quick else 1024
        x, labels = leaf(rows, 128, dtype=dtype), torch.arange(rows) // 2
        yield make("contrastive", name, f"{rows}x128", (
            [x, labels], lambda x, labels: ops.contrastive_loss(x, labels, 0.1), _contrastive))


def _softmax(rows: int, classes: int, dtype: torch.dtype) -> Iterator[tuple]:
    x = leaf(rows, classes, dtype=dtype)
    yield "softmax", [x], ops.softmax, lambda x: x.softmax(-1)
    yield "log_softmax", [x], ops.log_softmax, lambda x: x.log_softmax(-1)


def _rows(rows: int, classes: int, dtype: torch.dtype) -> Iterator[tuple]:
    x, targets = leaf(rows, classes, dtype=dtype), torch.randint(classes, (rows,))
    yield "cross_entropy", [x, targets], ops.cross_entropy, lambda x, targets: F.cross_entropy(wide(x), targets)

    def with_options(x: Tensor, targets: Tensor) -> Tensor:
        extra = wide(x).logsumexp(-1).square().mean() * 1e-4
        return F.cross_entropy(wide(x), targets, label_smoothing=0.1) + extra

    yield ("cross_entropy_smoothed", [x, targets],
           lambda x, targets: ops.cross_entropy(x, targets, label_smoothing=0.1, z_loss=1e-4), with_options)

    def margin(x: Tensor, targets: Tensor) -> Tensor:  # max: of equal rivals the first gets the gradient
        own = wide(x).gather(1, targets[:, None])[:, 0]
        return F.relu(wide(x).scatter(1, targets[:, None], -torch.inf).max(1)[0] + 1 - own).mean()

    yield "max_margin", [x, targets], ops.max_margin_loss, margin


def _linear_cross_entropy(rows: int, width: int, classes: int, dtype: torch.dtype, fast_bf16: bool) -> tuple:
    """torch's products of bf16 where the processor has instructions for them, else of f32, which is then faster."""
    keep = dtype == torch.bfloat16 and fast_bf16

    def formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden, weight = (hidden, weight) if keep else (wide(hidden), wide(weight))
        return F.cross_entropy(wide(F.linear(hidden, weight)), targets)

    inputs = [leaf(rows, width, dtype=dtype), leaf(classes, width, dtype=dtype, scale=0.05),
              torch.randint(classes, (rows,))]
    return inputs, ops.linear_cross_entropy, formula


def _contrastive(x: Tensor, labels: Tensor) -> Tensor:
    x = F.normalize(wide(x), dim=1)
    similarity = x @ x.T / 0.1
    others = ~torch.eye(len(x), dtype=torch.bool)
    alike = (labels[:, None] == labels) & others
    every = similarity.masked_fill(~others, -torch.inf).logsumexp(1)
    return (every - similarity.masked_fill(~alike, -torch.inf).logsumexp(1)).mean()
