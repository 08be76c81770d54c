"""Cross-entropy of logits: plain, safe, and the pieces that linear_cross_entropy shares.

In: logits [..., V] and a class for each row. Out: losses in f32 (f64 for f64 logits), reduced. The trainer and
nn.losses call them.

Dims: N rows (all leading dims flattened), V classes.
"""

from __future__ import annotations

import torch

from tessera.errors import InputError, ShapeError
from tessera.function.decorator import function
from tessera.ops.kernels.cross_entropy import cross_entropy_backward_kernel, cross_entropy_kernel
from tessera.ops.registration import Operation, is_readable
from tessera.types import Tensor, floating, integer

REDUCTIONS = ("mean", "sum", "none")


@function
def cross_entropy(
    logits: Tensor["...", "V", floating], targets: Tensor["...", integer], ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean", z_loss: float = 0.0,
) -> Tensor:
    """-log softmax(logits)[target], from the rows' largest logit and log-sum-exp, without storing the softmax.

    With label smoothing s, every class gets s / V of the target's probability (arXiv:1512.00567). The z-loss adds
    z_loss * lse(logits)^2, which keeps the logits small (PaLM, arXiv:2204.02311). A row whose logits are all -inf
    has loss +inf and no gradient.

    Args:
        logits: [..., V], any float dtype, any strides (rows that do not lie evenly in memory are copied).
        targets: [...] ints, each in 0..V-1 or `ignore_index`.
        ignore_index: rows with this target count neither in the sum nor in the mean.
        label_smoothing: 0 to 1.
        reduction: "mean" over the rows that count (0 when there is none), "sum", or "none".
        z_loss: >= 0.

    Returns:
        A scalar, or [...] for "none" (0 where ignored); f32, or f64 for f64 logits.

    Raises:
        ShapeError: the shapes do not fit.
        InputError: a target is no class, or an option is out of its range.
    """
    losses, counted = _losses(logits, targets, ignore_index, label_smoothing, reduction, z_loss)
    return reduce_rows(losses, counted, reduction, targets.shape)


@function
def cross_entropy_safe(
    logits: Tensor["...", "V", floating], targets: Tensor["...", integer], ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean", z_loss: float = 0.0,
) -> Tensor:
    """`cross_entropy` that is finite for any logits: rows without a finite loss are left out, with zero gradient.

    Such rows have NaN or +inf among their logits, -inf for every class, or -inf for the target; they count as
    if their target were `ignore_index`.

    Args and raises: see `cross_entropy`.
    """
    losses, counted = _losses(logits, targets, ignore_index, label_smoothing, reduction, z_loss)
    finite = losses.isfinite()
    return reduce_rows(torch.where(finite, losses, 0.0), counted & finite, reduction, targets.shape)


@function
def softmax_cross_entropy(
    logits: Tensor["...", "V", floating], targets: Tensor["...", integer], reduction: str = "mean",
) -> Tensor:
    """`cross_entropy` with nothing ignored: softmax and loss in one pass, nothing but two numbers a row stored."""
    if is_readable(targets) and bool((targets < 0).any()):
        raise InputError(f"targets: {int(targets.min())} given; expected 0..{logits.shape[-1] - 1}")
    return cross_entropy(logits, targets, reduction=reduction)


@function
def apply_label_smoothing(
    log_probs: Tensor["...", "V", floating], label_smoothing: float,
) -> Tensor["...", "V", floating]:
    """(1 - s) log_probs + s mean(log_probs): minus the target's entry is then the smoothed loss (arXiv:1512.00567).

    Args:
        log_probs: [..., V].
        label_smoothing: s, 0 to 1.

    Raises:
        InputError: label_smoothing is out of its range.
    """
    check_loss(1, label_smoothing, "none", 0.0)
    return (1.0 - label_smoothing) * log_probs + label_smoothing * log_probs.mean(-1, keepdim=True)


# The documents' names for the same.
stable_cross_entropy = cross_entropy
fused_softmax_cross_entropy = softmax_cross_entropy


