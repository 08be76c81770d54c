"""Losses as modules: their options are set once.

In: logits or hidden states, and classes. Out: the loss. Training code calls them.
"""

from __future__ import annotations

from torch import Tensor, nn

from tessera.ops.linear_cross_entropy import linear_cross_entropy
from tessera.ops.losses import cross_entropy


class CrossEntropyLoss(nn.Module):
    """ops.cross_entropy.

    Args:
        ignore_index, label_smoothing, reduction, z_loss: see there.
    """

    def __init__(
        self, *, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean", z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.reduction, self.z_loss = reduction, z_loss

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(
            logits, targets, self.ignore_index, self.label_smoothing, self.reduction, self.z_loss)


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """ops.linear_cross_entropy of hidden states [..., D] against an output projection [V, D].

    Args:
        ignore_index, label_smoothing, reduction, z_loss: see ops.cross_entropy.
    """

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        return linear_cross_entropy(
            hidden, weight, targets, self.ignore_index, self.label_smoothing, self.reduction, self.z_loss)
