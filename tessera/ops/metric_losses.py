"""Losses of ranking and metric learning: maximum margin, and contrast (InfoNCE).

In: scores or embeddings, and classes or labels. Out: a loss in f32 (f64 for f64). User code calls them.

Dims: N rows, C classes, D width of an embedding.
"""

from __future__ import annotations

import torch

from tessera.errors import InputError
from tessera.function.decorator import function
from tessera.ops.kernels.metric_losses import (
    contrastive_backward_kernel,
    contrastive_kernel,
    max_margin_backward_kernel,
    max_margin_kernel,
)
from tessera.ops.losses import check_loss, check_targets, reduce_rows
from tessera.ops.registration import Operation
from tessera.ops.softmax import l2_normalize
from tessera.types import Tensor, floating, integer

_LARGEST_FACTOR = 1e30  # similarities stay far enough from the largest f32 for sums over the width


@function
def max_margin_loss(
    scores: Tensor["N", "C", floating], targets: Tensor["N", integer], margin: float = 1.0, reduction: str = "mean",
) -> Tensor:
    """max(0, margin + best other score - target's score) (Crammer & Singer 2001).

    Args:
        scores: [N, C], any float dtype. A row whose others are all -inf has loss 0.
        targets: [N] ints in 0..C-1.
        margin: by how much the target should win, >= 0.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [N]; f32, or f64 for f64 scores. Of equal best scores the first gets the gradient.

    Raises:
        ShapeError: the shapes do not fit.
        InputError: a target is no class, or an option is out of its range.
    """
    check_loss(scores.shape[1], 0.0, reduction, 0.0)
    if not margin >= 0:
        raise InputError(f"margin: {margin} given; expected at least 0")
    losses_N, _ = _max_margin_op(scores, targets, float(margin))
    return reduce_rows(losses_N, torch.ones_like(targets, dtype=torch.bool), reduction, targets.shape)


@function
def contrastive_loss(
    embeddings: Tensor["N", "D", floating], labels: Tensor["N", integer], temperature: float = 0.07,
    normalize: bool = True, reduction: str = "mean",
) -> Tensor:
    """-log(sum over positives of exp(s) / sum over all others of exp(s)), s the similarities / temperature.

    InfoNCE (arXiv:1807.03748) with all positives of an anchor in its numerator; the positives are the other rows of
    the same label. Anchors without one are left out.

    Args:
        embeddings: [N, D], any float dtype.
        labels: [N] ints.
        temperature: > 0.
        normalize: to unit vectors first. Without it, similarities beyond 1e30 are scaled down to it.
        reduction: "mean" over the anchors that have a positive (0 when none has), "sum", or "none".

    Returns:
        A scalar, or [N] (0 for anchors left out); f32, or f64 for f64 embeddings.

    Raises:
        ShapeError: the shapes do not fit.
        InputError: the temperature is not positive, or another reduction.
    """
    check_loss(1, 0.0, reduction, 0.0)
    if not temperature > 0:
        raise InputError(f"temperature: {temperature} given; expected more than 0")
    wide_ND = embeddings if embeddings.dtype is torch.float64 else embeddings.float()
    if normalize or wide_ND.numel() == 0:
        wide_ND, factor = l2_normalize(wide_ND, 1), 1.0 / temperature
    else:
        size = wide_ND.detach().abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        wide_ND = wide_ND / size
        factor = (size.double().square() / temperature).clamp(max=_LARGEST_FACTOR).to(wide_ND.dtype)
    losses_N, _, positive_N = _contrastive_op(wide_ND @ wide_ND.t() * factor, labels)
    return reduce_rows(losses_N, positive_N != -torch.inf, reduction, labels.shape)