def _losses(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str, z_loss: float,
) -> tuple[Tensor, Tensor]:
    """The rows' losses [N], and which count [N]."""
    check_loss(logits.shape[-1], label_smoothing, reduction, z_loss)
    rows_N = targets.reshape(-1)
    losses_N, _, _ = _cross_entropy_op(
        logits.reshape(-1, logits.shape[-1]), rows_N, ignore_index, float(label_smoothing), float(z_loss))
    return losses_N, rows_N != ignore_index


def check_loss(n_classes: int, label_smoothing: float, reduction: str, z_loss: float) -> None:
    """Check what all losses take.

    Raises:
        ShapeError, InputError: see `cross_entropy`.
    """
    if n_classes == 0:
        raise ShapeError("logits: none for a row given; expected at least one class")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: {reduction!r} given; expected one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"label_smoothing: {label_smoothing} given; expected 0 to 1")
    if not z_loss >= 0.0:
        raise InputError(f"z_loss: {z_loss} given; expected at least 0")


def check_targets(targets_N: Tensor, n_classes: int, ignore_index: int) -> None:
    """Check that each target is a class or `ignore_index`: a kernel would read outside of its row.

    Not on a GPU, where the answer would have to be waited for, nor on tensors without values.

    Raises:
        InputError: naming the first target that is neither.
    """
    if not is_readable(targets_N) or targets_N.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets_N))
    if low < 0 or high >= n_classes:
        wrong = ((targets_N < 0) | (targets_N >= n_classes)) & (targets_N != ignore_index)
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0, 0])
            raise InputError(f"targets: {int(targets_N[place])} given in row {place}; expected 0..{n_classes - 1} "
                             f"or ignore_index {ignore_index}")


