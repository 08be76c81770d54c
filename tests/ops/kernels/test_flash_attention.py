"""The options of the flash attention kernel against float64: log-sum-exp, window, sinks, rows that see no key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.ops import kernels
from tests.kernel.backends import launch


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None,
              sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result and the rows' log-sum-exp, in float64."""
    group, (length, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    q, k, v = q.double(), *(t.double().repeat_interleave(group, 1) for t in (k, v))
    ages = torch.arange(length)[:, None] + keys - length - torch.arange(keys)
    hidden = (ages < 0) & causal | (ages >= (window or 1 << 30))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weights[..., :keys] @ v, lse


CASES = [  # backend, query heads, key heads, queries, keys, width, causal, window, sinks
    ("cpu", 4, 2, 70, 70, 24, True, None, True),
    ("cpu", 2, 1, 7, 130, 16, True, 20, False),
    ("cpu", 2, 1, 7, 130, 16, True, 1, True),
    ("cpu", 1, 1, 33, 7, 64, True, None, False),  # the first 26 queries see nothing
    ("cpu", 3, 3, 130, 200, 40, False, None, False),
    ("interp", 2, 1, 70, 70, 8, True, 20, True),
    ("interp", 1, 1, 33, 7, 8, True, None, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend,heads,kv_heads,length,keys,width,causal,window,sinks", CASES)
def test_options(backend, heads, kv_heads, length, keys, width, causal, window, sinks, dtype):
    generator = torch.Generator().manual_seed(length * keys)
    q, k, v = (torch.randn(2, *shape, width, generator=generator).to(dtype)
               for shape in ((heads, length), (kv_heads, keys), (kv_heads, keys)))
    logits = torch.randn(heads, generator=generator) if sinks else None
    out, lse = torch.full_like(q, float("nan")), torch.full((2, heads, length), float("nan"))
    launch(kernels.flash_attention_kernel, backend, q, k, v, out, width**-0.5, causal=causal, lse=lse, window=window,
           sinks=logits)
    expected, expected_lse = reference(q, k, v, width**-0.5, causal, window, logits)
    assert (out.double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert (lse - expected_lse).nan_to_num(0.0).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_large_and_small_scores(scale):
    """Scores of thousands: the maximum is taken off before exp, and -inf and 1e30 make no NaN of finite rows."""
    q, k, v = (torch.randn(1, 1, 90, 16, generator=torch.Generator().manual_seed(i)) * 8 for i in range(3))
    out = torch.empty_like(q)
    launch(kernels.flash_attention_kernel, "cpu", q, k, v, out, scale, causal=True)
    assert (out.double() - reference(q, k, v, scale, True, None, None)[0]).abs().max() < 1e-2
