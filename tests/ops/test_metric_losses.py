"""Maximum margin and contrast against float64 formulas: ties, lone anchors, extremes, gradients, registration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.errors import InputError, ShapeError
from tessera.ops import metric_losses as module
from tessera.ops.metric_losses import contrastive_loss, max_margin_loss
from tessera.ops.registration import implementation

INF = float("inf")
CHOICES = pytest.mark.parametrize("choice", ["auto", "reference"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def margin_expected(scores: Tensor, targets: Tensor, margin: float) -> Tensor:
    rows = torch.arange(len(scores))
    others = scores.clone()
    others[rows, targets] = -INF
    return (others.amax(1) - scores[rows, targets] + margin).clamp(min=0)


def contrast_expected(x: Tensor, labels: Tensor, temperature: float, normalize: bool) -> Tensor:
    """One anchor after the other, as the definition says."""
    x = torch.nn.functional.normalize(x, dim=1) if normalize else x
    losses = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        s = x @ x[i] / temperature
        losses.append(s[others].logsumexp(0) - s[positives].logsumexp(0) if positives else x.new_zeros(()))
    return torch.stack(losses)


@CHOICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed, rows, classes", [(1, 1, 2), (2, 7, 33), (3, 40, 5), (4, 3, 700)])
def test_max_margin(seed, rows, classes, dtype, choice):
    scores = normal(seed, rows, classes).to(dtype)
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    wide = scores.double().requires_grad_()
    expected = margin_expected(wide, targets, 0.5)
    scores.requires_grad_()
    with implementation(choice):
        loss = max_margin_loss(scores, targets, 0.5, "none")
        torch.testing.assert_close(max_margin_loss(scores, targets, 0.5), loss.mean())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    slopes = normal(seed + 10, rows)
    loss.backward(slopes)
    expected.backward(slopes.double())
    bound = 1e-6 if dtype is torch.float32 else 2.0**-8
    torch.testing.assert_close(scores.grad.double(), wide.grad, rtol=bound, atol=bound)


@CHOICES
def test_max_margin_extremes(choice):
    rows = [[1e30, -1e30, 0], [-INF, -INF, -INF], [-INF, 2, -INF], [INF, INF, 0], [0, 0, 0], [-1e30, 1e30, 0]]
    scores = torch.tensor(rows, requires_grad=True)
    with implementation(choice):
        loss = max_margin_loss(scores, torch.tensor([0, 1, 1, 0, 2, 0]), 1.0, "none")
        loss.sum().backward()
        assert max_margin_loss(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)) == 0
        assert max_margin_loss(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)) == 0
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 0, 0, 1, 1, 2e30]))
    assert scores.grad.isfinite().all()
    assert torch.equal(scores.grad[[0, 1, 2, 5]], torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [-1, 1, 0]]))


@CHOICES
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed, rows, width, labels", [(1, 2, 3, 1), (2, 9, 5, 4), (3, 33, 17, 6), (4, 12, 8, 100)])
def test_contrast(seed, rows, width, labels, dtype, normalize, choice):
    x = normal(seed, rows, width).to(dtype)
    y = torch.randint(labels, (rows,), generator=torch.Generator().manual_seed(seed))
    wide = x.double().requires_grad_()
    expected = contrast_expected(wide, y, 0.3, normalize)
    counted = sum(int((y == label).sum()) for label in y.unique() if (y == label).sum() > 1)
    x.requires_grad_()
    with implementation(choice):
        loss = contrastive_loss(x, y, 0.3, normalize, "none")
        torch.testing.assert_close(contrastive_loss(x, y, 0.3, normalize), loss.sum() / max(counted, 1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    slopes = normal(seed + 10, rows)
    loss.backward(slopes)
    expected.backward(slopes.double())
    bound = 1e-4 if dtype is torch.float32 else 2.0**-7
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=bound, atol=bound * wide.grad.abs().max().item() + 1e-6)


@CHOICES
def test_contrast_extremes(choice):
    """No positives at all, one row, none; 1e30 with and without unit length; similarities far apart."""
    with implementation(choice):
        x = normal(5, 4, 3).requires_grad_()
        contrastive_loss(x, torch.arange(4)).backward()
        assert (x.grad == 0).all()
        assert contrastive_loss(torch.ones(1, 3), torch.tensor([0])) == 0
        assert contrastive_loss(torch.ones(0, 3), torch.zeros(0, dtype=torch.long)) == 0
        labels = torch.tensor([0, 0, 1, 1, 2])
        for scale, normalize in ((1e30, True), (1e30, False), (1e-30, True), (1e-30, False)):
            x = (normal(6, 5, 3) * scale).requires_grad_()
            loss = contrastive_loss(x, labels, normalize=normalize)
            loss.backward()
            assert loss.isfinite() and x.grad.isfinite().all()
        torch.testing.assert_close(
            contrastive_loss(normal(6, 5, 3) * 1e30, labels), contrastive_loss(normal(6, 5, 3), labels))
        assert contrastive_loss(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), 1e-4) < 1e-6


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_gradcheck(choice):
    scores, targets = normal(7, 5, 4).double().requires_grad_(), torch.tensor([0, 3, 1, 1, 2])
    with implementation(choice):
        assert torch.autograd.gradcheck(lambda x: max_margin_loss(x, targets, 0.7, "none"), scores)
        assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, targets, 0.5, True, "none"), scores)
        assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, targets, 0.5, False), scores)


def test_registration_and_compile():
    scores, targets = normal(8, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    torch.library.opcheck(module._max_margin_op.registered, (scores.clone().requires_grad_(), targets, 1.0))
    similarity = normal(9, 5, 5)
    torch.library.opcheck(module._contrastive_op.registered, (similarity.clone().requires_grad_(), targets))
    for loss in (max_margin_loss, contrastive_loss):
        x = scores.clone().requires_grad_()
        compiled = torch.compile(lambda x, loss=loss: loss(x, targets), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x, targets), x))


def test_wrong_arguments():
    scores, targets = torch.randn(3, 4), torch.tensor([0, 1, 4])
    with pytest.raises(InputError, match="targets: 4 given in row 2"):
        max_margin_loss(scores, targets)
    with pytest.raises(InputError, match=r"margin: -1\.0 given"):
        max_margin_loss(scores, targets, -1.0)
    with pytest.raises(ShapeError, match=r"scores has 1 axis, \[3\]; expected 2"):
        max_margin_loss(scores[:, 0], targets)
    with pytest.raises(ShapeError, match=r"labels has N=2 .* but embeddings has N=3"):
        contrastive_loss(scores, targets[:2])
    with pytest.raises(InputError, match=r"temperature: 0\.0 given"):
        contrastive_loss(scores, targets, 0.0)
