"""Cross-entropy of hidden states against a vocabulary, without the [N, V] logits.

In: hidden states [..., D], the output projection [V, D], and a class for each row. Out: the loss; its gradients are
made with it, chunk by chunk, while a chunk of logits is in the cache (Liger, arXiv:2410.10989; cut cross-entropy,
arXiv:2411.09009). The trainer and nn.LinearCrossEntropy call it.

A chunk of rows is taken over the whole vocabulary at once: its logits become losses and then, in place, the
logits' gradient, which goes into both results. Where even few rows make a large chunk, or each row's gradient is
not known yet, the vocabulary comes in blocks: a first pass keeps running log-sum-exps, a second one computes the
logits again.

Dims: N rows, D width, V classes, C columns of a block of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tessera.errors import UnsupportedError
from tessera.function.decorator import function
from tessera.function.precision import active_precision
from tessera.ops.kernels.cross_entropy import (
    cross_entropy_backward_kernel,
    cross_entropy_both_kernel,
    logsumexp_update_kernel,
)
from tessera.ops.kernels.gemm import gemm_add_kernel, gemm_kernel, gemm_transposed_add_kernel, linear_kernel
from tessera.ops.losses import (
    check_loss,
    check_targets,
    class_gradients,
    places_among,
    reduce_rows,
    row_gradients,
    row_losses,
)
from tessera.ops.matmul import has_products_of
from tessera.ops.registration import Operation
from tessera.types import Tensor, floating, integer

_CHUNK = 1 << 21  # logits in a chunk: 8 MiB of f32
_BLOCK = 4096  # classes in a block, where the vocabulary comes in blocks
_MIN_ROWS, _MAX_ROWS = 96, 512  # below, products are bound by the weight and its gradient; above, nothing is won
_FEW_ROWS = 128  # of all: a chunk of fewer would be most of the logits


@function
def linear_cross_entropy(
    hidden: Tensor["...", "D", floating], weight: Tensor["V", "D", floating], targets: Tensor["...", integer],
    ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean", z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(hidden @ weight^T, targets), with memory for a chunk of logits only.

    Products are accumulated in f32 and the logits kept in f32, whatever the inputs' dtype; the products' operands
    are in hidden's dtype (under ts.precision or torch.autocast, in theirs), and weight's gradient is summed in f32.

    Args:
        hidden: [..., D], any float dtype.
        weight: [V, D], any float dtype.
        targets: [...] ints, each in 0..V-1 or `ignore_index`.
        ignore_index, label_smoothing, reduction, z_loss: see `cross_entropy`.

    Returns:
        A scalar, or [...] for "none"; f32, or f64 for f64 inputs.

    Raises:
        ShapeError: the shapes do not fit.
        InputError: a target is no class, or an option is out of its range.
    """
    check_loss(weight.shape[0], label_smoothing, reduction, z_loss)
    active = active_precision()
    if active is not None:
        hidden = hidden.to(active.compute)
    elif torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    hidden_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    counted_N = targets_N != ignore_index
    options = (ignore_index, float(label_smoothing), float(z_loss))
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if reduction == "none" or not wants_grad:
        losses_N, _, _ = _rows_op(hidden_ND, weight, targets_N, *options)
        return reduce_rows(losses_N, counted_N, reduction, targets.shape)
    count = counted_N.sum().clamp(min=1) if reduction == "mean" else torch.ones((), device=hidden.device)
    share = 1.0 / count.to(torch.float64 if hidden.dtype is torch.float64 else torch.float32)
    return _sum_op(hidden_ND, weight, targets_N, share, *options, weight.requires_grad)[0]


