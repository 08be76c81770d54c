"""Cross-entropy in its forms against torch's in float64: values, gradients, extremes, registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import InputError, ShapeError
from tessera.ops import losses
from tessera.ops.losses import cross_entropy, cross_entropy_safe, softmax_cross_entropy
from tessera.ops.registration import implementation

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [(0.0, 0.0, "mean"), (0.1, 0.0, "sum"), (0.0, 1e-2, "none"), (0.25, 1e-3, "none"), (1.0, 0.0, "mean")]


def case(
    seed: int, shape: tuple[int, ...], n_classes: int, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, n_classes, generator=generator) * 4).to(dtype)
    targets = torch.randint(n_classes, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.3
    return logits, targets.masked_fill(ignored, -100)


def expected(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float, reduction: str) -> Tensor:
    """torch's cross-entropy in float64, with the z-loss added by hand."""
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    loss = F.cross_entropy(rows, labels, label_smoothing=smoothing, reduction="none")
    loss = loss + z_loss * torch.where(labels != -100, rows.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss.reshape(targets.shape)
    return loss.sum() / ((labels != -100).sum().clamp(min=1) if reduction == "mean" else 1)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing, z_loss, reduction", OPTIONS)
@pytest.mark.parametrize("seed, shape, n_classes", [
    (1, (9,), 7), (2, (3, 11), 130), (3, (2, 2, 2), 1), (4, (5,), 1003)])
def test_loss_and_gradient(seed, shape, n_classes, smoothing, z_loss, reduction, dtype, choice):
    logits, targets = case(seed, shape, n_classes, dtype)
    wide = logits.double().requires_grad_()
    logits.requires_grad_()
    with implementation(choice):
        loss = cross_entropy(logits, targets, -100, smoothing, reduction, z_loss)
    reference = expected(wide, targets, smoothing, z_loss, reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=2e-6, atol=2e-6)
    weights = torch.rand(loss.shape, generator=torch.Generator().manual_seed(seed))
    (loss * weights).sum().backward()
    (reference * weights).sum().backward()
    bound = 2e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.2, 0.01)])
def test_gradcheck(choice, smoothing, z_loss):
    logits, targets = case(5, (6,), 5, torch.float64)
    with implementation(choice):
        def run(logits: Tensor) -> Tensor:
            return cross_entropy(logits, targets, -100, smoothing, "none", z_loss)

        assert torch.autograd.gradcheck(run, logits.requires_grad_())
        assert torch.autograd.gradgradcheck(run, logits)


@pytest.mark.parametrize("seed", [6, 7])
def test_strided_logits(seed):
    """Shifted by one place, transposed, and columns out of a wider tensor."""
    logits, targets = case(seed, (3, 9), 40)
    for view, labels in ((logits[:, :-1], targets[:, 1:]), (logits.transpose(0, 1), targets.transpose(0, 1)),
                         (logits[..., 3:20], targets.clamp(max=16)), (logits[..., ::2], targets.clamp(max=19))):
        view = view.detach().requires_grad_()
        wide = view.detach().double().requires_grad_()
        cross_entropy(view, labels).backward()
        expected(wide, labels, 0.0, 0.0, "mean").backward()
        torch.testing.assert_close(view.grad.double(), wide.grad, rtol=1e-6, atol=1e-6)


EXTREME = torch.tensor([
    [-INF, -INF, -INF, -INF], [1e30, 1e30, -INF, 0], [NAN, 0, 0, 0], [INF, 0, 0, 0], [0, -INF, 0, 0],
    [3e38, -3e38, 0, 1],
    [-1e30, -1e30, -1e30, -1e30], [1.0, 2, 3, 4]])
