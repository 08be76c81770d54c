"""Ring attention on real processes against float64 attention in one."""

from __future__ import annotations

import itertools

import pytest
import torch

import tessera as ts
from tessera.dist.ring_attention import _even_sizes, _Ring
from tests.dist import ring_ranks

CASES = [{"length": length, "heads": heads, "dtype": dtype, "is_causal": is_causal, "is_sharded": is_sharded}
         for length, heads, dtype, is_causal, is_sharded in (
             (64, (4, 2), torch.float32, True, False), (64, (4, 2), torch.float32, True, True),
             (61, (3, 1), torch.float32, True, False), (61, (2, 2), torch.float32, False, False),
             (200, (2, 2), torch.float32, False, True), (160, (4, 4), torch.bfloat16, True, True),
             (5, (2, 1), torch.float32, True, False), (24, (2, 1), torch.float64, True, True))]


def exact(case):
    q, k, v, grad = (x.double().requires_grad_() for x in ring_ranks.draw(case))
    group = q.shape[1] // k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=case["is_causal"], scale=0.3)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


@pytest.mark.parametrize("n_ranks", [4, 3])
def test_values_and_gradients(n_ranks):
    cases = [case for case in CASES if not case["is_sharded"] or case["length"] % (2 * n_ranks) == 0]
    results = ts.dist.spawn(ring_ranks.attend, n_ranks, cases)
    for case, *per_rank in zip(cases, *results):
        tolerance = 2**-6 if case["dtype"] is torch.bfloat16 else 2e-5
        for found in per_rank:
            for actual, expected in zip(found, exact(case)):
                assert actual.dtype == case["dtype"]
                bound = tolerance * max(1.0, expected.abs().max().item())
                assert (actual.double() - expected).abs().max() <= bound, case


def test_one_rank_needs_no_job():
    case = CASES[0]
    q, k, v, _ = ring_ranks.draw(case)
    for function in (ts.dist.ring_attention, ts.ops.ring_attention, ts.nn.MemoryEfficientAttention.ring_attention):
        out = function(q, k, v, ts.dist.mesh(1), is_causal=True, scale=0.3)
        torch.testing.assert_close(out.double(), exact(case)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_ranks", [2, 4, 8])
def test_the_load_is_balanced(n_ranks, monkeypatch):
    """Every rank has two pairs of chunks in every step; together they are the causal mask, each pair once."""
    sizes, seen = (10,) * (2 * n_ranks), torch.zeros(20 * n_ranks, 20 * n_ranks, dtype=torch.int64)
    places = torch.arange(20 * n_ranks).split(10)
    for rank, source in itertools.product(range(n_ranks), repeat=2):
        ring = _Ring(mesh=None, axis="tp", sizes=sizes)
        monkeypatch.setattr(_Ring, "rank", rank)
        rows, columns, causal = ring.meeting(source, True)
        queries = torch.cat((places[rank], places[-1 - rank]))[rows]
        keys = torch.cat((places[source], places[-1 - source]))[columns]
        assert len(queries) * len(keys) == (400 if causal else 200)
        seen[queries[:, None], keys] += (queries[:, None] >= keys) if causal else 1
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_sizes_and_errors():
    assert _even_sizes(5, 8) == (0, 1, 0, 1, 1, 0, 1, 1)
    mesh = ts.dist.mesh(1)
    x = torch.randn(1, 2, 7, 8)
    with pytest.raises(ts.ShapeError, match=r"k_BKSD has S=6 .* but q_BHSD has S=7"):
        ts.dist.ring_attention(x, x[:, :, :6], x[:, :, :6], mesh)
    with pytest.raises(ts.ShapeError, match="a part of 7 tokens given; expected an even number"):
        ts.dist.ring_attention(x, x, x, mesh, is_sharded=True)
    with pytest.raises(ts.InputError, match="7 tokens given; expected a multiple of 2"):
        ts.dist.zigzag_shard(x, mesh, dim=2)
    with ts.dist.deterministic(), pytest.raises(ts.errors.UnsupportedError, match="ring_attention: its sums depend"):
        ts.dist.ring_attention(x, x, x, mesh)