def _row_chunks(n_rows: int, n_classes: int, itemsize: int) -> Iterator[slice]:
    """Chunks of rows whose logits fit the cache, and are a small part of all.

    In 16 bits, half as many: an addition of f32 to the weight's gradient costs more beside a product.
    """
    rows = min(max(_CHUNK // n_classes, _MIN_ROWS), _MAX_ROWS, max(_MIN_ROWS, -(-n_rows // (4 * itemsize))))
    return (slice(start, start + rows) for start in range(0, n_rows, rows))


def _blocks(n_rows: int, n_classes: int) -> Iterator[tuple[slice, slice]]:
    """(rows, classes) of blocks of logits, all classes of some rows before the next rows."""
    rows = max(_CHUNK // _BLOCK, 1)
    for first in range(0, n_rows, rows):
        for start in range(0, n_classes, _BLOCK):
            yield slice(first, min(first + rows, n_rows)), slice(start, min(start + _BLOCK, n_classes))


def _logits(hidden_ND: Tensor, weight_CD: Tensor, scratch: Tensor) -> Tensor:
    """hidden @ weight^T in f32 [N, C], in the scratch memory."""
    out_NC = scratch[:len(hidden_ND) * len(weight_CD)].view(len(hidden_ND), len(weight_CD))
    if out_NC.is_cpu:
        linear_kernel(hidden_ND, weight_CD, out_NC)
    else:
        out_NC.copy_(hidden_ND @ weight_CD.t())
    return out_NC


def _add_products(
    grad_NC: Tensor, hidden_ND: Tensor, weight_CD: Tensor, d_hidden_ND: Tensor, d_weight_CD: Tensor | None,
    *, first: bool,
) -> None:
    """d_hidden (+)= grad @ weight, set where this is the first block of classes, and d_weight += grad^T @ hidden."""
    if hidden_ND.is_cpu and hidden_ND.dtype is not torch.float32:
        (gemm_kernel if first else gemm_add_kernel)(grad_NC, weight_CD, d_hidden_ND)
        if d_weight_CD is not None:
            gemm_transposed_add_kernel(grad_NC, hidden_ND, d_weight_CD)
        return
    d_hidden_ND.addmm_(grad_NC, weight_CD.to(d_hidden_ND.dtype), beta=0.0 if first else 1.0)
    if d_weight_CD is not None:
        d_weight_CD.addmm_(grad_NC.t().to(d_weight_CD.dtype), hidden_ND.to(d_weight_CD.dtype))


def _gradient_memory(logits_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the logits' gradient goes: their own memory, or half as much for a 16-bit dtype."""
    return logits_NC if dtype is torch.float32 else torch.empty_like(logits_NC, dtype=dtype)


def _operands(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """hidden, and the weight rounded to its dtype; both kept in f32 where products of that dtype are emulated."""
    low_VD = weight_VD.to(hidden_ND.dtype)
    if hidden_ND.is_cpu and not has_products_of(hidden_ND.dtype) and weight_VD.dtype is torch.float32:
        return hidden_ND.float(), low_VD.float()
    return hidden_ND, low_VD


def _sum_kernel(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, share: Tensor,
    ignore_index: int, smoothing: float, z_loss: float, with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(share * sum of the losses, and its gradients to hidden [N, D] and weight [V, D])."""
    (n, _width), n_classes = hidden_ND.shape, len(weight_VD)
    if 0 < n < _FEW_ROWS and n * n_classes > _CHUNK:
        losses_N, top_N, spread_N = _rows_kernel(hidden_ND, weight_VD, targets_N, ignore_index, smoothing, z_loss)
        return losses_N.sum(dtype=losses_N.dtype) * share, *_rows_backward_kernel(
            share.expand(n), hidden_ND, weight_VD, targets_N, top_N, spread_N, ignore_index, smoothing, z_loss,
            with_weight)
    check_targets(targets_N, n_classes, ignore_index)
    dtype, (hidden_ND, low_VD) = hidden_ND.dtype, _operands(hidden_ND, weight_VD)
    losses_N = hidden_ND.new_empty(n, dtype=torch.float32)
    d_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
    d_weight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32) if with_weight else None
    chunks = list(_row_chunks(n, n_classes, hidden_ND.itemsize))
    scratch = hidden_ND.new_empty(min(chunks[0].stop, n) * n_classes if n else 0, dtype=torch.float32)
    for rows in chunks:
        logits_NV = _logits(hidden_ND[rows], low_VD, scratch)
        grad_NV = _gradient_memory(logits_NV, hidden_ND.dtype)
        cross_entropy_both_kernel(
            share.expand(len(logits_NV)), logits_NV, targets_N[rows], losses_N[rows], grad_NV, ignore_index,
            smoothing or None, z_loss or None)
        _add_products(grad_NV, hidden_ND[rows], low_VD, d_hidden_ND[rows], d_weight_VD, first=True)
    return losses_N.sum(dtype=losses_N.dtype) * share, d_hidden_ND.to(dtype), _as_weight(d_weight_VD, weight_VD)


def _as_weight(d_weight_VD: Tensor | None, weight_VD: Tensor) -> Tensor:
    """The weight's gradient in its dtype; an empty tensor where it is not wanted."""
    return weight_VD.new_empty(0) if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype)


def _statistics(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, first_class: int, with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(largest logit, sum of exp(logit - largest), the target's logit or 0, sum of the logits), [N] f32 each.

    Args:
        weight_VD: the classes from `first_class` on, in hidden's dtype.
    """
    n = len(hidden_ND)
    top_N = hidden_ND.new_full((n,), -torch.inf, dtype=torch.float32)
    total_N, picked_N = (torch.zeros_like(top_N) for _ in range(2))
    sums_N = torch.zeros_like(top_N) if with_sums else None
    scratch = top_N.new_empty(_CHUNK if n else 0)
    for rows, classes in _blocks(n, len(weight_VD)):
        logits_NC = _logits(hidden_ND[rows], weight_VD[classes], scratch)
        logsumexp_update_kernel(
            logits_NC, targets_N[rows], top_N[rows], total_N[rows], picked_N[rows], first_class + classes.start,
            None if sums_N is None else sums_N[rows])
    return top_N, total_N, picked_N, sums_N


def _finish(
    top_N: Tensor, total_N: Tensor, picked_N: Tensor, sums_N: Tensor | None, targets_N: Tensor, n_classes: int,
    ignore_index: int, smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, tops and spreads [N] from the statistics over all classes."""
    spread_N = total_N.log()
    top_N = torch.where(top_N == -torch.inf, 0.0, top_N)
    losses_N = spread_N - (1.0 - smoothing) * (picked_N - top_N)
    if sums_N is not None:
        losses_N = losses_N - smoothing * (sums_N / n_classes - top_N)
    if z_loss:
        losses_N = losses_N + z_loss * (top_N + spread_N).square()
    losses_N = torch.where(spread_N == -torch.inf, torch.inf, losses_N)
    return torch.where(targets_N != ignore_index, losses_N, 0.0), top_N, spread_N


def _rows_kernel(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, tops and spreads [N]."""
    check_targets(targets_N, len(weight_VD), ignore_index)
    statistics = _statistics(hidden_ND, weight_VD.to(hidden_ND.dtype), targets_N, 0, smoothing > 0)
    return _finish(*statistics, targets_N, len(weight_VD), ignore_index, smoothing, z_loss)


def _rows_backward_kernel(
    grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, top_N: Tensor, spread_N: Tensor,
    ignore_index: int, smoothing: float, z_loss: float, with_weight: bool = True, first_class: int = 0,
    n_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients to hidden [N, D] and weight [V, D], from logits computed again block by block."""
    dtype, (hidden_ND, low_VD) = hidden_ND.dtype, _operands(hidden_ND, weight_VD)
    d_hidden_ND = hidden_ND.new_zeros(hidden_ND.shape, dtype=torch.float32)
    d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if with_weight else None
    scratch = hidden_ND.new_empty(_CHUNK if len(hidden_ND) else 0, dtype=torch.float32)
    for rows, classes in _blocks(len(hidden_ND), len(weight_VD)):
        logits_NC = _logits(hidden_ND[rows], low_VD[classes], scratch)
        grad_NC = _gradient_memory(logits_NC, hidden_ND.dtype)
        cross_entropy_backward_kernel(
            grad_N[rows], logits_NC, targets_N[rows], top_N[rows], spread_N[rows], grad_NC, ignore_index,
            smoothing or None, z_loss or None, first_class + classes.start, n_classes or len(weight_VD))
        _add_products(
            grad_NC, hidden_ND[rows], low_VD[classes], d_hidden_ND[rows],
            None if d_weight_VD is None else d_weight_VD[classes], first=classes.start == 0)
    return d_hidden_ND.to(dtype), _as_weight(d_weight_VD, weight_VD)


def _plain_logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    wide = torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32
    return hidden_ND.to(wide) @ weight_VD.to(hidden_ND.dtype).to(wide).t()


def _rows_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return row_losses(_plain_logits(hidden_ND, weight_VD), targets_N, ignore_index, smoothing, z_loss)


def _rows_backward_reference(
    grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, top_N: Tensor, spread_N: Tensor,
    ignore_index: int, smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor]:
    logits_NV = _plain_logits(hidden_ND, weight_VD)
    grad_NV = row_gradients(grad_N, logits_NV, targets_N, ignore_index, smoothing, z_loss)
    d_hidden_ND = grad_NV @ weight_VD.to(hidden_ND.dtype).to(grad_NV.dtype)
    d_weight_VD = grad_NV.t() @ hidden_ND.to(grad_NV.dtype)
    return d_hidden_ND.to(hidden_ND.dtype), d_weight_VD.to(weight_VD.dtype)


def _sum_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, share: Tensor,
    ignore_index: int, smoothing: float, z_loss: float, with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses_N, top_N, spread_N = _rows_reference(hidden_ND, weight_VD, targets_N, ignore_index, smoothing, z_loss)
    with torch.no_grad():
        d_hidden_ND, d_weight_VD = _rows_backward_reference(
            share.expand(len(hidden_ND)), hidden_ND, weight_VD, targets_N, top_N, spread_N, ignore_index, smoothing,
            z_loss)
    d_weight_VD = d_weight_VD if with_weight else weight_VD.new_empty(0)
    return losses_N.sum(dtype=losses_N.dtype) * share, d_hidden_ND, d_weight_VD


def _shard_statistics(
    hidden_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, first_class: int, with_sums: bool,
) -> tuple[Tensor, ...]:
    *found, sums_N = _statistics(hidden_ND, weight_CD.to(hidden_ND.dtype), targets_N, first_class, with_sums)
    return *found, found[0].new_zeros(found[0].shape) if sums_N is None else sums_N


def _shard_statistics_reference(
    hidden_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, first_class: int, with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_NC = _plain_logits(hidden_ND, weight_CD)
    here_N1, places_N1 = places_among(targets_N, first_class, len(weight_CD))
    top_N = logits_NC.amax(-1)
    total_N = torch.where(top_N.unsqueeze(-1) == -torch.inf, 0.0, (logits_NC - top_N.unsqueeze(-1)).exp()).sum(-1)
    picked_N = torch.where(here_N1, logits_NC.gather(-1, places_N1), 0.0).squeeze(-1)
    return top_N, total_N, picked_N, logits_NC.sum(-1) if with_sums else torch.zeros_like(top_N)


def _shard_backward_reference(
    grad_N: Tensor, hidden_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, top_N: Tensor, spread_N: Tensor,
    ignore_index: int, smoothing: float, z_loss: float, with_weight: bool, first_class: int, n_classes: int,
) -> tuple[Tensor, Tensor]:
    logits_NC = _plain_logits(hidden_ND, weight_CD)
    shifted_NC = logits_NC - top_N.unsqueeze(-1)
    grad_NC = class_gradients(
        grad_N, shifted_NC, top_N, spread_N, targets_N, ignore_index, smoothing, z_loss, first_class, n_classes)
    d_hidden_ND = grad_NC @ weight_CD.to(hidden_ND.dtype).to(grad_NC.dtype)
    d_weight_CD = (grad_NC.t() @ hidden_ND.to(grad_NC.dtype)).to(weight_CD.dtype)
    return d_hidden_ND.to(hidden_ND.dtype), d_weight_CD if with_weight else weight_CD.new_empty(0)


def _fake_rows(hidden_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32
    n = hidden_ND.shape[0]
    return hidden_ND.new_empty(n, dtype=dtype), hidden_ND.new_empty(n, dtype=dtype), hidden_ND.new_empty(n, dtype=dtype)


def _fake_sum(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, share: Tensor, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden_ND.new_empty((), dtype=torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32)
    return loss, hidden_ND.new_empty(hidden_ND.shape), weight_VD.new_empty(weight_VD.shape if options[-1] else (0,))


def _scaled(
    grad: Tensor | None, d_hidden_ND: Tensor, d_weight_VD: Tensor, with_weight: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass made, times the loss's own, which is 1 for loss.backward()."""
    others = (None,) * 6
    if grad is None:
        return None, None, *others
    if not torch.compiler.is_compiling() and type(grad) is torch.Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedError('linear_cross_entropy: create_graph given; second derivatives need reduction="none"')
        if grad.is_cpu and grad.item() == 1.0:
            return d_hidden_ND, d_weight_VD if with_weight else None, *others
    d_weight = (d_weight_VD * grad).to(d_weight_VD.dtype) if with_weight else None
    return (d_hidden_ND * grad).to(d_hidden_ND.dtype), d_weight, *others


_rows_backward_op = Operation(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor top, "
    "Tensor spread, int ignore_index, float smoothing, float z_loss) -> (Tensor, Tensor)",
    kernel=lambda grad_N, hidden_ND, *rest: _rows_backward_kernel(grad_N, hidden_ND, *rest),
    reference=_rows_backward_reference,
    fake=lambda grad_N, hidden_ND, weight_VD, *_: (
        hidden_ND.new_empty(hidden_ND.shape), weight_VD.new_empty(weight_VD.shape)))
_rows_op = Operation(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float smoothing, "
    "float z_loss) -> (Tensor, Tensor, Tensor)",
    kernel=_rows_kernel, reference=_rows_reference, fake=_fake_rows,
    save=lambda inputs, outputs: (*inputs[:3], outputs[1], outputs[2], *inputs[3:]),
    backward=lambda saved, grad_N, *_: (*_rows_backward_op(grad_N, *saved), None, None, None, None))
_sum_op = Operation(
    "linear_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor targets, Tensor share, int ignore_index, "
    "float smoothing, float z_loss, bool with_weight) -> (Tensor, Tensor, Tensor)",
    kernel=_sum_kernel, reference=_sum_reference, fake=_fake_sum,
    save=lambda inputs, outputs: (outputs[1], outputs[2], inputs[7]),
    backward=lambda saved, grad, *_: _scaled(grad, *saved), zero_grads=False)


_shard_statistics_op = Operation(
    "vocab_shard_statistics(Tensor hidden, Tensor weight, Tensor targets, int first_class, bool with_sums)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_shard_statistics, reference=_shard_statistics_reference,
    fake=lambda hidden_ND, *_: (*_fake_rows(hidden_ND), _fake_rows(hidden_ND)[0]))
_shard_backward_op = Operation(
    "vocab_shard_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor top, Tensor spread, "
    "int ignore_index, float smoothing, float z_loss, bool with_weight, int first_class, int n_classes)"
    " -> (Tensor, Tensor)",
    kernel=lambda grad_N, *rest: _rows_backward_kernel(grad_N, *rest), reference=_shard_backward_reference,
    fake=lambda grad_N, hidden_ND, weight_CD, *options: (
        hidden_ND.new_empty(hidden_ND.shape), weight_CD.new_empty(weight_CD.shape if options[-3] else (0,))))


@function
def vocab_parallel_cross_entropy(
    hidden: Tensor["...", "D", floating], weight_shard: Tensor["C", "D", floating],
    targets: Tensor["...", integer], *, first_class: int, n_classes: int, reduce_max: Callable[[Any], Any],
    reduce_sum: Callable[[Any], Any], ignore_index: int = -100, label_smoothing: float = 0.0,
    reduction: str = "mean", z_loss: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` for a rank that has some of the classes (Megatron-LM, arXiv:1909.08053).

    Two reductions of a few numbers a row join the ranks' log-sum-exps; one of hidden's gradient joins the backward
    passes. The loss and hidden's gradient are the same on every rank, the weight's gradient is the shard's.

    Args:
        hidden: [..., D], any float dtype, the same on every rank.
        weight_shard: [C, D], the classes first_class..first_class + C - 1.
        targets: [...] ints among all classes, the same on every rank.
        first_class, n_classes: the shard's first class, and how many there are on all ranks.
        reduce_max, reduce_sum: a tensor's elementwise maximum and sum over the ranks.
        ignore_index, label_smoothing, reduction, z_loss: see `cross_entropy`.

    Raises:
        ShapeError, InputError: as `linear_cross_entropy`.
    """
    check_loss(n_classes, label_smoothing, reduction, z_loss)
    targets_N = targets.reshape(-1)
    check_targets(targets_N, n_classes, ignore_index)
    losses_N = _VocabParallel.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight_shard, targets_N, (ignore_index, float(label_smoothing),
        float(z_loss)), (first_class, n_classes), (reduce_max, reduce_sum))
    return reduce_rows(losses_N, targets_N != ignore_index, reduction, targets.shape)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_CD: Tensor, targets_N: Tensor, options: tuple[int, float, float],
        classes: tuple[int, int], reductions: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    ) -> Tensor:
        reduce_max, reduce_sum = reductions
        top_N, *sums = _shard_statistics_op(hidden_ND, weight_CD, targets_N, classes[0], options[1] > 0)
        largest_N = reduce_max(top_N)
        sums[0] = sums[0] * torch.where(largest_N == -torch.inf, 0.0, (top_N - largest_N).exp())
        total_N, picked_N, *totals = reduce_sum(torch.stack(sums[:3 if options[1] else 2]))
        losses_N, top_N, spread_N = _finish(
            largest_N, total_N, picked_N, totals[0] if totals else None, targets_N, classes[1], *options)
        ctx.save_for_backward(hidden_ND, weight_CD, targets_N, top_N, spread_N)
        ctx.options, ctx.classes, ctx.reduce_sum = options, classes, reduce_sum
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_CD = _shard_backward_op(
            grad_N, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[1], *ctx.classes)
        d_hidden_ND = ctx.reduce_sum(d_hidden_ND)
        return d_hidden_ND, d_weight_CD if ctx.needs_input_grad[1] else None, None, None, None, None