EXTREME_TARGETS = torch.tensor([0, 1, 2, 1, 1, 0, 3, 3])


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_extreme_logits(choice):
    logits = EXTREME.clone().requires_grad_()
    with implementation(choice):
        loss = cross_entropy(logits, EXTREME_TARGETS, reduction="none")
        loss[[0, 1, 5, 6, 7]].sum().backward()
    ln = torch.log(torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(loss[[0, 1, 4, 5, 6]].detach(), torch.stack([
        torch.tensor(INF), ln[0], torch.tensor(INF), torch.tensor(0.0), ln[1]]))
    assert loss[[2, 3]].isnan().all()
    assert torch.equal(logits.grad[0], torch.zeros(4))
    torch.testing.assert_close(logits.grad[1], torch.tensor([0.5, -0.5, 0, 0]))
    torch.testing.assert_close(logits.grad[6], torch.tensor([0.25, 0.25, 0.25, -0.75]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_safe_leaves_out_rows_without_a_finite_loss(choice, dtype):
    rows = [0, 2, 3, 4]
    logits = EXTREME.to(dtype).clone().requires_grad_()
    with implementation(choice):
        each = cross_entropy_safe(logits, EXTREME_TARGETS, reduction="none", label_smoothing=0.0)
        mean = cross_entropy_safe(logits, EXTREME_TARGETS)
        mean.backward()
    kept = [row for row in range(len(EXTREME)) if row not in rows]
    assert each.isfinite().all() and (each[rows] == 0).all()
    torch.testing.assert_close(mean, each[kept].mean())
    assert logits.grad.isfinite().all() and (logits.grad[rows] == 0).all()
    assert (logits.grad[-1] != 0).all()


def test_nothing_to_count():
    """All ignored, and no rows: zero, with zero gradients, where torch gives NaN."""
    logits = torch.randn(4, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    empty = torch.randn(0, 5, requires_grad=True)
    loss = cross_entropy(empty, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 5)
    assert cross_entropy(torch.randn(2, 0, 5), torch.zeros(2, 0, dtype=torch.int32), reduction="none").shape == (2, 0)


def test_softmax_cross_entropy():
    logits, targets = case(8, (12,), 33)
    targets = targets.clamp(min=0)
    torch.testing.assert_close(
        softmax_cross_entropy(logits, targets, "sum"), F.cross_entropy(logits, targets, reduction="sum"))
    with pytest.raises(InputError, match="targets: -100 given"):
        softmax_cross_entropy(logits, targets.index_fill(0, torch.tensor(2), -100))
    assert losses.fused_softmax_cross_entropy is softmax_cross_entropy and losses.stable_cross_entropy is cross_entropy


def test_another_ignore_index():
    logits, targets = case(9, (20,), 6)
    targets = targets.clamp(min=0)
    torch.testing.assert_close(
        cross_entropy(logits, targets.int(), 3), F.cross_entropy(logits, targets, ignore_index=3))


@pytest.mark.parametrize("target", [7, -1, 10**9])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_targets_out_of_range(target, choice):
    logits, targets = torch.randn(4, 7, requires_grad=True), torch.tensor([1, -100, target, 6])
    with implementation(choice), pytest.raises(InputError, match=f"targets: {target} given in row 2; expected 0..6"):
        cross_entropy(logits, targets)


def test_wrong_arguments():
    logits, targets = torch.randn(4, 7), torch.zeros(4, dtype=torch.long)
    for wrong, error, match in [
        ({"targets": targets[:3]}, ShapeError, r"targets has \[3\] for .* but logits has \[4\]"),
        ({"targets": targets.float()}, ShapeError, "targets is torch.float32; expected one of torch.int64"),
        ({"reduction": "max"}, InputError, "reduction: 'max' given"),
        ({"label_smoothing": 1.5}, InputError, "label_smoothing: 1.5 given"),
        ({"z_loss": -1.0}, InputError, "z_loss: -1.0 given"),
        ({"logits": torch.randn(4, 0)}, ShapeError, "expected at least one class"),
    ]:
        with pytest.raises(error, match=match):
            cross_entropy(**{"logits": logits, "targets": targets, **wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype):
    logits, targets = case(10, (5,), 9, dtype)
    torch.library.opcheck(losses._cross_entropy_op.registered, (logits.requires_grad_(), targets, -100, 0.1, 0.01))
    with torch.no_grad():
        loss, top, spread = losses._cross_entropy_op(logits, targets, -100, 0.1, 0.01)
    torch.library.opcheck(
        losses._cross_entropy_backward_op.registered,
        (torch.rand_like(loss), logits.detach(), targets, top, spread, -100, 0.1, 0.01))


def test_compiled_whole():
    logits, targets = case(11, (3, 5), 17)
    logits.requires_grad_()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"}):
        eager = torch.autograd.grad(cross_entropy(logits, targets, **options), logits)[0]
        loss = compiled(logits, targets, **options)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], eager)
        torch.testing.assert_close(loss, cross_entropy(logits, targets, **options))