def reduce_rows(losses_N: Tensor, counted_N: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    """Losses that are 0 where they do not count: their mean over those that do, their sum, or all in `shape`."""
    if reduction == "none":
        return losses_N.reshape(shape)
    total = losses_N.sum(dtype=losses_N.dtype)  # named, or ts.precision would round it
    return total if reduction == "sum" else total / counted_N.sum().clamp(min=1)


def row_statistics(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits less their row's largest, the largest, log of the sum of their exponentials), in f32 or f64.

    A row without a finite largest gives zeros, 0, and a spread of -inf where all are -inf, NaN otherwise: no NaN
    reaches the gradient of a row that cross_entropy_safe leaves out.
    """
    x_NV = logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float()
    top_N = x_NV.detach().amax(-1)
    finite_N = top_N.isfinite()
    spread_N = torch.where(top_N == -torch.inf, -torch.inf, torch.nan).to(x_NV.dtype)
    top_N = torch.where(finite_N, top_N, 0.0)
    shifted_NV = torch.where(finite_N.unsqueeze(-1), x_NV - top_N.unsqueeze(-1), 0.0)
    return shifted_NV, top_N, torch.where(finite_N, shifted_NV.exp().sum(-1).log(), spread_N)


def row_losses(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain expression of `cross_entropy`, differentiable by torch: losses, tops and spreads, [N] each."""
    check_targets(targets_N, logits_NV.shape[-1], ignore_index)
    shifted_NV, top_N, spread_N = row_statistics(logits_NV)
    counted_N = targets_N != ignore_index
    places_N1 = torch.where(counted_N, targets_N, 0).long().unsqueeze(-1)
    losses_N = spread_N - (1.0 - smoothing) * shifted_NV.gather(-1, places_N1).squeeze(-1)
    if smoothing:
        losses_N = losses_N - smoothing * shifted_NV.mean(-1)
    if z_loss:
        losses_N = losses_N + z_loss * (top_N + spread_N).square()
    losses_N = torch.where(spread_N == -torch.inf, torch.inf, losses_N)
    return torch.where(counted_N, losses_N, 0.0), top_N, spread_N.detach()


def row_gradients(
    grad_N: Tensor, logits_NV: Tensor, targets_N: Tensor, ignore_index: int, smoothing: float, z_loss: float,
) -> Tensor:
    """grad * d(loss)/d(logits) [N, V] in f32 or f64, written out; zeros where `cross_entropy` has no gradient."""
    return class_gradients(grad_N, *row_statistics(logits_NV), targets_N, ignore_index, smoothing, z_loss)


def class_gradients(
    grad_N: Tensor, shifted_NC: Tensor, top_N: Tensor, spread_N: Tensor, targets_N: Tensor, ignore_index: int,
    smoothing: float, z_loss: float, first_class: int = 0, n_classes: int | None = None,
) -> Tensor:
    """`row_gradients` to some of the classes, C from `first_class` on, from the statistics of all `n_classes`.

    Args:
        shifted_NC: the logits less `top_N`.
    """
    counted_N = (targets_N != ignore_index) & (spread_N != -torch.inf) & (grad_N != 0)
    spread_N = torch.where(counted_N, spread_N, 0.0)
    factor_N = 1.0 + 2.0 * z_loss * (top_N + spread_N)
    out_NC = (shifted_NC - spread_N.unsqueeze(-1)).exp() * factor_N.unsqueeze(-1)
    out_NC = out_NC - smoothing / (n_classes or shifted_NC.shape[-1])
    here_N1, places_N1 = places_among(targets_N, first_class, shifted_NC.shape[-1])
    out_NC = out_NC.scatter_add(-1, places_N1, here_N1.to(out_NC.dtype) * (-1.0 + smoothing))
    return torch.where(counted_N.unsqueeze(-1), out_NC * grad_N.unsqueeze(-1), 0.0)


def places_among(targets_N: Tensor, first_class: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """(whether a target is one of some classes, its place among them or 0), [N, 1] each."""
    places_N1 = (targets_N.long() - first_class).unsqueeze(-1)
    here_N1 = (places_N1 >= 0) & (places_N1 < n_classes)
    return here_N1, torch.where(here_N1, places_N1, 0)


def _run_forward(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(targets_N, logits_NV.shape[-1], ignore_index)
    losses_N, top_N, spread_N = (logits_NV.new_empty(len(targets_N), dtype=torch.float32) for _ in range(3))
    cross_entropy_kernel(
        logits_NV, targets_N, losses_N, ignore_index, smoothing or None, z_loss or None, top_N, spread_N)
    return losses_N, top_N, spread_N


def _run_backward(
    grad_N: Tensor, logits_NV: Tensor, targets_N: Tensor, top_N: Tensor, spread_N: Tensor,
    ignore_index: int, smoothing: float, z_loss: float,
) -> Tensor:
    out_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    cross_entropy_backward_kernel(
        grad_N, logits_NV, targets_N, top_N, spread_N, out_NV, ignore_index, smoothing or None, z_loss or None)
    return out_NV


def _reference_backward(
    grad_N: Tensor, logits_NV: Tensor, targets_N: Tensor, top_N: Tensor, spread_N: Tensor,
    ignore_index: int, smoothing: float, z_loss: float,
) -> Tensor:
    return row_gradients(grad_N, logits_NV, targets_N, ignore_index, smoothing, z_loss).to(logits_NV.dtype)


def _fake_forward(logits_NV: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits_NV.dtype is torch.float64 else torch.float32
    return tuple(logits_NV.new_empty(logits_NV.shape[0], dtype=dtype) for _ in range(3))  # type: ignore


_cross_entropy_backward_op = Operation(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor top, Tensor spread, "
    "int ignore_index, float smoothing, float z_loss) -> Tensor",
    kernel=_run_backward, reference=_reference_backward,
    fake=lambda grad_N, logits_NV, *_: logits_NV.new_empty(logits_NV.shape))
_cross_entropy_op = Operation(
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index, float smoothing, float z_loss)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_run_forward, reference=row_losses, fake=_fake_forward,
    save=lambda inputs, outputs: (inputs[0], inputs[1], outputs[1], outputs[2], *inputs[2:]),
    backward=lambda saved, grad_N, *_: (_cross_entropy_backward_op(grad_N, *saved), None, None, None, None))