# The documents' names for the same.
stable_max_margin_loss, stable_contrastive_loss = max_margin_loss, contrastive_loss


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _max_margin(scores_NC: Tensor, targets_N: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    check_targets(targets_N, scores_NC.shape[1], 0)
    losses_N = scores_NC.new_empty(len(targets_N), dtype=torch.float32)
    rival_N = scores_NC.new_empty(len(targets_N), dtype=torch.int32)
    max_margin_kernel(scores_NC, targets_N, losses_N, rival_N, margin)
    return losses_N, rival_N


def _max_margin_reference(scores_NC: Tensor, targets_N: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    check_targets(targets_N, scores_NC.shape[1], 0)
    wide_NC = scores_NC.to(_wide(scores_NC.dtype))
    places_N1 = targets_N.long().unsqueeze(1)
    best_N, rival_N = wide_NC.scatter(1, places_N1, -torch.inf).max(1)
    own_N = wide_NC.gather(1, places_N1).squeeze(1)
    alone_N, tie_N = best_N == -torch.inf, best_N == own_N
    # Where nothing is subtracted, nothing infinite may be: the gradient of the branch not taken would be NaN.
    ahead_N = torch.where(alone_N | tie_N & ~own_N.isfinite(), 0.0, best_N) - torch.where(
        alone_N | tie_N & ~own_N.isfinite(), 0.0, own_N)
    return torch.where(alone_N, 0.0, (ahead_N + margin).relu()), rival_N.int()


def _max_margin_backward(
    grad_N: Tensor, scores_NC: Tensor, losses_N: Tensor, targets_N: Tensor, rival_N: Tensor,
) -> Tensor:
    out_NC = torch.empty(scores_NC.shape, dtype=scores_NC.dtype, device=scores_NC.device)
    max_margin_backward_kernel(grad_N, losses_N, targets_N, rival_N, out_NC)
    return out_NC


def _max_margin_backward_reference(
    grad_N: Tensor, scores_NC: Tensor, losses_N: Tensor, targets_N: Tensor, rival_N: Tensor,
) -> Tensor:
    slope_N1 = torch.where(losses_N > 0, grad_N, 0.0).unsqueeze(1).to(scores_NC.dtype)
    out_NC = torch.zeros(scores_NC.shape, dtype=scores_NC.dtype, device=scores_NC.device)
    out_NC = out_NC.scatter(1, rival_N.long().unsqueeze(1), slope_N1)
    return out_NC.scatter(1, targets_N.long().unsqueeze(1), -slope_N1)


def _contrastive(similarity_NN: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    losses_N, all_N, positive_N = (similarity_NN.new_empty(len(labels_N), dtype=torch.float32) for _ in range(3))
    contrastive_kernel(similarity_NN, labels_N, losses_N, all_N, positive_N)
    return losses_N, all_N, positive_N


def _others_and_positives(labels_N: Tensor) -> tuple[Tensor, Tensor]:
    others_NN = ~torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    return others_NN, (labels_N.unsqueeze(0) == labels_N.unsqueeze(1)) & others_NN


def _masked_lse(x_NN: Tensor, mask_NN: Tensor) -> Tensor:
    """log(sum(exp(x))) where the mask is true; -inf with zero gradient for a row without any."""
    empty_N = ~mask_NN.any(1)
    safe_NN = torch.where(empty_N.unsqueeze(1), 0.0, torch.where(mask_NN, x_NN, -torch.inf))
    return torch.where(empty_N, -torch.inf, safe_NN.logsumexp(1))


def _contrastive_reference(similarity_NN: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide_NN = similarity_NN.to(_wide(similarity_NN.dtype))
    others_NN, positives_NN = _others_and_positives(labels_N)
    all_N, positive_N = _masked_lse(wide_NN, others_NN), _masked_lse(wide_NN, positives_NN)
    has_positive_N = positive_N != -torch.inf
    losses_N = torch.where(has_positive_N, all_N, 0.0) - torch.where(has_positive_N, positive_N, 0.0)
    return losses_N, all_N.detach(), positive_N.detach()


def _contrastive_backward(
    grad_N: Tensor, similarity_NN: Tensor, labels_N: Tensor, all_N: Tensor, positive_N: Tensor,
) -> Tensor:
    out_NN = torch.empty(similarity_NN.shape, dtype=similarity_NN.dtype, device=similarity_NN.device)
    contrastive_backward_kernel(grad_N, similarity_NN, labels_N, all_N, positive_N, out_NN)
    return out_NN


def _contrastive_backward_reference(
    grad_N: Tensor, similarity_NN: Tensor, labels_N: Tensor, all_N: Tensor, positive_N: Tensor,
) -> Tensor:
    others_NN, positives_NN = _others_and_positives(labels_N)
    has_positive_N1 = (positive_N != -torch.inf).unsqueeze(1)
    share_NN = torch.where(others_NN, (similarity_NN - all_N.unsqueeze(1)).exp(), 0.0)
    positive_NN = torch.where(positives_NN, (similarity_NN - positive_N.unsqueeze(1)).exp(), 0.0)
    return torch.where(has_positive_N1, (share_NN - positive_NN) * grad_N.unsqueeze(1), 0.0).to(similarity_NN.dtype)


_max_margin_backward_op = Operation(
    "max_margin_backward(Tensor grad, Tensor scores, Tensor losses, Tensor targets, Tensor rival) -> Tensor",
    kernel=_max_margin_backward, reference=_max_margin_backward_reference,
    fake=lambda grad_N, scores_NC, *_: scores_NC.new_empty(scores_NC.shape))
_max_margin_op = Operation(
    "max_margin(Tensor scores, Tensor targets, float margin) -> (Tensor, Tensor)", kernel=_max_margin,
    reference=_max_margin_reference,
    fake=lambda scores_NC, *_: (scores_NC.new_empty(scores_NC.shape[0], dtype=_wide(scores_NC.dtype)),
                                scores_NC.new_empty(scores_NC.shape[0], dtype=torch.int32)),
    save=lambda inputs, outputs: (inputs[0], outputs[0], inputs[1], outputs[1]),
    backward=lambda saved, grad_N, _: (_max_margin_backward_op(grad_N, *saved), None, None))
_contrastive_backward_op = Operation(
    "contrastive_backward(Tensor grad, Tensor similarity, Tensor labels, Tensor all_lse, Tensor positive_lse)"
    " -> Tensor",
    kernel=_contrastive_backward, reference=_contrastive_backward_reference,
    fake=lambda grad_N, similarity_NN, *_: similarity_NN.new_empty(similarity_NN.shape))
_contrastive_op = Operation(
    "contrastive(Tensor similarity, Tensor labels) -> (Tensor, Tensor, Tensor)", kernel=_contrastive,
    reference=_contrastive_reference,
    fake=lambda similarity_NN, _: tuple(
        similarity_NN.new_empty(similarity_NN.shape[0], dtype=_wide(similarity_NN.dtype)) for _ in range(3)),
    save=lambda inputs, outputs: (*inputs, outputs[1], outputs[2]),
    backward=lambda saved, grad_N, *_: (_contrastive_backward_op(grad_N, *saved), None))
