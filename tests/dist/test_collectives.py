"""Collectives on real processes, through shared memory and through sockets, against sums and concatenations of all
ranks' tensors in one process."""

import pytest
import torch

import tessera as ts
from tests.dist import ranks

# The gradient with respect to each rank's x of sum over ranks of sum(y_rank * weight_rank).
REFERENCES = {
    "all_reduce": lambda xs, r: sum(xs),
    "mesh_reduce": lambda xs, r: sum(xs) / len(xs),
    "all_gather": lambda xs, r: torch.cat(xs, 1),
    "all_gather_uneven": lambda xs, r: torch.cat([x[: i + 1] for i, x in enumerate(xs)]),
    "reduce_scatter": lambda xs, r: sum(xs).chunk(len(xs))[r],
    "reduce_scatter_uneven": lambda xs, r: sum(xs).split([3 * len(xs) + 1, *[1] * (len(xs) - 1)])[r],
    "all_to_all": lambda xs, r: torch.cat([x.chunk(len(xs))[r] for x in xs], 2),
    "broadcast": lambda xs, r: xs[-1] * 1,
    "ring": lambda xs, r: xs[r - 1] * 1,
    "ring_back": lambda xs, r: xs[(r + 1) % len(xs)] * 1,
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "seed", "shared"), [(2, 5, True), (2, 7, False), (4, 6, True), (4, 8, False)])
def test_collectives_and_gradients(n, seed, shared, monkeypatch):
    monkeypatch.setenv("TESSERA_SHARED_MEMORY", str(int(shared)))
    results = ts.dist.spawn(ranks.collectives, n, seed)
    xs = [ranks.inputs(seed, r, (4 * n, 3, 5)).double().requires_grad_() for r in range(n)]
    for name, reference in REFERENCES.items():
        ys = [reference(xs, r) for r in range(n)]
        weights = [ranks.inputs(seed + 1, r, tuple(y.shape)) for r, y in enumerate(ys)]
        loss = sum((y * w).sum() for y, w in zip(ys, weights))
        grads = torch.autograd.grad(loss, xs, allow_unused=True)
        for r, result in enumerate(results):
            close(result[name], ys[r].detach())
            grad = result[name + ".grad"]
            close(grad, torch.zeros_like(grad) if grads[r] is None else grads[r][: len(grad)])
    weights = [ranks.inputs(seed + 1, r, tuple(xs[0].shape)) for r in range(n)]
    for r, result in enumerate(results):
        x = xs[r].detach()
        close(result["fan_out"], x)
        close(result["fan_out.grad"], sum(weights))
        close(result["replicated.grad"], weights[r])
        first = r * (r + 1) // 2
        whole = ranks.inputs(seed + 1, r, tuple(result["all_gather_replicated"].shape))
        close(result["all_gather_replicated.grad"], whole[first: first + r + 1])
        close(result["max"], torch.stack(xs).detach().amax(0))
        close(result["context"], sum(xs).detach() / n)
        assert torch.equal(result["bf16"], sum(t.detach().float().bfloat16().float() for t in xs).bfloat16())
        assert result["double"].dtype == torch.float64
        if r % 2:
            assert torch.equal(result["recv"], xs[r - 1][:2].detach().bfloat16())


@pytest.mark.parametrize("shared", ["0", "1"])
def test_axes_of_a_grid(shared, monkeypatch):
    monkeypatch.setenv("TESSERA_SHARED_MEMORY", shared)
    results = ts.dist.spawn(ranks.grid, 4, 9)
    xs = [ranks.inputs(9, r, (7, 3)) for r in range(4)]
    for r, result in enumerate(results):
        assert result["coordinate"] == (r // 2, r % 2) and result["sub_size"] == 2
        close(result["local"], xs[r // 2 * 2] + xs[r // 2 * 2 + 1])
        close(result["node"], xs[r % 2] + xs[r % 2 + 2])
        close(result["sub"], torch.cat(xs[r // 2 * 2: r // 2 * 2 + 2]))
        close(result["tree"], sum(xs))
        assert result["device_mesh"] == [[0, 1], [2, 3]]
        if r % 2:
            close(result["pair"], xs[1] + xs[3])


@pytest.mark.parametrize("shared", ["0", "1"])
def test_a_rank_that_does_not_come_is_named(shared, monkeypatch):
    monkeypatch.setenv("TESSERA_SHARED_MEMORY", shared)
    errors = ts.dist.spawn(ranks.mismatch, 2, "sleeps")
    assert "rank 0: all_reduce #1 on axis 'tp' of [2, 5] failed after 2 s: rank 1 is missing" in errors[0]


def test_ranks_that_call_different_collectives_are_told():
    errors = ts.dist.spawn(ranks.mismatch, 2, "checked")
    assert errors[0] == ("rank 0: all_reduce of [2, 5] float32 on axis 'tp', "
                         "but rank 1 calls all_gather of [3] float32")
    assert errors[1].startswith("rank 1: all_gather of [3] float32 on axis 'tp', but rank 0 calls all_reduce")
